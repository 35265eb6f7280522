// The same problem through training: a frame for each time it was answered.

import { h } from "../dom.js";
import { thumbnail } from "./layout.js";
import { nameOf } from "./words.js";

/** `link(id)` gives a frame's address. Null where there is one frame only. */
export function film(play, link) {
  const frames = play.counterparts;
  if (frames.length < 2) return null;
  const frame = (sample) => {
    const here = sample.id === play.id;
    const label = `${nameOf(sample)}: ${sample.correct ? "right" : "wrong"}`;
    return h(
      "li",
      null,
      h(
        "a",
        { href: link(sample.id), ariaLabel: label, title: label, dataset: { correct: sample.correct }, "aria-current": here ? "true" : null },
        h("span.play-frame-name", null, h("b", null, sample.correct ? "✓" : "✗"), sample.kind === "base" ? "base" : `iteration ${sample.iteration}`),
        thumbnail(sample),
      ),
    );
  };
  const strip = h("ol.play-film", { ariaLabel: "The same problem through training" }, frames.map(frame));
  requestAnimationFrame(() => {
    const current = strip.querySelector("[aria-current]");
    if (current) strip.scrollLeft = current.offsetLeft - strip.clientWidth / 2 + current.offsetWidth / 2;
  });
  return strip;
}
