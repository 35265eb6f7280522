// The rows of the list of runs: one run, or the runs of one group of settings.

import { at, get, token } from "./api.js";
import { ago, count, duration, figure, h, number, percent, pill, put, setText } from "./dom.js";
import { middleClipped, settingText } from "./names.js";
import { Sparkline } from "./spark.js";
import { meanOf } from "./statistics.js";

const cellsOf = (row) => {
  const cell = (name, kind = "td") => (row[name] = h(kind, { dataset: { cell: name } }));
  row.bar = h("i");
  row.figures = h("span");
  return [
    cell("status"),
    h("td", { dataset: { cell: "progress" } }, h("div.iterations", null, row.figures, h("div.progress", null, row.bar))),
    ...["held", "best", "reward", "solved"].map((name) => cell(name, "td.num")),
    cell("trend"),
    cell("speed", "td.num"),
    cell("age", "td.num"),
  ];
};

/** The settings of a run that aren't its recipe's, as text. */
const differing = (run, without = []) => {
  const keys = Object.keys(run.differs ?? {}).filter((key) => !without.includes(key) && (key !== "objective.type" || run.differs[key] !== run.method));
  return keys.sort((one, two) => (one === "run.seed") - (two === "run.seed")).map((key) => settingText(key, run.differs[key])); // the seed last
};

/** The whole cell ticks: a finger that misses the box by a little doesn't open the run. */
const chooser = (box) => h("td.choose", { onclick: (event) => event.target !== box && (event.stopPropagation(), box.click()) }, box);

export class RunRow {
  /** page: {state, chosen(), edit(run)}. */
  constructor(id, page) {
    const href = `#/run/${encodeURIComponent(id)}`;
    this.page = page;
    this.id = id;
    this.box = h("input", {
      type: "checkbox",
      ariaLabel: `Compare ${id}`,
      onchange: () => (page.state.chosen[this.box.checked ? "add" : "delete"](id), page.chosen()),
    });
    this.about = h("span.note");
    this.differs = h("span.differs");
    this.labels = h("span.labels");
    this.said = h("span.said");
    this.pen = h("button.icon-button.pen", { type: "button", ariaLabel: `Tags and note of ${id}`, title: "Tags, note, archive", onclick: () => page.edit(this.run) }, "✎");
    this.element = h(
      "tr.link",
      { dataset: { run: id }, onclick: (event) => !event.target.closest("a, input, button") && !String(getSelection()) && (location.hash = href) },
      chooser(this.box),
      h("td.name", { dataset: { cell: "name" } }, h("div.first", null, middleClipped("a", { href }, id), this.labels, this.pen), h("div.second", null, this.about, this.differs, this.said)),
      cellsOf(this),
    );
    this.spark = new Sparkline(this.trend, () => this.values());
    this.offer();
  }

  async values() {
    if (this.run.status === "unreadable") return [];
    const { series } = await get(at`runs/${this.id}/metrics`, { name: ["reward/mean", "loss"], points: 60 });
    const found = series["reward/mean"]?.iteration.length ? series["reward/mean"] : series.loss;
    return found ? found.iteration.map((iteration, index) => [iteration, number(found.value[index])]) : [];
  }

  update(run, indent) {
    const moved = !this.run || this.run.iteration !== run.iteration;
    this.run = run;
    if (this.status.firstChild?.dataset?.status !== run.status) put(this.status, pill(run.status));
    this.status.title = run.unreadable ?? (run.lost_rows ? `${run.lost_rows} rows were lost` : "");
    this.element.dataset.status = run.status;
    this.element.classList.toggle("indent", Boolean(indent));
    this.element.classList.toggle("archived", run.archived);
    setText(this.about, run.unreadable ?? [run.recipe ?? run.task, run.method].filter(Boolean).join(" · "));
    setText(this.differs, differing(run).join(", "));
    this.differs.title = Object.entries(run.differs ?? {}).map(([key, value]) => `${key}=${JSON.stringify(value)}`).join("\n");
    setText(this.said, run.note);
    this.said.title = run.note;
    const labels = JSON.stringify([run.tags, run.archived]);
    if (this.labels.dataset.of !== labels) put(this.labels, run.archived && h("span.tag.off", null, "archived"), run.tags.map((tag) => h("span.tag", null, tag)));
    this.labels.dataset.of = labels;
    setText(this.figures, run.total_iterations ? `${count(run.iteration)} / ${count(run.total_iterations)}` : "–");
    this.bar.style.width = `${run.total_iterations ? Math.min(100, (100 * run.iteration) / run.total_iterations) : 0}%`;
    const below = number(run.held_out) < number(run.held_out_best);
    setText(this.held, percent(run.held_out));
    setText(this.best, percent(run.held_out_best));
    this.best.dataset.past = String(below);
    this.best.title = run.held_out_best_iteration === null ? "" : `at iteration ${count(run.held_out_best_iteration)}`;
    setText(this.reward, figure(run.reward));
    setText(this.solved, percent(run.solve_rate));
    setText(this.speed, figure(run.tokens_per_s, 3));
    this.tick();
    if (moved) this.spark.refresh();
  }

