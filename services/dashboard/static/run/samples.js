// Sampled completions of a run, under a heading for those of one prompt; each opens in playback.

import { keepInAddress, oneOf } from "../address.js";
import { at, get } from "../api.js";
import { empty, failure, figure, h, loading, put, setText } from "../dom.js";
import { cursorKeys } from "../rows.js";

const VERDICTS = [["", "All"], ["true", "Right"], ["false", "Wrong"]];
const KINDS = { train: "training", base: "held out, base model", trained: "held out, trained" };
const SEARCH_MS = 250;

export async function samplesTab(host, runId, app) {
  const asked = new URLSearchParams(location.hash.split("?")[1] ?? "");
  const state = { correct: oneOf(asked, "correct", ["true", "false"], ""), kind: asked.get("kind") ?? "", iteration: asked.get("iteration") ?? "", q: asked.get("q") ?? "", next: null };
  const kinds = new Set(state.kind ? [state.kind] : []);
  const headings = new Map(); // of what is shown, by prompt
  const body = h("tbody");
  const note = h("div");
  const verdicts = h("div.segments", { role: "group", ariaLabel: "Verdict" });
  const choose = (name, value) => ((state[name] = value), load());
  const kindChoice = h("select", { ariaLabel: "Kind", onchange: () => choose("kind", kindChoice.value) });
  const iteration = h("input.short", { type: "number", min: "0", placeholder: "Iteration", ariaLabel: "Only this iteration", value: state.iteration, onchange: () => choose("iteration", iteration.value) });
  const search = h("input", { type: "search", placeholder: "Search question, text, problem", ariaLabel: "Search samples", value: state.q, oninput: () => later() });
  const fresh = h("button.button", { type: "button", hidden: true, onclick: () => load() }, "Show new samples");
  const more = h("button.button", { type: "button", hidden: true, onclick: () => load(true) }, "More samples");
  const titles = [["Verdict"], ["Reward", "num"], ["Question"], ["Completion"]];
  const table = h("table.table.samples", null, h("thead", null, h("tr", null, titles.map(([text, kind]) => h(kind ? `th.${kind}` : "th", null, text)))), body);
  put(host, h("div.row.filters", null, verdicts, kindChoice, iteration, search, fresh), h("section.card", null, note, h("div.table-wrap", null, table)), more);
  app.search(search);
  const cursor = cursorKeys(app, body, { open: (row) => (location.hash = row.querySelector("a").getAttribute("href")) });
  let waiting = null;

  function later() {
    clearTimeout(waiting);
    waiting = setTimeout(() => choose("q", search.value.trim()), SEARCH_MS);
  }

  function choices() {
    put(verdicts, VERDICTS.map(([value, text]) => h("button", { type: "button", ariaPressed: String(state.correct === value), onclick: () => choose("correct", value) }, text)));
    if (kindChoice.options.length !== kinds.size + 1) {
      put(kindChoice, h("option", { value: "" }, "Any kind"), [...kinds].sort().map((kind) => h("option", { value: kind }, KINDS[kind] ?? kind)));
      kindChoice.value = state.kind;
    }
  }

  /** The heading under which a sample stands; a new one is added to the table. */
  function heading(sample) {
    const group = sample.kind === "train" ? sample.group_id : "";
    const key = `${sample.iteration} ${sample.kind} ${group}`;
    if (!headings.has(key)) {
      const rate = h("span.note");
      const name = `Iteration ${sample.iteration}, ${KINDS[sample.kind] ?? sample.kind}`;
      body.append(h("tr.group", null, h("th", { colSpan: titles.length, scope: "colgroup" }, h("b", null, name), group !== "" && h("span.mono", null, oneLine(sample.question)), rate)));
      headings.set(key, { rate, right: 0, all: 0 });
    }
    return headings.get(key);
  }

  function add(sample) {
    const under = heading(sample);
    under.all += 1;
    under.right += sample.correct ? 1 : 0;
    setText(under.rate, state.correct ? `${under.all} shown` : `${under.right} of ${under.all} right`);
    body.append(sampleRow(runId, sample));
  }

  async function load(older = false) {
    if (!older) fresh.hidden = true;
    const { correct, kind, q } = state;
    keepInAddress({ correct, kind, iteration: state.iteration, q });
    choices();
    if (!older && !body.children.length) put(note, loading("samples"));
    try {
      const query = { correct, kind, iteration: state.iteration, q, limit: 50, cursor: older ? state.next : null };
      const answer = await get(at`runs/${runId}/samples`, query);
      if (!app.alive()) return;
      for (const sample of answer.items) kinds.add(sample.kind);
      choices();
      if (!older) {
        body.replaceChildren();
        headings.clear();
      }
      answer.items.forEach(add);
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

const oneLine = (text) => text.replace(/\s+/g, " ");

function sampleRow(runId, sample) {
  const href = `#/run/${encodeURIComponent(runId)}/play/${sample.id}`;
  const verdict = h("span.verdict", { dataset: { correct: String(sample.correct) } }, sample.correct ? "✓ right" : "✗ wrong");
  const parts = Object.entries(sample.rewards).map(([name, value]) => `${name} ${figure(value, 3)}`).join(", ");
  return h(
    "tr.link",
    { dataset: { correct: String(sample.correct) }, onclick: (event) => !event.target.closest("a") && (location.hash = href) },
    h("td", null, verdict),
    h("td.num", { title: parts }, figure(sample.reward)),
    h("td.question", { title: `${sample.problem_id}: ${sample.question}` }, oneLine(sample.question)),
    h("td.completion", null, h("a.mono", { href }, sample.completion || "(empty)")),
  );
}
