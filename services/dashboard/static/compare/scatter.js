// A metric against a setting: a point for each run, the mean of runs with the same value as a line.

import { figure, h, put, s } from "../dom.js";
import { valueText } from "../names.js";
import { meanOf } from "../statistics.js";

const [WIDEST, NARROWEST, HEIGHT] = [720, 300, 260];
const PLOT = { left: 64, right: 16, top: 14, bottom: 34 };

/** points: [{label, color (CSS), x (a setting's value), y}]; `format` writes y. Returns an SVG, or a sentence. */
export function scatter(host, points, { setting, metric, format = figure, open }) {
  const good = points.filter(({ x, y }) => x !== undefined && typeof y === "number" && Number.isFinite(y));
  if (!good.length) return put(host, h("p.note", null, "No run has both."));
  const numeric = good.every(({ x }) => typeof x === "number");
  const values = numeric ? [...new Set(good.map(({ x }) => x))].sort((a, b) => a - b) : [...new Set(good.map(({ x }) => valueText(x)))].sort();
  const place = scaleX(values, numeric);
  const width = Math.min(WIDEST, Math.max(NARROWEST, host.clientWidth)); // so that its text is readable on a phone
  const [low, high] = padded(good.map(({ y }) => y));
  const y = (value) => HEIGHT - PLOT.bottom - ((HEIGHT - PLOT.top - PLOT.bottom) * (value - low)) / (high - low);
  const x = (value) => PLOT.left + (width - PLOT.left - PLOT.right) * place(numeric ? value : valueText(value));
  const means = values.map((value) => [value, meanOf(good.filter((point) => (numeric ? point.x : valueText(point.x)) === value).map((point) => point.y)).mean]);
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => low + share * (high - low));
  put(
    host,
    s(
      "svg.scatter",
      { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `${metric} against ${setting}: ${means.map(([value, mean]) => `${valueText(value)}: ${format(mean)}`).join(", ")}` },
      ticks.map((value) => [s("line.grid", { x1: PLOT.left, x2: width - PLOT.right, y1: y(value), y2: y(value) }), s("text", { x: PLOT.left - 8, y: y(value) + 4, "text-anchor": "end" }, format(value))]),
      shownTicks(values, x).map((value) => s("text", { x: x(value), y: HEIGHT - 14, "text-anchor": "middle" }, valueText(value))),
      means.length > 1 && s("polyline.means", { points: means.map(([value, mean]) => `${x(value).toFixed(1)},${y(mean).toFixed(1)}`).join(" ") }),
      good.map(({ label, color, x: value, y: height }) => {
        const dot = s("circle.dot", { cx: x(value).toFixed(1), cy: y(height).toFixed(1), r: 5, tabindex: 0, role: "link", "aria-label": `${label}: ${format(height)}` }, s("title", null, `${label}\n${setting} ${valueText(value)}\n${metric} ${format(height)}`));
        dot.style.setProperty("--swatch", color);
        dot.addEventListener("click", () => open(label));
        dot.addEventListener("keydown", (event) => event.key === "Enter" && open(label));
        return dot;
      }),
    ),
  );
}

/** Equal steps for names; logarithmic where numbers span more than tenfold. */
function scaleX(values, numeric) {
  if (values.length === 1) return () => 0.5;
  if (!numeric) return (value) => 0.06 + (0.88 * values.indexOf(value)) / (values.length - 1);
  const [first, last] = [values[0], values.at(-1)];
  const scale = first > 0 && last / first >= 10 ? Math.log : (value) => value;
  return (value) => 0.04 + (0.92 * (scale(value) - scale(first))) / (scale(last) - scale(first));
}

/** Those that don't overlap. */
function shownTicks(values, x) {
  let end = -Infinity;
  return values.filter((value) => {
    const half = 4 * valueText(value).length + 6;
    if (x(value) - half < end) return false;
    end = x(value) + half;
    return true;
  });
}

function padded(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = high > low ? 0.08 * (high - low) : Math.max(Math.abs(high) * 0.1, 0.01);
  return [low - room, high + room];
}
