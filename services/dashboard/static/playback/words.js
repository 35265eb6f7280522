// What is said about a completion: its name, its verdict, and one sentence for each step.

import { h } from "../dom.js";

export const verdict = (correct) => h("span.play-verdict", { dataset: { correct } }, correct ? "✓ right" : "✗ wrong");

/** "completion 3", "base model", "trained, iteration 20". */
export function nameOf(sample) {
  if (sample.kind === "train") return `completion ${sample.row + 1}`;
  return sample.kind === "base" ? "base model" : `${sample.kind}, iteration ${sample.iteration}`;
}

/** A position as people count, from 1 like the steps. */
export const place = (position) => String(position + 1);

/** Whether a position is there after this many steps. Fillers come with the last step taken. */
export function isRevealed(play, position, done) {
  const step = play.cells.step[position];
  return play.cells.drawn[position] ? step < done : step <= done;
}

const WHERE = {
  low_confidence: "where the model was surest",
  entropy: "where the model was least undecided",
  left_to_right: "from left to right",
  random: "at random places",
  decoupled_confidence: "at drawn places, sure ones likelier",
};

const tokens = (n) => `${n} ${n === 1 ? "token" : "tokens"}`;

const maskedAt = (play, done) => play.cells.step.filter((_, position) => !isRevealed(play, position, Math.min(done, play.steps))).length;

/** What the last of `done` steps did; of two documents, how far each is. `steps`: of the longer one. */
export function sentence(plays, done, steps) {
  if (plays.length === 1) return ofOne(plays[0], done);
  return `Step ${done} of ${steps}; still masked: ${plays.map((play) => `${maskedAt(play, done)} of ${nameOf(play)}`).join(", ")}.`;
}

function ofOne(play, done) {
  const { drawn, step } = play.cells;
  const masked = maskedAt(play, done);
  if (done === 0) return `Step 0 of ${play.steps}: nothing is written yet, all ${step.length} positions are masked.`;
  const at = Math.min(done, play.steps);
  const wrote = step.filter((own, position) => drawn[position] && own === at - 1).length;
  const { block_length: block, position_rule: rule, threshold } = play.sampler;
  const where = threshold !== null && threshold !== undefined ? "where the model was sure enough" : WHERE[rule];
  const first = step.findIndex((own, position) => drawn[position] && own === at - 1);
  const blocks = block > 0 && block < step.length ? ` in block ${Math.floor(first / block) + 1} of ${Math.ceil(step.length / block)}` : "";
  const left = masked ? `${masked} still masked` : `complete: ${play.correct ? "right" : "wrong"}`;
  return `Step ${at} of ${play.steps}: wrote ${tokens(wrote)}${where ? ` ${where}` : ""}${blocks}; ${left}.`;
}
