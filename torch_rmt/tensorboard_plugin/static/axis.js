// The horizontal axis: a monotone coordinate of the eigenvalue, as in torch_rmt/sinks/drawing.py.
// An axis is {scale: 'linear' | 'log' | 'symlog', unit}.

const LN10 = Math.log(10);

/** Coordinate of an eigenvalue; -Infinity on a logarithmic axis where it is not positive. */
export function place(axis, x) {
  if (axis.scale === 'log') return x > 0 ? Math.log10(x) : -Infinity;
  if (axis.scale === 'symlog') return Math.asinh(x / (2 * axis.unit)) / LN10;
  return x;
}

/** Eigenvalue at a coordinate: the inverse of `place`. */
export function value(axis, u) {
  if (axis.scale === 'log') return 10 ** u;
  if (axis.scale === 'symlog') return 2 * axis.unit * Math.sinh(u * LN10);
  return u;
}

/** dx/du at an eigenvalue x, by which a density in x becomes one in u. */
export function stretch(axis, x) {
  if (axis.scale === 'log') return x * LN10;
  if (axis.scale === 'symlog') return Math.sqrt(x * x + 4 * axis.unit * axis.unit) * LN10;
  return 1;
}

export function same(a, b) {
  return a.scale === b.scale && (a.scale !== 'symlog' || a.unit === b.unit);
}

/** One axis for several drawings: the user's choice, or one on which each of them can be read. */
export function commonAxis(drawings, choice) {
  const positive = drawings.every((d) => d.positive);
  let scale = choice;
  if (scale === 'auto') {
    scale = drawings.every((d) => d.axis.scale === 'linear') ? 'linear' : positive ? 'log' : 'symlog';
  }
  if (scale === 'log' && !positive) scale = 'symlog';
  return {scale, unit: scale === 'symlog' ? commonUnit(drawings) : 1};
}

/** The coarsest unit of the drawings, in which every bar at zero stays narrow, if it leaves each a decade beyond. */
function commonUnit(drawings) {
  const largest = drawings.map((d) => Math.max(...[d.low, d.high].map((u) => Math.abs(value(d.axis, u))), 1e-300));
  const units = drawings.filter((d) => d.axis.scale === 'symlog').map((d) => d.axis.unit);
  // Three decades below the largest eigenvalue, where no drawing brings a unit of its own.
  const unit = units.length ? Math.max(...units) : 1e-3 * Math.max(...largest);
  return 10 ** Math.floor(Math.log10(Math.min(unit, 0.1 * Math.min(...largest))) + 1e-9);
}

/** Up to nine [coordinate, text] between two coordinates. */
export function ticks(axis, low, high) {
  if (axis.scale === 'linear') return inPrint(roundSteps(low, high));
  if (axis.scale === 'log') {
    const found = powerTicks(low, high);
    if (found.length >= 2) return found;
    return inPrint(roundSteps(10 ** low, 10 ** high).filter((v) => v > 0)).map(([v, text]) => [Math.log10(v), text]);
  }
  const top = Math.max(Math.abs(low), Math.abs(high));
  const base = Math.round(Math.log10(axis.unit));
  const step = Math.max(1, Math.ceil(top / 3.5));
  const out = [[0, '0']];
  for (let e = base + step; e <= base + Math.ceil(top); e += step) {
    const u = place(axis, 10 ** e);
    out.push([u, power(e)], [-u, '−' + power(e)]);
  }
  return out.filter(([u]) => low <= u && u <= high).sort((a, b) => a[0] - b[0]);
}

/** Equally spaced values with as many digits as tell neighbours apart. */
function inPrint(values) {
  const largest = Math.max(...values.map(Math.abs));
  const digits = Math.ceil(Math.log10(largest / (values[1] - values[0]))) + 2;
  return values.map((v) => [v, number(v, Number.isFinite(digits) ? Math.min(Math.max(3, digits), 12) : 3)]);
}

/** Powers of ten between two logarithms, at most about eight. */
export function powerTicks(low, high) {
  const step = Math.max(1, Math.ceil((high - low) / 7));
  const out = [];
  for (let e = Math.ceil(low / step) * step; e <= high; e += step) out.push([e, power(e)]);
  return out;
}

/** Multiples of a round number between two others, at most about seven. */
export function roundSteps(low, high, count = 6) {
  const raw = (high - low) / count || 1;
  const magnitude = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * magnitude).find((s) => s >= raw * (1 - 1e-9));
  const out = [];
  for (let k = Math.ceil(low / step - 1e-9); k <= high / step + 1e-9; k++) out.push(k * step + 0);
  return out;
}

export function power(e) {
  if (e >= -2 && e <= 3) return String(Number((10 ** e).toPrecision(1)));
  return '10' + String(e).replace(/[-0-9]/g, (c) => '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'['-0123456789'.indexOf(c)]);
}

/** A number for people: three or so digits, powers of ten where it is far from one. */
export function number(v, digits = 3) {
  if (v === null || v === undefined || !Number.isFinite(v)) return '—';
  if (v === 0) return '0';
  const size = Math.abs(v);
  if (size >= 1e-3 && size < 1e5) {
    const text = String(Number(v.toPrecision(Math.max(digits, size >= 1 ? Math.floor(Math.log10(size)) + 1 : digits))));
    return text.replace('-', '−');
  }
  const [mantissa, exponent] = v.toExponential(digits - 1).split('e');
  const head = String(Number(mantissa)).replace('-', '−');
  const tail = power10(Number(exponent));
  return head === '1' ? tail : `${head}·${tail}`;
}

function power10(e) {
  return '10' + String(e).replace(/[-0-9]/g, (c) => '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'['-0123456789'.indexOf(c)]);
}
