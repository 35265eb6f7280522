// What a run was asked for, by whom, and what became of it; newest first.

import { at, get } from "../api.js";
import { NAMES, WAITING } from "../controls.js";
import { clock, empty, failure, h, loading, put } from "../dom.js";
import { runHeader } from "../run/header.js";
import { follow } from "./run.js";

const AGAIN_MS = 2000;
const COLUMNS = ["Asked for", "By", "When", "Status", "What happened"];

export async function render(root, params, app) {
  const { id } = params;
  app.title([["Runs", "#/runs"], [id, `#/run/${encodeURIComponent(id)}`], ["Actions", null]]);
  const run = await get(at`runs/${id}`);
  if (!app.alive()) return;
  const header = runHeader(run, "actions", app);
  const body = h("tbody");
  const note = h("div", null, loading("actions"));
  const table = h("table.table.actions.stacked", { hidden: true }, h("thead", null, h("tr", null, COLUMNS.map((text) => h("th", null, text)))), body);
  const more = h("button.button", { type: "button", hidden: true, onclick: () => load(true) }, "Older actions");
  put(root, header.element, h("section.card", null, note, h("div.table-wrap", null, table)), more);
  let next = null;
  let timer = null;
  app.onLeave(() => clearTimeout(timer));

  async function load(older = false) {
    clearTimeout(timer);
    try {
      const answer = await get(at`runs/${id}/actions`, { limit: 50, cursor: older ? next : null });
      if (!app.alive()) return;
      next = answer.next_cursor;
      more.hidden = next === null;
      if (!older) body.replaceChildren();
      body.append(...answer.items.map(row));
      table.hidden = !body.children.length;
      put(note, !body.children.length && empty("Nothing was asked of this run", "Stop, pause, checkpoints and numbers of actors show up here, with who asked and what the run made of it."));
      if (answer.items.some(({ status }) => status in WAITING)) timer = setTimeout(() => load(), AGAIN_MS);
    } catch (error) {
      put(note, failure(error, () => load()));
    }
  }

  await load();
  follow(id, app, header, run, { event: ({ kind }) => kind === "command" && load() });
}

function row(action) {
  const name = action.action === "set_actors" ? `Actors: ${action.arguments.actors}` : (NAMES[action.action] ?? action.action);
  const status = h("span.outcome", { dataset: { status: action.status } }, action.status);
  const values = [name, h("span.muted", null, action.requested_by), h("span.muted", null, clock(action.time, { date: true })), status, WAITING[action.status] ?? action.result ?? ""];
  return h("tr", { dataset: { status: action.status, action: action.action } }, values.map((value, index) => h("td", { dataset: { label: COLUMNS[index] } }, value)));
}
