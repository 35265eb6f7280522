// What runs can be drawn along: iterations, seconds of training, completions, or forward-equivalents. A basis maps a
// run's iterations to such an x, by what the run reported of each iteration.

import { between } from "../statistics.js";

export const AXES = [
  { id: "iteration", title: "Iterations", along: "iteration" },
  { id: "seconds", title: "Seconds", along: "second", metric: "time/iteration_s", hint: "Seconds of training: the sum of time/iteration_s" },
  { id: "completions", title: "Completions", along: "completion", hint: "Completions drawn for training" },
  { id: "forwards", title: "Forward-equivalents", along: "forward-equivalent", metric: "forward_equivalents", hint: "What rollouts and updates cost, whatever the method: a forward of one sequence is 1, its backward 2 more" },
];

/** The names of the metrics whose sum over iterations is this axis: one or none. */
export const summed = (axis) => AXES.filter(({ id, metric }) => id === axis && metric).map(({ metric }) => metric);

/** What a run with this `config` has of the axis: f(iteration), or null. `steps`: the series of the metric that is summed. */
export function basis(axis, config, steps) {
  if (axis === "iteration") return (iteration) => iteration;
  if (axis === "completions") {
    const each = config["rollout.prompts_per_iteration"] * config["rollout.group_size"];
    return Number.isFinite(each) ? (iteration) => iteration * each : null;
  }
  if (!steps?.x.length) return null;
  const points = [[0, 0]];
  steps.x.forEach((x, index) => {
    const [before, sum] = points.at(-1);
    if (x > before) points.push([x, sum + (x - before) * (steps.y[index] ?? 0)]);
  });
  const [end, total] = points.at(-1);
  return (iteration) => (iteration <= end ? between(points, Math.max(0, iteration)) : total + ((iteration - end) * total) / Math.max(1, end));
}

/** A series along another axis; the same one along iterations. */
export function along(data, map, axis) {
  if (axis === "iteration" || !map) return data;
  return { ...data, x: data.x.map(map), bad: data.bad.map(([x, kind]) => [map(x), kind]) };
}
