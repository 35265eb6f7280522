// What metrics are, from the service's table.

import { get } from "../api.js";

let fetched = null;

/** Entries {name, pattern, group, what, healthy, act, unit}; asked for once, none when the service is older. */
export function metricReference() {
  fetched ??= get("metric-reference").then(({ items }) => items.map((item) => ({ ...item, matches: new RegExp(item.pattern) })), () => ((fetched = null), []));
  return fetched;
}

export const entryOf = (reference, name) => reference.find(({ matches }) => matches.test(name)) ?? null;

/** What a chart's info says of its metrics: each entry once, [{label, what, healthy, act}]. */
export function infoOf(reference, names) {
  const entries = new Set(names.map((name) => entryOf(reference, name)).filter(Boolean));
  return [...entries].map(({ name, what, healthy, act }) => ({ label: name, what, healthy, act }));
}
