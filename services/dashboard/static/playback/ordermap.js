// Position by step: where in the text a whole batch decides first, and the way that the completions shown took.

import { figure, h, number, put } from "../dom.js";
import { place } from "./words.js";

const MARGIN = { left: 34, right: 6, top: 6, bottom: 26 };
const NOISE = 3; // standard errors up to which a part of the text isn't called early or late; of five, by chance 1 in 75
const SEEN = [1.5, 5]; // from how many standard deviations a cell has colour, and full colour

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
    this.block = plays[0].sampler.block_length;
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
    if (this.map) {
      const colours = [colour("--map-rare"), colour("--map-often")];
      if (this.painted !== colours.join()) {
        this.heat = heat(this.map, this.block, colours);
        this.painted = colours.join(); // a theme's colours stay, while steps and sizes change all the time
      }
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
    paint.fillText("1", inner.x, height - 6);
    paint.textAlign = "center";
    paint.fillText(`position in the ${this.plays.some((play) => play.context.length) ? "gaps" : "text"}`, inner.x + inner.w / 2, height - 6);
    paint.textAlign = "right";
    paint.fillText(String(this.positions), inner.x + inner.w, height - 6);
  }

  #summary() {
    if (!this.map) return "Position by denoising step for the completions shown; no map of the batch was kept.";
    return `Position by denoising step, over ${this.map.completions} completions. ${early(this.map, this.block, this.plays[0].sampler.position_rule).text}`;
  }
}

