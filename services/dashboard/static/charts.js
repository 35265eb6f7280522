// Line and area charts on Plotly with one cursor, one zoom and one smoothing for all charts of a page.
//
// A chart's series are {key, label, color (1..8), dash, data, bounds, sparse}; see series.js for `data`. Raw values are
// always drawn: smoothing adds a line over them, unless they are `sparse` (evaluations). `bounds` are intervals of the
// points, [low, high] each. Points that stand for several iterations carry their minimum and maximum as a band, and
// values that are no numbers are marked at the bottom. A chart's `info` says what its metrics are: [{label, what,
// healthy, act}].

import { valueAxis } from "./chartaxis.js";
import { figure, h, put, setText } from "./dom.js";
import { before, hasBand, nearest, smooth, valueAt } from "./series.js";

const PLOTLY = new URL("./vendor/plotly.min.js", import.meta.url);
const MARGIN = { l: 48, r: 12, t: 8, b: 36 };
const FEW_POINTS = 30;
const MANY_SERIES = 32; // beyond, points are neither told apart nor drawn in time
let plotly = null;

/** Plotly, loaded from this service (index.html has it fetched ahead, since it is large). */
export function loadPlotly() {
  plotly ??= new Promise((resolve, reject) => {
    const script = h("script", { src: PLOTLY.href });
    // While it loads the library adds the style sheet of its maps, which nobody here draws: the CSP would refuse it with
    // an error in the console. Its own few rules go into the element that index.html has for them.
    const create = document.createElement;
    document.createElement = (tag, ...rest) => create.call(document, tag === "style" ? "template" : tag, ...rest);
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error("The chart library did not load from this service."));
    document.head.append(script);
  })
    .catch((error) => {
      plotly = null;
      throw error;
    })
    .finally(() => delete document.createElement);
  return plotly;
}

/** The theme's colours as rgb(): {text, muted, line, surface, bad, series: [8]}. */
export function palette() {
  const probe = h("span", { hidden: true });
  document.body.append(probe);
  const read = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const colors = Object.fromEntries(["text", "muted", "line", "surface", "bad", "accent"].map((name) => [name, read(name)]));
  colors.series = Array.from({ length: 8 }, (_, index) => read(`series-${index + 1}`));
  probe.remove();
  return colors;
}

export const DASHES = ["solid", "dash", "dot", "dashdot"];

/**
 * What the charts of a page share. `onZoom([first, last] or null)` is told when the reader picks a stretch, `onLog()`
 * when a chart's scale changes.
 */
export class ChartGroup {
  constructor({ onZoom, onLog } = {}) {
    loadPlotly().catch(() => {}); // a chart says so when it draws
    this.onLog = onLog;
    this.charts = [];
    this.span = 0;
    this.colors = palette();
    this.onZoom = onZoom;
    this.range = null;
    this.extent = [Infinity, -Infinity];
    this.cursor = null;
    this.visible = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const chart = this.charts.find((item) => item.plot === entry.target);
        if (!chart) continue;
        chart.seen = entry.isIntersecting;
        if (chart.seen) chart.draw();
      }
    }, { rootMargin: "200px" });
  }

  add(host, spec) {
    const chart = new Chart(this, host, spec);
    this.charts.push(chart);
    this.visible.observe(chart.plot);
    return chart;
  }

  remove(chart) {
    this.charts = this.charts.filter((item) => item !== chart);
    this.visible.unobserve(chart.plot);
    chart.close();
  }

  /** Redraw for other colours. */
  retheme() {
    this.colors = palette();
    for (const chart of this.charts) chart.changed();
  }

  /** Iterations that the moving average remembers; 0 draws none. */
  setSmoothing(span) {
    this.span = span;
    for (const chart of this.charts) chart.changed();
  }

  /** Let the shared axis reach over these series too. */
  widen(series) {
    const ends = series.flatMap(({ data }) => (data.x.length ? [data.x[0], data.x.at(-1)] : []));
    const [first, last] = [Math.min(this.extent[0], ...ends), Math.max(this.extent[1], ...ends)];
    if (first === this.extent[0] && last === this.extent[1]) return;
    this.extent = [first, last];
    for (const chart of this.charts) chart.redraw(); // in the same frame as the series that widen it
  }

  /** The x range of every chart. */
  axis() {
    if (this.range) return this.range;
    const [first, last] = this.extent[0] > this.extent[1] ? [0, 1] : this.extent;
    const room = Math.max(0.5, 0.012 * (last - first));
    return [first - room, last + room];
  }

  setCursor(x) {
    if (x === this.cursor) return;
    this.cursor = x;
    for (const chart of this.charts) chart.showCursor();
  }

  zoom(range) {
    this.range = range;
    for (const chart of this.charts) chart.changed();
    this.onZoom?.(range);
  }

  close() {
    this.visible.disconnect();
    for (const chart of this.charts) chart.close();
    this.charts = [];
  }
}

