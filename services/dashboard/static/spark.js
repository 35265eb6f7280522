// A small curve in a table cell, fetched when its row comes into view.

import { h, put, s } from "./dom.js";

const WIDTH = 112;
const HEIGHT = 26;
const AT_ONCE = 4;
const waiting = [];
let running = 0;

export class Sparkline {
  /** `load()` resolves to [[x, y or null], ...]. */
  constructor(host, load) {
    this.host = host;
    this.load = load;
    this.seen = false;
    this.stale = false;
    this.open = true;
    put(host, h("span.spark-wait"));
    this.observer = new IntersectionObserver((entries) => {
      this.seen = entries.at(-1).isIntersecting;
      if (this.seen && this.stale) this.fetch();
    });
    this.observer.observe(host);
  }

  refresh() {
    this.stale = true;
    if (this.seen) this.fetch();
  }

  fetch() {
    this.stale = false;
    waiting.push(this);
    next();
  }

  async run() {
    try {
      if (!this.open) return;
      const points = await this.load();
      if (points.length) drawCurve(this.host, points);
      else put(this.host, h("span.muted", null, "–"));
    } catch {
      put(this.host, h("span.muted", null, "–")); // the row itself tells what is wrong with the run
    }
  }

  close() {
    this.open = false;
    this.observer.disconnect();
  }
}

function next() {
  while (running < AT_ONCE && waiting.length) {
    running += 1;
    waiting.shift().run().finally(() => {
      running -= 1;
      next();
    });
  }
}

/** The curve of [[x, y or null], ...], its end marked; nothing for no values. */
export function drawCurve(host, points, { width = WIDTH, height = HEIGHT } = {}) {
  const good = points.filter(([, y]) => y !== null && Number.isFinite(y));
  if (!good.length) return put(host);
  const [first, last] = [good[0][0], good.at(-1)[0]];
  const values = good.map(([, y]) => y);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const x = (value) => 2 + ((width - 6) * (value - first)) / (last - first || 1);
  const y = (value) => (high === low ? height / 2 : height - 3 - ((height - 6) * (value - low)) / (high - low));
  const line = good.map(([at, value]) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  const [endX, endY] = [x(last), y(good.at(-1)[1])];
  put(
    host,
    s(
      "svg.spark",
      { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `from ${values[0].toPrecision(3)} to ${values.at(-1).toPrecision(3)}` },
      good.length > 1 && s("polyline", { points: line }),
      s("circle", { cx: endX.toFixed(1), cy: endY.toFixed(1), r: 2.2 }),
    ),
  );
}
