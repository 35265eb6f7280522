// The one legend of a comparison: a row for each run, with its swatch, what differs, its newest and its best.

import { h, put, s, setText } from "../dom.js";
import { middleClipped, settingText } from "../names.js";

const DASH = { solid: "", dash: "7 4", dot: "2 3", dashdot: "8 3 2 3" };

/** A stretch of the run's line, long enough for its dashes. */
export function swatch({ color, dash }) {
  const line = s("line", { x1: 1, x2: 33, y1: 5, y2: 5, "stroke-dasharray": DASH[dash] });
  const drawn = s("svg.swatch", { viewBox: "0 0 34 10", width: 34, height: 10, "aria-hidden": "true" }, line);
  drawn.style.setProperty("--swatch", `var(--series-${color})`);
  return drawn;
}

/** page: {toggle(id), isolate(id), remove(id), highlight(id or null), sort(column), focus(name), running(run)}. */
export class RunTable {
  constructor(page) {
    this.page = page;
    this.rows = new Map();
    this.body = h("tbody");
    this.focus = h("select", { ariaLabel: "Metric of the table", title: "Which metric the table shows", onchange: () => page.focus(this.focus.value) });
    this.newest = h("button", { type: "button", onclick: () => page.sort("newest") }, "Newest");
    this.heads = [
      h("th.swatches", { ariaLabel: "Colour" }),
      h("th", { dataset: { column: "name" } }, h("button", { type: "button", onclick: () => page.sort("name") }, "Run")),
      h("th.num", { dataset: { column: "newest" } }, this.newest),
      h("th.num", { dataset: { column: "best" } }, h("button", { type: "button", onclick: () => page.sort("best") }, "Best")),
      h("th"),
    ];
    this.element = h("section.card.compare-table", null, h("header", null, this.focus), h("div.table-wrap", null, h("table.table.legend", null, h("thead", null, h("tr", null, this.heads)), this.body)));
  }

  /** items: runs in order, each {id, run, style, hidden, newest, best, differs: [[key, value]]}. */
  show(items, { names, focused, sorted, format, at }) {
    if (this.focus.dataset.names !== names.map(([name]) => name).join()) put(this.focus, names.map(([name, title]) => h("option", { value: name }, title)));
    this.focus.dataset.names = names.map(([name]) => name).join();
    this.focus.value = focused;
    setText(this.newest, at === null ? "Newest" : at);
    for (const head of this.heads) if (head.dataset.column) head.ariaSort = head.dataset.column === sorted.column ? (sorted.down ? "descending" : "ascending") : "none";
    for (const id of [...this.rows.keys()]) if (!items.some((item) => item.id === id)) this.rows.delete(id);
    const wanted = items.map((item) => this.row(item, format));
    if (wanted.length !== this.body.children.length || wanted.some((row, index) => this.body.children[index] !== row)) this.body.replaceChildren(...wanted);
  }

  row(item, format) {
    const { id } = item;
    if (!this.rows.has(id)) this.rows.set(id, this.make(id));
    const row = this.rows.get(id);
    row.element.dataset.hidden = String(item.hidden);
    row.element.dataset.status = item.run.status;
    row.eye.ariaPressed = String(!item.hidden);
    const style = JSON.stringify(item.style);
    if (row.eye.dataset.of !== style) put(row.eye, swatch(item.style));
    row.eye.dataset.of = style;
    setText(row.differs, item.differs.map(([key, value]) => settingText(key, value)).join(", "));
    row.differs.title = item.differs.map(([key, value]) => `${key}=${JSON.stringify(value)}`).join("\n");
    setText(row.state, item.run.status === "finished" ? "" : this.page.running(item) ? `${item.run.status}, followed` : item.run.status);
    row.state.dataset.status = item.run.status;
    setText(row.newest, item.newest === null ? "–" : format(item.newest));
    setText(row.best, item.best === null ? "–" : format(item.best.value));
    row.best.title = item.best === null ? "" : `at iteration ${item.best.iteration}`;
    return row.element;
  }

  make(id) {
    const { page } = this;
    const row = {
      eye: h("button.eye", { type: "button", ariaLabel: `Show ${id}`, title: "Hide or show", onclick: () => page.toggle(id) }),
      differs: h("span.differs"),
      state: h("span.run-state"),
      newest: h("td.num"),
      best: h("td.num"),
    };
    const name = middleClipped("button", { type: "button", onclick: () => page.isolate(id) }, id);
    name.title = `${id}\nclick: this one alone, or all again`;
    row.element = h(
      "tr",
      { dataset: { run: id }, onpointerenter: () => page.highlight(id), onpointerleave: () => page.highlight(null) },
      h("td.swatches", null, row.eye),
      h("td.name", { onclick: (event) => !event.target.closest("button") && !String(getSelection()) && page.isolate(id) }, name, h("div.second", null, row.differs, row.state)),
      row.newest,
      row.best,
      h("td.ends", null, h("a.icon-button", { href: `#/run/${encodeURIComponent(id)}`, ariaLabel: `Open ${id}`, title: "Open the run" }, "↗"), h("button.icon-button", { type: "button", ariaLabel: `Leave ${id} out`, title: "Leave it out of the comparison", onclick: () => page.remove(id) }, "✕")),
    );
    return row;
  }
}
