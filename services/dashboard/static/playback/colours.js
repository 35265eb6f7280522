// Colours of cells. Cividis: made so that people with and without colour blindness see the same order of lightness.

import { figure, h, number } from "../dom.js";

const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const RGB = CIVIDIS.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));

/** Red, green, blue (0..255) at a fraction of the scale. */
export function rgb(fraction) {
  const at = Math.min(1, Math.max(0, fraction)) * (RGB.length - 1);
  const low = Math.min(RGB.length - 2, Math.floor(at));
  return RGB[low].map((value, channel) => Math.round(value + (RGB[low + 1][channel] - value) * (at - low)));
}

const css = (channels) => `rgb(${channels.join(" ")})`;

/** Black or white, whichever is read better on it. */
function ink(channels) {
  const [r, g, b] = channels.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff"; // where both have a contrast of 4.6
}

const chance = (logp) => (number(logp) === null ? null : Math.exp(number(logp)));

/** A way to colour positions. `of(document, position)` is the value there, null where there is none. */
export const MODES = {
  confidence: {
    title: "Confidence",
    about: "Probability of the token under the law it was drawn from; where it was chosen greedily, at temperature 1",
    of: (play, position) => (play.sampler.temperature === 0 ? chance(play.cells.logp_raw[position]) : number(play.cells.confidence[position])),
    end: () => 1,
    ends: ["0", "1"],
  },
  entropy: {
    title: "Entropy",
    about: "Entropy of that law, in nats: how undecided the policy was",
    of: (play, position) => number(play.cells.entropy[position]),
    unit: " nats",
    end: (plays) => Math.max(1e-6, ...plays.flatMap((play) => play.cells.entropy.map(number).filter(Number.isFinite))),
  },
  step: {
    title: "Step",
    about: "Denoising step at which the position was revealed",
    of: (play, position) => (play.cells.drawn[position] ? play.cells.step[position] + 1 : null),
    start: 1,
    end: (plays) => Math.max(2, ...plays.map((play) => play.steps)),
  },
};

/** (document, position) -> {background, ink} or null, on one scale for all documents shown. */
export function scale(name, plays) {
  const mode = MODES[name];
  const start = mode.start ?? 0;
  const end = mode.end(plays);
  return (play, position) => {
    const value = mode.of(play, position);
    if (value === null || Number.isNaN(value)) return null;
    const channels = rgb((value - start) / (end - start));
    return { background: css(channels), ink: ink(channels) };
  };
}

/** The whole scale as a bar. */
export function scaleBar() {
  const stops = CIVIDIS.map((hex, index) => `${hex} ${(100 * index) / (CIVIDIS.length - 1)}%`).join(", ");
  return h("i", { ariaHidden: "true", style: { background: `linear-gradient(to right, ${stops})` } });
}

export function legend(name, plays) {
  const mode = MODES[name];
  const [low, high] = mode.ends ?? [figure(mode.start ?? 0, 3), figure(mode.end(plays), 3) + (mode.unit ?? "")];
  return h(
    "div.play-legend",
    { title: mode.about },
    h("span", null, low),
    scaleBar(),
    h("span", null, high),
    h("span.sr", null, `${mode.title}: dark blue is ${low}, yellow is ${high}. ${mode.about}.`),
  );
}
