// The completion as cells, one a position. A cell keeps its place and width while it is masked, so nothing jumps.

import { figure, h, put, setText } from "../dom.js";
import { viewName } from "./axis.js";
import { isRevealed, place } from "./words.js";

const LONGEST = 60; // characters of a token
const SHORT = 64; // positions of a completion that is shown larger
const FOLDED = 3; // special tokens at the end from which on they are one cell
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

/** One completion. `onSelect(position)` is called when a cell is clicked. */
export class Cells {
  constructor(play, label, onSelect) {
    this.play = play;
    this.label = label;
    this.shown = -1;
    this.cells = [];
    const flow = [];
    const { special, drawn } = play.cells;
    this.ends = endsOf(play);
    const context = (before) => play.context.filter((piece) => piece.before === before).map((piece) => h("span.play-context", null, piece.text));
    let gap = null; // the one that cells go into, where the prompt has any
    let gaps = 0;
    const add = (element) => (gap ? gap.append(element) : flow.push(element));
    play.cells.text.forEach((text, position) => {
      const fixed = context(position);
      if (play.context.length && (fixed.length || position === 0)) flow.push(fixed, (gap = h("span.play-gap", { title: `gap ${(gaps += 1)} of the text` })));
      const fills = position > 0 && !drawn[position] && !drawn[position - 1];
      const shares = fills || (position > this.ends.first && position <= this.ends.last);
      this.cells.push(shares ? this.cells[position - 1] : this.#cell(text, position));
      if (!shares) add(this.cells[position]);
      if (!shares && /\n/.test(text)) add(h("br"));
    });
    flow.push(...context(play.cells.text.length));
    this.reading = h("p.sr");
    this.flow = h(`div.play-flow${this.cells.length <= SHORT ? ".short" : ""}`, { dir: "ltr", onclick: (event) => pick(event) }, flow);
    const pick = (event) => {
      const cell = event.target.closest(".play-cell");
      if (cell) onSelect(Number(cell.dataset.position));
    };
    this.element = h("div", { role: "group", ariaLabel: label }, this.reading, this.flow);
  }

  #cell(text, position) {
    const { special, drawn, mark } = this.play.cells;
    const sign = special[position] ? "∎" : visible(text);
    const { first, last } = this.ends;
    if (position === first) {
      const wide = `∎ ${last - first + 1} of ${last - first + 1}`.length;
      return h("span.play-cell.special.ends", { dataset: { position, last }, title: "the end of the text, again and again", style: { "--wide": `${wide}ch` } });
    }
    const worth = mark[position] ? { mark: mark[position] } : {};
    if (drawn[position]) return h(`span.play-cell${special[position] ? ".special" : ""}`, { dataset: { position, ...worth } }, sign);
    const end = drawn.indexOf(true, position); // a run of fillers is one cell
    const run = (end < 0 ? drawn.length : end) - position;
    return h("span.play-cell.filler", { dataset: { position }, title: "filled after the text had ended" }, `${sign} ×${run}`);
  }

  /** Colour every revealed cell with what `colourOf(play, position)` says. */
  colour(colourOf) {
    const { first, last } = this.ends;
    const ends = [...this.cells.keys()].slice(first, last + 1).map((position) => colourOf(this.play, position)).filter(Boolean);
    const foremost = ends.sort((one, other) => other.amount - one.amount)[0]; // in a cell of several the least sure shows
    this.cells.forEach((cell, position) => {
      const inside = position >= first && position <= last;
      const colour = inside ? foremost : colourOf(this.play, position);
      cell.style.setProperty("--cell", colour?.background ?? "transparent");
      cell.style.setProperty("--ink", colour?.ink ?? "var(--muted)");
    });
  }

  /** The state after this many steps. */
  show(done) {
    if (done === this.shown) return;
    this.shown = done;
    const { step, drawn } = this.play.cells;
    const { first, last } = this.ends;
    if (last > first) this.#showEnds(done);
    this.cells.forEach((cell, position) => {
      if (position >= first && position <= last) return;
      const revealed = isRevealed(this.play, position, done);
      cell.classList.toggle("masked", !revealed);
      cell.classList.toggle("new", revealed && drawn[position] && step[position] === done - 1);
    });
    setText(this.reading, `After ${done} of ${this.play.steps} steps: ${this.text(done)}`);
  }

  #showEnds(done) {
    const { first, last } = this.ends;
    const cell = this.cells[first];
    const all = [...this.play.cells.step.keys()].slice(first, last + 1);
    const there = all.filter((position) => isRevealed(this.play, position, done)).length;
    setText(cell, there === all.length ? `∎ ×${all.length}` : `∎ ${there} of ${all.length}`);
    cell.classList.toggle("masked", !there);
    cell.classList.toggle("part", there > 0 && there < all.length);
    cell.classList.toggle("new", all.some((position) => this.play.cells.step[position] === done - 1));
  }

  /** The text after this many steps; runs of masks are counted. */
  text(done) {
    const { text, special } = this.play.cells;
    const around = (before) => this.play.context.filter((piece) => piece.before === before).map((piece) => piece.text);
    const parts = text.map((token, position) => (!isRevealed(this.play, position, done) ? "\uE000" : special[position] ? "" : token));
    return [...parts.flatMap((part, position) => [...around(position), part]), ...around(parts.length)].join("").replace(/\uE000+/g, (run) => (run.length === 1 ? "[MASK]" : `[MASK ×${run.length}]`));
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
    for (const cell of new Set(this.cells)) cell.classList.remove("scored");
    for (const position of positions) this.cells[position]?.classList.add("scored");
  }
}

/** The special tokens at the end of the text that were drawn, when they are many: first and last position, else none. In
 * a gap they end nothing. */
function endsOf({ context, cells: { special, drawn } }) {
  if (context.length) return { first: Infinity, last: -1 };
  const last = drawn.lastIndexOf(true);
  let first = last + 1;
  while (first > 0 && special[first - 1] && drawn[first - 1]) first -= 1;
  return last - first + 1 >= FOLDED ? { first, last } : { first: Infinity, last: -1 };
}

/** What is known of one position. */
export function describe(host, play, position) {
  if (position === null || position >= play.cells.text.length) {
    put(host);
    return;
  }
  const { cells } = play;
  const drawn = cells.drawn[position];
  const rows = [
    ["Position", `${place(position)} of ${cells.text.length}${cells.mark[position] ? `, ${SAID[cells.mark[position]]}` : ""}`],
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

const SAID = { clue: "a clue that was kept", right: "right", wrong: "wrong" };

const ordinal = (n) => `${n}${n % 100 > 10 && n % 100 < 14 ? "th" : ({ 1: "st", 2: "nd", 3: "rd" }[n % 10] ?? "th")}`;
