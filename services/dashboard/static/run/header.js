// What stands above every page of a run: name, status, progress, the figures that matter, and the tabs.

import { ago, clock, count, duration, figure, h, number, percent, pill, put, setText } from "../dom.js";

const TABS = [
  ["", "Overview", "1"],
  ["samples", "Samples", "2"],
  ["workers", "Workers", "3"],
  ["events", "Events", "4"],
  ["config", "Config", "5"],
];

/** {element, update(run), run(), setPace(seconds), problem(error or null)}; `tab` is the open one. */
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
  const element = h("div.run-head", null, h("div.head", null, title, controls), progress, strip, banners, tabs);
  const cells = new Map();
  let attached = null;
  let problem = null;
  let pace = null;
  let latest = run;

  function update(next) {
    latest = next;
    const eta = pace === null || !next.total_iterations ? null : pace * Math.max(0, next.total_iterations - next.iteration);
    if (status.firstChild?.dataset?.status !== next.status) put(status, pill(next.status));
    const parts = [next.task, next.method, next.host && `on ${next.host}`, next.starts > 1 && `started ${next.starts} times`, next.created && `begun ${clock(next.created, { date: true })}`];
    setText(about, parts.filter(Boolean).join(" · "));
    const share = next.total_iterations ? Math.min(1, next.iteration / next.total_iterations) : 0;
    progress.dataset.status = next.status;
    bar.style.width = `${100 * share}%`;
    progress.ariaValueNow = String(Math.round(100 * share));
    figures(next, eta);
    warn();
    attached?.update?.(next);
  }

  function figures(next, eta) {
    const value = (name) => next.latest?.[name]?.value;
    const running = next.status === "running" || next.status === "paused";
    const took = (next.ended ?? next.heartbeat) - next.created;
    const left = running && eta !== null ? `${duration(eta)} to go` : `${running ? "runs for" : "took"} ${duration(took)}`;
    const held = value("eval/m/solve_rate");
    const rows = [
      ["Iteration", next.total_iterations ? `${count(next.iteration)} / ${count(next.total_iterations)}` : count(next.iteration), left],
      value("reward/mean") !== undefined && ["Reward", figure(value("reward/mean")), "mean, last iteration"],
      value("solve_rate") !== undefined && ["Solved", percent(value("solve_rate")), "sampled, last iteration"],
      held !== undefined && ["Held out", percent(held), gain(next, held)],
      value("reward/mean") === undefined && value("loss") !== undefined && ["Loss", figure(value("loss")), "last iteration"],
      ["Speed", next.tokens_per_s === null ? "–" : figure(next.tokens_per_s, 3), value("time/iteration_s") ? `tokens/s, ${figure(value("time/iteration_s"), 2)} s each` : "tokens/s"],
      value("staleness/max") !== undefined && ["Staleness", figure(value("staleness/max")), "versions at most"],
      ["Last wrote", ago(next.heartbeat), next.workers ? `${next.workers} workers` : "no workers"],
    ].filter(Boolean);
    for (const [name, text, note] of rows) {
      if (!cells.has(name)) {
        const parts = [h("dt", null, name), h("dd"), h("dd.note")];
        cells.set(name, parts);
        strip.append(h("div", { dataset: { figure: name } }, parts));
      }
      setText(cells.get(name)[1], text);
      setText(cells.get(name)[2], note);
    }
  }

  function warn() {
    const texts = [];
    if (problem) texts.push(["bad", problem]);
    if (latest.unreadable) texts.push(["bad", `The run's store can't be read now: ${latest.unreadable}. It is tried again all the time.`]);
    if (latest.status === "lost") texts.push(["bad", `The run says running but wrote last ${ago(latest.heartbeat)}: its process is probably gone. Resume it with run.resume=auto.`]);
    if (latest.lost_rows) texts.push(["warn", `${count(latest.lost_rows)} rows could not be written to the store; training and metrics.jsonl are complete.`]);
    const same = banners.children.length === texts.length && texts.every(([, text], index) => banners.children[index].textContent === text);
    if (!same) put(banners, texts.map(([kind, text]) => h("div.banner", { dataset: { kind }, role: "status" }, text)));
  }

  const tick = setInterval(() => update(latest), 5000);
  app.onLeave(() => clearInterval(tick));
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
    /** Seconds that an iteration takes now, for the time to go. */
    setPace: (seconds) => {
      pace = seconds;
      update(latest);
    },
    /** Say what is wrong with the connection or the store; null takes it back. */
    problem: (error) => {
      problem = error === null ? null : problemText(error);
      warn();
    },
  };
}

function gain(run, held) {
  const base = run.summary?.base?.greedy?.m;
  if (base === undefined) return "greedy, m steps";
  const points = 100 * (number(held) - base);
  return `${points >= 0 ? "+" : "−"}${Math.abs(points).toFixed(1)} points over base`;
}

function problemText(error) {
  if (error.status === 404) return "The run is gone: its folder or its row was removed. What you see is what was read last.";
  if (error.status === 0) return "The dashboard service does not answer. This page goes on by itself when it is back.";
  return error.detail ?? error.message;
}
