// Ranges and ticks of a chart's value axis.

import { figure, percent } from "./dom.js";

const SMALL = 1e-3; // ticks of smaller values are written with an exponent
const FLAT = 1e-4; // of a curve's size: what moves less is drawn flat
const ROOM = 0.06; // of a range, above and below what is drawn
const MOST_TICKS = 6;

/**
 * What Plotly's y axis needs, and how many values a logarithmic one can't show: {axis, hidden}.
 *
 * spec: {series, kind, zero, format}; `within`: the stretch of x that the reader looks at, null for all of it.
 */
export function valueAxis(spec, { log, within }) {
  const extent = extentOf(spec, within);
  if (log && spec.kind !== "stacked" && extent.positive < Infinity) return { axis: logAxis(spec, extent), hidden: extent.below };
  const axis = { type: "linear", nticks: 5, tickformat: tickFormat(spec, extent), exponentformat: "power", rangemode: spec.zero ? "tozero" : "normal" };
  return { axis: { ...axis, ...linearRange(spec, extent, within) }, hidden: log && spec.kind !== "stacked" ? extent.below : 0 };
}

/** {low, high, positive: the smallest value above 0, below: how many are not above it} of the values drawn. */
function extentOf(spec, within) {
  const found = { low: Infinity, high: -Infinity, positive: Infinity, below: 0 };
  const take = (value) => {
    found.low = Math.min(found.low, value);
    found.high = Math.max(found.high, value);
  };
  const sums = new Map();
  for (const { data, bounds } of spec.series) {
    data.y.forEach((value, index) => {
      const x = data.x[index];
      if (value === null || (within && (x < within[0] || x > within[1]))) return;
      if (spec.kind === "stacked") return void sums.set(x, (sums.get(x) ?? 0) + value);
      const around = data.own ? data.own[index] : [data.low[index], data.high[index], ...(bounds?.[index] ?? [])];
      for (const each of [value, ...around]) if (each !== null) take(each);
      if (value > 0) found.positive = Math.min(found.positive, value);
      else found.below += 1;
    });
  }
  if (sums.size) [0, ...sums.values()].forEach(take);
  return found;
}

/** Curves that never move, or by rounding only, would otherwise fill the chart with noise. */
function linearRange(spec, { low, high }, within) {
  const size = Math.max(Math.abs(low), Math.abs(high));
  if (spec.kind !== "stacked" && high - low <= FLAT * size) {
    if (size === 0) return { autorange: false, range: spec.format === percent ? [-0.005, 0.1] : [-0.05, 1] };
    return { autorange: false, range: [Math.min(0, 2 * low), Math.max(0, 2 * high)] };
  }
  if (low > high || !(within || spec.series.some(({ data }) => data.own))) return { autorange: true };
  const room = ROOM * (high - low);
  const bottom = spec.kind === "stacked" || (spec.zero && !within) ? Math.min(0, low) : low - room;
  return { autorange: false, range: [bottom, high + room] };
}

function tickFormat(spec, { low, high }) {
  if (spec.format === percent) return "~%";
  const size = Math.max(Math.abs(low), Math.abs(high));
  return size > 0 && size < SMALL ? ".2~e" : "~g"; // else the margin cuts the zeros off
}

function logAxis(spec, { positive, high }) {
  const [first, last] = [Math.log10(positive), Math.log10(high)];
  const room = Math.max(0.02, ROOM * (last - first));
  const range = [first - room, last + room];
  const values = logTicks(10 ** range[0], 10 ** range[1]);
  const write = spec.format === percent ? (value) => `${figure(100 * value, 3)}%` : (value) => figure(value, 3);
  return { type: "log", autorange: false, range, tickmode: "array", tickvals: values, ticktext: values.map(write) };
}

/** Values between two positive ones to mark on a logarithmic axis: 1, 2, 5 of each decade, or as many as have room. */
export function logTicks(low, high) {
  const decades = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) decades.push(power);
  const within = (values) => values.filter((value) => value >= low && value <= high);
  const fine = within(decades.flatMap((power) => [1, 2, 5].map((digit) => Number(`${digit}e${power}`))));
  if (fine.length < 2) return evenTicks(low, high);
  if (fine.length <= MOST_TICKS + 1) return fine;
  const whole = within(decades.map((power) => Number(`1e${power}`)));
  const step = Math.ceil(whole.length / MOST_TICKS);
  return whole.filter((_, index) => index % step === 0);
}

/** For less than a decade: even steps of 1, 2 or 5. */
function evenTicks(low, high) {
  const rough = (high - low) / 4;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = size * ([1, 2, 5].find((digit) => digit * size >= rough) ?? 10);
  const ticks = [];
  for (let index = Math.ceil(low / step); index * step <= high; index += 1) ticks.push(Number((index * step).toPrecision(6)));
  return ticks;
}