  offer() {
    this.pen.hidden = !token.get();
  }

  tick() {
    this.box.checked = this.page.state.chosen.has(this.id);
    if (!this.run) return;
    setText(this.age, ago(this.run.created));
    this.age.title = this.run.ended ? `ran for ${duration(this.run.ended - this.run.created)}` : `last wrote ${ago(this.run.heartbeat)}`;
  }

  close() {
    this.spark.close();
  }
}

export class GroupRow {
  /** page: {state, show(), chosen()}. */
  constructor(group, page) {
    this.page = page;
    this.group = group;
    this.runs = [];
    this.box = h("input", { type: "checkbox", ariaLabel: "Compare the runs of this group", onchange: () => this.choose() });
    this.title = h("span.differs");
    this.about = h("span.note");
    this.handle = h("button", { type: "button", ariaExpanded: "false", onclick: () => this.toggle() }, h("i", { ariaHidden: "true" }), this.title);
    this.element = h(
      "tr.group",
      { dataset: { group }, onclick: (event) => !event.target.closest("a, input, button") && this.toggle() },
      chooser(this.box),
      h("td.name", { dataset: { cell: "name" } }, this.handle, h("div.second", null, this.about)),
      cellsOf(this),
    );
  }

  toggle() {
    const { open } = this.page.state;
    open[open.has(this.group) ? "delete" : "add"](this.group);
    this.page.show();
  }

  choose() {
    for (const { id } of this.runs) this.page.state.chosen[this.box.checked ? "add" : "delete"](id);
    this.page.chosen();
  }

  update(runs) {
    this.runs = runs;
    const [first] = runs;
    this.handle.ariaExpanded = String(this.page.state.open.has(this.group));
    setText(this.title, differing(first, ["run.seed"]).join(", ") || first.recipe || first.id);
    const seeds = runs.map((run) => run.seed).filter((seed) => seed !== null).sort((a, b) => a - b);
    setText(this.about, `${runs.length} runs${seeds.length ? `, seeds ${seeds.join(" ")}` : ""} · ${[first.recipe ?? first.task, first.method].filter(Boolean).join(" · ")}`);
    const states = new Map();
    for (const { status } of runs) states.set(status, (states.get(status) ?? 0) + 1);
    const told = [...states].join();
    if (this.status.dataset.of !== told) put(this.status, h("div.states", null, [...states].map(([status, n]) => h("span.pill", { dataset: { status } }, `${n} ${status}`))));
    this.status.dataset.of = told;
    const [done, total] = [runs.reduce((sum, run) => sum + run.iteration, 0), runs.reduce((sum, run) => sum + run.total_iterations, 0)];
    setText(this.figures, total ? `${Math.round((100 * done) / total)} % of ${count(total)}` : "–");
    this.bar.style.width = `${total ? Math.min(100, (100 * done) / total) : 0}%`;
    for (const [cell, name, show] of [["held", "held_out", percent], ["best", "held_out_best", percent], ["reward", "reward", figure], ["solved", "solve_rate", percent]]) {
      spread(this[cell], meanOf(runs.map((run) => number(run[name]))), show);
    }
    setText(this.speed, figure(meanOf(runs.map((run) => number(run.tokens_per_s))).mean, 3));
    this.tick();
  }

  tick() {
    const { chosen } = this.page.state;
    const some = this.runs.filter(({ id }) => chosen.has(id)).length;
    this.box.checked = some > 0 && some === this.runs.length;
    this.box.indeterminate = some > 0 && some < this.runs.length;
    if (this.runs.length) setText(this.age, ago(Math.max(...this.runs.map((run) => run.created ?? 0))));
  }

  close() {}
}

/** Mean and interval in a cell. */
function spread(cell, { n, mean, half }, show) {
  const text = half === null ? "" : ` ± ${show === percent ? (100 * half).toFixed(1) : figure(half, 2)}`;
  if (cell.dataset.of === `${mean}${text}`) return;
  put(cell, h("span", null, show(mean)), text && h("span.muted", null, text));
  cell.dataset.of = `${mean}${text}`;
  cell.title = half === null ? "" : `mean of ${n} runs and its 95 % interval (t)`;
}
