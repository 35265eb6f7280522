// Methods under one protocol: solve rates with intervals, curves by work and by time, and what each method cost.

import { at, get } from "../api.js";
import { ChartGroup } from "../charts.js";
import { styleOf } from "../compare/colours.js";
import { bytes, count, duration, empty, h, percent, pill, put } from "../dom.js";
import { saveCsv, saveJson } from "../downloads.js";
import { emptySeries } from "../series.js";

const AGAIN_MS = 15000;

export async function render(root, params, app) {
  return params.name ? one(root, params.name, app) : list(root, app);
}

async function list(root, app) {
  app.title([["Runs", "#/runs"], ["Comparisons", null]]);
  const { items } = await get("comparisons");
  if (!app.alive()) return;
  if (!items.length) return void put(root, empty("No comparison yet", "python -m learner.compare leaves one in its folder; start the dashboard with that folder, or the one around it, as --runs."));
  put(root, h("div.head", null, h("h1", null, "Comparisons")), table(
    [["Comparison"], ["Status"], ["Methods"]],
    items.map((item) => [link(`#/comparisons/${encodeURIComponent(item.name)}`, item.name), pill(item.complete ? "finished" : "running"), item.methods.join(", ")]),
  ));
}

async function one(root, name, app) {
  app.title([["Runs", "#/runs"], ["Comparisons", "#/comparisons"], [name, null]]);
  const top = h("div.stack");
  const bottom = h("div.stack");
  const charts = h("div.grid");
  const groups = [new ChartGroup(), new ChartGroup()]; // the two have different axes
  const byWork = groups[0].add(charts, { id: "by-work", title: "Solved by work", unit: "forward-equivalents of training", hint: "Held-out problems, greedy, in as many steps as all are trained with; mean over seeds", along: "forward-equivalents", format: percent, zero: true, height: 300 });
  const byTime = groups[1].add(charts, { id: "by-time", title: "Solved by time", unit: "seconds of training", hint: "The same against seconds, which depend on the machine", along: "second", format: percent, zero: true, height: 300 });
  app.onTheme(() => groups.forEach((group) => group.retheme()));
  app.onLeave(() => groups.forEach((group) => group.close()));
  let timer = null;
  app.onLeave(() => clearTimeout(timer));

  async function load() {
    const comparison = await get(at`comparisons/${name}`);
    if (!app.alive()) return;
    put(top, head(name, comparison), h("div.row.end.exports", null, h("button.button", { type: "button", onclick: () => saveCsv(name, asRows(comparison)) }, "CSV"), h("button.button", { type: "button", onclick: () => saveJson(name, comparison) }, "JSON")), rates(comparison));
    put(bottom, costs(comparison), failures(comparison));
    const methods = Object.entries(comparison.methods);
    const [most] = counts(comparison);
    const series = (x) => methods.map(([key, method], index) => ({ key, label: key, ...styleOf(index), data: points(x(key, method) ?? [], method.curve.solve_rate[most] ?? []) }));
    byWork.set(series((_, method) => method.curve.forward_equivalents));
    byTime.set(series((key) => comparison.machine.methods[key]?.curve_s));
    if (!comparison.complete) timer = setTimeout(() => load().catch((error) => app.toast(error.message, "error")), AGAIN_MS);
  }
  await load();
  if (app.alive()) put(root, top, charts, bottom);
}

function points(x, y) {
  return { ...emptySeries(), x, y, low: y, high: y };
}

function head(name, { settings, complete }) {
  const seeds = `seeds ${settings.seeds.join(", ")}; settings chosen on ${settings.tuning_seeds.join(", ")}`;
  return h("div.head", null, h("div", null, h("h1", null, name), h("p.note", null, `${count(settings.budget)} forward-equivalents a run; ${count(settings.problems)} held-out problems a seed; ${seeds}`)), pill(complete ? "finished" : "running"));
}

/** A row for each method and number of steps. */
function asRows(comparison) {
  return ranked(comparison).flatMap(([method, found]) => counts(comparison).filter((steps) => found.solve_rate[steps]).map((steps) => {
    const [rate, gain] = [found.solve_rate[steps], found.difference[steps]];
    return { method, steps, solve_rate: rate.value, low: rate.interval[0], high: rate.interval[1], difference: gain?.value, difference_low: gain?.interval[0], difference_high: gain?.interval[1], forward_equivalents: found.spent, ...found.point };
  }));
}

