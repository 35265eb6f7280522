// Two or more runs on shared axes, and the settings in which they differ.

import { at, get } from "../api.js";
import { ChartGroup, DASHES } from "../charts.js";
import { count, empty, figure, h, percent, pill, put } from "../dom.js";
import { byName, panelsFor } from "../panels.js";
import { append, Backlog, emptySeries, toSeries } from "../series.js";
import { differenceTable, flatten } from "../run/config.js";

const POINTS = 500;
const FIRST = ["reward/mean", "solve_rate", /^eval\/.*solve_rate$/, "loss", "entropy", "grad_norm", "ratio/max", "machine/tokens_per_s", "time/iteration_s"];
const SPANS = [[0, "Raw"], [5, "5"], [20, "20"], [100, "100"]];

export async function render(root, params, app) {
  const ids = [...new Set(params.query.getAll("run"))];
  app.title([["Runs", "#/runs"], ["Compare", null]]);
  if (ids.length < 2) return void put(root, empty("Nothing to compare", "Choose two or more runs in the list of runs."));
  const answers = await Promise.allSettled(ids.map((id) => Promise.all([get(at`runs/${id}`), get(at`runs/${id}/config`), get(at`runs/${id}/metric-names`)])));
  if (!app.alive()) return;
  const lost = ids.filter((_, index) => answers[index].status === "rejected");
  const runs = answers.flatMap((answer, index) => (answer.status === "rejected" ? [] : [{ id: ids[index], style: styleOf(index), run: answer.value[0], config: flatten(answer.value[1].config), names: answer.value[2].names, data: new Map(), backlog: new Backlog() }]));
  if (!runs.length) throw answers[0].reason;

  const group = new ChartGroup();
  app.onTheme(() => group.retheme());
  app.onLeave(() => group.close());
  const names = [...new Set(runs.flatMap((run) => run.names))];
  const titles = new Map(panelsFor(names).flatMap((panel) => [...panel.names, panel.total].filter(Boolean).map((name) => [name, panel])));
  const charts = h("div.grid");
  const shownNames = [];
  const more = h("select", { ariaLabel: "Add a metric", onchange: () => (add(more.value), (more.value = "")) });
  const smoothing = h("div.segments", { role: "group", ariaLabel: "Smoothing" });
  put(
    root,
    h("div.head", null, h("h1", null, `${runs.length} runs`), h("div.row.chart-tools", null, h("span.note", null, "Smoothing, iterations"), smoothing, more)),
    lost.length > 0 && h("div.banner", { dataset: { kind: "bad" } }, `Left out, because they can't be read: ${lost.join(", ")}`),
    legend(runs),
    charts,
    differences(runs),
  );
  setSpan(0);
  for (const pattern of FIRST) for (const name of names.filter((item) => (typeof pattern === "string" ? item === pattern : pattern.test(item))).sort(byName)) add(name);
  choices();

  function setSpan(span) {
    group.setSmoothing(span);
    put(smoothing, SPANS.map(([value, text]) => h("button", { type: "button", ariaPressed: String(value === span), onclick: () => setSpan(value) }, text)));
  }

  function choices() {
    put(more, h("option", { value: "" }, "Add a metric…"), names.filter((name) => !shownNames.some((item) => item.name === name)).sort().map((name) => h("option", { value: name }, name)));
  }

  function add(name) {
    if (!name || shownNames.some((item) => item.name === name)) return;
    const panel = titles.get(name);
    const chart = group.add(charts, { id: name, title: name, format: panel?.format ?? figure, zero: panel?.zero });
    const item = { name, chart };
    shownNames.push(item);
    choices();
    load(item).catch((error) => app.toast(error.message, "error"));
  }

  async function load(item) {
    await Promise.all(runs.map(async (run) => {
      if (run.data.has(item.name) || !run.names.includes(item.name)) return;
      await run.backlog.during(() => get(at`runs/${run.id}/metrics`, { name: [item.name], points: POINTS }), ({ series }, late) => {
        run.data.set(item.name, toSeries(series[item.name]));
        for (const update of late) take(run, update);
      });
    }));
    if (app.alive()) feed(item);
  }

  function feed({ name, chart }) {
    chart.set(runs.map((run) => ({ key: run.id, label: run.id, ...run.style, data: run.data.get(name) ?? emptySeries() })));
  }

  function take(run, { iteration, values }) {
    for (const [name, value] of Object.entries(values ?? {})) if (run.data.has(name)) append(run.data.get(name), iteration, value);
  }

  let timer = null;
  app.onLeave(() => clearTimeout(timer));
  const running = runs.filter(({ run }) => run.status === "running");
  for (const item of running.slice(0, 4)) {
    app.stream(item.id, {
      since: item.run.marker,
      metrics: (update) => {
        item.backlog.push(update);
        take(item, update);
        timer ??= setTimeout(() => ((timer = null), shownNames.forEach(feed)), 500);
      },
    });
  }
}

const styleOf = (index) => ({ color: (index % 8) + 1, dash: DASHES[Math.floor(index / 8) % DASHES.length] });

function legend(runs) {
  const held = ({ run }) => run.latest["eval/m/solve_rate"]?.value ?? null;
  const titles = [["Run"], ["Status"], ["Task and method"], ["Iteration", "num"], ["Reward", "num"], ["Solved", "num"], ["Held out", "num"], ["Tokens/s", "num"]];
  return h("section.card", null, h("div.table-wrap", null, h(
    "table.table.legend",
    null,
    h("thead", null, h("tr", null, titles.map(([text, kind]) => h(kind ? `th.${kind}` : "th", null, text)))),
    h("tbody", null, runs.map((item) =>
      h(
        "tr",
        null,
        h("td", null, h("span.entry", null, h("i", { dataset: { dash: item.style.dash }, style: { "--swatch": `var(--series-${item.style.color})` } }), h("a", { href: `#/run/${encodeURIComponent(item.id)}` }, item.id))),
        h("td", null, pill(item.run.status)),
        h("td.muted", null, [item.run.task, item.run.method].filter(Boolean).join(" · ")),
        h("td.num", null, `${count(item.run.iteration)} / ${count(item.run.total_iterations)}`),
        h("td.num", null, figure(item.run.reward)),
        h("td.num", null, percent(item.run.solve_rate)),
        h("td.num", null, held(item) === null ? "–" : percent(held(item))),
        h("td.num", null, figure(item.run.tokens_per_s, 3)),
      ))),
  )));
}

function differences(runs) {
  const keys = [...new Set(runs.flatMap(({ config }) => Object.keys(config)))].sort();
  const rows = keys.map((key) => [key, runs.map(({ config }) => config[key])]);
  const differ = rows.filter(([, values]) => new Set(values.map((value) => JSON.stringify(value))).size > 1);
  return differenceTable(runs.map(({ id }) => id), differ, rows.length - differ.length);
}
