// What the server knows, fetched once and kept until TensorBoard reloads.

const ROOT = new URL('../', import.meta.url);

const series = new Map();

/** {runs: {run: [{tag, name, last_step}]}, most_steps}. */
export async function fetchRuns() {
  return getJson('runs');
}

/** Points of one run and tag, in the order of steps; fetched again when there are later ones. */
export function fetchSeries(run, tag, lastStep) {
  const key = JSON.stringify([run, tag]);
  const known = series.get(key);
  if (known && known.lastStep === lastStep) return known.answer;
  const query = new URLSearchParams({run, tag});
  const answer = getJson(`series?${query}`);
  series.set(key, {lastStep, answer});
  answer.catch(() => series.delete(key));
  return answer;
}

async function getJson(path) {
  const response = await fetch(new URL(path, ROOT));
  if (!response.ok) throw new Error(`${response.status}: ${(await response.text()).slice(0, 300)}`);
  return response.json();
}
