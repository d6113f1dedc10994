// Elements made of names and text only: nothing that an event file holds is ever read as HTML.

const SVG = 'http://www.w3.org/2000/svg';

/** An element with attributes ("on..." are listeners) and children; strings become text. */
export function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, v] of Object.entries(attributes)) {
    if (v === null || v === undefined || v === false) continue;
    if (key.startsWith('on')) element.addEventListener(key.slice(2), v);
    else if (typeof v === 'number') element.setAttribute(key, String(Math.round(v * 100) / 100));
    else element.setAttribute(key, v === true ? '' : v);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
