// Colours of cells. What is sure is left as it is; the unsure stands out. Steps have no better and worse: they are in
// cividis, whose order of lightness people with and without colour blindness see alike.

import { figure, h, number } from "../dom.js";

const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const RGB = CIVIDIS.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const SURE = 1e-3; // a chance of error up to which a token counts as sure

/** Red, green, blue (0..255) at a fraction of the scale. */
function rgb(fraction) {
  const at = fraction * (RGB.length - 1);
  const low = Math.min(RGB.length - 2, Math.floor(at));
  return RGB[low].map((value, channel) => Math.round(value + (RGB[low + 1][channel] - value) * (at - low)));
}

/** Black or white, whichever is read better on it. */
function ink(channels) {
  const [r, g, b] = channels.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff"; // where both have a contrast of 4.6
}

const unsure = (fraction) => ({ background: `color-mix(in srgb, var(--unsure) ${(100 * fraction).toFixed(1)}%, transparent)`, ink: "var(--text)", amount: fraction });

function ordered(fraction) {
  const channels = rgb(fraction);
  return { background: `rgb(${channels.join(" ")})`, ink: ink(channels), amount: fraction };
}

const chance = (logp) => (number(logp) === null ? null : Math.exp(number(logp)));
const clamp = (value) => Math.min(1, Math.max(0, value));

/** A way to colour positions. `of(document, position)`: the value there, null where there is none; `share(value, end)`:
    where on the scale it is; `paint(share)`: its colour. */
export const MODES = {
  confidence: {
    title: "Confidence",
    about: "Probability of the token under the law it was drawn from; where it was chosen greedily, at temperature 1. The scale is logarithmic in the chance of another token",
    of: (play, position) => (play.sampler.temperature === 0 ? chance(play.cells.logp_raw[position]) : number(play.cells.confidence[position])),
    end: () => 1,
    share: (value) => clamp(1 - Math.log10(Math.max(SURE, 1 - value)) / Math.log10(SURE)),
    paint: unsure,
    ends: () => ["sure", "p = 0"],
    said: "no colour is sure (99.9 % or more), full orange is a token that was hardly likely",
  },
  entropy: {
    title: "Entropy",
    about: "Entropy of that law, in nats: how undecided the policy was",
    of: (play, position) => number(play.cells.entropy[position]),
    end: (plays) => Math.max(1e-6, ...plays.flatMap((play) => play.cells.entropy.map(number).filter(Number.isFinite))),
    share: (value, end) => clamp(value / end),
    paint: unsure,
    ends: (end) => ["0", `${figure(end, 3)} nats`],
    said: "no colour is decided, full orange is undecided",
  },
  step: {
    title: "Step",
    about: "Denoising step at which the position was revealed",
    of: (play, position) => (play.cells.drawn[position] ? play.cells.step[position] + 1 : null),
    end: (plays) => Math.max(2, ...plays.map((play) => play.steps)),
    share: (value, end) => clamp((value - 1) / (end - 1)),
    paint: ordered,
    ends: (end) => ["1", String(end)],
    said: "dark blue is the first, yellow the last",
  },
};

/** (document, position) -> {background, ink, amount} or null, on one scale for all documents shown. */
export function scale(name, plays) {
  const mode = MODES[name];
  const end = mode.end(plays);
  return (play, position) => {
    const value = mode.of(play, position);
    return value === null || Number.isNaN(value) ? null : mode.paint(mode.share(value, end));
  };
}

export function legend(name, plays) {
  const mode = MODES[name];
  const [low, high] = mode.ends(mode.end(plays));
  const stops = [0, 0.25, 0.5, 0.75, 1].map((share) => mode.paint(share).background).join(", ");
  return h(
    "div.play-legend",
    { title: mode.about },
    h("span", null, low),
    h("i", { ariaHidden: "true", style: { background: `linear-gradient(to right, ${stops})` } }),
    h("span", null, high),
    h("span.sr", null, `${mode.title}: ${mode.said}. ${mode.about}.`),
  );
}
