// Every sample of a run: a slider over its iterations, a choice among those of one iteration, and a search.

import { at, get } from "../api.js";
import { failure, h, put, setText } from "../dom.js";
import { nameOf } from "./words.js";

const SEARCH_MS = 250;
const PAGE = 20;
const GREEDY = ["base", "trained"];

let refocus = null; // what was used to come here, so that a keyboard stays where it was

const isHeldOut = (kind) => GREEDY.includes(kind);

/** index: what `sample-iterations` answers with. `open(id)` goes to a sample. */
export class Finder {
  constructor(runId, play, index, open) {
    this.runId = runId;
    this.play = play;
    this.open = (id, from) => ((refocus = from), open(id));
    const same = (kind) => isHeldOut(kind) === isHeldOut(play.kind);
    this.stops = [...new Set(index.iteration.filter((_, at) => same(index.kind[at])))];
    this.label = h("output");
    this.slider = h("input", {
      type: "range",
      min: "0",
      max: String(Math.max(0, this.stops.length - 1)),
      value: String(this.stops.indexOf(play.iteration)),
      disabled: this.stops.length < 2,
      ariaLabel: "Iteration",
      oninput: () => this.#name(),
      onchange: () => this.#go(),
    });
    this.choice = h("select", { ariaLabel: "Sample", disabled: true, onchange: () => this.open(this.choice.value, "choice") }, h("option", null, play.problem_id));
    this.search = h("input", { type: "search", placeholder: "Search question, text, problem", ariaLabel: "Search samples", oninput: () => this.#later() });
    this.found = h("div.suggestions", { hidden: true });
    const other = index.kind.some((kind) => !same(kind));
    const kinds = [["train", "Training"], ["trained", "Held out"]].map(([kind, text]) =>
      h("button", { type: "button", ariaPressed: String(same(kind)), disabled: !same(kind) && !other, onclick: () => !same(kind) && this.#other(index) }, text),
    );
    this.element = h(
      "div.play-finder",
      null,
      h("div.segments", { role: "group", ariaLabel: "Kind of sample" }, kinds),
      h("label.play-field.wide", null, h("span", null, "Iteration ", this.label), this.slider),
      h("label.play-field", null, h("span", null, "Sample"), this.choice),
      h("div.play-field.play-search", null, h("span", null, "Search"), this.search),
      this.found,
    );
    this.#name();
    this.#list();
    requestAnimationFrame(() => {
      const field = { slider: this.slider, choice: this.choice }[refocus];
      refocus = null;
      field?.focus({ preventScroll: true });
    });
  }

  #name() {
    const iteration = this.stops[Number(this.slider.value)] ?? this.play.iteration;
    setText(this.label, iteration === 0 && isHeldOut(this.play.kind) ? "0, the base model" : `${iteration}`);
    this.slider.setAttribute("aria-valuetext", `iteration ${iteration}`);
  }

  #samples(query) {
    return get(at`runs/${this.runId}/samples`, { limit: 500, ...query });
  }

  /** Those of an iteration and of this sample's sort, by group and row. */
  async #of(iteration) {
    const { items } = await this.#samples({ iteration });
    return items.filter((sample) => isHeldOut(sample.kind) === isHeldOut(this.play.kind));
  }

  async #list() {
    const samples = await this.#of(this.play.iteration);
    const text = (sample) => `${sample.correct ? "✓" : "✗"} ${sample.question.replace(/\s+/g, " ").slice(0, 60) || sample.problem_id} · ${nameOf(sample)}`;
    put(this.choice, samples.map((sample) => h("option", { value: String(sample.id), selected: sample.id === this.play.id }, text(sample))));
    this.choice.disabled = samples.length < 2;
  }

  /** To the slider's iteration: the same problem there, else the same row. */
  async #go() {
    const samples = await this.#of(this.stops[Number(this.slider.value)]);
    const best = samples.find((sample) => sample.problem_id === this.play.problem_id) ?? samples.find((sample) => sample.row === this.play.row) ?? samples[0];
    if (best) this.open(best.id, "slider");
  }

  async #other(index) {
    const at = index.kind.findLastIndex((kind) => isHeldOut(kind) !== isHeldOut(this.play.kind));
    const { items } = await this.#samples({ iteration: index.iteration[at], kind: index.kind[at], limit: 1 });
    if (items.length) this.open(items[0].id, null);
  }

  #later() {
    clearTimeout(this.waiting);
    this.waiting = setTimeout(() => this.#find(), SEARCH_MS);
  }

  async #find(cursor = null) {
    const q = this.search.value.trim();
    this.found.hidden = !q;
    if (!q) return;
    try {
      const answer = await this.#samples({ q, limit: PAGE, cursor });
      if (q !== this.search.value.trim()) return;
      const row = (sample) =>
        h(
          "button.play-hit",
          { type: "button", dataset: { correct: sample.correct }, onclick: () => this.open(sample.id, null) },
          h("span", null, h("b", null, sample.correct ? "✓" : "✗"), ` iteration ${sample.iteration}, ${nameOf(sample)}`),
          h("span.clip.mono", null, sample.question.replace(/\s+/g, " ")),
        );
      if (!cursor) this.found.replaceChildren();
      this.found.querySelector(".more")?.remove();
      this.found.append(...answer.items.map(row));
      if (!this.found.children.length) put(this.found, h("p.note", null, "No sample has this in its question, its text or its problem's name."));
      if (answer.next_cursor) this.found.append(h("button.button.more", { type: "button", onclick: () => this.#find(answer.next_cursor) }, "More"));
    } catch (error) {
      put(this.found, failure(error));
    }
  }
}
