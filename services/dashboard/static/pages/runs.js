// All runs: filter, sort, choose two or more to compare.

import { at, get } from "../api.js";
import { ago, count, duration, empty, failure, figure, h, loading, number, percent, pill, put, setText } from "../dom.js";
import { cursorKeys } from "../rows.js";
import { Sparkline } from "../spark.js";

const PAGES_AT_MOST = 10;
const STATUSES = ["running", "paused", "finished", "stopped", "failed", "lost", "unreadable"];

const COLUMNS = [
  { id: "name", title: "Run", of: (run) => run.id },
  { id: "status", title: "Status", of: (run) => STATUSES.indexOf(run.status) },
  { id: "progress", title: "Iteration", of: (run) => run.iteration },
  { id: "reward", title: "Reward", of: (run) => number(run.reward), num: true },
  { id: "solved", title: "Solved", of: (run) => number(run.solve_rate), num: true },
  { id: "trend", title: "Trend", hint: "Mean reward over the run; loss where there is no reward" },
  { id: "speed", title: "Tokens/s", of: (run) => number(run.tokens_per_s), num: true },
  { id: "age", title: "Started", of: (run) => run.created, num: true },
];

export async function render(root, params, app) {
  app.title([["Runs", null]]);
  const state = { runs: [], folder: "", filter: "", status: "", sort: "age", down: true, chosen: new Set() };
  const rows = new Map();
  const filter = h("input.filter", {
    type: "search",
    placeholder: "Filter by name, task, method, host",
    ariaLabel: "Filter runs",
    oninput: () => ((state.filter = filter.value.trim().toLowerCase()), show()),
  });
  const statuses = h("div.segments", { role: "group", ariaLabel: "Status" });
  const compare = h("button.button", { type: "button", disabled: true, title: "Tick two runs or more, and see them on shared axes (c)", onclick: () => openComparison() }, "Compare");
  const submit = h("button.button", { type: "button", onclick: () => import("../controls.js").then((controls) => controls.openSubmit(app)) }, "New run");
  const offer = () => (submit.hidden = !app.token.get());
  offer();
  window.addEventListener("unmask-token", offer);
  app.onLeave(() => window.removeEventListener("unmask-token", offer));
  const summary = h("p.note");
  const headers = COLUMNS.map((column) => header(column));
  const body = h("tbody");
  const table = h("table.table.runs", null, h("thead", null, h("tr", null, h("th.choose", { ariaLabel: "Compare" }), headers)), body);
  const note = h("div");
  const card = h("section.card", null, note, h("div.table-wrap", null, table));
  put(
    root,
    h("div.head", null, h("div", null, h("h1", null, "Runs"), summary), h("div.row", null, h("a.button", { href: "#/comparisons", title: "Methods under one protocol (learner.compare)" }, "Comparisons"), compare, submit)),
    h("div.row.filters", null, filter, statuses),
    card,
  );
  table.hidden = true;
  put(note, loading("runs"));
  app.search(filter);
  const cursor = cursorKeys(app, body, {
    open: (row) => (location.hash = row.querySelector("a").getAttribute("href")),
    extra: { x: [(row) => row?.querySelector("input")?.click(), "choose the row for comparing"] },
  });
  app.keys({ c: [() => openComparison(), "compare the chosen runs"] });

  function openComparison() {
    if (state.chosen.size < 2) return app.toast("Choose two or more runs to compare them.");
    location.hash = `#/compare?${[...state.chosen].map((id) => `run=${encodeURIComponent(id)}`).join("&")}`;
  }

  function header(column) {
    const kind = column.num ? "th.num" : "th";
    if (!column.of) return h(kind, { title: column.hint }, column.title);
    const sort = () => {
      state.down = state.sort === column.id ? !state.down : column.id !== "name";
      state.sort = column.id;
      show();
    };
    return h(kind, { dataset: { column: column.id } }, h("button", { type: "button", onclick: sort }, column.title));
  }

  function show() {
    const { of } = COLUMNS.find((column) => column.id === state.sort);
    const matches = (run) => [run.id, run.task, run.method, run.host].join(" ").toLowerCase().includes(state.filter);
    const found = state.runs.filter(matches);
    const shown = found.filter((run) => !state.status || run.status === state.status);
    shown.sort((first, second) => compareValues(of(first), of(second), state.down) || (first.id < second.id ? -1 : 1));
    const present = STATUSES.filter((status) => state.runs.some((run) => run.status === status));
    const choices = [["", "All", found.length], ...present.map((status) => [status, status, found.filter((run) => run.status === status).length])];
    put(statuses, choices.map(([status, text, n]) =>
      h(
        "button",
        { type: "button", ariaPressed: String(state.status === status), onclick: () => ((state.status = status), show()) },
        text,
        h("span.n", null, String(n)),
      )));
    for (const header of headers) {
      const { column } = header.dataset;
      if (column) header.ariaSort = column === state.sort ? (state.down ? "descending" : "ascending") : "none";
    }
    const wanted = shown.map((run) => {
      if (!rows.has(run.id)) rows.set(run.id, new Row(run.id, state, chosen));
      const row = rows.get(run.id);
      row.update(run);
      return row.element;
    });
    if (wanted.length !== body.children.length || wanted.some((row, index) => body.children[index] !== row)) body.replaceChildren(...wanted);
    table.hidden = shown.length === 0;
    if (shown.length) put(note);
    else if (state.runs.length) put(note, empty("No run matches", "Clear the filter to see all runs."));
    else put(note, empty("No runs yet", `Start one with “make run”; runs in ${state.folder || "the folder of runs"} show up here by themselves.`));
    const running = state.runs.filter((run) => run.status === "running").length;
    setText(summary, `${count(state.runs.length)} in ${state.folder}${running ? `, ${running} running` : ""}`);
    cursor.refresh();
  }

  function chosen() {
    compare.disabled = state.chosen.size < 2;
    compare.classList.toggle("primary", state.chosen.size >= 2);
    setText(compare, state.chosen.size >= 2 ? `Compare ${state.chosen.size}` : "Compare");
  }

  async function load() {
    const runs = [];
    let folder = "";
    let next = null;
    for (let page = 0; page < PAGES_AT_MOST && (page === 0 || next); page += 1) {
      const answer = await get("runs", { limit: 200, cursor: next });
      runs.push(...answer.items);
      [next, folder] = [answer.next_cursor, answer.folder];
    }
    if (!app.alive()) return;
    const ids = new Set(runs.map((run) => run.id));
    for (const id of [...rows.keys()]) if (!ids.has(id)) rows.delete(id), state.chosen.delete(id);
    Object.assign(state, { runs, folder });
    chosen();
    show();
  }

  let pending = null;
  let failed = false;
  const refresh = (wait = 700) => {
    pending ??= setTimeout(async () => {
      pending = null;
      try {
        await load();
        failed = false;
      } catch (error) {
        if (app.alive() && !failed && !state.runs.length) put(note, failure(error, () => refresh(0)));
        failed = true;
      }
    }, wait);
  };
  const clock = setInterval(() => rows.forEach((row) => row.tick()), 5000);
  const poll = setInterval(() => refresh(0), 20_000);
  app.onLeave(() => [clearInterval(clock), clearInterval(poll), clearTimeout(pending), rows.forEach((row) => row.close())]);
  await load().catch((error) => {
    failed = true;
    put(note, failure(error, () => refresh(0)));
  });
  app.stream(null, { run: () => refresh(), removed: () => refresh(0), reset: () => refresh(0), state: (name) => name === "live" && failed && refresh(0) });
}

