// TensorBoard around the frame: its reload button, and whether it is dark.

/** Call back whenever TensorBoard has reloaded its data. */
export function onReload(callback) {
  if (window.parent === window) return;
  // The protocol of TensorBoard's plugin_lib, which is not published as a module of its own.
  const channel = new MessageChannel();
  channel.port1.onmessage = (event) => {
    let message;
    try {
      message = JSON.parse(event.data);
    } catch {
      return;
    }
    if (message.isReply) return;
    if (message.type === 'experimental.DataReloaded') callback();
    const reply = {type: message.type, id: message.id, payload: null, error: null, isReply: true};
    channel.port1.postMessage(JSON.stringify(reply));
  };
  window.parent.postMessage('experimental.bootstrap', '*', [channel.port2]);
}

/** Keep the page as dark as TensorBoard; alone in a window, as dark as the reader's system. */
export function followDarkMode() {
  let body = null;
  try {
    if (window.parent !== window) body = window.parent.document.body;
  } catch {
    // Another origin, as in a notebook: the system decides.
  }
  const system = window.matchMedia('(prefers-color-scheme: dark)');
  const apply = () => {
    const dark = body ? body.classList.contains('dark-mode') : system.matches;
    document.documentElement.classList.toggle('dark', dark);
  };
  if (body) new MutationObserver(apply).observe(body, {attributes: true, attributeFilter: ['class']});
  else system.addEventListener('change', apply);
  apply();
}
