// What stands above every page of a run: name, status, progress, its vitals, and the tabs.

import { commandLine } from "../copy.js";
import { clock, count, h, pill, put, setText } from "../dom.js";
import { drawCurve } from "../spark.js";
import { eventRow } from "./events.js";
import { isLive, lookCloser, vitals } from "./vitals.js";

const TABS = [
  ["", "Overview", "1"],
  ["samples", "Samples", "2"],
  ["workers", "Workers", "3"],
  ["events", "Events", "4"],
  ["config", "Config", "5"],
  ["evaluations", "Evaluations", "6"],
  ["actions", "Actions", "7"],
];
const LOOK_MS = 5000; // least time between two looks at trends, workers and warnings

/** {element, update(run), run(), problem(error or null)}; `tab` is the open one. */
export function runHeader(run, tab, app) {
  const href = (name) => `#/run/${encodeURIComponent(run.id)}${name ? `/${name}` : ""}`;
  const status = h("span");
  const about = h("p.note");
  const controls = h("div.run-controls");
  const bar = h("i");
  const strip = h("dl.strip");
  const banners = h("div.stack.banners");
  const tabs = h(
    "nav.tabs",
    { ariaLabel: "Parts of the run" },
    TABS.map(([name, text]) => h("a", { href: href(name), "aria-current": tab === name ? "page" : null }, text)),
  );
  app.keys(Object.fromEntries(TABS.map(([name, text, key]) => [key, [() => (location.hash = href(name)), `open ${text.toLowerCase()}`]])));
  const title = h("div.run-title", null, h("div.row", null, h("h1", null, run.id), status), about);
  const progress = h("div.progress.run-progress", { role: "progressbar", ariaLabel: "Progress" }, bar);
  const element = h("div.run-head", { dataset: { brief: tab !== "" } }, h("div.head", null, title, controls), progress, strip, banners, tabs);
  requestAnimationFrame(() => showTab(tabs)); // when it is part of the page
  let attached = null;
  let problem = null;
  let latest = run;
  let seen = null;
  let looked = 0;
  let looking = null;
  let warned = "[]";

  function update(next) {
    latest = next;
    if (status.firstChild?.dataset?.status !== next.status) put(status, pill(next.status));
    const parts = [next.task, next.method, next.host && `on ${next.host}`, next.starts > 1 && `started ${next.starts} times`, next.created && `begun ${clock(next.created, { date: true })}`];
    setText(about, parts.filter(Boolean).join(" · "));
    const share = next.total_iterations ? Math.min(1, next.iteration / next.total_iterations) : 0;
    progress.dataset.status = next.status;
    bar.style.width = `${100 * share}%`;
    progress.ariaValueNow = String(Math.round(100 * share));
    app.state(`${next.status} ${next.total_iterations ? `${next.iteration}/${next.total_iterations}` : next.iteration}`);
    show();
    warn();
    look();
    attached?.update?.(next);
  }

  function look() {
    looking ??= setTimeout(async () => {
      looked = Date.now();
      try {
        seen = await lookCloser(run.id, seen);
        if (!app.alive()) return;
        show();
        warn();
      } catch {
        // the next look may do; what is wrong with the service or the store is told by who follows the run
      }
      looking = null;
    }, Math.max(0, looked + LOOK_MS - Date.now()));
  }

  function show() {
    const cells = vitals(latest, seen);
    const names = cells.map(({ name }) => name).join();
    if (strip.dataset.names !== names) put(strip, cells.map(({ name }) => vitalCell(name)));
    strip.dataset.names = names;
    cells.forEach((cell, index) => fillCell(strip.children[index], cell));
  }

  function warn() {
    const told = [];
    if (problem) told.push({ kind: "bad", text: problem });
    if (latest.unreadable) told.push({ kind: "bad", text: `The run's store can't be read now: ${latest.unreadable}. It is tried again all the time.` });
    else if (seen && ENDED[latest.status]) told.push({ ...ENDED[latest.status](latest, seen), command: seen.starts.go_on, events: seen.newest });
    if (latest.unstored_iterations) told.push({ kind: "warn", text: `The store has taken nothing since ${clock(latest.heartbeat)} (locked, or its disk is full): ${count(latest.unstored_iterations)} iterations are in metrics.jsonl only. Training goes on.` });
    if (latest.lost_rows) told.push({ kind: "warn", text: `${count(latest.lost_rows)} rows could not be written to the store; training goes on, and metrics.jsonl has the figures.` });
    const now = JSON.stringify(told);
    if (now !== warned) put(banners, told.map(banner)); // what is marked in one, or open, stays so
    warned = now;
  }

  const tick = setInterval(() => {
    show();
    warn();
    if (isLive(latest)) look();
  }, LOOK_MS);
  app.onLeave(() => (clearInterval(tick), clearTimeout(looking)));
  import("../controls.js")
    .then((module) => module.mountControls?.(controls, latest, app))
    .then((mounted) => {
      attached = mounted ?? null;
      if (attached?.close) app.alive() ? app.onLeave(() => attached.close()) : attached.close();
    })
    .catch(() => controls.remove());
  update(run);
  return {
    element,
    update,
    run: () => latest,
    /** Say what is wrong with the connection or the store; null takes it back. */
    problem: (error) => {
      problem = error === null ? null : problemText(error);
      warn();
    },
  };
}

/** On a narrow window the tabs scroll sideways: the open one must be seen. */
function showTab(tabs) {
  const open = tabs.querySelector("[aria-current]");
  if (open) tabs.scrollLeft = open.offsetLeft - tabs.offsetLeft - (tabs.clientWidth - open.offsetWidth) / 2;
}

/** Why a run works no more: {kind, text}. */
const ENDED = {
  failed: (run, { errors }) => ({ kind: "bad", text: errors[0]?.text ?? "The run failed; it left no word why." }),
  lost: (run) => ({ kind: "bad", text: `The run says running, but its process is gone, or its store takes nothing (locked, or its disk is full). It wrote last at ${clock(run.heartbeat, { date: true })}.` }),
  stopped: (run, { newest }) => ({ kind: "warn", text: `The run was stopped after iteration ${count(run.iteration)}${newest.some(({ text }) => text.includes("asked to stop")) ? ", as it was asked to" : ""}.` }),
};

function banner({ kind, text, command, events }) {
  const list = h("ol.events");
  const more = h("details", { ontoggle: () => more.open && put(list, events.map(eventRow)) }, h("summary", null, "its last events"), list);
  return h(
    "div.banner",
    { dataset: { kind }, role: "status" },
    h("p.why", null, text),
    command && h("div.go-on", null, h("span.note", null, "To go on:"), commandLine(command)),
    events?.length > 0 && more,
  );
}

const vitalCell = (name) =>
  h("div", { dataset: { figure: name } }, h("dt", null, name), h("dd.value", null, h("span.text"), h("span.curve")), h("dd.note"));

function fillCell(cell, { text, note, tone, points = [], href }) {
  const [, value, small] = cell.children;
  cell.dataset.tone = tone ?? "";
  setText(value.firstChild, text);
  if (cell.dataset.points !== JSON.stringify(points)) drawCurve(value.lastChild, points, { width: 64, height: 22 });
  cell.dataset.points = JSON.stringify(points);
  if (!href) return setText(small, note);
  if (small.textContent !== note || small.firstElementChild?.getAttribute("href") !== href) put(small, h("a", { href }, note));
}

function problemText(error) {
  if (error.status === 404) return "The run is gone: its folder or its row was removed. What you see is what was read last.";
  if (error.status === 0) return "The dashboard service does not answer. This page goes on by itself when it is back.";
  return error.detail ?? error.message;
}
