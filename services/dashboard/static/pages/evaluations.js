// What learner.evaluate found of a run: solve rates and pass@k with intervals, base and adapter side by side.

import { at, get } from "../api.js";
import { saveCsv, saveJson } from "../downloads.js";
import { clock, count, empty, figure, h, percent, pill, put, s } from "../dom.js";
import { runHeader } from "../run/header.js";
import { follow } from "./run.js";

const WIDTH = 240;
const HEIGHT = 34;

export async function render(root, params, app) {
  const { id } = params;
  app.title([["Runs", "#/runs"], [id, `#/run/${encodeURIComponent(id)}`], ["Evaluations", null]]);
  const [run, { items }] = await Promise.all([get(at`runs/${id}`), get(at`runs/${id}/evaluations`)]);
  if (!app.alive()) return;
  const header = runHeader(run, "evaluations", app);
  const none = h("section.card", null, empty("No evaluation of this run yet", `python -m learner.evaluate --run ${id} decodes held-out problems in several ways, base and adapter, with intervals. Evaluations on the way are among the curves.`));
  put(root, header.element, items.length ? items.map((item) => evaluation(id, item)) : none);
  follow(id, app, header, run, {});
}

function evaluation(run, item) {
  const metrics = [...new Set(item.cells.flatMap((cell) => ["base", "adapter"].flatMap((policy) => Object.keys(cell[policy]?.rates ?? {}))))];
  const rows = item.cells.flatMap((cell) => metrics.filter((metric) => cell.base?.rates[metric] || cell.adapter?.rates[metric]).map((metric) => [cell, metric]));
  const level = item.confidence ? `${figure(100 * item.confidence)} % intervals` : "intervals";
  const exported = rows.map(([cell, metric]) => ({ run, evaluation: item.name, cell: cell.label, metric, ...apart("base", cell.base?.rates[metric]), ...apart("adapter", cell.adapter?.rates[metric]), ...apart("difference", cell.difference[metric]) }));
  return h(
    "section.card.evaluation",
    { dataset: { evaluation: item.name } },
    h(
      "header",
      null,
      h("h2", null, item.name),
      h("span.note", null, `${count(item.problems)} problems, ${level}, ${clock(item.time, { date: true })}`),
      pill(item.complete ? "finished" : "running"),
      h("span.rates-key", null, ["base", "adapter"].map((policy) => [h(`i.${policy}`, { ariaHidden: "true" }), policy])),
      h("span.space"),
      h("button.icon-button", { type: "button", onclick: () => saveCsv(`${run}_${item.name}`, exported) }, "CSV"),
      h("button.icon-button", { type: "button", onclick: () => saveJson(`${run}_${item.name}`, item) }, "JSON"),
    ),
    item.unfinished.length > 0 && h("p.body.note", null, `Not done yet: ${item.unfinished.join(", ")}. The same command goes on.`),
    h("div.table-wrap", null, h(
      "table.table.stacked",
      null,
      h("thead", null, h("tr", null, h("th", null, "Decoded"), h("th", null, "Rate"), h("th.num", null, "Base"), h("th.num", null, "Adapter"), h("th", null, "0 to 100 %"), h("th.num", null, "Gain, points"), h("th.num", { title: "Forwards of the model for a completion, adapter" }, "Forwards"))),
      h("tbody", null, rows.map(([cell, metric]) => row(cell, metric))),
    )),
  );
}

function row(cell, metric) {
  const [base, adapter, gain] = [cell.base?.rates[metric], cell.adapter?.rates[metric], cell.difference[metric]];
  const clear = gain && (gain.interval[0] > 0 || gain.interval[1] < 0);
  return h(
    "tr",
    null,
    h("td", { dataset: { label: "Decoded" } }, cell.label),
    h("td", { dataset: { label: "Rate" } }, metric === "solve_rate" ? "solved" : metric),
    h("td.num", { dataset: { label: "Base" } }, rate(base)),
    h("td.num", { dataset: { label: "Adapter" } }, rate(adapter)),
    h("td", { dataset: { label: "0 to 100 %" } }, bars(base, adapter)),
    h("td.num", { dataset: { label: "Gain, points", tone: clear ? (gain.value > 0 ? "ok" : "bad") : "" }, title: `Adapter less base on the same problems; ${clear ? "the interval leaves out 0" : "the interval has 0 in it: no difference is shown"}` }, rate(gain, points)),
    h("td.num", { dataset: { label: "Forwards" } }, figure(cell.adapter?.mean_nfe ?? cell.base?.mean_nfe, 3)),
  );
}

const points = (value) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${(100 * Math.abs(value)).toFixed(1)}`;

function rate(estimate, show = percent) {
  if (!estimate) return "–";
  return h("span", { title: estimate.method }, h("b", null, show(estimate.value)), " ", h("span.muted", null, `${show(estimate.interval[0])} to ${show(estimate.interval[1])}`));
}

/** Two points with their intervals on one axis. */
function bars(base, adapter) {
  const x = (value) => 4 + (WIDTH - 8) * Math.min(1, Math.max(0, value));
  const mark = (estimate, y, kind) => estimate && [
    s(`line.${kind}`, { x1: x(estimate.interval[0]), x2: x(estimate.interval[1]), y1: y, y2: y }),
    s(`circle.${kind}`, { cx: x(estimate.value), cy: y, r: 4 }),
  ];
  const told = [["base", base], ["adapter", adapter]].filter(([, estimate]) => estimate).map(([name, { value }]) => `${name} ${percent(value)}`).join(", ");
  return s("svg.rates", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT, role: "img", "aria-label": told }, s("line.axis", { x1: 4, x2: WIDTH - 4, y1: HEIGHT - 3, y2: HEIGHT - 3 }), [0, 0.25, 0.5, 0.75, 1].map((value) => s("line.axis", { x1: x(value), x2: x(value), y1: HEIGHT - 6, y2: HEIGHT })), mark(base, 9, "base"), mark(adapter, 20, "adapter"));
}

const apart = (name, estimate) => (estimate ? { [name]: estimate.value, [`${name}_low`]: estimate.interval[0], [`${name}_high`]: estimate.interval[1] } : {});
