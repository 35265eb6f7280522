// Control of a run. Shown only to who has entered the token; an action is shown as under way until the run itself
// confirms or refuses it. The newest answer stays in its line; all are on the run's page of actions.

import { annotate, openAnnotation } from "./annotate.js";
import { at, get, post, token } from "./api.js";
import { ago, h, put, setText } from "./dom.js";

const LIVE = ["running", "paused"];
const POLL_MS = 1000;
const RECENT_S = 3600; // an answer that old is no news
export const NAMES = { stop: "Stop", pause: "Pause", resume: "Resume", checkpoint: "Checkpoint", set_actors: "Actors" };
export const WAITING = {
  requested: "asked for, the run has not taken it yet",
  accepted: "the run has it, and does it as soon as it can",
};

/** Buttons for `run` in `host`; {update(run), close()}. */
export function mountControls(host, run, app) {
  let latest = run;
  let shown = "";
  let open = true;
  const pending = new Map(); // action id -> its line
  const lines = h("ul.control-lines", { role: "status", ariaLabel: "What the run was asked for" });
  const buttons = h("div.row.end");
  const more = h("div.row.end");
  const acknowledge = h("button.button", { type: "button", hidden: true, dataset: { action: "acknowledge" }, title: "Health counts only what comes after", onclick: () => takeNote() }, "Take note of warnings");
  const stepper = actorStepper((actors) => ask("set_actors", { actors }));
  put(more, acknowledge, h("button.button", { type: "button", dataset: { action: "note" }, title: "Tags, note, archive", onclick: () => openAnnotation(app, latest, (told) => (latest = { ...latest, ...told })) }, "Note…"), h("button.button", { type: "button", dataset: { action: "clone" }, title: "A new run with these settings", onclick: () => import("./newrun.js").then((module) => module.openNewRun(app, latest)) }, "Clone…"));
  put(host, buttons, lines);

  function render() {
    const allowed = Boolean(token.get());
    const live = allowed && LIVE.includes(latest.status);
    const state = live ? latest.status : String(allowed);
    if (state === shown) return;
    shown = state;
    if (allowed) lookAtHealth();
    lines.hidden = !allowed;
    if (!live) return void put(buttons, allowed && more);
    const paused = latest.status === "paused";
    put(
      buttons,
      more,
      paused ? button("resume", "Go on with the next iteration") : button("pause", "Rest after this iteration; the run stays alive"),
      button("checkpoint", "Save a checkpoint after this iteration"),
      stepper.element,
      h("button.button.danger", { type: "button", dataset: { action: "stop" }, onclick: confirmStop }, "Stop…"),
    );
    countActors();
  }

  const button = (action, title) =>
    h("button.button", { type: "button", title, dataset: { action }, onclick: () => ask(action) }, action === "checkpoint" ? "Checkpoint now" : NAMES[action]);

  let newest = 0; // id of the newest warning or error

  async function lookAtHealth() {
    try {
      const found = await Promise.all(["warning", "error"].map((level) => get(at`runs/${latest.id}/events`, { level, limit: 1 })));
      newest = Math.max(0, ...found.flatMap(({ items }) => items.map(({ id }) => id)));
      acknowledge.hidden = newest <= (latest.acknowledged ?? 0);
    } catch {
      // the health itself tells what is wrong with the run or the service
    }
  }

  async function takeNote() {
    const told = await annotate(app, latest.id, { acknowledged: newest });
    if (!told) return;
    latest = { ...latest, acknowledged: told.acknowledged };
    acknowledge.hidden = true;
    app.toast("Noted: health counts what comes from now on. The events stay.");
  }

  /** The newest answer, also after a reload. */
  async function showNewest() {
    const { items } = await get(at`runs/${latest.id}/actions`, { limit: 1 });
    const [action] = items;
    if (open && action && !lines.children.length && NAMES[action.action] && Date.now() / 1000 - action.time < RECENT_S) follow(action, line(action));
  }

  async function countActors() {
    try {
      const workers = await get(at`runs/${latest.id}/workers`);
      stepper.show(workers.items.filter((each) => each.role === "rollout" && each.status !== "retired").length);
    } catch {
      // the next confirmed change brings the number
    }
  }

  function confirmStop() {
    app.dialog("Stop this run?", (close) => {
      const stop = () => {
        close();
        ask("stop");
      };
      return h(
        "div.stack",
        null,
        h("p", null, "It saves its last finished iteration and ends. It can be gone on with later: run.resume=auto."),
        h("div.row.end", null, h("button.button", { type: "button", onclick: close }, "Keep it running"), h("button.button.danger", { type: "button", dataset: { action: "confirm-stop" }, onclick: stop }, "Stop the run")),
      );
    });
  }

  async function ask(action, more = {}) {
    const busy = host.querySelectorAll("button");
    for (const each of busy) each.disabled = true;
    try {
      const asked = await post(at`runs/${latest.id}/actions`, { action, ...more });
      follow(asked, line(asked));
    } catch (error) {
      failed(app, error, `${NAMES[action]}: `);
    } finally {
      for (const each of busy) each.disabled = false;
    }
  }

  function line(action) {
    const text = h("span");
    const name = action.action === "set_actors" ? `Actors: ${action.arguments.actors}` : NAMES[action.action];
    const all = h("a", { href: `#/run/${encodeURIComponent(latest.id)}/actions` }, "all actions");
    const element = h("li", { dataset: { status: action.status, action: action.action } }, h("strong", null, name), " ", text, " ", all);
    put(lines, element); // one line, whose room is kept: a new answer pushes nothing
    return { element, text };
  }

  function follow(action, where) {
    where.element.dataset.status = action.status;
    setText(where.text, WAITING[action.status] ?? `${action.status}: ${action.result ?? ""}`);
    where.text.title = `${where.text.textContent} (asked for ${ago(action.time)})`;
    if (!(action.status in WAITING)) {
      pending.delete(action.id);
      if (action.action === "set_actors") action.status === "done" ? stepper.show(action.arguments.actors) : countActors();
      return;
    }
    const again = async () => {
      let next = action;
      try {
        next = await get(at`runs/${latest.id}/actions/${action.id}`);
      } catch {
        // asked again: the service or the store may be back in a moment
      }
      if (open) follow(next, where);
    };
    pending.set(action.id, setTimeout(again, POLL_MS));
  }

  window.addEventListener("unmask-token", render);
  render();
  showNewest().catch(() => {}); // the page of actions has it
  return {
    update(next) {
      const moved = next.workers !== latest.workers;
      latest = next;
      render();
      if (moved && LIVE.includes(shown)) countActors();
      if (token.get()) acknowledge.hidden = newest <= (next.acknowledged ?? 0);
    },
    close() {
      open = false;
      for (const timer of pending.values()) clearTimeout(timer);
      window.removeEventListener("unmask-token", render);
    },
  };
}

function actorStepper(set) {
  const field = h("input", { type: "number", min: 1, max: 4096, step: 1, required: true, ariaLabel: "Rollout actors", name: "actors" });
  const step = (by) => () => (field.value = Math.max(1, Number(field.value || 1) + by));
  const submit = (event) => {
    event.preventDefault();
    set(Number(field.value));
  };
  const element = h(
    "form.stepper",
    { onsubmit: submit, title: "Number of rollout actors" },
    h("span.note", null, "Actors"),
    h("button.icon-button", { type: "button", ariaLabel: "One actor fewer", onclick: step(-1) }, "−"),
    field,
    h("button.icon-button", { type: "button", ariaLabel: "One actor more", onclick: step(1) }, "+"),
    h("button.button", { type: "submit", dataset: { action: "set_actors" } }, "Set"),
  );
  element.hidden = true; // until it is known that the run has actors: a fine-tuning run has none
  return { element, show: (count) => ((field.value = count), (element.hidden = count === 0)) };
}

/** A wrong token is forgotten, and with it the buttons. */
function failed(app, error, what) {
  if (error.status === 401) token.set("");
  app.toast(`${what}${error.detail ?? error.message}`, "error");
}
