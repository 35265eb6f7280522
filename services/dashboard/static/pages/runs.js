// All runs: search, sort, group by settings, write notes, choose two or more to compare.

import { keepInAddress, oneOf } from "../address.js";
import { get, url } from "../api.js";
import { loadPlotly } from "../charts.js";
import { count, empty, failure, h, loading, number, put, setText } from "../dom.js";
import { annotate, openAnnotation } from "../annotate.js";
import { cursorKeys } from "../rows.js";
import { GroupRow, RunRow } from "../runrows.js";
import { meanOf } from "../statistics.js";

const PAGES_AT_MOST = 10;
const STATUSES = ["running", "paused", "finished", "stopped", "failed", "lost", "unreadable"];
const TYPED_MS = 200;
const REDRAW_MS = 400;

const COLUMNS = [
  { id: "name", title: "Run", of: (run) => run.id },
  { id: "status", title: "Status", of: (run) => STATUSES.indexOf(run.status) },
  { id: "progress", title: "Iteration", of: (run) => run.iteration },
  { id: "held", title: "Held out", of: (run) => number(run.held_out), num: true, hint: "Held-out problems solved at the newest evaluation, greedily, in as many steps as in training" },
  { id: "best", title: "Best", of: (run) => number(run.held_out_best), num: true, hint: "The best of the evaluations on the way, and its iteration" },
  { id: "reward", title: "Reward", of: (run) => number(run.reward), num: true },
  { id: "solved", title: "Solved", of: (run) => number(run.solve_rate), num: true, hint: "While training, sampled" },
  { id: "trend", title: "Trend", hint: "Mean reward over the run; loss where there is no reward" },
  { id: "speed", title: "Tokens/s", of: (run) => number(run.tokens_per_s), num: true },
  { id: "age", title: "Started", of: (run) => run.created, num: true },
];
const SORTED = COLUMNS.filter(({ of }) => of).map(({ id }) => id);
const ORDERS = COLUMNS.filter(({ of }) => of).flatMap(({ id, title }) => [[`-${id}`, `${title} ↓`], [id, `${title} ↑`]]);