/** How many positions and steps the batch used: what lies behind them is empty. */
function written(map) {
  if (!map) return { positions: 0, steps: 0 };
  const rows = map.counts.findLastIndex((row) => row.some((count) => count > 0)) + 1;
  const columns = Math.max(0, ...map.counts.map((row) => row.findLastIndex((count) => count > 0) + 1));
  return { positions: Math.min(map.positions, rows * map.positions_per_bin), steps: Math.min(map.steps, columns * map.steps_per_bin) };
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

/** What the counts would be if within each block the order were random: {counts, mean, variance of the step by bin}. */
function byChance(map, block) {
  const steps = map.counts[0]?.length ?? 0;
  const blockOf = (bin) => (block > 0 ? Math.floor((bin * map.positions_per_bin) / block) : 0);
  const found = map.counts.map(() => null);
  for (const wanted of new Set(map.counts.map((_, bin) => blockOf(bin)))) {
    const bins = [...map.counts.keys()].filter((bin) => blockOf(bin) === wanted);
    const columns = Array.from({ length: steps }, (_, step) => sum(bins.map((bin) => map.counts[bin][step])));
    const all = sum(columns);
    const centre = (step) => (step + 0.5) * map.steps_per_bin - 0.5;
    const mean = all ? sum(columns.map((count, step) => count * centre(step))) / all : 0;
    const variance = all ? sum(columns.map((count, step) => count * (centre(step) - mean) ** 2)) / all : 0;
    for (const bin of bins) {
      const own = sum(map.counts[bin]);
      found[bin] = { counts: columns.map((count) => (all ? (own * count) / all : 0)), mean, variance };
    }
  }
  return found;
}

/** By fifths of the text: how much earlier or later than by chance the batch writes them, and what can be said of it. */
function early(map, block, rule) {
  if (!map) return { text: "", fifths: [] };
  const chance = byChance(map, block);
  const length = written(map).positions;
  const parts = Math.min(5, length);
  const fifths = Array.from({ length: parts }, (_, part) => {
    const [from, to] = [part, part + 1].map((end) => Math.floor((end * length) / parts));
    const all = { tokens: 0, mean: 0, expected: 0, variance: 0 };
    for (let position = from; position < to; position += 1) {
      const bin = Math.floor(position / map.positions_per_bin);
      const mean = number(map.mean_step[position]);
      if (mean === null || !Number.isFinite(mean)) continue;
      const tokens = sum(map.counts[bin]) / map.positions_per_bin;
      all.tokens += tokens;
      all.mean += tokens * mean;
      all.expected += tokens * chance[bin].mean;
      all.variance += tokens * chance[bin].variance;
    }
    const by = all.tokens ? (all.mean - all.expected) / all.tokens : null;
    const error = all.tokens ? Math.sqrt(all.variance) / all.tokens : 0;
    return { from, to: to - 1, mean: all.mean / (all.tokens || 1), expected: all.expected / (all.tokens || 1), by, clear: by !== null && Math.abs(by) > NOISE * error && Math.abs(by) > 1e-9 };
  });
  return { text: said(fifths, rule), fifths };
}

function said(fifths, rule) {
  const random = rule === "random";
  const name = (fifth) => `positions ${place(fifth.from)}–${place(fifth.to)} (mean step ${figure(fifth.mean + 1, 3)}, by chance ${figure(fifth.expected + 1, 3)})`;
  const clear = fifths.filter((fifth) => fifth.clear).sort((one, other) => one.by - other.by);
  const sides = [["Written earlier than by chance", clear.filter(({ by }) => by < 0)[0]], ["later", clear.filter(({ by }) => by > 0).at(-1)]].filter(([, fifth]) => fifth);
  if (!sides.length) return random ? "Random order: no pattern is expected, and none is seen." : "No part of the text is written clearly earlier or later than by chance.";
  const text = `${sides.map(([side, fifth]) => `${side}: ${name(fifth)}`).join("; ")}.`;
  return random ? `Random order, yet beyond noise. ${text}` : text.replace(/^later/, "Written later than by chance");
}

/** Counts against those by chance as a small picture, a pixel a bin, position across and step down. */
function heat(map, block, colours) {
  const across = map.counts.length;
  const down = map.counts[0]?.length ?? 0;
  if (!across || !down) return null;
  const canvas = h("canvas");
  canvas.width = across;
  canvas.height = down;
  const paint = canvas.getContext("2d");
  const chance = byChance(map, block);
  map.counts.forEach((row, position) =>
    row.forEach((count, step) => {
      const expected = chance[position].counts[step];
      const off = (count - expected) / Math.sqrt(expected + 1); // about 1 by chance; the 1 keeps single tokens from shouting
      if (Math.abs(off) <= SEEN[0]) return;
      paint.globalAlpha = Math.min(1, (Math.abs(off) - SEEN[0]) / (SEEN[1] - SEEN[0]));
      paint.fillStyle = colours[off > 0 ? 1 : 0];
      paint.fillRect(position, step, 1, 1);
    }),
  );
  return canvas;
}

function line(paint, x1, y1, x2, y2) {
  paint.beginPath();
  paint.moveTo(x1, y1);
  paint.lineTo(x2, y2);
  paint.stroke();
}

/** What the map's colours stand for. */
export const mapLegend = () =>
  h("span.play-legend", { title: "Tokens of the batch drawn there, against random order within each block; differences that chance makes often have no colour" }, h("span", null, "rarer"), h("i.play-diverging", { ariaHidden: "true" }), h("span", null, "more often than by chance"));

/** Fifths of the text as bars from what chance gives: left is earlier. */
export function fifthBars(host, map, play) {
  const { text, fifths } = early(map, play.sampler.block_length, play.sampler.position_rule);
  if (!text) return put(host);
  if (play.sampler.position_rule === "random" && !fifths.some(({ clear }) => clear)) return put(host, h("p.note", null, text));
  const most = Math.max(1, ...fifths.map(({ by }) => Math.abs(by ?? 0)));
  const bar = ({ from, to, by, clear }) =>
    h(
      "div",
      { dataset: { clear } },
      h("dt", null, from === to ? place(from) : `${place(from)}–${place(to)}`),
      h("dd", null, h("i", { dataset: { side: by < 0 ? "early" : "late" }, style: { "--share": String(Math.abs(by ?? 0) / most) } }), h("span", null, by === null ? "–" : `${by > 0 ? "+" : ""}${figure(by, 2)}`)),
    );
  return put(host, h("p.note", null, text), h("dl.play-bars", { ariaLabel: "Steps earlier or later than by chance, by part of the text" }, fifths.map(bar)));
}
