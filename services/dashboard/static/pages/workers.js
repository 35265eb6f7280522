// The workers of a run by node: what each holds, whether it is alive, its memory and GPU, restarts and last error.

import { at, get } from "../api.js";
import { ago, bytes, count, duration, empty, failure, h, loading, pill, put } from "../dom.js";
import { cursorKeys } from "../rows.js";
import { runHeader } from "../run/header.js";
import { findRun, follow } from "./run.js";

const SILENT_S = 60; // the run tells of its workers every ten seconds
const RETIRED = "retired";
const HEARD = "Its last answer. Nothing is heard of a worker while it works: under its status is what it does, and for how long. The end of a process is noticed at once while it works, else when it is next needed.";
const COLUMNS = [["Worker"], ["Status"], ["Weights", "num"], ["Last heard", "num", HEARD], ["Memory", "num"], ["GPU"], ["Restarts", "num"], ["Process", "num"], ["Last error"]];

export async function render(root, params, app) {
  const { id } = params;
  app.title([["Runs", "#/runs"], [id, `#/run/${encodeURIComponent(id)}`], ["Workers", null]]);
  const run = await findRun(root, id, app);
  if (!run) return;
  const header = runHeader(run, "workers", app);
  const host = h("div.stack", null, loading("workers"));
  put(root, header.element, host);
  const rows = { children: [], contains: (row) => host.contains(row) };
  const cursor = cursorKeys(app, rows, { open: (row) => row.querySelector("summary")?.click() });
  let workers = [];
  let pending = null;
  let lag = 1; // versions by which actors are behind the ranks in normal work: they get new weights with their next lease

  function show() {
    if (!workers.length) return put(host, h("section.card", null, empty("No workers yet", "They are told as soon as they start.")));
    const newest = Math.max(...workers.map((worker) => worker.policy_version ?? -1));
    const ended = !["running", "paused"].includes(header.run().status);
    const nodes = new Map();
    for (const worker of workers) nodes.set(worker.node, [...(nodes.get(worker.node) ?? []), worker]);
    const opened = new Set([...host.querySelectorAll("details[open]")].map((item) => item.closest("tr").dataset.worker));
    put(host, [...nodes].map(([node, items]) => nodeCard(node, items, newest - lag, ended)));
    for (const row of host.querySelectorAll("tbody tr")) if (opened.has(row.dataset.worker)) row.querySelector("details")?.setAttribute("open", "");
    rows.children = [...host.querySelectorAll("tbody tr")];
    cursor.refresh();
  }

  async function load() {
    try {
      workers = (await get(at`runs/${id}/workers`)).items;
      if (app.alive()) show();
    } catch (error) {
      if (app.alive() && !workers.length) put(host, failure(error, load));
    }
  }

  const refresh = () => {
    pending ??= setTimeout(() => ((pending = null), load()), 1000);
  };
  const clock = setInterval(show, 10_000);
  app.onLeave(() => [clearInterval(clock), clearTimeout(pending)]);
  follow(id, app, header, run, { worker: refresh, metrics: refresh, reload: load });
  get(at`runs/${id}/config`).then(({ config }) => ((lag = 1 + (config.rollout?.max_staleness ?? 0)), workers.length && show()), () => {});
  await load();
}

/** `oldest`: the version that a worker may hold in normal work. */
function nodeCard(node, workers, oldest, ended) {
  const retired = workers.filter((worker) => worker.status === RETIRED).length;
  const actors = workers.filter((worker) => worker.role === "rollout" && worker.status !== RETIRED).length;
  const others = workers.length - actors - retired;
  const text = [actors && `${actors} rollout ${actors === 1 ? "actor" : "actors"}`, others && `${others} learner ${others === 1 ? "rank" : "ranks"}`, retired && `${retired} retired`].filter(Boolean).join(", ");
  return h(
    "section.card",
    { dataset: { node } },
    h("header", null, h("h2", null, node || "unknown node"), h("span.note", null, ended ? `${text}, as they were when the run ended` : text)),
    h("div.table-wrap", null, h(
      "table.table.workers",
      null,
      h("thead", null, h("tr", null, COLUMNS.map(([name, kind, title = ""]) => h(kind ? `th.${kind}` : "th", { title }, name)))),
      h("tbody", null, workers.map((worker) => workerRow(worker, oldest, ended))),
    )),
  );
}

function workerRow(worker, oldest, ended) {
  const late = worker.policy_version === null ? 0 : oldest - worker.policy_version;
  const { doing, since, told = worker.heartbeat } = worker.data;
  const now = Date.now() / 1000;
  const active = !ended && worker.status !== RETIRED;
  const [working, untold] = [active && doing, active && now - told > SILENT_S];
  const engine = worker.data.engine ?? {};
  const details = [engine.engine, engine.family, engine.dtype, engine.parameters && `${count(engine.parameters)} parameters`].filter(Boolean).join(" · ");
  const cell = (name, kind, ...content) => h(kind, { dataset: { cell: name } }, content);
  return h(
    "tr",
    { dataset: { worker: worker.worker_id } },
    cell("worker", "td", h("b", null, worker.worker_id), h("div.note", null, [worker.role, details].filter(Boolean).join(" · "))),
    cell("status", "td", ended ? h("span.pill", { dataset: { status: "past" } }, worker.status) : pill(worker.status), working && h("div.note", null, `${String(doing).replaceAll("_", " ")} for ${duration(now - since)}`)),
    cell("weights", "td.num", worker.policy_version === null ? "–" : `v${worker.policy_version}`, active && late > 0 && h("div.note", { dataset: { late: "true" } }, `${late} older than it should be`)),
    cell("heartbeat", "td.num", worker.status === "starting" ? "–" : ago(worker.heartbeat), untold && h("div.note", { dataset: { silent: "true" } }, `as the run told ${ago(told)}`)),
    cell("memory", "td.num", worker.data.memory_bytes === undefined ? "–" : bytes(worker.data.memory_bytes)),
    cell("gpu", "td", gpu(worker.data.gpu, engine)),
    cell("restarts", "td.num", count(worker.restarts)),
    cell("process", "td.num", worker.pid === null ? "–" : String(worker.pid)),
    cell("error", "td", worker.last_error ? h("details.error", null, h("summary.clip", null, worker.last_error.split("\n")[0]), h("pre", null, worker.last_error)) : h("span.muted", null, "none")),
  );
}

function gpu(used, engine) {
  if (!used) return engine.device ?? "–";
  return [used.name, h("div.note", null, `${bytes(used.memory_used_bytes)} of ${bytes(used.memory_total_bytes)}`)];
}
