// An answer as its task shows it: a grid, a line of parts, or code; each part appears when its positions are written.

import { h, setText } from "../dom.js";
import { isRevealed } from "./words.js";

const SHADE = "░";
const SAID = { right: "right", wrong: "wrong", clue: "given" };

/** `onSelect(position)` is called when a written part is clicked. Null where the task shows nothing. */
export function layoutOf(play, onSelect) {
  return play.layout ? new Answer(play, onSelect) : null;
}

class Answer {
  constructor(play, onSelect) {
    this.play = play;
    const { kind, columns, cells } = play.layout;
    this.cells = cells.map((cell) => h("span", { onclick: () => cell.positions.length && onSelect(cell.positions[0]) }));
    this.element = h(`div.play-answer`, { role: "img", dataset: shape(kind, columns), style: { "--columns": String(columns) } }, this.cells);
  }

  /** The state after this many steps. */
  show(done) {
    const { kind, cells } = this.play.layout;
    const said = cells.map((cell, index) => {
      const there = written(this.play, cell, done);
      const element = this.cells[index];
      const text = kind === "code" && cell.positions.length ? shaded(this.play, cell, done) : there && cell.written !== null ? cell.written : cell.text;
      const mark = there ? cell.mark : cell.text ? "clue" : null;
      setText(element, text || (there ? "" : " "));
      element.dataset.mark = mark ?? "";
      element.classList.toggle("masked", !there && kind !== "code");
      element.classList.toggle("new", there && cell.positions.some((position) => this.play.cells.step[position] === done - 1));
      return there ? `${text || "empty"}${mark ? ` ${SAID[mark]}` : ""}` : cell.text ? `${cell.text} given` : "masked";
    });
    this.element.setAttribute("aria-label", `The answer after ${done} steps: ${said.join(", ")}`);
  }

  select(position) {
    this.play.layout.cells.forEach((cell, index) => this.cells[index].classList.toggle("selected", position !== null && cell.positions.includes(position)));
  }
}

/** Whether a cell shows what it will: one that shows nothing of the completion always does. */
function written(play, cell, done) {
  if (cell.written === null) return true;
  return cell.positions.length ? cell.positions.every((position) => isRevealed(play, position, done)) : done >= play.steps;
}

const shaded = (play, cell, done) =>
  cell.positions.map((position) => (isRevealed(play, position, done) ? play.cells.text[position] : play.cells.text[position].replace(/\S/g, SHADE))).join("");

function shape(kind, columns) {
  const side = Math.sqrt(columns);
  return { kind, box: kind === "grid" && columns > 1 && Number.isInteger(side) ? side : 0 };
}

/** The expected answer in the grid of the task, where it has a character for each cell; else its text. */
export function expectedAnswer(play) {
  const { layout, expected } = play;
  if (layout?.kind !== "grid" || expected.length !== layout.cells.length) return h("div.play-expected", null, expected);
  const cells = [...expected].map((character, index) => h("span", { dataset: { mark: layout.cells[index].text ? "clue" : "" } }, character));
  return h("div.play-answer.small", { role: "img", ariaLabel: expected, dataset: shape(layout.kind, layout.columns), style: { "--columns": String(layout.columns) } }, cells);
}

/** The finished answer, small: for a frame of the film. */
export function thumbnail(frame) {
  const { layout, completion } = frame;
  if (!layout || layout.kind === "code") return h("span.play-snippet", { ariaHidden: "true" }, completion.slice(-160) || "(empty)");
  const cells = layout.cells.map((cell) => h("span", { dataset: { mark: cell.mark ?? "" } }, (cell.written ?? cell.text) || " "));
  return h("span.play-answer.small", { ariaHidden: "true", dataset: shape(layout.kind, layout.columns), style: { "--columns": String(layout.columns) } }, cells);
}
