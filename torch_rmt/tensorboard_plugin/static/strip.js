// The history of one number over the steps, all runs in one strip, and where we are in it.

import {number, powerTicks, roundSteps} from './axis.js';
import {draw} from './dom.js';

const HEIGHT = 150;
const LEFT = 58;
const RIGHT = 14;
const TOP = 12;
const BOTTOM = 30;

const KINDS = {
  shape: 'shape distance',
  kolmogorov: 'Kolmogorov distance',
  wasserstein: 'Wasserstein distance',
};
const SCALARS = {largest: 'largest', smallest: 'smallest', mean: 'mean'};

/** [{key, text}] of the numbers that some points hold. */
export function metricsOf(points) {
  const what = points.some((p) => p.label === 'eigenvalue') ? 'eigenvalue' : 'squared singular value';
  return [
    ...Object.entries(KINDS).map(([key, text]) => ({key, text: `${text} / noise floor`})),
    ...Object.entries(SCALARS).map(([key, text]) => ({key, text: `${text} ${what}`})),
    {key: 'outliers', text: 'number of outliers'},
  ].filter(({key}) => points.some((p) => metricOf(p, key) !== null));
}

/** The number of a point, null where it has none. */
export function metricOf(point, key) {
  if (key === 'outliers') return point.law ? point.outlier_count : null;
  if (key in SCALARS) return point.scalars[key] ?? null;
  const distance = point.distances[key];
  if (!distance || distance[0] === null || !(distance[1] > 0)) return null;
  return distance[0] / distance[1];
}

/**
 * @param runs [{run, colour, points}]
 * @param key of the number, `step` where we are, `logSteps` whether early steps take more room
 * @param width in pixels, `choose` called with the step that was clicked at
 */
export function stripPicture(runs, key, step, logSteps, width, choose) {
  const isDistance = key in KINDS;
  const lines = runs.map(({run, colour, points}) => ({
    run, colour,
    dots: points.map((p) => ({step: p.step, y: metricOf(p, key), agrees: p.agrees})).filter((dot) => dot.y !== null),
  }));
  const steps = runs.flatMap(({points}) => points.map((p) => p.step));
  const values = lines.flatMap(({dots}) => dots.map((dot) => dot.y));
  if (isDistance) values.push(1);
  const right = width - RIGHT;
  const bottom = HEIGHT - BOTTOM;
  const along = logSteps ? (s) => Math.log10(1 + Math.max(s, 0)) : (s) => s;
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const span = along(last) - along(first) || 1;
  const across = (s) => LEFT + 6 + (along(s) - along(first)) / span * (right - LEFT - 12);
  const logarithmic = isDistance || (Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values));
  const floorOfLog = 1e-3 * Math.max(...values, 1);
  const level = (y) => logarithmic ? Math.log10(Math.max(y, floorOfLog)) : y;
  let low = Math.min(...values.map(level));
  let high = Math.max(...values.map(level));
  const margin = 0.08 * (high - low) || (logarithmic ? 0.3 : 0.1 * Math.abs(high) || 1);
  low -= margin;
  high += margin;
  const up = (y) => bottom - (level(y) - low) / (high - low) * (bottom - TOP);

  const svg = draw('svg', {viewBox: `0 0 ${width} ${HEIGHT}`, role: 'img', class: 'strip',
    'aria-label': 'history over the steps of training'});
  const rungs = logarithmic ? powerTicks(low, high).map(([e, text]) => [10 ** e, text]) : null;
  const marks = rungs && rungs.length >= 2 ? rungs :
      roundSteps(logarithmic ? 10 ** low : low, logarithmic ? 10 ** high : high, 4)
          .filter((v) => !logarithmic || v > 0).map((v) => [v, number(v)]);
  for (const [y, text] of marks) {
    svg.append(
        draw('line', {class: 'grid', x1: LEFT, x2: right, y1: up(y), y2: up(y)}),
        draw('text', {x: LEFT - 7, y: up(y) + 4, 'text-anchor': 'end'}, text));
  }
  if (isDistance) {
    svg.append(
        draw('line', {class: 'noise', x1: LEFT, x2: right, y1: up(1), y2: up(1)}),
        draw('text', {class: 'noise-text', x: right - 4, y: up(1) - 4, 'text-anchor': 'end'}, 'noise floor'));
  }
  for (const [s, text] of stepTicks(first, last, logSteps, width)) {
    svg.append(
        draw('line', {class: 'axis', x1: across(s), x2: across(s), y1: bottom, y2: bottom + 4}),
        draw('text', {x: across(s), y: bottom + 16, 'text-anchor': 'middle'}, text));
  }
  svg.append(
      draw('line', {class: 'axis', x1: LEFT, x2: right, y1: bottom, y2: bottom}),
      draw('text', {class: 'title', x: (LEFT + right) / 2, y: HEIGHT - 2, 'text-anchor': 'middle'}, 'step'),
      draw('line', {class: 'here', x1: across(step), x2: across(step), y1: TOP - 8, y2: bottom}));
  for (const {run, colour, dots} of lines) {
    const points = dots.map((dot) => `${across(dot.step).toFixed(1)},${up(dot.y).toFixed(1)}`).join(' ');
    svg.append(draw('polyline', {class: 'history', points, style: `stroke:${colour}`}));
    for (const dot of dots) {
      svg.append(draw('circle', {
        class: dot.agrees === true ? 'dot agrees' : dot.agrees === false ? 'dot departs' : 'dot undecided',
        cx: across(dot.step), cy: up(dot.y), r: dots.length > 150 ? 2 : 4, style: `--run:${colour}`,
      }, draw('title', {}, `${run}, step ${dot.step}: ${number(dot.y)}`)));
    }
  }
  const all = [...new Set(steps)];
  const jump = (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * width;
    choose(all.reduce((a, b) => Math.abs(across(b) - at) < Math.abs(across(a) - at) ? b : a));
  };
  svg.addEventListener('click', jump);
  return svg;
}

function stepTicks(first, last, logSteps, width) {
  if (!logSteps) {
    return roundSteps(first, last, width / 150).filter((s) => Number.isInteger(s)).map((s) => [s, s.toLocaleString('en')]);
  }
  const out = first === 0 ? [[0, '0']] : [];
  for (let e = 0; 10 ** e <= last; e++) {
    for (const m of last > 1000 ? [1] : [1, 3]) {
      const s = m * 10 ** e;
      if (s >= first && s <= last) out.push([s, s.toLocaleString('en')]);
    }
  }
  return out;
}
