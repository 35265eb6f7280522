// Position by step: where in the text a whole batch decides first, and the way that the completions shown took.

import { figure, h, number, put } from "../dom.js";
import { rgb, scaleBar } from "./colours.js";

const MARGIN = { left: 34, right: 6, top: 6, bottom: 26 };

/** `map` may be null (none was kept). `plays`: up to two documents, whose ways are drawn. */
export class OrderMap {
  constructor(map, plays, { onPick }) {
    this.map = map;
    this.plays = plays;
    this.done = 0;
    this.position = null;
    this.positions = Math.max(1, written(map).positions, ...plays.map((play) => play.cells.drawn.lastIndexOf(true) + 1));
    this.steps = Math.max(1, written(map).steps, ...plays.map((play) => play.steps));
    this.canvas = h("canvas", { role: "img", ariaLabel: this.#summary() });
    this.probe = h("span", { hidden: true });
    this.element = h("div.play-map", null, this.canvas, this.probe);
    this.heat = map ? heat(map) : null;
    this.canvas.addEventListener("click", (event) => {
      const at = this.#at(event);
      if (at) onPick(at.position, at.step);
    });
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.element);
  }

  close() {
    this.observer.disconnect();
  }

  show(done) {
    this.done = done;
    this.draw();
  }

  select(position) {
    this.position = position;
    this.draw();
  }

  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
    const y = (event.clientY - box.top - MARGIN.top) / (box.height - MARGIN.top - MARGIN.bottom);
    if (x < 0 || x >= 1 || y < 0 || y >= 1) return null;
    return { position: Math.floor(x * this.positions), step: Math.floor(y * this.steps) };
  }

  draw() {
    const width = this.element.clientWidth;
    if (!width) return;
    const height = Math.round(Math.min(380, Math.max(200, width * 0.72)));
    const dense = Math.min(3, devicePixelRatio || 1);
    this.canvas.width = Math.round(width * dense);
    this.canvas.height = Math.round(height * dense);
    this.canvas.style.setProperty("height", `${height}px`);
    const paint = this.canvas.getContext("2d");
    paint.setTransform(dense, 0, 0, dense, 0, 0);
    const colour = (name) => {
      this.probe.style.setProperty("color", `var(${name})`);
      return getComputedStyle(this.probe).color; // resolved for the theme, which a custom property is not
    };
    const inner = { x: MARGIN.left, y: MARGIN.top, w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
    paint.fillStyle = colour("--map-empty");
    paint.fillRect(inner.x, inner.y, inner.w, inner.h);
    if (this.heat) {
      paint.imageSmoothingEnabled = false;
      const across = Math.min(this.heat.width, this.positions / this.map.positions_per_bin);
      const down = Math.min(this.heat.height, this.steps / this.map.steps_per_bin);
      const shown = { w: (across * this.map.positions_per_bin) / this.positions, h: (down * this.map.steps_per_bin) / this.steps };
      paint.drawImage(this.heat, 0, 0, across, down, inner.x, inner.y, inner.w * shown.w, inner.h * shown.h);
    }
    this.#ways(paint, inner, colour);
    this.#frame(paint, inner, colour, height);
  }

  #ways(paint, inner, colour) {
    const slot = { x: inner.w / this.positions, y: inner.h / this.steps };
    const radius = Math.max(1.4, Math.min(4, Math.min(slot.x, slot.y) * 0.34));
    this.plays.forEach((play, index) => {
      paint.fillStyle = colour(index ? "--way-2" : "--way-1");
      paint.strokeStyle = colour("--way-edge");
      play.cells.step.forEach((step, position) => {
        if (!play.cells.drawn[position]) return;
        const revealed = step < this.done;
        paint.globalAlpha = revealed ? 1 : 0.25;
        paint.beginPath();
        const x = inner.x + (position + 0.5) * slot.x;
        const y = inner.y + (step + 0.5) * slot.y;
        const first = this.plays.length > 1 ? 1.6 * radius : radius; // it stays to be seen under the second one
        if (index) paint.rect(x - radius, y - radius, 2 * radius, 2 * radius);
        else paint.arc(x, y, first, 0, 2 * Math.PI);
        paint.fill();
        if (radius > 2 && revealed) paint.stroke();
      });
    });
    paint.globalAlpha = 1;
    if (this.done) {
      paint.strokeStyle = colour("--way-now");
      paint.lineWidth = 1.5;
      line(paint, inner.x, inner.y + this.done * slot.y, inner.x + inner.w, inner.y + this.done * slot.y);
    }
    if (this.position !== null) {
      const x = inner.x + (this.position + 0.5) * slot.x;
      paint.strokeStyle = colour("--way-now");
      paint.setLineDash([3, 3]);
      line(paint, x, inner.y, x, inner.y + inner.h);
      paint.setLineDash([]);
    }
    paint.lineWidth = 1;
  }

