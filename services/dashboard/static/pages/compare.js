// Runs on shared axes: one table is the legend, everything that is shown is in the address.

import { keepInAddress, oneOf } from "../address.js";
import { at, get } from "../api.js";
import { ChartGroup } from "../charts.js";
import { Adder } from "../compare/adder.js";
import { along, AXES, basis, summed } from "../compare/axes.js";
import { groupsOf, meanSeries } from "../compare/bands.js";
import { Colours, styleOf } from "../compare/colours.js";
import { matches } from "../compare/filter.js";
import { following, take } from "../compare/live.js";
import { MetricSearch } from "../compare/search.js";
import { Against, settingsCard, settingsThatDiffer } from "../compare/settings.js";
import { standOut } from "../compare/standout.js";
import { RunTable } from "../compare/table.js";
import { lowIsGood, metricTitles } from "../compare/titles.js";
import { saveCsv, saveJson, savePng, seriesRows } from "../downloads.js";
import { empty, figure, h, loading, number, put, setText } from "../dom.js";
import { byName } from "../panels.js";
import { flatten } from "../run/config.js";
import { Backlog, emptySeries, toSeries } from "../series.js";
import { inOrder } from "../statistics.js";

const POINTS = 400;
const FIRST = [/^eval\/m\/solve_rate$/, "reward/mean", "solve_rate", "loss", "entropy", "grad_norm", "ratio/max", "machine/tokens_per_s", "time/iteration_s"];
const SPANS = [[0, "Raw"], [5, "5"], [20, "20"], [100, "100"]];
const TYPED_MS = 200;
const BEST = "eval/m/solve_rate"; // of which the service knows the best

