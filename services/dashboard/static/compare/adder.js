// A field that takes another run into a comparison; it offers those that there are.

import { get } from "../api.js";
import { h, put } from "../dom.js";
import { valueText } from "../names.js";

export class Adder {
  /** page: {has(id), add(id)}. */
  constructor(page) {
    this.page = page;
    this.known = h("datalist", { id: "runs-known" });
    this.field = h("input.adder", { type: "search", list: "runs-known", placeholder: "Add a run…", ariaLabel: "Add a run", onfocus: () => this.offer(), onchange: () => this.take() });
    this.element = h("footer", null, this.field, this.known);
  }

  take() {
    const id = this.field.value;
    this.field.value = "";
    if (id && !this.page.has(id)) this.page.add(id);
  }

  async offer() {
    if (this.known.children.length) return;
    const { items } = await get("runs", { limit: 500 }).catch(() => ({ items: [] }));
    put(this.known, items.filter(({ id }) => !this.page.has(id)).map((run) => h("option", { value: run.id }, Object.entries(run.differs).map(([key, value]) => `${key.split(".").at(-1)} ${valueText(value)}`).join(", "))));
  }
}
