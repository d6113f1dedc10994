// The picture of one record: bars of the measured spectrum, the law over them, atoms, outliers.

import {number, powerTicks, roundSteps, ticks, value} from './axis.js';
import {draw} from './dom.js';
import {curveAt} from './layout.js';

const LEFT = 58;
const RIGHT = 14;
const TOP = 16;
const BOTTOM = 48;

/**
 * @param layout of the record, `first` of the run's first step or null
 * @param frame {axis, range: [low, high], vertical: {floor, ceiling, logarithmic}, label, width in pixels}
 */
export function spectrumPicture(layout, first, frame, title) {
  const [low, high] = frame.range;
  const {floor, ceiling, logarithmic} = frame.vertical;
  const {width} = frame;
  const height = Math.min(Math.max(0.5 * width, 240), 340);
  const right = width - RIGHT;
  const bottom = height - BOTTOM;
  const across = (u) => LEFT + (u - low) / (high - low) * (right - LEFT);
  const up = (y) => {
    const share = logarithmic ? Math.log(Math.max(y, floor) / floor) / Math.log(ceiling / floor) : y / ceiling;
    return bottom - Math.min(Math.max(share, 0), 1) * (bottom - TOP);
  };
  const svg = draw('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': title, class: 'spectrum'});

  for (const [level, text] of verticalTicks(frame.vertical)) {
    const y = up(level);
    svg.append(
        draw('line', {class: 'grid', x1: LEFT, x2: right, y1: y, y2: y}),
        draw('text', {x: LEFT - 7, y: y + 4, 'text-anchor': 'end'}, text));
  }
  for (const bar of layout.bars) {
    const x = Math.max(across(bar.from), LEFT);
    const y = up(bar.height);
    const wide = Math.min(across(bar.to), right) - x - 0.5;
    if (across(bar.to) > LEFT && x < right) {
      svg.append(draw('rect', {class: 'bar', x, y, width: Math.max(wide, 0.6), height: Math.max(bottom - y, 0)}));
    }
  }
  if (first) svg.append(draw('path', {class: 'first', d: outline(first.bars, across, up, bottom, LEFT, right)}));
  for (const piece of layout.curve) {
    const shown = piece.filter(([u]) => low <= u && u <= high);
    const points = shown.map(([u, y]) => `${across(u).toFixed(1)},${up(y).toFixed(1)}`).join(' ');
    svg.append(draw('polyline', {class: 'law', points}));
  }
  for (const {u, x, mass} of layout.atoms) {
    if (u < low || u > high) continue;
    const at = across(u);
    const nearEnd = at > right - 60;
    svg.append(
        draw('line', {class: 'atom', x1: at, x2: at, y1: bottom, y2: TOP},
            draw('title', {}, `the law has a share of ${number(mass)} at ${number(x)}`)),
        draw('text', {class: 'atom-mass', x: nearEnd ? at - 4 : at + 4, y: TOP + 9, 'text-anchor': nearEnd ? 'end' : 'start'},
            number(mass, 2)));
  }
  for (const {u, x} of layout.outliers) {
    if (u < low || u > high) continue;
    const at = across(u);
    svg.append(draw('path', {class: 'outlier', d: `M${at - 5},${bottom - 10}h10l-5,9z`},
        draw('title', {}, `outlier at ${number(x, 4)}`)));
  }
  svg.append(draw('line', {class: 'axis', x1: LEFT, x2: right, y1: bottom, y2: bottom}));
  for (const [u, text] of ticks(frame.axis, low, high)) {
    const x = across(u);
    svg.append(
        draw('line', {class: 'axis', x1: x, x2: x, y1: bottom, y2: bottom + 4}),
        draw('text', {x, y: bottom + 17, 'text-anchor': 'middle'}, text));
  }
  svg.append(
      draw('text', {class: 'title', x: (LEFT + right) / 2, y: height - 8, 'text-anchor': 'middle'}, frame.label),
      draw('text', {class: 'title', transform: `translate(13 ${(TOP + bottom) / 2}) rotate(-90)`, 'text-anchor': 'middle'},
          heightLabel(frame.axis)));
  addReadout(svg, layout, frame, {across, bottom, right});
  return svg;
}

function heightLabel(axis) {
  return axis.scale === 'linear' ? 'density' : 'share per decade';
}

function verticalTicks({floor, ceiling, logarithmic}) {
  if (!logarithmic) return roundSteps(0, ceiling, 5).map((v) => [v, number(v)]);
  return powerTicks(Math.log10(floor), Math.log10(ceiling)).map(([e, text]) => [10 ** e, text]);
}

/** The bars' upper edge as one path, down to the bottom where there are none. */
function outline(bars, across, up, bottom, left, right) {
  const clip = (x) => Math.min(Math.max(x, left), right).toFixed(1);
  let d = '';
  let end = null;
  for (const bar of bars) {
    const y = up(bar.height).toFixed(1);
    if (end === null || Math.abs(bar.from - end) > 1e-9 * (1 + Math.abs(end))) {
      if (end !== null) d += `V${bottom}`;
      d += `M${clip(across(bar.from))},${bottom}`;
    }
    d += `V${y}H${clip(across(bar.to))}`;
    end = bar.to;
  }
  return end === null ? '' : `${d}V${bottom}`;
}

/** Numbers under the pointer. */
function addReadout(svg, layout, frame, {across, bottom, right}) {
  const [low, high] = frame.range;
  const line = draw('line', {class: 'pointer', y1: TOP, y2: bottom, x1: -9, x2: -9});
  const text = draw('text', {class: 'readout', x: right, y: TOP - 4, 'text-anchor': 'end'});
  svg.append(line, text);
  svg.addEventListener('pointermove', (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * frame.width;
    const u = low + (at - LEFT) / (right - LEFT) * (high - low);
    if (u < low || u > high) return;
    line.setAttribute('x1', at);
    line.setAttribute('x2', at);
    const bar = layout.bars.find((b) => b.from <= u && u < b.to);
    const law = curveAt(layout, u);
    const said = [`${number(value(frame.axis, u))}`, `measured ${number(bar ? bar.height : 0)}`];
    if (layout.curve.length) said.push(`law ${number(law === null ? 0 : law)}`);
    text.textContent = said.join('   ');
  });
  svg.addEventListener('pointerleave', () => {
    line.setAttribute('x1', -9);
    line.setAttribute('x2', -9);
    text.textContent = '';
  });
}
