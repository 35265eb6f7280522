// What happened at each denoising step, under the slider: how undecided the policy was, which steps the update drew and
// with which weights, and how far the log-probs had moved. Masks that were drawn for the update are states that the
// rollout never saw: they have no step, and are in the table only.

import { figure, h, number, put, s } from "../dom.js";

const ROWS = [
  { id: "entropy", height: 30, about: "How undecided the policy was: mean entropy of the tokens drawn at the step" },
  { id: "drawn", height: 22, about: "Steps that the update drew: the dot's area is the importance weight, hollow where that is negative" },
  { id: "ratio", height: 34, about: "New minus old log-prob of the step's tokens" },
];
const NAME = 15; // for the name above each row
const GAP = 5;
const ROUNDING = 1e-4; // a log ratio below it is drawn as none

/** What is drawn: one entry a step. */
export function profile(play) {
  const steps = Array.from({ length: play.steps }, () => ({ tokens: 0, entropy: 0 }));
  play.cells.step.forEach((step, position) => {
    if (!play.cells.drawn[position]) return;
    steps[step].tokens += 1;
    steps[step].entropy += number(play.cells.entropy[position]) || 0;
  });
  return steps;
}

const isMask = (view) => view.step === null;

/** What a scored view is called: by its step, or by its number among the masks of its update. */
export function viewName(play, view) {
  if (!isMask(view)) return `step ${view.step + 1}`;
  return `mask ${play.scored.filter((other) => isMask(other) && other.update === view.update).indexOf(view) + 1}`;
}

/** The scales of all documents shown: those of their batches, else the largest values that they have themselves. */
export function scalesOf(plays) {
  const most = (values) => Math.max(0, ...values.map((value) => Math.abs(number(value))).filter(Number.isFinite));
  const own = (play) => ({
    entropy: most(profile(play).map(({ tokens, entropy }) => (tokens ? entropy / tokens : 0))),
    weight: most(play.scored.map((view) => view.weight)),
    log_ratio: most(play.scored.map((view) => view.log_ratio)),
  });
  const all = plays.map((play) => play.scales ?? own(play));
  return { batch: plays.every((play) => play.scales), ...Object.fromEntries(["entropy", "weight", "log_ratio"].map((name) => [name, most(all.map((scale) => scale[name]))])) };
}

