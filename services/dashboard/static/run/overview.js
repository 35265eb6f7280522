// The overview of a run: all its curves by section, checkpoints, the newest events, the ledger.

import { keepInAddress } from "../address.js";
import { at, get } from "../api.js";
import { ChartGroup } from "../charts.js";
import { empty, h, number, put } from "../dom.js";
import { panelsFor } from "../panels.js";
import { append, Backlog, emptySeries, nearest, toSeries, wilson } from "../series.js";
import { checkpointCard } from "./checkpoints.js";
import { eventCard } from "./events.js";
import { ledgerView } from "./ledger.js";
import { infoOf, metricReference } from "./reference.js";
import { chartSections, smoothing } from "./sections.js";

const POINTS = 500;
const NAMES_AT_ONCE = 40;
const TOO_MANY = 3 * POINTS;
const SPANS = [[0, "Raw"], [5, "5"], [20, "20"], [100, "100"]];
const PROBLEMS = "eval/problems";

export async function overviewTab(host, runId, app, query) {
  const data = new Map(); // name -> series, the whole run
  const backlog = new Backlog();
  let zoomed = null; // {range, data} where the reader looks closer
  let names = new Set();
  let panels = [];
  let reference = [];
  let dirty = new Set();
  let timer = null;
  const logged = query.getAll("log");
  const group = new ChartGroup({ onZoom: (range) => closer(range), onLog: () => keepInAddress({ log: group.charts.filter((chart) => chart.log).map((chart) => chart.spec.id) }) });
  app.onTheme(() => group.retheme());
  app.onLeave(() => (group.close(), clearTimeout(timer)));

  const spans = h("div.segments", { role: "group", ariaLabel: "Smoothing" });
  const reset = h("button.button", { type: "button", hidden: true, onclick: () => group.zoom(null) }, "Whole run");
  const none = h("section.card", { hidden: true }, empty("No metrics yet", "Curves begin with the first finished iteration."));
  const sections = chartSections();
  const ledger = ledgerView();
  const events = eventCard(runId);
  const checkpoints = checkpointCard();
  const tools = h("div.row.chart-tools", null, h("span.note", null, "Smoothing, iterations"), spans, reset, h("span.note.wide-only", null, "drag to zoom, double click for all; arrow keys move the cursor in a chart"));
  const internals = sections.element("internals");
  internals.querySelector(".more").append(ledger.element);
  put(host, tools, none, sections.element("learning"), h("div.two", null, checkpoints.element, events.element), ["policy health", "throughput", "other"].map(sections.element), internals);
  const asked = Number(query.get("smooth"));
  setSpan(query.has("smooth") && SPANS.some(([span]) => span === asked) ? asked : smoothing.get());
  const [first, last] = [Number(query.get("from")), Number(query.get("to"))];
  if (query.has("from") && last > first) group.range = [first, last];
  app.keys({
    s: [() => choose(SPANS[(SPANS.findIndex(([span]) => span === group.span) + 1) % SPANS.length][0]), "more smoothing, or none"],
    l: [() => group.charts.filter((chart) => !chart.logButton.hidden).forEach((chart) => chart.toggleLog()), "logarithmic scale for all charts"],
    z: [() => group.zoom(null), "zoom out to the whole run"],
  });

  function setSpan(span) {
    group.setSmoothing(span);
    put(spans, SPANS.map(([value, text]) => h("button", { type: "button", ariaPressed: String(value === span), onclick: () => choose(value) }, text)));
  }

  function choose(span) {
    setSpan(span);
    smoothing.set(span);
    keepInAddress({ smooth: span || "0" });
  }

  function build() {
    const next = panelsFor([...names]);
    const aside = h("div");
    for (const panel of next) {
      const old = panels.find((item) => item.id === panel.id);
      panel.chart = old?.chart ?? group.add(aside, { ...panel, log: logged.includes(panel.id), info: infoOf(reference, [...panel.names, ...(panel.total ? [panel.total] : [])]) });
    }
    for (const old of panels) if (!next.some((panel) => panel.id === old.id)) group.remove(old.chart);
    panels = next;
    none.hidden = panels.length > 0;
    tools.hidden = panels.length === 0;
    for (const panel of panels) feed(panel);
    sections.place(panels, reference);
  }

  function feed(panel) {
    const source = (name) => zoomed?.data.get(name) ?? data.get(name) ?? emptySeries();
    const list = panel.names.map((name, index) => ({
      key: name,
      label: panel.label(name),
      color: index + 1,
      dash: index >= 8 ? "dash" : "solid",
      data: source(name),
      sparse: panel.sparse?.(name) ?? false,
      bounds: panel.id === "eval" ? intervals(source(name), source(PROBLEMS)) : null,
    }));
    if (panel.total) list.push({ key: panel.total, label: list.length ? "rest" : "iteration", color: 8, data: rest(source(panel.total), list) });
    panel.chart.set(list);
  }

  async function fetchSeries(wanted, limits = {}) {
    const found = new Map();
    for (let begin = 0; begin < wanted.length; begin += NAMES_AT_ONCE) {
      const part = wanted.slice(begin, begin + NAMES_AT_ONCE);
      const { series } = await get(at`runs/${runId}/metrics`, { name: part, points: POINTS, ...limits });
      for (const name of part) found.set(name, series[name] ? toSeries(series[name]) : emptySeries());
    }
    return found;
  }

  async function fetchAll() {
    const answer = await get(at`runs/${runId}/metric-names`);
    const wanted = panelsFor(answer.names).flatMap((panel) => [...panel.names, ...(panel.total ? [panel.total] : [])]);
    return { all: answer.names, found: await fetchSeries([...wanted, ...answer.names.filter((name) => name === PROBLEMS)]) };
  }

  async function load() {
    await backlog.during(fetchAll, ({ all, found }, late) => {
      if (!app.alive()) return;
      names = new Set(all);
      data.clear();
      for (const [name, series] of found) data.set(name, series);
      for (const update of late) take(update);
      build();
    });
  }

  /** True when it brings a metric that was not there. */
  function take(update) {
    let fresh = false;
    for (const [name, value] of Object.entries(update.values)) {
      if (!names.has(name)) fresh = Boolean(names.add(name));
      if (!data.has(name)) data.set(name, emptySeries());
      append(data.get(name), update.iteration, value);
      dirty.add(name);
    }
    return fresh;
  }

  function showLedger(state) {
    ledger.element.hidden = state.iteration === null && names.size > 0; // a fine-tuning run has none
    ledger.update(state);
    sections.place(panels, reference);
  }

  async function loadRest() {
    await Promise.all([get(at`runs/${runId}/ledger`).then(showLedger), events.load(), checkpoints.load(runId)]);
  }

  async function closer(range) {
    reset.hidden = range === null;
    keepInAddress({ from: range?.[0].toPrecision(6), to: range?.[1].toPrecision(6) });
    if (range === null) {
      zoomed = null;
      return panels.forEach(feed);
    }
    const [from, to] = [Math.max(0, Math.floor(range[0])), Math.max(0, Math.ceil(range[1]))];
    if (![...data.values()].some((series) => series.coarse)) return;
    const found = await fetchSeries([...data.keys()], { first: from, last: to }).catch(() => null);
    if (!found || group.range !== range) return;
    zoomed = { range, data: found };
    panels.forEach(feed);
  }

  function flush() {
    timer = null;
    const touched = panels.filter((panel) => [...panel.names, panel.total].some((name) => dirty.has(name)));
    dirty = new Set();
    if ([...data.values()].some((series) => series.x.length > TOO_MANY)) load().catch(() => {});
    else {
      touched.forEach(feed);
      sections.place(panels, reference);
    }
    get(at`runs/${runId}/ledger`).then(showLedger, () => {});
    checkpoints.load(runId).catch(() => {});
  }

  reference = await metricReference();
  await load();
  if (group.range) closer(group.range);
  await loadRest();
  return {
    event: events.add,
    reload: () => Promise.all([load(), loadRest()]).catch(() => {}),
    metrics: (update) => {
      backlog.push(update);
      if (take(update)) build();
      timer ??= setTimeout(flush, 400);
    },
  };
}

/** Wilson's intervals of rates over so many problems; none for points that stand for several evaluations. */
function intervals(rates, problems) {
  if (rates.coarse || !problems.x.length) return null;
  return rates.y.map((rate, index) => {
    const n = problems.y[nearest(problems, rates.x[index])];
    return rate === null || !(n > 0) || rate < 0 || rate > 1 ? null : wilson(rate, n);
  });
}

/** What the stages leave of the total. */
function rest(total, stages) {
  const left = emptySeries();
  total.x.forEach((x, index) => {
    const claimed = stages.reduce((sum, { data }) => {
      const at = nearest(data, x);
      return sum + (at >= 0 && data.x[at] === x ? number(data.y[at]) ?? 0 : 0);
    }, 0);
    append(left, x, total.y[index] === null ? null : Math.max(0, total.y[index] - claimed));
  });
  return left;
}
