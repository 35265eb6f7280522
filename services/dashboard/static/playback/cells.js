// The completion as cells, one a position. A cell keeps its place and width while it is masked, so nothing jumps.

import { figure, h, put, setText } from "../dom.js";
import { viewName } from "./axis.js";

const LONGEST = 60; // characters of a token
const SHORT = 64; // positions of a completion that is shown larger
const hex = (character) => `⟨${character.codePointAt(0).toString(16).toUpperCase().padStart(2, "0")}⟩`;

/** A token's text as it can be seen: control, invisible and direction-changing characters by a sign or their code. */
export function visible(text) {
  if (text === "") return "∅";
  if (/^ +$/.test(text)) return "␣".repeat(Math.min(8, text.length));
  const shown = text
    .replace(/\n/g, "↵")
    .replace(/\t/g, "⇥")
    .replace(/[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, hex)
    .replace(/^[\u200c\u200d\ufe0e\ufe0f]+$/, (all) => [...all].map(hex).join(""));
  const characters = [...shown];
  return characters.length > LONGEST ? `${characters.slice(0, LONGEST).join("")}…` : shown;
}

/** Whether a position is there after this many steps. Fillers come with the last step taken. */
export function isRevealed(play, position, done) {
  const step = play.cells.step[position];
  return play.cells.drawn[position] ? step < done : step <= done;
}

/** One completion. `onSelect(position)` is called when a cell is clicked. */
export class Cells {
  constructor(play, label, onSelect) {
    this.play = play;
    this.label = label;
    this.shown = -1;
    this.cells = [];
    const flow = [];
    play.cells.text.forEach((text, position) => {
      const shares = position > 0 && !play.cells.drawn[position] && !play.cells.drawn[position - 1];
      this.cells.push(shares ? this.cells[position - 1] : this.#cell(text, position));
      if (!shares) flow.push(this.cells[position]);
      if (!shares && /\n/.test(text)) flow.push(h("br"));
    });
    this.reading = h("p.sr");
    this.flow = h(`div.play-flow${this.cells.length <= SHORT ? ".short" : ""}`, { dir: "ltr", onclick: (event) => pick(event) }, flow);
    const pick = (event) => {
      const cell = event.target.closest(".play-cell");
      if (cell) onSelect(Number(cell.dataset.position));
    };
    this.element = h("div", { role: "group", ariaLabel: label }, this.reading, this.flow);
  }

  #cell(text, position) {
    const { special, drawn } = this.play.cells;
    const sign = special[position] ? "∎" : visible(text);
    if (drawn[position]) return h(`span.play-cell${special[position] ? ".special" : ""}`, { dataset: { position } }, sign);
    const end = drawn.indexOf(true, position); // a run of fillers is one cell
    const run = (end < 0 ? drawn.length : end) - position;
    return h("span.play-cell.filler", { dataset: { position }, title: "filled after the text had ended" }, `${sign} ×${run}`);
  }

  /** Colour every revealed cell with what `colourOf(play, position)` says. */
  colour(colourOf) {
    this.cells.forEach((cell, position) => {
      const colour = colourOf(this.play, position);
      cell.style.setProperty("--cell", colour?.background ?? "transparent");
      cell.style.setProperty("--ink", colour?.ink ?? "var(--muted)");
    });
  }

  /** The state after this many steps. */
  show(done) {
    if (done === this.shown) return;
    this.shown = done;
    const { step, drawn } = this.play.cells;
    this.cells.forEach((cell, position) => {
      const revealed = isRevealed(this.play, position, done);
      cell.classList.toggle("masked", !revealed);
      cell.classList.toggle("new", revealed && drawn[position] && step[position] === done - 1);
    });
    setText(this.reading, `After ${done} of ${this.play.steps} steps: ${this.text(done)}`);
  }

  /** The text after this many steps; runs of masks are counted. */
  text(done) {
    const { text, special } = this.play.cells;
    const parts = text.map((token, position) => (!isRevealed(this.play, position, done) ? "\uE000" : special[position] ? "" : token));
    return parts.join("").replace(/\uE000+/g, (run) => (run.length === 1 ? "[MASK]" : `[MASK ×${run.length}]`));
  }

  /** Mark one position, or none (null). */
  select(position) {
    this.flow.querySelector(".selected")?.classList.remove("selected");
    const cell = this.cells[position];
    cell?.classList.add("selected");
    cell?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** Underline the positions that an update scored. */
  scored(positions) {
    this.cells.forEach((cell, position) => cell.classList.toggle("scored", positions.has(position)));
  }
}

/** What is known of one position. */
export function describe(host, play, position) {
  if (position === null || position >= play.cells.text.length) {
    put(host, h("p.note", null, "Choose a cell, or step through them with [ and ]."));
    return;
  }
  const { cells } = play;
  const drawn = cells.drawn[position];
  const rows = [
    ["Position", `${position} of ${cells.text.length}`],
    ["Token", h("span.mono", null, `${JSON.stringify(cells.text[position])}  #${cells.token[position]}`)],
    ["Revealed at", drawn ? `step ${cells.step[position] + 1}, ${ordinal(cells.rank[position] + 1)} there` : "filled after the text had ended"],
  ];
  if (drawn) {
    rows.push(
      ["Confidence", figure(cells.confidence[position])],
      ["Log-prob", figure(cells.logp[position])],
      ["at temperature 1", figure(cells.logp_raw[position])],
      ["Entropy", `${figure(cells.entropy[position])} nats`],
    );
  }
  for (const scored of play.scored) {
    const token = scored.tokens.find((candidate) => candidate.position === position);
    if (!token) continue;
    const update = play.updates > 1 ? ` (update ${scored.update + 1})` : "";
    if (scored.step === null) rows.push([`Log-prob, ${viewName(play, scored)}${update}`, figure(token.new_logp)]);
    else rows.push([`New log-prob${update}`, figure(token.new_logp)], ["Ratio new / old", figure(token.ratio, 6)]);
  }
  put(host, h("dl.play-facts", null, rows.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value)))));
}

const ordinal = (n) => `${n}${n % 100 > 10 && n % 100 < 14 ? "th" : ({ 1: "st", 2: "nd", 3: "rd" }[n % 10] ?? "th")}`;