/** `steps`: of the longest document shown; `scales`: see `scalesOf`; `onStep(done)` is called when a step is clicked. */
export class StepAxis {
  constructor(play, steps, scales, onStep) {
    this.play = play;
    this.slots = steps;
    this.scales = scales;
    this.update = 0;
    this.done = play.steps;
    this.steps = profile(play);
    this.element = h("div.play-axis");
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.element);
    this.element.addEventListener("click", (event) => {
      const { left, width } = this.element.getBoundingClientRect();
      onStep(1 + Math.min(play.steps - 1, Math.floor(((event.clientX - left) / width) * steps)));
    });
  }

  close() {
    this.observer.disconnect();
  }

  /** Which of the updates on the batch. */
  choose(update) {
    this.update = update;
    this.draw();
  }

  show(done) {
    this.done = done;
    this.#cursor();
  }

  #cursor() {
    if (!this.cursor) return;
    const at = Math.max(0, this.done - 1);
    this.cursor.setAttribute("x", (at * this.width) / this.slots);
    this.cursor.setAttribute("visibility", this.done ? "visible" : "hidden");
  }

  draw() {
    const width = this.element.clientWidth;
    if (!width) return;
    this.width = width;
    const scored = this.play.scored.filter((view) => view.update === this.update && !isMask(view));
    const rows = scored.length ? ROWS : ROWS.slice(0, 1);
    const height = rows.reduce((sum, row) => sum + NAME + row.height + GAP, 0);
    const slot = width / this.slots;
    const middle = (step) => (step + 0.5) * slot;
    const parts = [];
    let top = 0;
    for (const row of rows) {
      parts.push(s("text.play-row", { x: 0, y: top + 10 }, s("title", null, row.about), this.#name(row.id, width)));
      top += NAME;
      if (row.id !== "ratio") parts.push(s("line.play-base", { x1: 0, x2: width, y1: top + row.height, y2: top + row.height }));
      if (row.id === "entropy") parts.push(this.#entropy(top, row.height, slot));
      if (row.id === "drawn") parts.push(drawnSteps(scored, this.scales.weight, middle, top, row.height, slot));
      if (row.id === "ratio") parts.push(ratios(scored, this.scales.log_ratio, middle, top, row.height));
      top += row.height + GAP;
    }
    this.cursor = s("rect.play-cursor", { y: 0, width: Math.max(1.5, slot), height });
    put(
      this.element,
      s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": this.#summary(scored) }, this.cursor, parts),
    );
    this.#cursor();
  }

  /** What a row shows and to which scale. */
  #name(id, width) {
    const { batch, entropy, weight, log_ratio: ratio } = this.scales;
    const of = batch && width > 420 ? " in this batch" : "";
    if (id === "entropy") return `entropy by step: full height ${figure(entropy, 2)} nats${of && ", the most"}${of}`;
    if (id === "drawn") return `steps that the update drew: largest dot weight ${figure(weight, 2)}${of}`;
    return ratio < ROUNDING ? "log ratio, new minus old: none beyond rounding" : `log ratio, new minus old: ±${figure(ratio, 2)}${of}`;
  }

  #entropy(top, height, slot) {
    const means = this.steps.map(({ tokens, entropy }) => (tokens ? entropy / tokens : 0));
    const most = Math.max(1e-9, this.scales.entropy);
    const inner = Math.max(1, slot - Math.min(2, slot * 0.2));
    return means.map((mean, step) => {
      const tall = Math.min(1, mean / most) * height;
      const label = `step ${step + 1}: ${this.steps[step].tokens} drawn, mean entropy ${figure(mean, 3)} nats`;
      return s("rect.play-bar", { x: step * slot, y: top + height - tall, width: inner, height: tall }, s("title", null, label));
    });
  }

  #summary(scored) {
    const drawn = scored.map((step) => `${step.step + 1} with weight ${figure(step.weight, 3)}`).join(", ");
    const masks = this.play.scored.filter((view) => view.update === this.update && isMask(view)).length;
    const other = masks ? `The update scored ${masks} drawn mask${masks > 1 ? "s" : ""}.` : "The update scored none of them.";
    return `${this.play.steps} denoising steps. ` + (drawn ? `The update drew steps ${drawn}.` : other);
  }
}

function drawnSteps(scored, scale, middle, top, height, slot) {
  const most = Math.max(1e-9, scale);
  const largest = Math.min(9, Math.max(3.5, slot / 2));
  return scored.map((step) => {
    const radius = Math.max(1.5, largest * Math.sqrt(Math.min(1, Math.abs(number(step.weight) || 0) / most)));
    const times = step.count > 1 ? `, drawn ${step.count} times` : "";
    const label = `step ${step.step + 1}: weight ${figure(step.weight, 4)}${times}`;
    const x = middle(step.step);
    return [
      s(`circle.play-drawn${number(step.weight) < 0 ? ".minus" : ""}`, { cx: x, cy: top + height - 10, r: radius }, s("title", null, label)),
      step.count > 1 && slot > 16 && s("text.play-count", { x: x + radius + 1, y: top + height - 13 }, `×${step.count}`),
    ];
  });
}