class Row {
  constructor(id, state, chosen) {
    const href = `#/run/${encodeURIComponent(id)}`;
    const box = h("input", {
      type: "checkbox",
      ariaLabel: `Compare ${id}`,
      checked: state.chosen.has(id),
      onchange: () => (state.chosen[box.checked ? "add" : "delete"](id), chosen()),
    });
    const cell = (name, kind = "td") => (this[name] = h(kind, { dataset: { cell: name } }));
    this.id = id;
    this.about = h("span.note.clip");
    this.bar = h("i");
    this.figures = h("span");
    this.element = h(
      "tr.link",
      { dataset: { run: id }, onclick: (event) => !event.target.closest("a, input, button") && (location.hash = href) },
      h("td.choose", null, box),
      h("td.name", { dataset: { cell: "name" } }, h("a.clip", { href, title: id }, id), this.about),
      cell("status"),
      h("td", { dataset: { cell: "progress" } }, h("div.iterations", null, this.figures, h("div.progress", null, this.bar))),
      cell("reward", "td.num"),
      cell("solved", "td.num"),
      cell("trend"),
      cell("speed", "td.num"),
      cell("age", "td.num"),
    );
    this.spark = new Sparkline(this.trend, () => this.values());
  }

  async values() {
    if (this.run.status === "unreadable") return [];
    const { series } = await get(at`runs/${this.id}/metrics`, { name: ["reward/mean", "loss"], points: 60 });
    const found = series["reward/mean"]?.iteration.length ? series["reward/mean"] : series.loss;
    return found ? found.iteration.map((iteration, index) => [iteration, number(found.value[index])]) : [];
  }

  update(run) {
    const moved = !this.run || this.run.iteration !== run.iteration;
    this.run = run;
    if (this.status.firstChild?.dataset?.status !== run.status) put(this.status, pill(run.status));
    this.status.title = run.unreadable ?? (run.lost_rows ? `${run.lost_rows} rows were lost` : "");
    this.element.dataset.status = run.status;
    setText(this.about, run.unreadable ?? [run.task, run.method].filter(Boolean).join(" · "));
    setText(this.figures, run.total_iterations ? `${count(run.iteration)} / ${count(run.total_iterations)}` : "–");
    this.bar.style.width = `${run.total_iterations ? Math.min(100, (100 * run.iteration) / run.total_iterations) : 0}%`;
    setText(this.reward, figure(run.reward));
    setText(this.solved, percent(run.solve_rate));
    setText(this.speed, figure(run.tokens_per_s, 3));
    this.tick();
    if (moved) this.spark.refresh();
  }

  tick() {
    if (!this.run) return;
    setText(this.age, ago(this.run.created));
    this.age.title = this.run.ended ? `ran for ${duration(this.run.ended - this.run.created)}` : `last wrote ${ago(this.run.heartbeat)}`;
  }

  close() {
    this.spark.close();
  }
}

/** Missing values last, whichever way. */
function compareValues(first, second, down) {
  const [noFirst, noSecond] = [missing(first), missing(second)];
  if (noFirst || noSecond) return noFirst - noSecond;
  const order = typeof first === "string" ? first.localeCompare(second, "en", { numeric: true }) : first - second;
  return down ? -order : order;
}

const missing = (value) => Number(value === null || value === undefined || Number.isNaN(value));