class Chart {
  constructor(group, host, spec) {
    this.group = group;
    this.spec = { height: 200, kind: "lines", along: "iteration", format: figure, series: [], ...spec };
    this.seen = false;
    this.stale = true;
    this.drawings = 0;
    this.log = Boolean(spec.log) && spec.kind !== "stacked";
    this.readout = h("div.readout");
    this.logButton = h("button.icon-button.log", { type: "button", title: "Logarithmic scale", ariaPressed: String(this.log), onclick: () => this.toggleLog() }, "log");
    this.plot = h("div.plot", { tabIndex: 0, role: "img", ariaLabel: this.spec.title, style: { height: `${this.spec.height}px` } });
    this.line = h("i.cursor", { hidden: true });
    this.none = h("p.none", { hidden: true }, "No values yet");
    const unit = this.spec.unit && h("span.note", null, this.spec.unit);
    this.hidden = h("span.note.hidden-values");
    this.about = h("div.about", { hidden: true });
    const mark = h("button.icon-button.info", { type: "button", title: "What this is", ariaLabel: `What ${this.spec.title} is`, ariaExpanded: "false", onclick: () => this.toggleAbout(mark) }, "i");
    const title = h("header", null, h("h2", { title: this.spec.hint ?? "" }, this.spec.title), unit, this.spec.info?.length > 0 && mark, h("span.space"), this.hidden, this.logButton);
    this.element = h("section.card.chart", { dataset: { chart: this.spec.id } }, title, this.about, this.readout, h("div.plot-box", null, this.plot, this.line, this.none));
    if (this.spec.kind === "stacked") this.logButton.hidden = true;
    host.append(this.element);
    const box = this.plot.parentElement;
    box.addEventListener("pointermove", (event) => this.group.setCursor(this.iterationAt(event.clientX)));
    box.addEventListener("pointerleave", () => this.group.setCursor(null));
    this.plot.addEventListener("keydown", (event) => this.step(event));
    this.plot.addEventListener("blur", () => this.group.setCursor(null));
    this.resized = new ResizeObserver(() => this.drawn && window.Plotly.Plots.resize(this.plot));
    this.resized.observe(box);
  }

  /** Take these series; drawn at once when the chart is in view, else when it comes into view. */
  set(series) {
    this.spec.series = series;
    this.group.widen(series);
    this.changed();
  }

  changed() {
    this.showReadout();
    this.redraw();
  }

  redraw() {
    this.stale = true;
    if (this.seen) this.draw();
  }

  toggleLog() {
    this.log = !this.log;
    this.logButton.ariaPressed = String(this.log);
    this.changed();
    this.group.onLog?.();
  }

  toggleAbout(mark) {
    this.about.hidden = !this.about.hidden;
    mark.ariaExpanded = String(!this.about.hidden);
    const sentence = (name, text) => text && h("p", null, h("b", null, name), " ", text);
    put(this.about, this.spec.info.map(({ label, what, healthy, act }) => h("div", null, sentence(label, what), sentence("Healthy:", healthy), sentence("If not:", act))));
  }

  async draw() {
    if (!this.stale || this.waiting) return;
    this.waiting = true;
    try {
      const Plotly = await loadPlotly();
      await new Promise(requestAnimationFrame);
      if (!this.plot.isConnected) return;
      this.stale = false;
      const data = this.spec.series.filter((series) => series.data.x.length);
      this.none.hidden = data.length > 0;
      if (!data.length && !this.drawn) return;
      const traces = this.spec.kind === "stacked" ? this.areas(data) : data.flatMap((series) => this.lines(series));
      const config = { displayModeBar: false, responsive: false, doubleClick: false, showTips: false };
      await Plotly.react(this.plot, traces, this.layout(), config);
      if (!this.drawn) this.listen();
      this.drawn = true;
      this.describe();
      this.showCursor();
    } catch (error) {
      this.none.hidden = false;
      setText(this.none, error.message);
    } finally {
      this.waiting = false;
    }
    if (this.stale && this.plot.isConnected) this.draw();
  }

