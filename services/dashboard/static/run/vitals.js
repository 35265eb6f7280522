// What a glance at a run must tell: is it alive, how long will it take, is it learning, is it healthy.
//
// A vital is {name, text, note, tone ("ok", "warn", "bad" or none), points (for a small curve), href}.

import { at, get } from "../api.js";
import { ago, count, duration, figure, number, percent } from "../dom.js";

const HELD_OUT = "eval/m/solve_rate";
const TRENDS = ["reward/mean", "solve_rate", "loss", "time/iteration_s", HELD_OUT];
const POINTS = 80;
const MOST_EVENTS = 100;
const PACE_POINTS = 10;
const GONE = ["lost", "failed"];

/** What the vitals need besides the run's own row: trends, workers, the newest warnings and errors. */
export async function lookCloser(runId) {
  const [{ series }, workers, warnings, errors] = await Promise.all([
    get(at`runs/${runId}/metrics`, { name: TRENDS, points: POINTS }),
    get(at`runs/${runId}/workers`),
    get(at`runs/${runId}/events`, { level: "warning", limit: MOST_EVENTS }),
    get(at`runs/${runId}/events`, { level: "error", limit: MOST_EVENTS }),
  ]);
  const trends = Object.fromEntries(TRENDS.map((name) => [name, pairs(series[name])]));
  return { trends, workers: workers.items, warnings: warnings.items, errors: errors.items };
}

const pairs = (rows) => (rows?.iteration ?? []).map((iteration, index) => [iteration, number(rows.value[index])]);

/** `seen` is what lookCloser gave, null before the first answer. */
export function vitals(run, seen) {
  const value = (name) => run.latest?.[name]?.value;
  const held = value(HELD_OUT);
  const rewarded = value("reward/mean") !== undefined;
  return [
    alive(run),
    time(run, seen),
    rewarded && learning("Reward", figure(value("reward/mean"), 3), seen?.trends["reward/mean"]),
    value("solve_rate") !== undefined && learning("Solved", percent(value("solve_rate")), seen?.trends.solve_rate, { share: true }),
    held !== undefined && { name: "Held out", text: percent(held), ...gain(seen?.trends[HELD_OUT], number(held)) },
    !rewarded && value("loss") !== undefined && learning("Loss", figure(value("loss"), 3), seen?.trends.loss, { down: true }),
    ...heldOutLosses(run),
    health(run, seen),
    { name: "Speed", text: run.tokens_per_s === null ? "–" : figure(run.tokens_per_s, 3), note: pace(run) },
  ].filter(Boolean);
}

function alive(run) {
  const workers = `${count(run.workers)} ${run.workers === 1 ? "worker" : "workers"}`;
  if (isLive(run)) return { name: "Last wrote", text: ago(run.heartbeat), note: workers, tone: "ok" };
  return { name: "Last wrote", text: ago(run.heartbeat), note: run.status, tone: GONE.includes(run.status) ? "bad" : null };
}

function time(run, seen) {
  const done = run.total_iterations ? `iteration ${count(run.iteration)} / ${count(run.total_iterations)}` : `iteration ${count(run.iteration)}`;
  const took = duration((run.ended ?? run.heartbeat) - run.created);
  if (!isLive(run)) return { name: "Took", text: took, note: done };
  const recent = (seen?.trends["time/iteration_s"] ?? []).slice(-PACE_POINTS).map(([, seconds]) => seconds).filter(Number.isFinite);
  const left = run.total_iterations - run.iteration;
  if (!recent.length || !run.total_iterations) return { name: "Runs for", text: took, note: done };
  return { name: "To go", text: left > 0 ? duration(left * mean(recent)) : "the rest", note: done };
}

function learning(name, text, points = [], { share = false, down = false } = {}) {
  const change = trend(points);
  if (change === null) return { name, text, note: "last iteration", points };
  if (change === 0) return { name, text, note: "no clear trend yet", points };
  const by = share ? `${(100 * Math.abs(change)).toFixed(1)} points` : figure(Math.abs(change), 2);
  return { name, text, note: `${change > 0 ? "▲" : "▼"} ${by} since start`, tone: change > 0 === !down ? "ok" : "warn", points };
}

