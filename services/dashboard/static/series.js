// Series as charts draw them: from the API's rows, grown by live values, smoothed beside the raw data.

import { number } from "./dom.js";

/**
 * {x, y, low, high, bad, coarse}: y is null where the value is no finite number, and `bad` says which kind it was there;
 * coarse: points stand for several iterations.
 */
export function emptySeries() {
  return { x: [], y: [], low: [], high: [], bad: [], coarse: false };
}

export function toSeries(rows) {
  const series = emptySeries();
  rows.iteration.forEach((iteration, index) => {
    addPoint(series, iteration, rows.value[index], rows.low?.[index], rows.high?.[index]);
  });
  series.coarse = rows.count.some((values) => values > 1);
  return series;
}

function addPoint(series, iteration, raw, rawLow, rawHigh) {
  const value = number(raw);
  const fine = value !== null && Number.isFinite(value);
  const bound = (item) => (item !== null && Number.isFinite(item) ? item : fine ? value : null);
  series.x.push(iteration);
  series.y.push(fine ? value : null);
  series.low.push(bound(number(rawLow)));
  series.high.push(bound(number(rawHigh)));
  if (value !== null && !fine) series.bad.push([iteration, String(raw)]);
}

/** Add a live value. One at or before the end (a resumed run reports anew) replaces all from there on. */
export function append(series, iteration, value) {
  while (series.x.length && series.x.at(-1) >= iteration) {
    for (const column of ["x", "y", "low", "high"]) series[column].pop();
  }
  while (series.bad.length && series.bad.at(-1)[0] >= iteration) series.bad.pop();
  addPoint(series, iteration, value);
}

/** Live updates that come while an answer is fetched which may be older than they are. */
export class Backlog {
  #open = new Set();

  push(update) {
    for (const late of this.#open) late.push(update);
  }

  /** Fetch, then `settle(answer, late)`: nothing comes between the two, so whoever repeats `late` on the answer misses nothing. */
  async during(fetching, settle) {
    const late = [];
    this.#open.add(late);
    try {
      settle(await fetching(), late);
    } finally {
      this.#open.delete(late);
    }
  }
}

/** True where points stand for several iterations that differ. */
export const hasBand = (series) => series.x.some((_, index) => series.high[index] > series.low[index]);

/** Moving average with a memory of `span` iterations, started without bias; gaps stay gaps. */
export function smooth(series, span) {
  let sum = 0;
  let weight = 0;
  let before = null;
  return series.x.map((x, index) => {
    const value = series.y[index];
    if (value === null) return null;
    const decay = before === null ? 0 : Math.exp(-(x - before) / span);
    const share = before === null ? 1 : 1 - decay;
    sum = decay * sum + share * value;
    weight = decay * weight + share;
    before = x;
    return sum / weight;
  });
}

/** Index of the point nearest to iteration x; -1 for an empty series. */
export function nearest(series, x) {
  let low = 0;
  let high = series.x.length - 1;
  if (high < 0) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (series.x[middle] <= x) low = middle;
    else high = middle;
  }
  return Math.abs(series.x[low] - x) <= Math.abs(series.x[high] - x) ? low : high;
}

/**
 * Index of the last point at or before iteration x, -1 for none: before the first, or when the series has ended, which
 * shows in a gap longer than its last. Of a `sparse` one with a single point that can't be told.
 */
export function before(series, x, sparse = false) {
  const { length } = series.x;
  let at = nearest(series, x);
  if (at >= 0 && series.x[at] > x) at -= 1;
  if (at < 0 || at < length - 1 || x === series.x[at]) return at;
  if (length === 1) return sparse ? at : -1;
  return x - series.x[at] > series.x[at] - series.x[at - 1] ? -1 : at;
}

/** Wilson's score interval at 95 % of a rate over n independent outcomes (Wilson 1927): [low, high]. */
export function wilson(rate, n) {
  const z = 1.96;
  const centre = (rate + (z * z) / (2 * n)) / (1 + (z * z) / n);
  const half = (z / (1 + (z * z) / n)) * Math.sqrt((rate * (1 - rate)) / n + (z * z) / (4 * n * n));
  return [rate === 0 ? 0 : Math.max(0, centre - half), rate === 1 ? 1 : Math.min(1, centre + half)];
}

/** The value as text for the reader at that point, non-finite ones by name. */
export function valueAt(series, index) {
  if (index < 0) return null;
  if (series.y[index] !== null) return series.y[index];
  return series.bad.find(([x]) => x === series.x[index])?.[1] ?? null;
}
