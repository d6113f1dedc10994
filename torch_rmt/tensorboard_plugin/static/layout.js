// A record, laid out on an axis that several of them share. Heights are mass per unit of the coordinate, so that
// areas are shares of the spectrum on every axis.

import {place, same, stretch, value} from './axis.js';

/** {bars: [{from, to, height}], curve: [[u, y], ...] in pieces, atoms, outliers: [{u, x}]} of a record. */
export function layOut(record, axis) {
  return {
    bars: bars(record, record.bars, axis).filter(({height}) => height > 0),
    curve: curve(record, axis),
    atoms: record.atoms.map(([u, mass]) => ({u: move(record, axis, u), x: value(record.axis, u), mass}))
        .filter((atom) => Number.isFinite(atom.u)),
    outliers: record.outliers.map((u) => ({u: move(record, axis, u), x: value(record.axis, u)}))
        .filter((outlier) => Number.isFinite(outlier.u)),
  };
}

function move(record, axis, u) {
  return same(record.axis, axis) ? u : place(axis, value(record.axis, u));
}

/** Bars of equal width in the record's own coordinate, moved; each keeps its mass. */
function bars(record, heights, axis) {
  const width = (record.high - record.low) / heights.length;
  const out = [];
  heights.forEach((height, i) => {
    let from = move(record, axis, record.low + i * width);
    const to = move(record, axis, record.low + (i + 1) * width);
    if (!Number.isFinite(to)) return;
    // A bar that reaches down to zero goes on for ever on a logarithmic axis: one decade of it is shown.
    if (!Number.isFinite(from)) from = to - 1;
    out.push({from, to, height: height * width / (to - from)});
  });
  return out;
}

function curve(record, axis) {
  if (record.law_bars) {
    const stairs = bars(record, record.law_bars, axis);
    return [stairs.flatMap(({from, to, height}) => [[from, height], [to, height]])];
  }
  const [places, heights] = record.curve;
  const pieces = [[]];
  places.forEach((u, i) => {
    const y = heights[i];
    if (u === null || y === null) {
      pieces.push([]);
      return;
    }
    if (same(record.axis, axis)) {
      pieces.at(-1).push([u, y]);
      return;
    }
    const x = value(record.axis, u);
    const v = place(axis, x);
    if (Number.isFinite(v)) pieces.at(-1).push([v, y * stretch(axis, x) / stretch(record.axis, x)]);
  });
  return pieces.filter((piece) => piece.length > 1);
}

/** Ends of the axis that hold everything in some layouts, with a margin. */
export function horizontalRange(layouts) {
  let low = Infinity;
  let high = -Infinity;
  const take = (u) => {
    low = Math.min(low, u);
    high = Math.max(high, u);
  };
  for (const layout of layouts) {
    for (const bar of layout.bars) {
      take(bar.from);
      take(bar.to);
    }
    for (const piece of layout.curve) for (const [u, y] of piece) if (y > 0) take(u);
    for (const mark of [...layout.atoms, ...layout.outliers]) take(mark.u);
  }
  if (!(low <= high)) return [-1, 1];
  const margin = 0.03 * (high - low) || 0.5;
  return [low - margin, high + margin];
}

/** Whether heights span so much that they want a logarithmic axis. */
export function wantsLogarithm(layouts) {
  const heights = layouts.flatMap(({bars}) => bars.map((bar) => bar.height));
  const highest = heights.reduce((a, b) => Math.max(a, b), 0);
  return heights.some((height) => height < 1e-3 * highest);
}

/** {floor, ceiling, logarithmic} of heights; a curve's infinite edge never flattens the bars. */
export function verticalRange(layouts, logarithmic) {
  let smallest = Infinity;
  let highest = 0;
  let curve = 0;
  for (const layout of layouts) {
    for (const {height} of layout.bars) {
      smallest = Math.min(smallest, height);
      highest = Math.max(highest, height);
    }
    for (const piece of layout.curve) for (const [, y] of piece) curve = Math.max(curve, y);
  }
  if (!highest) return {floor: 0, ceiling: curve ? 1.08 * curve : 1, logarithmic: false};
  const top = Math.max(highest, Math.min(curve, 3 * highest));
  return logarithmic ? {floor: 0.5 * smallest, ceiling: 2 * top, logarithmic} : {floor: 0, ceiling: 1.08 * top, logarithmic};
}

/** Height of the law's curve at a coordinate, null outside its support. */
export function curveAt(layout, u) {
  for (const piece of layout.curve) {
    for (let i = 1; i < piece.length; i++) {
      const [a, ya] = piece[i - 1];
      const [b, yb] = piece[i];
      if (a <= u && u <= b) return b > a ? ya + (yb - ya) * (u - a) / (b - a) : yb;
    }
  }
  return null;
}
