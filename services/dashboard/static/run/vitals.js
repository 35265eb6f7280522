// What a glance at a run must tell: is it alive, how long will it take, is it learning, is it healthy.
//
// A vital is {name, text, note, tone ("ok", "warn", "bad" or none), points (for a small curve), href}.

import { at, get } from "../api.js";
import { ago, count, duration, figure, number, percent } from "../dom.js";
import { hasFallen, trend } from "./trend.js";

const HELD_OUT = "eval/m/solve_rate";
const PROBLEMS = "eval/problems";
const TO_GO = "machine/to_go_s";
const TRENDS = ["reward/mean", "solve_rate", "loss", HELD_OUT];
const POINTS = 80;
const MOST_EVENTS = 100;
const GONE = ["lost", "failed"];

/** What to do about warnings, by their kind. */
const ADVICE = {
  fell: "lower learner.lr",
  nonfinite: "lower learner.lr",
  log_ratio: "try learner.verify",
  store: "free its disk",
  fault: "it was mended",
  settings: "as you asked",
  biased: "see its text",
  dropped: "see its text",
};

/** What the vitals need besides the run's own row: trends, workers, warnings and errors, starts, its settings. */
export async function lookCloser(runId, before) {
  const [{ series }, workers, warnings, errors, newest, starts, settings] = await Promise.all([
    get(at`runs/${runId}/metrics`, { name: TRENDS, points: POINTS }),
    get(at`runs/${runId}/workers`),
    get(at`runs/${runId}/events`, { level: "warning", limit: MOST_EVENTS }),
    get(at`runs/${runId}/events`, { level: "error", limit: MOST_EVENTS }),
    get(at`runs/${runId}/events`, { limit: 8 }),
    get(at`runs/${runId}/starts`),
    before?.settings ?? get(at`runs/${runId}/config`).then(({ config }) => config),
  ]);
  const trends = Object.fromEntries(TRENDS.map((name) => [name, pairs(series[name])]));
  return { trends, workers: workers.items, warnings: warnings.items, errors: errors.items, newest: newest.items, starts, settings };
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
    rewarded && learning("Reward", value("reward/mean"), seen?.trends["reward/mean"], { write: (each) => figure(each, 3) }),
    value("solve_rate") !== undefined && learning("Solved", value("solve_rate"), seen?.trends.solve_rate, { write: percent, share: true }),
    held !== undefined && { name: "Held out", text: percent(held), ...standing(number(held), run, seen) },
    !rewarded && value("loss") !== undefined && learning("Loss", value("loss"), seen?.trends.loss, { write: (each) => figure(each, 3), down: true }),
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

/** Without the time between two starts; what is left is the run's own estimate, which its terminal shows too. */
function time(run, seen) {
  const done = run.total_iterations ? `iteration ${count(run.iteration)} / ${count(run.total_iterations)}` : `iteration ${count(run.iteration)}`;
  const took = seen ? duration(seen.starts.ran_s) : "…";
  if (!isLive(run)) {
    const training = run.summary?.train_seconds;
    return { name: "Took", text: took, note: [done, Number.isFinite(training) && `training ${duration(training)}`].filter(Boolean).join(", ") };
  }
  const left = run.latest?.[TO_GO]?.value;
  if (typeof left !== "number") return { name: "Runs for", text: took, note: done };
  return { name: "To go", text: run.iteration < run.total_iterations ? duration(left) : "the rest", note: done };
}

/** A noisy figure: the mean of the newest iterations, the last one, and where it goes. */
function learning(name, last, points = [], { write, share = false, down = false }) {
  const found = trend(points.map(([, value]) => value).filter(Number.isFinite));
  if (found === null) return { name, text: write(last), note: "last iteration", points };
  const by = (change) => `${change > 0 ? "▲" : "▼"} ${share ? `${(100 * Math.abs(change)).toFixed(1)} points` : figure(Math.abs(change), 2)}`;
  const said = [
    found.lately !== 0 && `${by(found.lately)} lately`,
    found.start !== 0 && `${by(found.start)} since start`,
  ].filter(Boolean);
  const course = found.lately || found.start;
  return {
    name,
    text: write(found.mean),
    note: `mean of the newest ${found.n}, last ${write(last)}; ${said.join(", ") || "no clear trend"}`,
    tone: course === 0 ? null : course > 0 === !down ? "ok" : "warn",
    points,
  };
}

/** Where held-out stands against its best and against the base. */
function standing(held, run, seen) {
  const points = (seen?.trends[HELD_OUT] ?? []).filter(([, rate]) => Number.isFinite(rate));
  if (!points.length) return { note: "greedy, m steps" };
  const base = points[0][0] === 0 ? points[0][1] : null;
  if (base !== null && points.length === 1) {
    const every = seen.settings?.evaluation?.every;
    return { note: every ? `base; first evaluation at ${count(every)}` : "base; evaluated at the end" };
  }
  const top = points.reduce((found, each) => (each[1] > found[1] ? each : found));
  const [iteration, best] = run.held_out_best >= top[1] ? [run.held_out_best_iteration, run.held_out_best] : top; // points may be means
  const problems = run.latest[PROBLEMS]?.value ?? seen.settings?.evaluation?.problems;
  const apart = (other) => `${Math.abs(100 * (held - other)).toFixed(1)} points`;
  if (problems && hasFallen(held, best, problems)) {
    return { note: `▼ ${apart(best)} below its best (${percent(best)} at ${count(iteration)})`, tone: "bad" };
  }
  const beside = held < best ? `; best ${percent(best)} at ${count(iteration)}` : "";
  if (base === null) return { note: held < best ? `best ${percent(best)} at ${count(iteration)}` : "its best" };
  if (held === base) return { note: `as the base${beside}` };
  if (held > base) return { note: `▲ ${apart(base)} over base${beside || ", its best"}`, tone: "ok" };
  return { note: `▼ ${apart(base)} below base${beside}`, tone: "warn" };
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
  if (errors.length) return { name, text: `◆ ${many(errors, "error")}`, note: `${errors[0].kind}, ${ago(errors[0].time)}: read it`, tone: "bad", href: events("error") };
  if (GONE.includes(run.status)) return { name, text: `◆ ${run.status}`, note: "see below how to go on", tone: "bad", href: events("") };
  if (broken) return { name, text: "◆ no number", note: `${broken[0]} is ${figure(broken[1].value)}: lower learner.lr`, tone: "bad" };
  if (warnings.length) return { name, text: `▲ ${many(warnings, "warning")}`, note: `${warnings[0].kind}, ${ago(warnings[0].time)}${ADVICE[warnings[0].kind] ? `: ${ADVICE[warnings[0].kind]}` : ""}`, tone: "warn", href: events("warning") };
  if (run.lost_rows) return { name, text: `▲ ${count(run.lost_rows)} lost`, note: "rows of the store: free its disk", tone: "warn" };
  if (restarts) return { name, text: `▲ ${restarts} restarted`, note: "actors", tone: "warn", href: workers };
  return { name, text: "✓ good", note: "no warning, no restart", tone: "ok" };
}

const many = (items, what) => `${items.length}${items.length === MOST_EVENTS ? "+" : ""} ${what}${items.length === 1 ? "" : "s"}`;

function pace(run) {
  const seconds = run.latest?.["time/iteration_s"]?.value;
  return seconds === undefined ? "tokens/s" : `tokens/s, ${figure(seconds, 2)} s an iteration`;
}

export const isLive = (run) => run.status === "running" || run.status === "paused";