  #frame(paint, inner, colour, height) {
    paint.fillStyle = colour("--muted");
    paint.font = "11px system-ui, sans-serif";
    paint.textAlign = "right";
    paint.textBaseline = "top";
    paint.fillText("1", inner.x - 6, inner.y);
    paint.textBaseline = "bottom";
    paint.fillText(String(this.steps), inner.x - 6, inner.y + inner.h);
    paint.save();
    paint.translate(10, inner.y + inner.h / 2);
    paint.rotate(-Math.PI / 2);
    paint.textAlign = "center";
    paint.textBaseline = "middle";
    paint.fillText("step", 0, 0);
    paint.restore();
    paint.textBaseline = "bottom";
    paint.textAlign = "left";
    paint.fillText("0", inner.x, height - 6);
    paint.textAlign = "center";
    paint.fillText("position in the text", inner.x + inner.w / 2, height - 6);
    paint.textAlign = "right";
    paint.fillText(String(this.positions - 1), inner.x + inner.w, height - 6);
  }

  #summary() {
    if (!this.map) return "Position by denoising step for the completions shown; no map of the batch was kept.";
    return `Position by denoising step, over ${this.map.completions} completions. ${firsts(this.map).text}`;
  }
}

/** How many positions and steps the batch used: what lies behind them is empty. */
function written(map) {
  if (!map) return { positions: 0, steps: 0 };
  const rows = map.counts.findLastIndex((row) => row.some((count) => count > 0)) + 1;
  const columns = Math.max(0, ...map.counts.map((row) => row.findLastIndex((count) => count > 0) + 1));
  return { positions: Math.min(map.positions, rows * map.positions_per_bin), steps: Math.min(map.steps, columns * map.steps_per_bin) };
}

/** Which fifth of the text the batch writes first, and which last, by mean step. */
function firsts(map) {
  if (!map) return { text: "", fifths: [] };
  const length = written(map).positions;
  const parts = Math.min(5, length);
  const fifths = Array.from({ length: parts }, (_, part) => {
    const from = Math.floor((part * length) / parts);
    const to = Math.floor(((part + 1) * length) / parts);
    const values = map.mean_step.slice(from, to).map(number).filter((value) => value !== null && Number.isFinite(value));
    return { from, to: to - 1, mean: values.length ? values.reduce((a, b) => a + b, 0) / values.length : null };
  });
  const known = fifths.filter((fifth) => fifth.mean !== null).sort((a, b) => a.mean - b.mean);
  if (known.length < 2) return { text: "", fifths };
  const name = (fifth) => `positions ${fifth.from}–${fifth.to} (mean step ${figure(fifth.mean + 1, 3)})`;
  return { text: `Decided first: ${name(known[0])}; last: ${name(known.at(-1))}.`, fifths };
}

/** Counts as a small picture, a pixel a bin, position across and step down. */
function heat(map) {
  const across = map.counts.length;
  const down = map.counts[0]?.length ?? 0;
  if (!across || !down) return null;
  const canvas = h("canvas");
  canvas.width = across;
  canvas.height = down;
  const paint = canvas.getContext("2d");
  const pixels = paint.createImageData(across, down);
  const most = mostOf(map);
  map.counts.forEach((row, position) =>
    row.forEach((count, step) => {
      const [r, g, b] = rgb(Math.sqrt(count / most));
      pixels.data.set([r, g, b, count ? 255 : 0], 4 * (step * across + position));
    }),
  );
  paint.putImageData(pixels, 0, 0);
  return canvas;
}

function line(paint, x1, y1, x2, y2) {
  paint.beginPath();
  paint.moveTo(x1, y1);
  paint.lineTo(x2, y2);
  paint.stroke();
}

const mostOf = (map) => Math.max(1, ...map.counts.map((row) => Math.max(...row)));

/** What the map's colours stand for: tokens in a cell of the map. */
export const mapLegend = (map) =>
  h("span.play-legend", { title: "Tokens of the batch that were drawn there; the scale is a square root" }, h("span", null, "1"), scaleBar(), h("span", null, `${mostOf(map)} tokens`));

/** Mean step by fifth of the text, as bars. */
export function fifthBars(host, map) {
  const { text, fifths } = firsts(map);
  if (!text) return put(host);
  return put(
    host,
    h("p.note", null, text),
    h(
      "dl.play-bars",
      null,
      fifths.map((fifth) =>
        h(
          "div",
          null,
          h("dt", null, `${fifth.from}–${fifth.to}`),
          h("dd", null, h("i", { style: { "--share": String(((fifth.mean ?? 0) + 1) / written(map).steps) } }), h("span", null, fifth.mean === null ? "–" : figure(fifth.mean + 1, 3))),
        ),
      ),
    ),
  );
}
