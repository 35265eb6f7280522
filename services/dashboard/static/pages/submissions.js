// Runs that were submitted from here, as they stand; read with the token.

import { at, getWithToken, token } from "../api.js";
import { ago, clock, empty, failure, h, loading, put, setText } from "../dom.js";
import { middleClipped } from "../names.js";

const AGAIN_MS = 3000;

export async function render(root, params, app) {
  app.title([["Runs", "#/runs"], ["Submissions", null]]);
  const note = h("div", null, loading("submissions"));
  const list = h("div.stack");
  put(root, h("div.head", null, h("h1", null, "Submissions"), h("button.button", { type: "button", onclick: () => import("../newrun.js").then((module) => module.openNewRun(app)) }, "New run")), note, list);
  let timer = null;
  const again = () => load();
  window.addEventListener("unmask-token", again);
  app.onLeave(() => [clearTimeout(timer), window.removeEventListener("unmask-token", again)]);
  const cards = new Map();

  async function load() {
    clearTimeout(timer);
    if (!token.get()) {
      cards.clear();
      put(list);
      return put(note, h("section.card", null, empty("The token is needed", "Settings and logs of jobs may hold anything: enter it with the button at the top right.")));
    }
    try {
      const { items } = await getWithToken("submissions");
      if (!app.alive()) return;
      put(note, !items.length && h("section.card", null, empty("Nothing was submitted", "A run that is started with New run shows up here with its settings and its job's log.")));
      for (const item of items) {
        if (!cards.has(item.id)) cards.set(item.id, card(item));
        cards.get(item.id).update(item);
      }
      const wanted = items.map(({ id }) => cards.get(id).element);
      if (wanted.some((element, index) => list.children[index] !== element)) put(list, wanted);
      if (items.some(({ status }) => status === "accepted" || status === "requested")) timer = setTimeout(load, AGAIN_MS);
    } catch (error) {
      if (error.status === 401) token.set("");
      else put(note, failure(error, () => load()));
    }
  }

  await load();
}

function card(item) {
  const outcome = h("span.outcome");
  const result = h("p.note");
  const name = h("span.name");
  const log = h("details", { ontoggle: () => log.open && show() }, h("summary", null, "Log of the job"));
  const text = h("pre");
  log.append(text);
  const settings = [`recipe=${item.recipe}`, ...item.overrides].join(" ");
  const element = h(
    "section.card.submission",
    { dataset: { run: item.run_id } },
    h("header", null, name, outcome, h("span.note", null, `${clock(item.time, { date: true })}, ${ago(item.time)}, by ${item.requested_by}`)),
    h("div.body", null, h("p.mono", null, settings), result, item.job_id && log),
  );

  async function show() {
    setText(text, "Asking Ray…");
    try {
      const told = await getWithToken(at`submissions/${item.id}`);
      setText(text, told.log || told.job_message || "The job has written nothing yet.");
    } catch (error) {
      setText(text, error.detail ?? error.message);
    }
  }

  return {
    element,
    update(told) {
      outcome.dataset.status = told.status;
      setText(outcome, told.status === "accepted" ? "waiting for the run" : told.status);
      setText(result, told.result ?? "");
      const kind = told.status === "done" ? "a" : "span";
      if (name.dataset.kind !== kind) put(name, middleClipped(kind, kind === "a" ? { href: `#/run/${encodeURIComponent(told.run_id)}` } : {}, told.run_id));
      name.dataset.kind = kind;
    },
  };
}
