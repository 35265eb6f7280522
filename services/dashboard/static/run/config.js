// The resolved settings of a run, and what differs from another run.

import { at, get } from "../api.js";
import { count, empty, failure, h, loading, put } from "../dom.js";

/** Settings by full key: {"rollout.sampler.steps": 8}. */
export function flatten(config, prefix = "", found = {}) {
  for (const [key, value] of Object.entries(config ?? {})) {
    const name = prefix ? `${prefix}.${key}` : key;
    if (value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) flatten(value, name, found);
    else found[name] = value;
  }
  return found;
}

export const shown = (value) => (value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));

export async function configTab(host, runId, app) {
  const [{ config }, { items }] = await Promise.all([get(at`runs/${runId}/config`), get("runs", { limit: 200 })]);
  const settings = Object.entries(flatten(config));
  const filter = h("input.filter", { type: "search", placeholder: "Filter settings", ariaLabel: "Filter settings", oninput: () => show() });
  const others = items.filter((run) => run.id !== runId);
  const other = h("select", { ariaLabel: "Compare with", onchange: () => difference() }, h("option", { value: "" }, "Difference to…"), others.map((run) => h("option", { value: run.id }, run.id)));
  const cards = h("div.config-cards");
  const diff = h("div");
  put(host, h("div.row.filters", null, filter, others.length > 0 && other), diff, cards);
  app.search(filter);

  function show() {
    const text = filter.value.trim().toLowerCase();
    const groups = new Map();
    for (const [key, value] of settings) {
      if (!`${key} ${shown(value)}`.toLowerCase().includes(text)) continue;
      const group = key.includes(".") ? key.split(".")[0] : "other";
      groups.set(group, [...(groups.get(group) ?? []), [group === "other" ? key : key.slice(group.length + 1), value]]);
    }
    put(cards, [...groups].map(([group, rows]) =>
      h("section.card", null, h("header", null, h("h2", null, group)), h("dl.body.settings", null, rows.map(([key, value]) => h("div", null, h("dt", null, key), h("dd.mono", { dataset: { empty: String(value === null) } }, shown(value))))))));
    if (!groups.size) put(cards, empty(settings.length ? "No setting matches" : "No settings", settings.length ? "Clear the filter." : "The run has told none."));
  }

  async function difference() {
    if (!other.value) return put(diff);
    put(diff, loading("the difference"));
    try {
      const answer = await get(at`runs/${runId}/config-diff`, { other: other.value });
      put(diff, differenceTable([runId, answer.other_id], answer.differences.map((row) => [row.key, [side(row, "value", runId), side(row, "other", answer.other_id)]]), answer.equal));
    } catch (error) {
      put(diff, failure(error, difference));
    }
  }

  show();
  return {};
}

const side = (row, name, runId) => (row.only_in && row.only_in !== runId ? undefined : row[name]);

/** Rows are [key, [value of each run]]. */
export function differenceTable(ids, rows, equal) {
  const title = h("header", null, h("h2", null, "Settings that differ"), h("span.note", null, `${count(equal)} are alike`));
  if (!rows.length) return h("section.card", null, title, h("p.body.note", null, "None."));
  return h(
    "section.card",
    null,
    title,
    h("div.table-wrap", null, h(
      "table.table.differences",
      null,
      h("thead", null, h("tr", null, h("th", null, "Setting"), ids.map((id) => h("th", null, id)))),
      h("tbody", null, rows.map(([key, values]) => h("tr", null, h("td", null, key), values.map((value) => h("td.mono", { dataset: { missing: String(value === undefined) } }, shown(value)))))),
    )),
  );
}
