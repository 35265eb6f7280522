// Sampled completions of a run; each opens in playback.

import { at, get } from "../api.js";
import { count, empty, failure, figure, h, loading, put } from "../dom.js";
import { cursorKeys } from "../rows.js";

const VERDICTS = [["", "All"], ["true", "Right"], ["false", "Wrong"]];

export async function samplesTab(host, runId, app) {
  const state = { correct: "", kind: "", iteration: "", next: null };
  const kinds = new Set();
  const body = h("tbody");
  const note = h("div");
  const verdicts = h("div.segments", { role: "group", ariaLabel: "Verdict" });
  const kindChoice = h("select", { ariaLabel: "Kind", onchange: () => ((state.kind = kindChoice.value), load()) });
  const iteration = h("input.short", { type: "number", min: "0", placeholder: "Iteration", ariaLabel: "Only this iteration", onchange: () => ((state.iteration = iteration.value), load()) });
  const fresh = h("button.button", { type: "button", hidden: true, onclick: () => load() }, "Show new samples");
  const more = h("button.button", { type: "button", hidden: true, onclick: () => load(true) }, "More samples");
  const titles = [["Iteration", "num"], ["Verdict"], ["Reward", "num"], ["Kind"], ["Problem"], ["Completion"]];
  const table = h("table.table.samples", null, h("thead", null, h("tr", null, titles.map(([text, kind]) => h(kind ? `th.${kind}` : "th", null, text)))), body);
  put(host, h("div.row.filters", null, verdicts, kindChoice, iteration, fresh), h("section.card", null, note, h("div.table-wrap", null, table)), more);
  app.search(iteration);
  const cursor = cursorKeys(app, body, { open: (row) => (location.hash = row.querySelector("a").getAttribute("href")) });

  function choices() {
    put(verdicts, VERDICTS.map(([value, text]) => h("button", { type: "button", ariaPressed: String(state.correct === value), onclick: () => ((state.correct = value), load()) }, text)));
    if (kindChoice.options.length !== kinds.size + 1) {
      put(kindChoice, h("option", { value: "" }, "Any kind"), [...kinds].sort().map((kind) => h("option", { value: kind }, kind)));
      kindChoice.value = state.kind;
    }
  }

  async function load(older = false) {
    if (!older) fresh.hidden = true;
    choices();
    if (!older && !body.children.length) put(note, loading("samples"));
    try {
      const query = { correct: state.correct, kind: state.kind, iteration: state.iteration, limit: 50, cursor: older ? state.next : null };
      const answer = await get(at`runs/${runId}/samples`, query);
      for (const { kind } of answer.items) kinds.add(kind);
      choices();
      if (!older) body.replaceChildren();
      body.append(...answer.items.map((sample) => sampleRow(runId, sample)));
      state.next = answer.next_cursor;
      more.hidden = state.next === null;
      table.hidden = !body.children.length;
      put(note, !body.children.length && empty("No samples", "A run keeps a few completions of each iteration; none fit here yet."));
      cursor.refresh();
    } catch (error) {
      body.replaceChildren();
      table.hidden = true;
      put(note, failure(error, () => load()));
    }
  }

  await load();
  return { sample: () => (fresh.hidden = false), reload: () => load() };
}

function sampleRow(runId, sample) {
  const href = `#/run/${encodeURIComponent(runId)}/play/${sample.id}`;
  const verdict = h("span.verdict", { dataset: { correct: String(sample.correct) } }, sample.correct ? "✓ right" : "✗ wrong");
  const parts = Object.entries(sample.rewards).map(([name, value]) => `${name} ${figure(value, 3)}`).join(", ");
  return h(
    "tr.link",
    { onclick: (event) => !event.target.closest("a") && (location.hash = href) },
    h("td.num", null, count(sample.iteration)),
    h("td", null, verdict),
    h("td.num", { title: parts }, figure(sample.reward)),
    h("td", null, sample.kind),
    h("td.muted.problem", null, sample.problem_id),
    h("td.completion", null, h("a.mono", { href }, sample.completion || "(empty)")),
  );
}
