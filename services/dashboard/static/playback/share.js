// What leaves the page: a link, and a picture that moves.

import { at, url } from "../api.js";

/** Whether the text is in the clipboard now; a page that isn't served safely has none. */
export async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/** Where the animated SVG of what is shown is, in the colours of the page. */
export function animationAddress(runId, plays) {
  const { theme } = document.documentElement.dataset;
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  return url(at`runs/${runId}/samples/${plays[0].id}/animation`, { beside: plays[1]?.id ?? null, theme: dark ? "dark" : "light" }).href;
}
