// The card of settings that differ between runs.

import { h } from "./dom.js";

/** `rows`: {label (text or element), values: [[value, its text]], dataset}, a value for each of `columns`; undefined where there is none. */
export function differencesCard(note, corner, columns, rows) {
  const title = h("header", null, h("h2", null, "Settings that differ"), h("span.note", null, note));
  if (!rows.length || !columns.length) return h("section.card", null, title, h("p.body.note", null, "None."));
  const cell = ([value, text]) => h("td.mono", { dataset: { missing: String(value === undefined) } }, text);
  return h(
    "section.card",
    null,
    title,
    h("div.table-wrap.tall", null, h(
      "table.table.differences",
      null,
      h("thead", null, h("tr", null, h("th", null, corner), columns.map((column) => h("th", null, column)))),
      h("tbody", null, rows.map(({ label, values, dataset = {} }) => h("tr", { dataset }, h("td", null, label), values.map(cell)))),
    )),
  );
}
