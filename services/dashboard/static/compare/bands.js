// The runs of one group of settings as one curve: their mean, and the 95 % interval of the mean as a band.

import { between, meanOf } from "../statistics.js";
import { emptySeries } from "../series.js";

/**
 * Mean of the series, at the points of the one that reaches furthest; where only one has a value there is no band. `own`
 * is the lowest and highest of the runs: the chart's scale, since the band of two or three may reach far beyond.
 */
export function meanSeries(all) {
  const series = all.filter((data) => data.x.length);
  if (!series.length) return emptySeries();
  const points = series.map((data) => data.x.map((x, index) => [x, data.y[index]]).filter(([, y]) => y !== null));
  const grid = series.reduce((best, data) => (data.x.at(-1) > best.x.at(-1) ? data : best)).x;
  const found = { ...emptySeries(), own: [], coarse: series.some((data) => data.coarse) };
  for (const x of grid) {
    const values = points.map((of) => between(of, x)).filter((value) => value !== null);
    const { mean, half } = meanOf(values);
    if (mean === null) continue;
    found.own.push([Math.min(...values), Math.max(...values)]);
    found.x.push(x);
    found.y.push(mean);
    found.low.push(half === null ? mean : mean - half);
    found.high.push(half === null ? mean : mean + half);
  }
  return found;
}

/** Groups of runs with the same settings but seed, in the order of their first run: [{group, runs}]. */
export function groupsOf(runs) {
  const groups = new Map();
  for (const item of runs) groups.set(item.run.group || item.id, [...(groups.get(item.run.group || item.id) ?? []), item]);
  return [...groups].map(([group, items]) => ({ group, runs: items }));
}
