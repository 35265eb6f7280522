// Names of runs and settings in little room.

import { figure, h } from "./dom.js";

const TAIL = 12;

/** A name whose end stays in view: what tells runs apart is often there. Copied as a whole. */
export function middleClipped(kind, properties, name) {
  const characters = [...name];
  const cut = Math.max(Math.ceil(characters.length / 2), characters.length - TAIL);
  return h(`${kind}.middle`, { title: name, ...properties }, h("span.start", null, characters.slice(0, cut).join("")), h("span.end", null, characters.slice(cut).join("")));
}

/** "lr 3e-4" for learner.lr=0.0003, "objective wd1" for objective.type=wd1. */
export const settingText = (key, value) => `${key.replace(/\.type$/, "").split(".").at(-1)} ${valueText(value)}`;

/** A setting's value as people write it: small numbers with an exponent, texts without quotes. */
export function valueText(value) {
  if (value === undefined) return "–";
  if (typeof value === "string") return value;
  if (typeof value !== "number") return JSON.stringify(value);
  if (value === 0 || Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  if (size >= 0.01) return figure(value);
  const [digits, exponent] = value.toExponential().split("e");
  return `${Number(Number(digits).toPrecision(4))}e${Number(exponent)}`;
}