/**
 * By how much the last values lie above the first ones; 0 where that is less than twice its standard error, null where
 * there are too few to tell.
 */
export function trend(points) {
  const values = points.map(([, value]) => value).filter(Number.isFinite);
  const n = Math.min(10, Math.floor(values.length / 3));
  if (n < 2) return null;
  const [first, last] = [values.slice(0, n), values.slice(-n)];
  const change = mean(last) - mean(first);
  return Math.abs(change) > 2 * Math.sqrt((variance(first) + variance(last)) / n) ? change : 0;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const variance = (values) => values.reduce((sum, value) => sum + (value - mean(values)) ** 2, 0) / (values.length - 1);

function gain([first] = [], held) {
  if (first?.[0] !== 0 || !Number.isFinite(first[1])) return { note: "greedy, m steps" }; // the base was not evaluated
  const points = 100 * (held - first[1]);
  if (points === 0) return { note: "as the base" };
  const sign = points > 0 ? "▲" : "▼";
  return { note: `${sign} ${Math.abs(points).toFixed(1)} points ${points > 0 ? "over" : "below"} base`, tone: points > 0 ? "ok" : "warn" };
}

function heldOutLosses(run) {
  const name = Object.keys(run.latest ?? {}).find((key) => /^held_out\/.*loss$/.test(key));
  return name ? [{ name: "Held out", text: figure(run.latest[name].value, 3), note: `loss at iteration ${count(run.latest[name].iteration)}` }] : [];
}

/** The worst that is known, in a word; what it is, below. */
function health(run, seen) {
  const name = "Health";
  const events = (level) => `#/run/${encodeURIComponent(run.id)}/events?level=${level}`;
  const workers = `#/run/${encodeURIComponent(run.id)}/workers`;
  if (run.status === "unreadable") return { name, text: "◆ unreadable", note: "the store", tone: "bad" };
  const broken = Object.entries(run.latest ?? {}).find(([, entry]) => typeof entry.value !== "number");
  if (!seen) return { name, text: "…", note: "looking" };
  const [errors, warnings] = [seen.errors, seen.warnings].map((items) => items.filter(({ id }) => id > (run.acknowledged ?? 0)));
  const restarts = seen.workers.reduce((sum, worker) => sum + worker.restarts, 0);
  if (errors.length) return { name, text: `◆ ${many(errors, "error")}`, note: `${errors[0].kind}, ${ago(errors[0].time)}`, tone: "bad", href: events("error") };
  if (GONE.includes(run.status)) return { name, text: `◆ ${run.status}`, note: "see the events", tone: "bad", href: events("") };
  if (broken) return { name, text: "◆ no number", note: `${broken[0]} is ${figure(broken[1].value)}`, tone: "bad" };
  if (warnings.length) return { name, text: `▲ ${many(warnings, "warning")}`, note: `${warnings[0].kind}, ${ago(warnings[0].time)}`, tone: "warn", href: events("warning") };
  if (run.lost_rows) return { name, text: `▲ ${count(run.lost_rows)} lost`, note: "rows of the store", tone: "warn" };
  if (restarts) return { name, text: `▲ ${restarts} restarted`, note: "actors", tone: "warn", href: workers };
  return { name, text: "✓ good", note: "no warning, no restart", tone: "ok" };
}

const many = (items, what) => `${items.length}${items.length === MOST_EVENTS ? "+" : ""} ${what}${items.length === 1 ? "" : "s"}`;

function pace(run) {
  const seconds = run.latest?.["time/iteration_s"]?.value;
  return seconds === undefined ? "tokens/s" : `tokens/s, ${figure(seconds, 2)} s a round`;
}

export const isLive = (run) => run.status === "running" || run.status === "paused";