export async function render(root, params, app) {
  app.title([["Runs", null]]);
  const { query } = params;
  const sort = oneOf(query, "sort", SORTED.flatMap((id) => [id, `-${id}`]), "-age");
  const state = {
    runs: new Map(),
    folder: "",
    archivedRuns: 0,
    q: query.get("q") ?? "",
    status: oneOf(query, "status", STATUSES, ""),
    sort: sort.replace(/^-/, ""),
    down: sort.startsWith("-"),
    grouped: query.get("group") === "1",
    archived: query.get("archived") === "1",
    chosen: new Set(query.getAll("pick")),
    open: new Set(query.getAll("open")),
  };
  const rows = new Map();
  const filter = h("input.filter", {
    type: "search",
    placeholder: "Name, task, tag or setting: lr=0.003 seed=2",
    title: "Every word must be in a run's name, task, method, host, recipe, tags or note, or be a setting of it: lr=0.003, learner.lr=3e-3, seed=2",
    ariaLabel: "Filter runs",
    value: state.q,
    oninput: () => typed(),
  });
  const statuses = h("div.segments", { role: "group", ariaLabel: "Status" });
  const grouping = toggle("Group seeds", "Runs whose settings differ in the seed alone as one row, with mean and 95 % interval (g)", () => change({ grouped: !state.grouped }));
  const shelf = toggle("Archived", "Show archived runs too", () => (change({ archived: !state.archived }), refresh(0)));
  const order = h("select.narrow-only", { ariaLabel: "Sort by", onchange: () => change({ sort: order.value.replace(/^-/, ""), down: order.value.startsWith("-") }) }, ORDERS.map(([value, text]) => h("option", { value }, text)));
  const tickAll = h("button.button.narrow-only", { type: "button", onclick: () => chooseAll(!all.checked) });
  const compare = h("button.button.compare-chosen", { type: "button", title: "Tick two runs or more, and see them on shared axes (c)", onclick: () => openComparison() }, "Compare");
  const archive = h("button.button", { type: "button", onclick: () => archiveChosen() }, "Archive");
  const submit = h("button.button", { type: "button", onclick: () => import("../newrun.js").then((module) => module.openNewRun(app)) }, "New run");
  const csv = h("a.button", { download: "runs.csv", title: "These runs as a table" }, "CSV");
  const json = h("a.button", { target: "_blank", title: "These runs from the API" }, "JSON");
  const offer = () => {
    submit.hidden = !app.token.get();
    rows.forEach((row) => row.offer?.());
    chosen();
  };
  window.addEventListener("unmask-token", offer);
  app.onLeave(() => window.removeEventListener("unmask-token", offer));
  const summary = h("p.note");
  const all = h("input", { type: "checkbox", ariaLabel: "Choose all that are listed", onchange: () => chooseAll(all.checked) });
  const headers = COLUMNS.map((column) => header(column));
  const body = h("tbody");
  const table = h("table.table.runs", null, h("thead", null, h("tr", null, h("th.choose", null, all), headers)), body);
  const note = h("div");
  const card = h("section.card", null, note, h("div.runs-wrap", null, table));
  put(
    root,
    h("div.head", null, h("div", null, h("h1", null, "Runs"), summary), h("div.row", null, h("a.button", { href: "#/comparisons", title: "Methods under one protocol (learner.compare)" }, "Comparisons"), csv, json, archive, compare, submit)),
    h("div.row.filters", null, filter, statuses, grouping, shelf, order, tickAll),
    card,
  );
  table.hidden = true;
  put(note, loading("runs"));
  app.search(filter);
  const cursor = cursorKeys(app, body, {
    open: (row) => (row.querySelector("a") ? (location.hash = row.querySelector("a").getAttribute("href")) : row.querySelector(".name button")?.click()),
    extra: { x: [(row) => row?.querySelector("input")?.click(), "choose the row for comparing"] },
  });
  app.keys({ c: [() => openComparison(), "compare the chosen runs"], g: [() => change({ grouped: !state.grouped }), "group runs by their settings"] });
  offer();

  function toggle(text, title, onclick) {
    return h("button.button", { type: "button", title, ariaPressed: "false", onclick }, text);
  }

  function change(values) {
    Object.assign(state, values);
    show();
  }

  function remember() {
    const { q, status, grouped, archived } = state;
    const sorted = orderOf(state);
    keepInAddress({ q, status, group: grouped, archived, sort: sorted === "-age" ? null : sorted, pick: [...state.chosen], open: grouped ? [...state.open] : [] });
  }

  let typing = null;
  function typed() {
    clearTimeout(typing);
    typing = setTimeout(() => {
      others.clear();
      state.q = filter.value.trim();
      remember();
      refresh(0);
    }, TYPED_MS);
  }

  function openComparison() {
    if (state.chosen.size < 2) return app.toast("Choose two or more runs to compare them.");
    location.hash = `#/compare?${[...state.chosen].map((id) => `run=${encodeURIComponent(id)}`).join("&")}`;
  }

  async function archiveChosen() {
    const archived = ![...state.chosen].every((id) => state.runs.get(id)?.archived);
    for (const id of state.chosen) if (!(await annotate(app, id, { archived }))) return;
    app.toast(`${count(state.chosen.size)} ${archived ? "archived: the list leaves them out" : "back in the list"}`);
    state.chosen.clear();
    refresh(0);
  }

  function header(column) {
    const kind = column.num ? "th.num" : "th";
    if (!column.of) return h(kind, { title: column.hint, dataset: { head: column.id } }, column.title);
    const sort = () => change({ down: state.sort === column.id ? !state.down : column.id !== "name", sort: column.id });
    return h(kind, { dataset: { column: column.id, head: column.id }, title: column.hint }, h("button", { type: "button", onclick: sort }, column.title));
  }

  function show() {
    const found = [...state.runs.values()].filter((run) => state.archived || !run.archived);
    const kept = found.filter((run) => !state.status || run.status === state.status);
    const present = STATUSES.filter((status) => status === state.status || found.some((run) => run.status === status));
    const choices = [["", "All", found.length], ...present.map((status) => [status, status, found.filter((run) => run.status === status).length])];
    put(statuses, choices.map(([status, text, n]) => h("button", { type: "button", ariaPressed: String(state.status === status), onclick: () => change({ status }) }, text, h("span.n", null, String(n)))));
    grouping.ariaPressed = String(state.grouped);
    shelf.ariaPressed = String(state.archived);
    order.value = orderOf(state);
    setText(shelf, state.archivedRuns ? `Archived ${count(state.archivedRuns)}` : "Archived");
    shelf.hidden = !state.archivedRuns && !state.archived;
    for (const header of headers) {
      const { column } = header.dataset;
      if (column) header.ariaSort = column === state.sort ? (state.down ? "descending" : "ascending") : "none";
    }
    const wanted = entries(kept).map((entry) => element(entry));
    if (wanted.length !== body.children.length || wanted.some((row, index) => body.children[index] !== row)) body.replaceChildren(...wanted);
    table.hidden = kept.length === 0;
    if (kept.length) put(note);
    else if (state.q || state.status) put(note, empty("No run matches", "Clear the filter to see all runs."));
    else put(note, empty(state.archivedRuns ? "All runs are archived" : "No runs yet", state.archivedRuns ? "Show archived ones with the button above." : `Start one with “make run”; runs in ${state.folder || "the folder of runs"} show up here by themselves.`));
    const running = found.filter((run) => run.status === "running").length;
    setText(summary, `${count(found.length)} in ${state.folder}${running ? `, ${running} running` : ""}`);
    const asked = { q: state.q, status: state.status, archived: state.archived ? "true" : null, limit: 500 };
    csv.href = url("runs", { ...asked, format: "csv" });
    json.href = url("runs", asked);
    remember();
    chosen();
    cursor.refresh();
  }

  /** What has a row, in order: {run, indent} or {group, runs}. */
  function entries(kept) {
    const { of } = COLUMNS.find((column) => column.id === state.sort);
    const ordered = (items, value) => items.sort((first, second) => compareValues(value(first), value(second), state.down) || (first.id < second.id ? -1 : 1));
    if (!state.grouped) return ordered(kept, of).map((run) => ({ run }));
    const groups = new Map();
    for (const run of kept) groups.set(run.group || run.id, [...(groups.get(run.group || run.id) ?? []), run]);
    const mean = ({ runs }) => (typeof of(runs[0]) === "string" ? of(runs[0]) : runs.length > 1 ? meanOf(runs.map(of)).mean : of(runs[0]));
    const items = [...groups].map(([group, runs]) => ({ id: runs[0].id, group, runs: ordered(runs, of) }));
    return ordered(items, mean).flatMap(({ group, runs }) => {
      if (runs.length === 1) return [{ run: runs[0] }];
      return [{ group, runs }, ...(state.open.has(group) ? runs.map((run) => ({ run, indent: true })) : [])];
    });
  }

  function element({ run, indent = false, group, runs }) {
    const key = run ? run.id : `group ${group}`;
    if (!rows.has(key)) rows.set(key, run ? new RunRow(run.id, { state, chosen, edit }) : new GroupRow(group, { state, show, chosen }));
    const row = rows.get(key);
    row.update(run ?? runs, indent);
    return row.element;
  }

  function edit(run) {
    openAnnotation(app, run, (told) => take({ ...state.runs.get(run.id), ...told }));
  }

  function chosen() {
    const n = state.chosen.size;
    if (n) loadPlotly().catch(() => {}); // a comparison is near, whose charts would wait for it
    compare.disabled = n < 2;
    compare.classList.toggle("primary", n >= 2);
    const ids = listed();
    const away = n - ids.filter((id) => state.chosen.has(id)).length; // ticked before the filter said otherwise
    setText(compare, n >= 2 ? `Compare ${n}${away ? `, ${away} not listed` : ""}` : "Compare");
    archive.hidden = !app.token.get() || n === 0;
    setText(archive, n && [...state.chosen].every((id) => state.runs.get(id)?.archived) ? `Take back ${n}` : `Archive ${n}`);
    rows.forEach((row) => row.tick());
    all.checked = ids.length > 0 && ids.every((id) => state.chosen.has(id));
    setText(tickAll, all.checked ? "Tick none" : `Tick all ${count(ids.length)}`);
    if (state.runs.size) remember();
  }

  function chooseAll(on) {
    for (const id of listed()) state.chosen[on ? "add" : "delete"](id);
    chosen();
  }

  /** Runs that have a row, or are in a group that has. */
  function listed() {
    const shown = [...rows.values()].filter((row) => row.element.isConnected);
    return [...new Set(shown.flatMap((row) => (row.runs ? row.runs.map(({ id }) => id) : row.id)))];
  }

  async function load() {
    const runs = new Map();
    let [folder, archivedRuns, next] = ["", 0, null];
    const asked = state.q;
    for (let page = 0; page < PAGES_AT_MOST && (page === 0 || next); page += 1) {
      const answer = await get("runs", { limit: 500, cursor: next, q: asked, archived: state.archived ? "true" : null });
      for (const run of answer.items) runs.set(run.id, run);
      [next, folder, archivedRuns] = [answer.next_cursor, answer.folder, answer.archived];
    }
    if (!app.alive() || asked !== state.q) return;
    for (const [key, row] of rows) if (!row.runs && !runs.has(key)) row.close(), rows.delete(key);
    if (!state.q) for (const id of [...state.chosen]) if (!runs.has(id)) state.chosen.delete(id);
    Object.assign(state, { runs, folder, archivedRuns });
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
        if (app.alive() && !failed && !state.runs.size) put(note, failure(error, () => refresh(0)));
        failed = true;
      }
    }, wait);
  };

  /** What the stream tells of a run that is listed is shown at once; whether another one matches, the service says. */
  let redraw = null;
  const others = new Set(); // told of, asked for, and not among those that match
  function take(run) {
    const known = state.runs.get(run.id);
    if (known.archived !== run.archived || known.note !== run.note || known.tags.join() !== run.tags.join()) refresh();
    state.runs.set(run.id, run);
    redraw ??= setTimeout(() => ((redraw = null), show()), REDRAW_MS);
  }

  /** A run that isn't listed is asked for, unless nothing would come of it. */
  function hear(run) {
    if (state.runs.has(run.id)) take(run);
    else if (!others.has(run.id)) others.add(run.id), refresh();
  }

  const clock = setInterval(() => rows.forEach((row) => row.tick()), 5000);
  const poll = setInterval(() => refresh(0), 20_000);
  app.onLeave(() => [clearInterval(clock), clearInterval(poll), clearTimeout(pending), clearTimeout(redraw), clearTimeout(typing), rows.forEach((row) => row.close())]);
  await load().catch((error) => {
    failed = true;
    put(note, failure(error, () => refresh(0)));
  });
  app.stream(null, { run: (run) => hear(run), removed: () => refresh(0), reset: () => refresh(0), state: (name) => name === "live" && failed && refresh(0) });
}

/** As the address says it: "-age" is the newest first. */
const orderOf = ({ sort, down }) => `${down ? "-" : ""}${sort}`;

/** Missing values last, whichever way. */
function compareValues(first, second, down) {
  const [noFirst, noSecond] = [missing(first), missing(second)];
  if (noFirst || noSecond) return noFirst - noSecond;
  const order = typeof first === "string" ? first.localeCompare(second, "en", { numeric: true }) : first - second;
  return down ? -order : order;
}

const missing = (value) => Number(value === null || value === undefined || Number.isNaN(value));
