// What a newcomer sees first: the question, the right answer, the verdict, and what the marks mean.

import { figure, h } from "../dom.js";
import { expectedAnswer } from "./layout.js";
import { nameOf, verdict } from "./words.js";

const LONG = 700; // characters from which on a question can be folded
const MARKS = { clue: "clue", right: "right", wrong: "wrong" };

export function card(title, body, note) {
  return h("section.card", null, h("header", null, h("h2", null, title), note && h("span.note.clip", null, note)), h("div.body", null, body));
}

export function questionCard(play) {
  const text = h("div.play-ask", null, play.question);
  const long = play.question.length > LONG;
  return h(
    "section.card.play-question",
    { ariaLabel: "Question" },
    h("h2", null, "Question"),
    long ? h("details", { open: true }, h("summary", null, `${play.question.length} characters`), text) : text,
    play.expected !== null && [h("h2", null, "Expected answer"), expectedAnswer(play)],
  );
}

/** A completion with its verdict: as its task shows the answer (null: not at all), and by position. */
export function answerCard(play, answer, cells) {
  return h(
    "section.card.play-text",
    { ariaLabel: nameOf(play) },
    h("header", null, h("h2", null, nameOf(play)), verdict(play.correct), h("span.note", null, `reward ${figure(play.reward)}`)),
    h("div.body", null, answer?.element, cells.element),
  );
}

/** What the looks of cells mean, and the choice of colours with its legend. */
export function keyOf(plays, modes, legend) {
  const entry = (mark, text, dataset = {}) => h("span", null, h(`i.${mark}`, { ariaHidden: "true", dataset }), text);
  const has = (mark) => plays.some((play) => play.layout?.cells.some((cell) => cell.mark === mark));
  return h(
    "div.play-key",
    null,
    entry("masked", "masked"),
    entry("new", "written by this step"),
    plays.some((play) => play.scored.length) && entry("scored", "scored by the update"),
    Object.entries(MARKS).map(([mark, text]) => has(mark) && entry("marked", text, { mark })),
    plays.some((play) => play.context.length) && h("span", null, h("b.play-context.mono", null, "abc"), "given by the prompt"),
    h("span", null, h("b.mono", null, "∎"), "special token"),
    h("span.play-space"),
    modes,
    legend,
  );
}

/** Of a method that learns in phases: the policy that wrote is not the one that is trained. */
export function phaseNote(config, play) {
  const length = config?.objective?.phase_iterations;
  if (!Number.isInteger(length) || length < 1 || play.kind !== "train") return null;
  const begin = Math.floor((play.iteration - 1) / length) * length;
  return h("p.note", null, `Written by the teacher of this phase: the policy as it was ${begin ? `after iteration ${begin}` : "at the start"}. Phases have ${length} iterations.`);
}