  listen() {
    this.plot.on("plotly_relayout", (change) => {
      const [first, last] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      if (first !== undefined) this.group.zoom([first, last]);
    });
    this.plot.on("plotly_doubleclick", () => this.group.range && this.group.zoom(null));
  }

  color(series) {
    return this.group.colors.series[(series.color - 1) % 8];
  }

  lines(series) {
    const { data } = series;
    const color = this.color(series);
    const span = series.sparse ? 0 : this.group.span;
    const shown = this.log ? (value) => (value > 0 ? value : null) : (value) => value;
    const common = { hoverinfo: "none", showlegend: false, connectgaps: false };
    const traces = [];
    if (hasBand(data)) {
      const kept = data.x.map((_, index) => index).filter((index) => data.low[index] !== null && shown(data.low[index]) !== null);
      const x = kept.map((index) => data.x[index]);
      const outline = [...kept.map((index) => data.high[index]), ...kept.map((index) => data.low[index]).reverse()];
      traces.push({ ...common, x: [...x, ...x.slice().reverse()], y: outline, fill: "toself", fillcolor: alpha(color, 0.16), line: { width: 0 }, mode: "lines" });
    }
    const many = this.spec.series.length > MANY_SERIES;
    const few = data.x.length <= (many ? 1 : FEW_POINTS);
    traces.push({
      ...common,
      x: data.x,
      y: this.log ? data.y.map(shown) : data.y,
      ...(series.bounds && { error_y: errorBars(series, color) }),
      mode: few ? "lines+markers" : "lines",
      line: { color: alpha(color, span ? 0.38 : 1), width: span || many ? 1 : 1.6, dash: series.dash ?? "solid" },
      marker: { color: alpha(color, span ? 0.5 : 1), size: few ? 5 : 3 },
    });
    if (span) {
      traces.push({ ...common, x: data.x, y: smooth(data, span).map(shown), mode: "lines", line: { color, width: 2.2, dash: series.dash ?? "solid" } });
    }
    if (data.bad.length) {
      const marker = { symbol: "x-thin", size: 8, line: { color: this.group.colors.bad, width: 2 } };
      traces.push({ ...common, x: data.bad.map(([x]) => x), y: data.bad.map(() => 0.03), yaxis: "y2", mode: "markers", marker, cliponaxis: false });
    }
    return traces;
  }

  areas(data) {
    return data.map((series) => ({
      x: series.data.x,
      y: series.data.y.map((value) => value ?? 0),
      stackgroup: "all",
      mode: "lines",
      line: { width: 0.5, color: this.color(series) },
      fillcolor: alpha(this.color(series), 0.62),
      hoverinfo: "none",
      showlegend: false,
    }));
  }