function counts({ methods }) {
  return [...new Set(Object.values(methods).flatMap((method) => Object.keys(method.solve_rate)))].sort((a, b) => b - a);
}

function ranked(comparison) {
  const [most] = counts(comparison);
  const rate = ([, method]) => method.solve_rate[most]?.value ?? -1;
  return Object.entries(comparison.methods).sort((a, b) => rate(b) - rate(a));
}

function rates(comparison) {
  const steps = counts(comparison);
  const titles = [["Method"], ["Chosen"], ...steps.map((step) => [`In ${step} steps`, "num"]), [`Against ${comparison.reference}`, "num"]];
  const rows = ranked(comparison).map(([name, method]) => [
    methodName(comparison, name, method),
    Object.entries(method.point ?? {}).map(([key, value]) => `${key.split(".").at(-1)} ${value}`).join(", ") || "–",
    ...steps.map((step) => interval(method.solve_rate[step])),
    name === comparison.reference ? "–" : interval(method.difference[steps[0]], true),
  ]);
  const base = Object.values(comparison.methods).find((method) => Object.keys(method.base).length)?.base;
  if (base) rows.push(["the base", "–", ...steps.map((step) => percent(base[step])), "–"]);
  return table(titles, rows);
}

function costs(comparison) {
  const titles = [["Method"], ["Iterations", "num"], ["FE a run", "num"], ["FE of tuning", "num"], ["Training", "num"], ["At equal time", "num"], ["Learner's peak", "num"]];
  const noisy = Object.values(comparison.methods).some((method) => method.gradient_noise);
  if (noisy) titles.push(["Noise / signal", "num"], ["FE for as much signal", "num"]);
  return table(titles, ranked(comparison).map(([name, method]) => {
    const machine = comparison.machine.methods[name];
    const spent = method.spent === null ? "–" : count(Math.round(method.spent));
    return [name, method.iterations.join("–") || "–", spent, count(Math.round(method.tuning.spent)), duration(machine?.train_s), percent(machine?.solve_rate_at_equal_seconds ?? null), bytes(machine?.peak_rank_bytes), ...(noisy ? noise(method.gradient_noise) : [])];
  }));
}

function noise(found) {
  const [low, high] = found?.interval ?? [null, null];
  const end = (value) => (value === null ? "no end" : value.toPrecision(3));
  const ratio = found?.value ?? null;
  if (ratio === null) return [low === null ? "–" : `above ${end(low)}`, "–"];
  return [h("span", null, `${ratio.toPrecision(3)} `, h("span.muted", null, `${end(low)} to ${end(high)}`)), found.signal_fe === null ? "–" : count(Math.round(found.signal_fe))];
}

function failures({ methods, unfinished }) {
  const failed = Object.values(methods).flatMap((method) => Object.entries(method.failed));
  return [
    failed.map(([run, why]) => h("div.banner", { dataset: { kind: "bad" } }, `${run} failed: ${why}`)),
    unfinished.length > 0 && h("p.note", null, `Not done yet: ${unfinished.join(", ")}`),
  ];
}

function methodName(comparison, name, method) {
  const index = Object.keys(comparison.methods).indexOf(name);
  const style = styleOf(index);
  const runs = method.runs.map((run) => `run=${encodeURIComponent(run)}`).join("&");
  const text = method.runs.length > 1 ? link(`#/compare?${runs}`, name) : h("span", null, name);
  return h("span.entry", null, h("i", { dataset: { dash: style.dash }, style: { "--swatch": `var(--series-${style.color})` } }), text);
}

function interval(estimate, signed = false) {
  if (!estimate) return "–";
  const show = (value) => `${signed && value > 0 ? "+" : ""}${percent(value)}`;
  const [low, high] = estimate.interval;
  return h("span", { title: `by seed: ${estimate.by_seed.map(show).join(", ")}` }, `${show(estimate.value)} `, h("span.muted", null, `${show(low)} to ${show(high)}`));
}

const link = (href, text) => h("a", { href }, text);

function table(titles, rows) {
  const cell = (kind, index, content) => h(titles[index][1] ? `${kind}.${titles[index][1]}` : kind, { dataset: kind === "td" ? { label: titles[index][0] } : {} }, content);
  return h("section.card", null, h("div.table-wrap", null, h(
    "table.table.stacked",
    null,
    h("thead", null, h("tr", null, titles.map(([text], index) => cell("th", index, text)))),
    h("tbody", null, rows.map((row) => h("tr", null, row.map((content, index) => cell("td", index, content))))),
  )));
}
