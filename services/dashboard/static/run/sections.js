// The sections of a run's charts, and which chart is in which. Charts that never move are one line of their section.

import { h, put } from "../dom.js";
import { entryOf } from "./reference.js";

const FEWEST = 5; // values, for calling a curve constant
const FLAT = 1e-4; // of its size

const SECTIONS = [
  ["learning", "Learning", "is it getting better"],
  ["policy health", "Policy health", "will it go on getting better"],
  ["throughput", "Throughput", "how fast, and what it waits for"],
  ["other", "Other metrics", "the run's own"],
  ["internals", "Internals", "how it works inside"],
];

/** {element(id), place(panels, reference)}: one element a section; internals are folded. */
export function chartSections() {
  const parts = new Map(SECTIONS.map(([id, title, about]) => [id, section(id, title, about)]));
  return {
    element: (id) => parts.get(id).element,
    /** Put the charts where they belong; it may be called at any time. */
    place(panels, reference) {
      const wanted = new Map([...parts.keys()].map((id) => [id, { moving: [], constant: [] }]));
      const rewarded = panels.some(({ id }) => id === "reward");
      for (const panel of panels) wanted.get(sectionOf(panel, reference, rewarded))[isConstant(panel) ? "constant" : "moving"].push(panel);
      for (const [id, { moving, constant }] of wanted) parts.get(id).show(moving, constant);
    },
  };
}

function section(id, title, about) {
  const grid = h("div.grid");
  const still = h("div.grid");
  const summary = h("summary");
  const constants = h("details.constants", { hidden: true }, summary, still);
  const folded = id === "internals";
  const more = h("div.stack.more");
  const body = h("div.stack", null, more, grid, constants);
  const heading = [h("h2", null, title), h("span.note", null, about)];
  const element = folded
    ? h("details.chart-section", { dataset: { section: id } }, h("summary", null, ...heading), body)
    : h("section.chart-section.stack", { dataset: { section: id }, hidden: true }, h("div.section-title", null, ...heading), body);
  return {
    element,
    show(moving, constant) {
      arrange(grid, moving);
      arrange(still, constant);
      constants.hidden = !constant.length;
      const text = `${constant.length} constant: ${constant.map(said).join(", ")}`;
      if (summary.textContent !== text) put(summary, text);
      element.hidden = !moving.length && !constant.length && [...more.children].every((each) => each.hidden);
    },
  };
}

/** Charts in this order, none moved that lies right. */
function arrange(host, panels) {
  panels.forEach(({ chart }, index) => {
    if (host.children[index] !== chart.element) host.insertBefore(chart.element, host.children[index] ?? null);
  });
}

/** `rewarded`: it is reinforcement learning, whose loss says nothing of what was learned. */
function sectionOf(panel, reference, rewarded) {
  if (panel.id === "loss" && rewarded) return "policy health";
  if (panel.section) return panel.section;
  return entryOf(reference, panel.names[0])?.group ?? "other";
}

function isConstant(panel) {
  const series = panel.chart.spec.series;
  return panel.section !== "learning" && series.length > 0 && series.every(({ data }) => {
    const values = data.y.filter((value) => value !== null);
    if (values.length < FEWEST || data.bad.length) return false;
    const [low, high] = [Math.min(...values, ...data.low.filter((each) => each !== null)), Math.max(...values, ...data.high.filter((each) => each !== null))];
    return high - low <= FLAT * Math.max(Math.abs(low), Math.abs(high));
  });
}

function said(panel) {
  const values = new Set(panel.chart.spec.series.map(({ data }) => panel.format(data.y.find((value) => value !== null) ?? null)));
  return `${panel.title.toLowerCase()} ${[...values].join(" and ")}`;
}

/** The smoothing that this browser was left with. */
export const smoothing = {
  get: () => {
    try {
      return Number(localStorage.getItem("unmask-smoothing")) || 0;
    } catch {
      return 0;
    }
  },
  set: (span) => {
    try {
      localStorage.setItem("unmask-smoothing", String(span));
    } catch {
      // no storage: it holds until the page is loaded again
    }
  },
};