function ratios(scored, scale, middle, top, height) {
  const zero = top + height / 2;
  const half = height / 2 - 3;
  const most = Math.max(ROUNDING, scale);
  return [
    s("line.play-base", { x1: 0, x2: "100%", y1: zero, y2: zero }),
    ...scored.map((step) => {
      const value = number(step.log_ratio);
      const label = `step ${step.step + 1}: log ratio ${figure(value, 3)}, ratio ${figure(Math.exp(value), 6)}`;
      const x = middle(step.step);
      if (!Number.isFinite(value)) return s("text.play-odd", { x: x - 4, y: zero - 2 }, s("title", null, label), "✕");
      const y = zero - (Math.abs(value) < ROUNDING ? 0 : Math.min(1, Math.max(-1, value / most))) * half;
      const side = value < 0 ? "down" : "up";
      return s(`g.play-ratio.${side}`, null, s("line", { x1: x, x2: x, y1: zero, y2: y }), s("circle", { cx: x, cy: y, r: 2.5 }, s("title", null, label)));
    }),
  ];
}

/** Why an update scored nothing of a training sample. */
export function whyNone(play) {
  if (play.advantage === 0) return "The update scored nothing of this completion: it had no signal.";
  return "Nothing of this completion was scored: an older version recorded it, or the update left it out.";
}

/** Where in the completion a view scored, as a strip of its positions. */
function strip(play, view) {
  const all = play.cells.text.length;
  const marks = view.tokens.map(({ position }) => `M${position} 0h1v1h-1z`).join("");
  const label = `${view.tokens.length} of ${all} positions`;
  const box = { viewBox: `0 0 ${all} 1`, preserveAspectRatio: "none", role: "img", "aria-label": label };
  return s("svg.play-strip", box, s("title", null, label), s("path", { d: marks }));
}

/** What the update scored, as a table: for those who can't see the marks, for exact figures, and for drawn masks.
    `onPick(index)` is called when a row is chosen, with null when it is no longer. */
export function viewTable(play, update, onPick) {
  const scored = play.scored.filter((view) => view.update === update);
  const masks = scored.some(isMask);
  const steps = scored.some((view) => !isMask(view));
  const ratio = (view) => (view.log_ratio === null ? null : Math.exp(number(view.log_ratio)));
  const choice = (view) => (view.choice_new_logp === null ? null : number(view.choice_new_logp) - number(view.choice_old_logp));
  const columns = [
    masks ? ["View", (view) => viewName(play, view)] : ["Step", (view) => view.step + 1],
    ["Drawn", (view) => `×${view.count}`],
    ["Weight", (view) => figure(view.weight)],
    ["Tokens", (view) => view.tokens.length],
    masks && ["Log-prob", (view) => figure(view.new_logp)],
    steps && ["Log ratio", (view) => figure(view.log_ratio, 3)],
    steps && ["Ratio", (view) => figure(ratio(view), 6)],
    scored.some((view) => view.choice_new_logp !== null) && ["Choice of positions", (view) => figure(choice(view), 3)],
    masks && ["Where", (view) => strip(play, view)],
  ].filter(Boolean);
  const cell = (value) => h("td.num", null, value instanceof Element ? value : String(value));
  const rows = scored.map((view, index) =>
    h(
      "tr.link",
      { tabIndex: 0, title: "Underline what this row scored", onclick: () => pick(index), onkeydown: (event) => event.key === "Enter" && pick(index) },
      columns.map(([, value]) => cell(value(view))),
    ),
  );
  const pick = (index) => {
    const chosen = rows[index].getAttribute("aria-selected") !== "true";
    rows.forEach((row, other) => row.setAttribute("aria-selected", String(chosen && other === index)));
    onPick(chosen ? index : null);
  };
  const about = masks
    ? "Masks that were drawn for the update: states that the rollout never went through."
    : "States that the rollout went through, each before this step.";
  return [
    h("p.note", null, steps && masks ? "States that the rollout went through, and masks that were drawn for the update." : about),
    h(
      "div.play-scroll",
      { tabIndex: 0, role: "region", ariaLabel: "What the update scored" },
      h("table.table", null, h("thead", null, h("tr", null, columns.map(([title]) => h("th.num", { scope: "col" }, title)))), h("tbody", null, rows)),
    ),
  ];
}