export async function render(root, params, app) {
  const { query } = params;
  const ids = [...new Set(query.getAll("run"))];
  app.title([["Runs", "#/runs"], ["Compare", null]]);
  if (ids.length < 1) return void put(root, empty("Nothing to compare", "Choose two or more runs in the list of runs."));
  const answers = await counted(root, ids.map((id) => get(at`runs/${id}`)));
  if (!app.alive()) return;
  const lost = ids.filter((_, index) => answers[index].status === "rejected");
  const runs = answers.flatMap((answer) => (answer.status === "rejected" ? [] : [asItem(answer.value)]));
  if (!runs.length) throw answers[0].reason;

  const [first, last] = [Number(query.get("from")), Number(query.get("to"))];
  const state = {
    metrics: query.getAll("m"),
    axis: oneOf(query, "x", AXES.map(({ id }) => id), "iteration"),
    span: Number(oneOf(query, "smooth", SPANS.map(([span]) => String(span)), "0")),
    hidden: new Set(query.getAll("hide")),
    q: query.get("q") ?? "",
    colour: query.get("colour") ?? "",
    only: ids.includes(query.get("only")) ? query.get("only") : null,
    bands: query.get("bands") === "1",
    focus: query.get("focus") ?? "",
    sort: { column: oneOf(query, "sort", ["name", "newest", "best"], ""), down: query.get("up") !== "1" },
    setting: query.get("setting") ?? "",
    against: query.get("against") ?? "",
  };
  const group = new ChartGroup({ onZoom: (range) => keepInAddress({ from: range?.[0].toPrecision(6), to: range?.[1].toPrecision(6) }) });
  if (query.has("from") && last > first) group.range = [first, last];
  app.onTheme(() => (group.retheme(), showScatter()));
  app.onLeave(() => group.close());
  const moveCursor = group.setCursor.bind(group);
  group.setCursor = (x) => (moveCursor(x), showTableSoon());

  const { titleOf, panelOf, formatFor } = metricTitles(names);
  const charts = h("div.grid");
  const shown = []; // {name, chart}
  let hovered = null;
  let differing = []; // keys of settings
  const table = new RunTable({ toggle, isolate, remove, highlight, sort: sortBy, focus: (name) => change({ focus: name }, showTable), running: ({ id }) => live.has(id) });
  const live = following(app, runs, { fetchInto, changed: feedAll });
  const title = h("h1");
  const smoothing = h("div.segments", { role: "group", ariaLabel: "Smoothing" });
  const axes = h("div.segments", { role: "group", ariaLabel: "Along" });
  const bands = h("button.button", { type: "button", title: "Runs whose settings differ in the seed alone as their mean, with its 95 % interval as a band (b)", onclick: () => change({ bands: !state.bands }, restyle) }, "Seed bands");
  const all = h("button.button", { type: "button", hidden: true, onclick: () => showAll() }, "Show all");
  const filter = h("input.filter", { type: "search", placeholder: "Runs: lr=0.003", title: "Every word must be in a run's name, status, task, method, host, recipe, tags or note, or be a setting of it: lr=0.003, learner.lr=3e-3, seed=2", ariaLabel: "Filter runs", value: state.q, oninput: () => typed() });
  const colours = new Colours({ chosen: (values) => change(values, restyle) });
  const search = new MetricSearch({ names, titleOf, isShown: (name) => state.metrics.includes(name), pick });
  const adder = new Adder({ has: (id) => runs.some((item) => item.id === id), add: addRun });
  const against = new Against({ chosen: (values) => change(values, showScatter), isolate });
  const differences = h("div");
  table.element.firstChild.append(all);
  table.element.firstChild.after(colours.key);
  table.element.append(adder.element);
  put(
    root,
    h("div.head", null, title, h("div.row", null, h("button.button", { type: "button", title: "All points of all charts", onclick: () => saveCsv("compare", everything()) }, "CSV"), h("button.button", { type: "button", title: "All points of all charts, with the runs' settings", onclick: () => saveJson("compare", asJson()) }, "JSON"))),
    lost.length > 0 && h("div.banner", { dataset: { kind: "bad" } }, `Left out, because they can't be read: ${lost.join(", ")}`),
    h("div.row.chart-tools", null, search.element, filter, h("div.row", null, h("span.note", null, "Along"), axes), h("div.row", null, h("span.note", null, "Smoothing"), smoothing), bands, colours.element),
    h("div.compare", null, table.element, h("div.compare-charts", null, charts)),
    against.element,
    differences,
  );
  app.search(search.field);
  app.keys({
    b: [() => bands.hidden || bands.click(), "seeds as bands"],
    z: [() => (group.zoom(null), group.charts.forEach((chart) => chart.changed())), "the whole course"],
    s: [() => setSpan(SPANS[(SPANS.findIndex(([span]) => span === state.span) + 1) % SPANS.length][0]), "more smoothing, or none"],
    x: [() => setAxis(AXES[(AXES.findIndex(({ id }) => id === state.axis) + 1) % AXES.length].id), "along iterations, seconds, ..."],
  });
  app.onLeave(() => search.close());

  // Names

  function names() {
    return [...new Set(runs.flatMap((item) => item.names))];
  }

  // State

  function change(values, then) {
    Object.assign(state, values);
    remember();
    then();
  }

  function remember() {
    keepInAddress({ run: runs.map(({ id }) => id), m: isUsual() ? [] : state.metrics, x: state.axis === "iteration" ? null : state.axis, smooth: state.span || null, hide: [...state.hidden], q: state.q, colour: state.colour, only: state.only, bands: state.bands, focus: state.focus === usualFocus() ? null : state.focus, sort: state.sort.column, up: state.sort.column && !state.sort.down, setting: state.setting, against: state.against });
  }

  const usual = () => FIRST.flatMap((pattern) => names().filter((item) => (typeof pattern === "string" ? item === pattern : pattern.test(item))).sort(byName));
  const isUsual = () => state.metrics.join() === usual().join();
  const usualFocus = () => [BEST, "reward/mean", "loss"].find((name) => names().includes(name)) ?? names()[0] ?? "";
  const listed = () => runs.filter((item) => item.id === state.only || matches(item, state.q));
  const isShown = (item) => (state.only ? item.id === state.only : !state.hidden.has(item.id) && matches(item, state.q));

  function setSpan(span) {
    group.setSmoothing(span);
    change({ span }, () => put(smoothing, SPANS.map(([value, text]) => h("button", { type: "button", ariaPressed: String(value === span), onclick: () => setSpan(value) }, text))));
  }

  async function setAxis(axis) {
    if (axis !== state.axis) group.range = null;
    keepInAddress(axis === state.axis ? {} : { from: null, to: null });
    change({ axis }, () => {});
    await load(summed(axis));
    if (!app.alive()) return;
    group.extent = [Infinity, -Infinity];
    for (const { chart } of shown) chart.spec.along = AXES.find(({ id }) => id === axis).along;
    root.dataset.along = AXES.find(({ id }) => id === axis).along;
    feedAll();
    showAxes();
  }

  function showAxes() {
    put(axes, AXES.map(({ id, title: text, hint }) => {
      const without = runs.filter((item) => !has(id, item));
      const why = without.length ? `Not known of ${without.map((item) => item.id).slice(0, 3).join(", ")}${without.length > 3 ? ", …" : ""}` : hint;
      return h("button", { type: "button", dataset: { axis: id }, ariaPressed: String(id === state.axis), disabled: without.length > 0, title: why ?? "", onclick: () => setAxis(id) }, text);
    }));
  }

  const has = (axis, item) => (summed(axis).length ? summed(axis).every((name) => item.names.includes(name)) : Boolean(basis(axis, item.config ?? {}, null)));

  function toggle(id) {
    if (state.only) {
      for (const item of runs) if (item.id !== state.only) state.hidden.add(item.id);
      state.only = null;
    }
    if (!state.hidden.delete(id)) state.hidden.add(id);
    change({}, feedAll);
  }

  function isolate(id) {
    change({ only: state.only === id ? null : id }, feedAll);
  }

  function remove(id) {
    runs.splice(runs.findIndex((item) => item.id === id), 1);
    state.hidden.delete(id);
    if (state.only === id) state.only = null;
    if (!runs.length) return (location.hash = "#/runs");
    change({}, restyle);
    showAxes();
  }

  async function addRun(id) {
    try {
      const item = asItem(await get(at`runs/${id}`));
      runs.push(item);
      remember();
      await Promise.all([loadConfig(item), load([...state.metrics, ...summed(state.axis)])]);
      live.follow(item);
      restyle();
      showAxes();
    } catch (error) {
      app.toast(error.detail ?? error.message, "error");
    }
  }

  let typing = null;
  app.onLeave(() => clearTimeout(typing));
  function typed() {
    clearTimeout(typing);
    typing = setTimeout(() => change({ q: filter.value.trim() }, () => (feedAll(), showSettings())), TYPED_MS);
  }

  function showAll() {
    state.hidden.clear();
    filter.value = "";
    change({ only: null, q: "" }, () => (feedAll(), showSettings()));
  }

  function sortBy(column) {
    const down = state.sort.column === column ? !state.sort.down : column !== "name";
    change({ sort: { column, down } }, showTable);
  }

  // Metrics

  function pick(name) {
    if (state.metrics.includes(name)) return drop(name);
    state.metrics.push(name);
    change({}, () => {
      draw(name);
      load([name]).catch((error) => app.toast(error.message, "error"));
    });
  }

  function drop(name) {
    const index = shown.findIndex((item) => item.name === name);
    if (index >= 0) group.remove(shown.splice(index, 1)[0].chart);
    change({ metrics: state.metrics.filter((item) => item !== name) }, showTable);
  }

  function draw(name) {
    const panel = panelOf(name);
    const chart = group.add(charts, { id: name, title: titleOf(name), hint: [panel?.hint, name].filter(Boolean).join("\n"), unit: panel?.unit, format: formatFor(name), zero: panel?.zero, along: AXES.find(({ id }) => id === state.axis).along });
    const item = { name, chart };
    shown.push(item);
    const tool = (text, hint, onclick) => h("button.icon-button.tool", { type: "button", title: hint, onclick }, text);
    chart.element.querySelector("header").append(
      tool("PNG", "This chart as a picture", () => picture(item).catch((error) => app.toast(error.message, "error"))),
      tool("CSV", "These points as a table", () => saveCsv(name, seriesRows(name, chart.spec.series, chart.spec.along))),
      tool("✕", "Take this chart away", () => drop(name)),
    );
    chart.element.addEventListener("pointerenter", () => (hovered = name));
    chart.element.addEventListener("pointerleave", () => ((hovered = null), showTable()));
    feed(item);
  }

  async function picture({ name, chart }) {
    const styles = getComputedStyle(document.body);
    const entries = chart.spec.series.map((series) => ({ label: series.label, color: chart.color(series), dash: series.dash }));
    await savePng(name, chart.plot, { title: chart.spec.title, entries, ground: getComputedStyle(chart.element).backgroundColor, text: styles.color });
  }

  // Data

  let feeding = null;
  async function load(wanted) {
    await Promise.all(runs.map(async (item) => {
      const missing = wanted.filter((name) => item.names.includes(name) && !item.data.has(name));
      if (missing.length) await fetchInto(item, missing);
      feeding ??= setTimeout(() => ((feeding = null), app.alive() && feedAll()), 100 + 20 * runs.length); // curves come as they arrive, which is work for each of them
    }));
    clearTimeout(feeding);
    feeding = null;
    if (app.alive()) feedAll();
  }

  async function fetchInto(item, wanted) {
    await item.backlog.during(() => get(at`runs/${item.id}/metrics`, { name: wanted, points: POINTS }), ({ series }, late) => {
      for (const name of wanted) item.data.set(name, toSeries(series[name]));
      for (const update of late) take(item, update);
    });
  }

  async function loadConfig(item) {
    item.config = flatten((await get(at`runs/${item.id}/config`)).config);
  }

  const drawn = (item, name) => along(item.data.get(name) ?? emptySeries(), basis(state.axis, item.config ?? {}, item.data.get(summed(state.axis)[0])), state.axis);

  function feed({ name, chart }) {
    const visible = runs.filter(isShown);
    const sparse = name.startsWith("eval/"); // which are not smoothed
    if (!state.bands) return chart.set(visible.map((item) => ({ key: item.id, label: item.id, sparse, ...item.style, data: drawn(item, name) })));
    chart.set(groupsOf(visible).map(({ runs: items }) => ({ key: items[0].id, label: items.length > 1 ? `${items[0].id} and ${items.length - 1} more` : items[0].id, sparse, ...items[0].style, data: items.length > 1 ? meanSeries(items.map((item) => drawn(item, name))) : drawn(items[0], name) })));
  }

  function feedAll() {
    shown.forEach(feed);
    all.hidden = !state.only && !state.hidden.size && !state.q;
    bands.ariaPressed = String(state.bands);
    bands.hidden = groupsOf(runs).every(({ runs: items }) => items.length < 2);
    const visible = runs.filter(isShown).length;
    setText(title, visible < runs.length ? `${visible} of ${runs.length} runs` : `${runs.length} runs`);
    showTable();
    showScatter();
  }

  /** Colours anew: by run, by group of seeds or by a setting. */
  function restyle() {
    group.extent = [Infinity, -Infinity];
    differing = settingsThatDiffer(runs.map((item) => item.config));
    colours.show(runs, { differing, asked: state.colour, bands: state.bands });
    feedAll();
    showSettings();
  }

  const showSettings = () => put(differences, settingsCard(listed(), differing));

  // Table, scatter, settings

  function valueOf(item, name) {
    if (group.cursor === null || hovered === null) return number(item.run.latest[name]?.value ?? null);
    const data = drawn(item, name);
    const index = data.x.findLastIndex((x) => x <= group.cursor);
    return index < 0 || group.cursor > data.x.at(-1) ? null : data.y[index];
  }

  function bestOf(item, name) {
    if (name === BEST && item.run.held_out_best !== null) return { value: number(item.run.held_out_best), iteration: item.run.held_out_best_iteration };
    const data = item.data.get(name);
    if (!data?.x.length) return null;
    const values = lowIsGood(name) ? data.low : data.high;
    const finite = values.map((value, index) => [value, index]).filter(([value]) => value !== null);
    if (!finite.length) return null;
    const [value, index] = finite.reduce((best, one) => ((lowIsGood(name) ? one[0] < best[0] : one[0] > best[0]) ? one : best));
    return { value, iteration: data.x[index] };
  }

  let drawing = null;
  function showTableSoon() {
    drawing ??= requestAnimationFrame(() => ((drawing = null), showTable())); // a pointer moves more often than anybody sees
  }

  function showTable() {
    const name = hovered && group.cursor !== null ? hovered : state.focus;
    const items = listed().map((item) => ({ ...item, hidden: !isShown(item), newest: valueOf(item, name), best: bestOf(item, name), differs: differing.map((key) => [key, item.config?.[key]]).filter(([, value]) => value !== undefined) }));
    const { column, down } = state.sort;
    if (column) items.sort((one, two) => (column === "name" ? (down ? -1 : 1) * one.id.localeCompare(two.id, "en", { numeric: true }) : inOrder(column === "best" ? one.best?.value : one.newest, column === "best" ? two.best?.value : two.newest, down)));
    const offered = [...new Set([state.focus, ...state.metrics, BEST])].filter((each) => names().includes(each));
    table.show(items, { names: offered.map((each) => [each, titleOf(each)]), focused: state.focus, sorted: state.sort, format: formatFor(name), at: hovered && group.cursor !== null ? `${titleOf(name)} at ${figure(group.cursor)}` : null });
  }

  function showScatter() {
    const metrics = [...new Set([BEST, ...state.metrics])].filter((name) => names().includes(name)).map((name) => [name, titleOf(name)]);
    const value = (item, which, name) => (which === "best" ? bestOf(item, name)?.value : number(item.run.latest[name]?.value ?? null));
    against.show(runs.filter(isShown), { settings: differing, metrics, setting: state.setting, asked: state.against, value, formatFor });
  }

  // The pointed-at run stands out

  function highlight(id) {
    const seeds = id && state.bands ? groupsOf(runs.filter(isShown)).find(({ runs: items }) => items.some((each) => each.id === id)) : null;
    for (const { chart } of shown) standOut(chart, seeds ? seeds.runs[0].id : id);
  }

  // Export

  const everything = () => shown.flatMap(({ name, chart }) => seriesRows(name, chart.spec.series, chart.spec.along));

  function asJson() {
    return { along: AXES.find(({ id }) => id === state.axis).along, runs: runs.map((item) => ({ id: item.id, status: item.run.status, seed: item.run.seed, recipe: item.run.recipe, settings: item.config, best: bestOf(item, state.focus) })), series: everything() };
  }

  // Begin

  if (!state.metrics.length) state.metrics = usual();
  state.metrics = state.metrics.filter((name) => names().includes(name));
  if (!names().includes(state.focus)) state.focus = usualFocus();
  if (runs.some((item) => summed(state.axis).some((name) => !item.names.includes(name)))) state.axis = "iteration";
  group.span = state.span;
  setSpan(state.span);
  root.dataset.along = AXES.find(({ id }) => id === state.axis).along;
  restyle();
  for (const name of state.metrics) draw(name);
  const wanted = [...new Set([...state.metrics, ...summed(state.axis)])];
  // Settings are asked for first: they are small, and colours, search and the table's second line are made of them.
  const configs = Promise.allSettled(runs.map(loadConfig)).then(() => app.alive() && (restyle(), showAxes()));
  await Promise.all([configs, load(wanted)]);
  if (app.alive()) runs.forEach(live.follow);
}

/** Their outcomes; until then the page says how many are there. */
async function counted(root, requests) {
  const waiting = loading("runs");
  let there = 0;
  put(root, waiting);
  for (const request of requests) request.finally(() => setText(waiting.lastChild, `Loading runs: ${(there += 1)} of ${requests.length}…`)).catch(() => {});
  return Promise.allSettled(requests);
}

const asItem = (run) => ({ id: run.id, run, names: Object.keys(run.latest), config: null, style: styleOf(0), data: new Map(), backlog: new Backlog() });
