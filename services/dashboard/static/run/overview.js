// The overview of a run: all its curves, the ledger, the newest events, checkpoints.

import { at, get } from "../api.js";
import { ChartGroup } from "../charts.js";
import { ago, clock, count, empty, h, number, put } from "../dom.js";
import { panelsFor } from "../panels.js";
import { append, Backlog, emptySeries, nearest, toSeries } from "../series.js";
import { eventCard } from "./events.js";
import { ledgerView } from "./ledger.js";

const POINTS = 500;
const NAMES_AT_ONCE = 40;
const TOO_MANY = 3 * POINTS;
const SPANS = [[0, "Raw"], [5, "5"], [20, "20"], [100, "100"]];

export async function overviewTab(host, runId, app) {
  const data = new Map(); // name -> series, the whole run
  const backlog = new Backlog();
  let zoomed = null; // {range, data} where the reader looks closer
  let names = new Set();
  let panels = [];
  let dirty = new Set();
  let timer = null;
  const group = new ChartGroup({ onZoom: (range) => closer(range) });
  app.onTheme(() => group.retheme());
  app.onLeave(() => (group.close(), clearTimeout(timer)));

  const smoothing = h("div.segments", { role: "group", ariaLabel: "Smoothing" });
  const reset = h("button.button", { type: "button", hidden: true, onclick: () => group.zoom(null) }, "Whole run");
  const charts = h("div.grid");
  const others = h("div.grid");
  const otherPart = h("div.stack", { hidden: true }, h("div.section-title", null, h("h2", null, "Other metrics"), h("span.note", null, "everything else that the run writes")), others);
  const none = h("section.card", { hidden: true }, empty("No metrics yet", "Curves begin with the first finished iteration."));
  const ledger = ledgerView();
  const events = eventCard(runId);
  const checkpoints = checkpointCard();
  const tools = h("div.row.chart-tools", null, h("span.note", null, "Smoothing, iterations"), smoothing, reset, h("span.note.wide-only", null, "drag to zoom, double click for all; arrow keys move the cursor in a chart"));
  put(host, tools, none, charts, h("div.two", null, h("div.stack", null, ledger.element, checkpoints.element), events.element), otherPart);
  setSpan(0);
  app.keys({
    s: [() => setSpan(SPANS[(SPANS.findIndex(([span]) => span === group.span) + 1) % SPANS.length][0]), "more smoothing, or none"],
    l: [() => group.charts.filter((chart) => !chart.logButton.hidden).forEach((chart) => chart.toggleLog()), "logarithmic scale for all charts"],
    z: [() => group.zoom(null), "zoom out to the whole run"],
  });

  function setSpan(span) {
    group.setSmoothing(span);
    put(smoothing, SPANS.map(([value, text]) => h("button", { type: "button", ariaPressed: String(value === span), onclick: () => setSpan(value) }, text)));
  }

  function build() {
    const next = panelsFor([...names]);
    for (const panel of next) {
      const old = panels.find((item) => item.id === panel.id);
      panel.chart = old?.chart ?? group.add(panel.other ? others : charts, { ...panel, format: panel.format });
    }
    for (const old of panels) if (!next.some((panel) => panel.id === old.id)) group.remove(old.chart);
    panels = next;
    for (const kind of [false, true]) (kind ? others : charts).append(...panels.filter((panel) => panel.other === kind).map((panel) => panel.chart.element));
    otherPart.hidden = !others.children.length;
    none.hidden = panels.length > 0;
    tools.hidden = panels.length === 0;
    for (const panel of panels) feed(panel);
  }

  function feed(panel) {
    const source = (name) => zoomed?.data.get(name) ?? data.get(name) ?? emptySeries();
    const list = panel.names.map((name, index) => ({ key: name, label: panel.label(name), color: index + 1, dash: index >= 8 ? "dash" : "solid", data: source(name) }));
    if (panel.total) list.push({ key: panel.total, label: list.length ? "rest" : "iteration", color: 8, data: rest(source(panel.total), list) });
    panel.chart.set(list);
  }

  async function fetchSeries(wanted, query = {}) {
    const found = new Map();
    for (let begin = 0; begin < wanted.length; begin += NAMES_AT_ONCE) {
      const part = wanted.slice(begin, begin + NAMES_AT_ONCE);
      const { series } = await get(at`runs/${runId}/metrics`, { name: part, points: POINTS, ...query });
      for (const name of part) found.set(name, series[name] ? toSeries(series[name]) : emptySeries());
    }
    return found;
  }

  async function fetchAll() {
    const answer = await get(at`runs/${runId}/metric-names`);
    const wanted = panelsFor(answer.names).flatMap((panel) => [...panel.names, ...(panel.total ? [panel.total] : [])]);
    return { all: answer.names, found: await fetchSeries(wanted) };
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
  }

  async function loadRest() {
    await Promise.all([get(at`runs/${runId}/ledger`).then(showLedger), events.load(), checkpoints.load(runId)]);
  }

  async function closer(range) {
    reset.hidden = range === null;
    if (range === null) {
      zoomed = null;
      return panels.forEach(feed);
    }
    const [first, last] = [Math.max(0, Math.floor(range[0])), Math.max(0, Math.ceil(range[1]))];
    if (![...data.values()].some((series) => series.coarse)) return;
    const found = await fetchSeries([...data.keys()], { first, last }).catch(() => null);
    if (!found || group.range !== range) return;
    zoomed = { range, data: found };
    panels.forEach(feed);
  }

  function flush() {
    timer = null;
    const touched = panels.filter((panel) => [...panel.names, panel.total].some((name) => dirty.has(name)));
    dirty = new Set();
    if ([...data.values()].some((series) => series.x.length > TOO_MANY)) load().catch(() => {});
    else touched.forEach(feed);
    get(at`runs/${runId}/ledger`).then(showLedger, () => {});
    checkpoints.load(runId).catch(() => {});
  }

  await load();
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

function checkpointCard() {
  const list = h("ol.checkpoints");
  const note = h("p.note", null, "None yet");
  const element = h("section.card", null, h("header", null, h("h2", null, "Checkpoints")), h("div.body", null, note, list));
  return {
    element,
    load: async (runId) => {
      const { items } = await get(at`runs/${runId}/checkpoints`);
      note.hidden = items.length > 0;
      put(list, items.toReversed().slice(0, 6).map((item) =>
        h("li", { title: item.path }, h("b", null, `Iteration ${count(item.iteration)}`), h("span.note", { title: clock(item.time, { date: true }) }, ago(item.time)), h("span.mono.muted.clip", null, item.path))));
    },
  };
}
