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

/** The value as text for the reader at that point, non-finite ones by name. */
export function valueAt(series, index) {
  if (index < 0) return null;
  if (series.y[index] !== null) return series.y[index];
  return series.bad.find(([x]) => x === series.x[index])?.[1] ?? null;
}
