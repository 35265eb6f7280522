// Control of a run and submission of new ones. Shown only to who has entered the token; an action is shown as under way
// until the run itself confirms or refuses it.

import { at, get, getWithToken, post, token } from "./api.js";
import { h, put, setText } from "./dom.js";

const LIVE = ["running", "paused"];
const POLL_MS = 1000;
const NAMES = { stop: "Stop", pause: "Pause", resume: "Resume", checkpoint: "Checkpoint", set_actors: "Actors" };
const WAITING = {
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
  const stepper = actorStepper((actors) => ask("set_actors", { actors }));
  put(host, buttons, lines);

  function render() {
    const live = Boolean(token.get()) && LIVE.includes(latest.status);
    const state = live ? latest.status : "none";
    if (state === shown) return;
    shown = state;
    if (!live) return void put(buttons);
    const paused = latest.status === "paused";
    put(
      buttons,
      paused ? button("resume", "Go on with the next iteration") : button("pause", "Rest after this iteration; the run stays alive"),
      button("checkpoint", "Save a checkpoint after this iteration"),
      stepper.element,
      h("button.button.danger", { type: "button", dataset: { action: "stop" }, onclick: confirmStop }, "Stop…"),
    );
    countActors();
  }

  const button = (action, title) =>
    h("button.button", { type: "button", title, dataset: { action }, onclick: () => ask(action) }, action === "checkpoint" ? "Checkpoint now" : NAMES[action]);

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
    const element = h("li", { dataset: { status: action.status, action: action.action } }, h("strong", null, name), " ", text);
    lines.prepend(element);
    while (lines.children.length > 4) lines.lastElementChild.remove();
    return { element, text };
  }

  function follow(action, where) {
    where.element.dataset.status = action.status;
    setText(where.text, WAITING[action.status] ?? `${action.status}: ${action.result ?? ""}`);
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
  return {
    update(next) {
      const moved = next.workers !== latest.workers;
      latest = next;
      render();
      if (moved && shown !== "none") countActors();
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

/** The dialog that starts a run from a recipe. */
export async function openSubmit(app) {
  let offered;
  try {
    offered = await get("recipes");
  } catch (error) {
    return void failed(app, error, "");
  }
  app.dialog("New run", (close) => {
    const about = h("p.note");
    const recipe = h("select", { name: "recipe", onchange: () => describe() }, offered.items.map(({ name }) => h("option", { value: name }, name)));
    const overrides = h("textarea", { name: "overrides", rows: 5, spellcheck: false, placeholder: "run.name=my-run\nlearner.lr=0.0005" });
    const answer = h("div.submit-answer", { role: "status" });
    const describe = () => setText(about, offered.items.find(({ name }) => name === recipe.value)?.summary ?? "");
    const given = () => overrides.value.split("\n").map((text) => text.trim()).filter((text) => text && !text.startsWith("#"));
    if (offered.items.some(({ name }) => name === "sudoku")) recipe.value = "sudoku";
    describe();

    const send = (dry) => async (event) => {
      event.preventDefault();
      say(answer, "busy", dry ? "Checking the settings…" : "Submitting…");
      try {
        const sent = await post("submissions", { recipe: recipe.value, overrides: given(), dry });
        if (dry) {
          say(answer, "done", "The settings are sound.", h("details", null, h("summary", null, "All settings"), h("pre", null, JSON.stringify(sent.config, null, 2))));
        } else followSubmission(sent, answer, app, close);
      } catch (error) {
        say(answer, "refused", error.detail ?? error.message);
        if (error.status === 401) failed(app, error, "");
      }
    };
    return h(
      "form.stack",
      { onsubmit: send(!offered.submission) },
      h("label.field", null, h("span", null, "Recipe"), recipe),
      about,
      h("label.field", null, h("span", null, "Settings that differ, one key.sub=value a line"), overrides),
      offered.submission
        ? h("p.note", null, `It runs as a job of the Ray cluster at ${offered.ray_address}.`)
        : h("p.note", null, "This dashboard was started without --ray-address: settings can be checked, runs can't be submitted."),
      answer,
      h(
        "div.row.end",
        null,
        h("button.button", { type: "button", dataset: { action: "check" }, onclick: send(true) }, "Check"),
        offered.submission && h("button.button.primary", { type: "submit", dataset: { action: "submit" } }, "Submit"),
      ),
    );
  });
}

function followSubmission(sent, answer, app, close) {
  const log = sent.log && h("pre", null, sent.log);
  if (sent.status === "done") {
    const link = h("a", { href: `#/run/${encodeURIComponent(sent.run_id)}`, onclick: close }, `Open ${sent.run_id}`);
    return say(answer, "done", `${sent.result}. `, link);
  }
  if (sent.status !== "accepted") return say(answer, sent.status, sent.result ?? sent.status, log);
  say(answer, "busy", `Ray has the job${sent.job_status ? ` (${sent.job_status})` : ""}; waiting for run ${sent.run_id}…`, log);
  setTimeout(async () => {
    if (!answer.isConnected) return;
    try {
      sent = await getWithToken(at`submissions/${sent.id}`);
    } catch (error) {
      if (error.status === 401) {
        failed(app, error, "");
        return say(answer, "refused", "Ray has the job. The token is needed to follow it: enter it again; the run appears in the list.");
      }
      // anything else: asked again
    }
    followSubmission(sent, answer, app, close);
  }, 2 * POLL_MS);
}

function say(answer, status, ...parts) {
  answer.dataset.status = status;
  put(answer, h("p", null, parts[0]), parts.slice(1));
}

/** A wrong token is forgotten, and with it the buttons. */
function failed(app, error, what) {
  if (error.status === 401) token.set("");
  app.toast(`${what}${error.detail ?? error.message}`, "error");
}
