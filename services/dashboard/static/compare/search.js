// Finding metrics by name or title; those that are shown are marked, a click shows one or takes it away. The list stands
// in the page and covers nothing. A click elsewhere, or a key, closes it when it has done its work: what was clicked must
// not move away under the pointer.

import { h, put } from "../dom.js";
import { byName } from "../panels.js";

const MOST = 36;

export class MetricSearch {
  /** page: {names(), titleOf(name), isShown(name), pick(name)}. */
  constructor(page) {
    this.page = page;
    this.field = h("input", { type: "search", placeholder: "Find a metric…", ariaLabel: "Find a metric", oninput: () => this.show(), onfocus: () => this.show() });
    this.found = h("div.suggestions", { hidden: true });
    this.element = h("div.metric-search", { onkeydown: (event) => event.key === "Escape" && !this.found.hidden && this.hide(event) }, this.field, this.found);
    this.outside = (event) => !event.composedPath().includes(this.element) && (this.found.hidden = true);
    document.addEventListener("click", this.outside);
    document.addEventListener("keyup", this.outside);
  }

  show() {
    const { names, titleOf, isShown, pick } = this.page;
    const words = this.field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = names().filter((name) => words.every((word) => `${name} ${titleOf(name)}`.toLowerCase().includes(word))).sort(byName);
    put(
      this.found,
      fits.slice(0, MOST).map((name) => h("button", { type: "button", dataset: { metric: name }, ariaPressed: String(isShown(name)), onclick: () => (pick(name), this.field.focus(), this.show()) }, h("b", null, titleOf(name)), h("span.mono.muted", null, name))),
      fits.length > MOST && h("p.note", null, `and ${fits.length - MOST} more`),
      !fits.length && h("p.note", null, "No metric has these words."),
    );
    this.found.hidden = false;
  }

  hide(event) {
    event.stopPropagation();
    this.found.hidden = true;
    this.field.focus();
  }

  close() {
    document.removeEventListener("click", this.outside);
    document.removeEventListener("keyup", this.outside);
  }
}
