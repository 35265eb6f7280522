// What metrics are called where each has a chart of its own.

import { figure } from "../dom.js";
import { panelsFor } from "../panels.js";

/** `names()`: every metric there is. {titleOf(name), panelOf(name), formatFor(name)}. */
export function metricTitles(names) {
  let panels = new Map();
  const panelOf = (name) => {
    if (!panels.has(name)) panels = new Map(panelsFor(names()).flatMap((panel) => [...panel.names, panel.total].filter(Boolean).map((each) => [each, panel])));
    return panels.get(name);
  };
  const titleOf = (name) => {
    const panel = panelOf(name);
    if (!panel) return name;
    return panel.names.length > 1 ? `${panel.title}: ${name === panel.total ? "whole" : panel.label(name)}` : panel.title;
  };
  return { titleOf, panelOf, formatFor: (name) => panelOf(name)?.format ?? figure };
}

/** Whether a lower value is the better one. */
export const lowIsGood = (name) => /loss|_s$|(^|_)kl$|grad_norm|staleness|clip_fraction/.test(name);