  layout() {
    const { colors } = this.group;
    const axis = { showticklabels: this.spec.series.some(({ data }) => data.x.length > 0), gridcolor: colors.line, linecolor: colors.line, zeroline: false, tickfont: { size: 11, color: colors.muted }, automargin: false, fixedrange: true };
    const touch = matchMedia("(pointer: coarse)").matches;
    const { axis: values, hidden } = valueAxis(this.spec, { log: this.log, within: this.group.range });
    setText(this.hidden, hidden ? `${hidden} ${hidden === 1 ? "value" : "values"} ≤ 0 not shown` : "");
    return {
      datarevision: (this.drawings += 1), // series grow in place, which Plotly would not notice
      margin: MARGIN,
      height: this.spec.height,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: colors.muted },
      dragmode: touch ? false : "zoom",
      hovermode: false, // the cursor is our own
      xaxis: { ...axis, fixedrange: touch, showgrid: false, ticks: "outside", ticklen: 4, tickcolor: colors.line, nticks: 6, tickformat: ",d", range: this.group.axis(), autorange: false, title: { text: this.spec.along, standoff: 2, font: { size: 11, color: colors.muted } } },
      yaxis: { ...axis, ...values },
      yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    };
  }

  // Cursor and figures

  iterationAt(clientX) {
    const axis = this.plot._fullLayout?.xaxis;
    if (!axis) return null;
    const at = axis.p2l(clientX - this.plot.getBoundingClientRect().left - axis._offset);
    return this.snapped(at);
  }

  snapped(x) {
    let best = null;
    for (const { data } of this.spec.series) {
      const index = nearest(data, x);
      if (index >= 0 && (best === null || Math.abs(data.x[index] - x) < Math.abs(best - x))) best = data.x[index];
    }
    return best;
  }

  step(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const data = this.spec.series.find((series) => series.data.x.length)?.data;
    if (!move || !data) return;
    event.preventDefault();
    const from = this.group.cursor === null ? data.x.length - 1 - move : nearest(data, this.group.cursor);
    this.group.setCursor(data.x[Math.min(data.x.length - 1, Math.max(0, from + move))]);
  }

  showCursor() {
    const axis = this.plot._fullLayout?.xaxis;
    const x = this.group.cursor;
    const at = axis && x !== null ? axis.l2p(x) : -1;
    this.line.hidden = !axis || at < 0 || at > axis._length;
    if (!this.line.hidden) {
      this.line.style.transform = `translateX(${Math.round(axis._offset + at)}px)`;
      this.line.dataset.x = x.toLocaleString("en-US");
      this.line.dataset.side = at > axis._length * 0.75 ? "left" : "right";
    }
    this.showReadout();
  }

  /** Legend and figures in one: the values at the cursor, or the last ones before it, else the newest. */
  showReadout() {
    const shown = this.spec.series.filter((series) => series.data.x.length);
    if (this.readout.childElementCount !== shown.length || shown.some((series, index) => this.readout.children[index].dataset.key !== series.key)) {
      put(this.readout, shown.map((series) =>
        h(
          "span.entry",
          { dataset: { key: series.key }, title: series.key },
          h("i", { dataset: { dash: series.dash ?? "solid" }, style: { "--swatch": `var(--series-${((series.color - 1) % 8) + 1})` } }),
          h("span.label", null, series.label),
          h("b"),
          h("span.note"),
        )));
    }
    shown.forEach((series, index) => {
      const [value, note] = [...this.readout.children[index].children].slice(-2);
      const at = this.group.cursor === null ? series.data.x.length - 1 : before(series.data, this.group.cursor, series.sparse);
      const found = valueAt(series.data, at);
      setText(value, found === null ? "–" : this.spec.format(found));
      setText(note, found === null ? "" : this.beside(series, at));
    });
  }

  /** A point's interval, and its iteration where that is not the cursor's. */
  beside({ data, bounds }, at) {
    const interval = bounds?.[at] ? `${bounds[at].map((bound) => this.spec.format(bound)).join("–")}` : "";
    const x = this.group.cursor === null ? data.x.at(-1) : this.group.cursor;
    return [interval, data.x[at] !== x && `at ${figure(data.x[at])}`].filter(Boolean).join(" ");
  }

  describe() {
    const parts = this.spec.series.filter((series) => series.data.x.length).map(({ label, data }) => `${label}: ${this.spec.format(valueAt(data, data.x.length - 1))} at ${this.spec.along} ${data.x.at(-1)}`);
    this.plot.setAttribute("aria-label", `${this.spec.title}. ${parts.join("; ") || "no values yet"}`);
  }

  close() {
    this.resized.disconnect();
    if (this.drawn) window.Plotly.purge(this.plot);
    this.element.remove();
  }
}

function errorBars({ data, bounds }, color) {
  const side = (index) => data.y.map((value, at) => (value === null || !bounds[at] ? 0 : Math.abs(bounds[at][index] - value)));
  return { type: "data", symmetric: false, array: side(1), arrayminus: side(0), color: alpha(color, 0.55), thickness: 1.2, width: 3 };
}

function alpha(rgb, share) {
  const parts = rgb.match(/[\d.]+/g);
  if (rgb.startsWith("color(srgb")) return `rgba(${parts.slice(-3).map((part) => Math.round(255 * part)).join(",")},${share})`;
  return `rgba(${parts.slice(0, 3).join(",")},${share})`;
}
