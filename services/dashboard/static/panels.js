// Which metrics go together on a run's page. Names that no panel claims are grouped by their first part at the end, so
// that nothing a run writes stays hidden.

import { duration, figure, percent } from "./dom.js";

const seconds = (value) => {
  if (typeof value === "number" && value >= 60) return duration(value);
  return value >= 0 && value < 0.001 ? "0 s" : `${figure(value, 3)} s`;
};

/** Names in the order of drawing; a RegExp takes all that match, sorted. `label` names a series; `sparse` ones come from
 * evaluations, each of which is a measurement of its own. */
const PANELS = [
  {
    id: "eval",
    section: "learning",
    title: "Solve rate by step count",
    hint: "Held-out problems, greedy, with m denoising steps and with fewer",
    names: [/^eval\/.*solve_rate$/],
    label: (name) => name.slice(5).replace(/\/solve_rate$/, "") + " steps",
    sparse: () => true,
    format: percent,
    zero: true,
  },
  {
    id: "reward",
    section: "learning",
    title: "Reward",
    hint: "Mean over the iteration's completions, and its components",
    names: ["reward/mean", /^reward\//],
    label: (name) => name.slice(7),
  },
  { id: "solve", section: "learning", title: "Solved while training", hint: "Sampled completions that are right", names: ["solve_rate"], label: () => "share", format: percent, zero: true },
  { id: "loss", section: "learning", title: "Loss", names: ["loss", /^(eval|held_out|sft)\/.*loss$/, /^loss\//], label: (name) => name, sparse: (name) => /^(eval|held_out)\//.test(name) },
  { id: "entropy", section: "policy health", title: "Entropy", unit: "nats a token", hint: "Of the law that tokens were drawn from", names: ["entropy"], label: () => "mean", zero: true },
  {
    id: "clip",
    section: "policy health",
    title: "Clip fraction",
    hint: "Share of scored actions whose ratio is clipped",
    names: [/clip_fraction\/(low|high)$/],
    label: (name) => name.replace(/clip_fraction\//, "").replaceAll("_", " "),
    format: percent,
    zero: true,
  },
  {
    id: "ratio",
    section: "policy health",
    title: "Importance ratio",
    hint: "New policy against the one that drew the batch",
    names: [/ratio\/(mean|max)$/],
    label: (name) => name.replace(/ratio\//, "").replaceAll("_", " "),
  },
  {
    id: "weights",
    section: "policy health",
    title: "Timestep weights",
    hint: "Largest importance weight of a sampled denoising step",
    names: [/^importance_weight\//],
    label: (name) => name.slice(18),
    zero: true,
  },
  { id: "staleness", section: "policy health", title: "Staleness", unit: "versions", hint: "Versions between drawing a group and learning from it", names: [/^staleness\//], label: (name) => name.slice(10), zero: true },
  { id: "kl", section: "policy health", title: "KL to the reference", names: [/(^|_)kl$/], label: (name) => name.replaceAll("_", " ") },
  { id: "grad", section: "policy health", title: "Gradient norm", names: ["grad_norm"], label: () => "norm", zero: true },
  { id: "speed", section: "throughput", title: "Tokens per second", names: ["machine/tokens_per_s"], label: () => "tokens/s", zero: true },
  {
    id: "time",
    section: "throughput",
    title: "Time by stage",
    unit: "seconds",
    hint: "Seconds of an iteration; the rest is what no stage claims",
    names: [/^time\/(?!iteration_s$)[^/]*_s$/],
    total: "time/iteration_s",
    label: (name) => name.slice(5, -2).replaceAll("_", " "),
    format: seconds,
    kind: "stacked",
  },
  {
    id: "lease",
    section: "throughput",
    title: "Time of a lease",
    unit: "seconds",
    hint: "Mean seconds in which an actor loads weights, generates, and waits for the last verdicts",
    names: [/^time\/lease\//],
    label: (name) => name.slice(11, -2).replaceAll("_", " "),
    format: seconds,
    kind: "stacked",
  },
];

/** Shown by the ledger's own drawing, as intervals, and among the vitals. */
const ELSEWHERE = [/^ledger\//, /^eval\/problems$/, /^machine\/to_go_s$/];

const OTHERS = { machine: "Machine", ledger: "Ledger", log_ratio: "Learner against rollout", updates: "Updates", groups: "Groups" };

/** Panels for these metric names: [{id, section?, title, names, total?, label(name), sparse?(name), format, kind, zero, other}]. */
export function panelsFor(names) {
  const left = new Set(names);
  const panels = [];
  for (const panel of PANELS) {
    const taken = [];
    for (const pattern of panel.names) {
      const found = [...left].filter((name) => (typeof pattern === "string" ? name === pattern : pattern.test(name))).sort(byName);
      for (const name of found) {
        left.delete(name);
        taken.push(name);
      }
    }
    const total = panel.total && left.delete(panel.total) ? panel.total : null;
    if (taken.length || total) panels.push({ format: figure, ...panel, names: taken, total, other: false });
  }
  const groups = new Map();
  for (const name of [...left].filter((item) => !ELSEWHERE.some((pattern) => pattern.test(item))).sort(byName)) {
    const slash = name.indexOf("/");
    const key = slash > 0 ? name.slice(0, slash) : "";
    groups.set(key, [...(groups.get(key) ?? []), name]);
  }
  for (const [key, found] of groups) {
    if (key === "") for (const name of found) panels.push(otherPanel(name, name.replaceAll("_", " "), [name], (each) => each.replaceAll("_", " ")));
    else panels.push(otherPanel(`other-${key}`, OTHERS[key] ?? key, found, (name) => name.slice(key.length + 1).replaceAll("_", " ")));
  }
  return panels;
}

function otherPanel(id, title, names, label) {
  return { id, title, names, total: null, label, format: figure, kind: "lines", other: true };
}

/** "m" before "m/2" before "m/4" before "m/16"; otherwise by the alphabet. */
export function byName(first, second) {
  const stem = (name) => name.replace(/\/solve_rate$/, "");
  return stem(first).localeCompare(stem(second), "en", { numeric: true });
}
