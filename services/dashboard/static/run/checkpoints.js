// The checkpoints of a run that can be taken: what each is worth, its path, and ready commands.

import { at, get } from "../api.js";
import { copyButton } from "../copy.js";
import { ago, clock, count, figure, h, percent, put } from "../dom.js";

const MOST = 8;

/** {element, load(runId)}. */
export function checkpointCard() {
  const list = h("ol.checkpoints");
  const note = h("p.note", null, "None yet");
  const gone = h("p.note", { hidden: true });
  const element = h("section.card", null, h("header", null, h("h2", null, "Checkpoints")), h("div.body", null, note, list, gone));
  return {
    element,
    load: async (runId) => {
      const { items } = await get(at`runs/${runId}/checkpoints`);
      const there = items.filter((item) => item.on_disk !== false);
      const newest = there.toReversed();
      const shown = newest.filter((item, index) => index < MOST || item.best);
      const deleted = items.filter((item) => item.on_disk === false).map(({ iteration }) => count(iteration));
      note.hidden = there.length > 0;
      put(list, shown.map(row));
      gone.hidden = !deleted.length;
      gone.textContent = `No longer on disk: ${deleted.length === 1 ? "iteration" : "iterations"} ${deleted.join(", ")} (deleted for checkpoint.keep, or by hand)`;
    },
  };
}

function row(item) {
  const path = h("span.mono.muted.clip", { title: item.path }, item.path);
  const worth = item.held_out === null ? "not evaluated" : `held out ${item.measure.endsWith("rate") ? percent(item.held_out) : figure(item.held_out)}`;
  const take = (text, label, title) => Object.assign(copyButton(() => text, path, label), { title });
  return h(
    "li",
    { dataset: { iteration: String(item.iteration) } },
    h("b", null, `Iteration ${count(item.iteration)}`),
    h("span.marks", null, item.best && h("span.mark", { dataset: { mark: "best" } }, "best"), item.last && h("span.mark", null, "last")),
    h("span", null, worth),
    h("span.note", { title: clock(item.time, { date: true }) }, ago(item.time)),
    path,
    h("span.takes", null, h("span.note", null, "copy"), take(item.path, "path", item.path), take(item.evaluate, "evaluate", item.evaluate), take(item.export, "export", item.export)),
  );
}
