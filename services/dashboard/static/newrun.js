// The form of a new run: a recipe, settings that differ (found by name or meaning, with unit and default), a sweep, and
// the command that does the same in a shell. What was submitted is followed on its own page.

import { at, get, post, token } from "./api.js";
import { h, put, setText } from "./dom.js";
import { valueText } from "./names.js";
import { flatten } from "./run/config.js";

const MOST_RUNS = 50;
const MOST_FOUND = 60;
const OF_THE_PLACE = /^(run\.(name|dir|resume|dashboard|restarts|shared)|store\.url|resources\.ray_address)$/;

/** `from`: the run whose settings it begins with, or none. */
export async function openNewRun(app, from = null) {
  let offered;
  try {
    offered = await get("recipes");
  } catch (error) {
    return app.toast(error.detail ?? error.message, "error");
  }
  const form = new Form(app, offered, from);
  app.dialog(from ? `A run as ${from.id}` : "New run", (close) => form.build(close)).classList.add("wide");
  await form.begin();
}

class Form {
  constructor(app, offered, from) {
    Object.assign(this, { app, offered, from });
    this.settings = [];
    const names = offered.items.map(({ name }) => name);
    const first = [from?.recipe, from && `${from.task}_${from.method}`, "sudoku"].find((name) => names.includes(name)) ?? names[0];
    this.about = h("p.note");
    this.recipe = h("select", { name: "recipe", onchange: () => this.load() }, names.map((name) => h("option", { value: name }, name)));
    this.recipe.value = first;
    this.overrides = h("textarea", { name: "overrides", rows: 6, spellcheck: false, placeholder: "run.name=my-run\nlearner.lr=0.0005", oninput: () => this.changed() });
    this.sweep = h("textarea", { name: "sweep", rows: 2, spellcheck: false, placeholder: "learner.lr=1e-4,3e-4\nrun.seed=0,1,2", oninput: () => this.changed() });
    this.search = h("input", { type: "search", placeholder: "Find a setting: learning rate, steps, seconds…", ariaLabel: "Find a setting", oninput: () => this.list() });
    this.found = h("div.settings-found", { ariaLabel: "Settings" });
    this.command = h("pre.command");
    this.number = h("span.note");
    this.answer = h("div.submit-answer", { role: "status" });
  }

  build(close) {
    const { submission, ray_address: address } = this.offered;
    this.close = close;
    this.describe();
    this.changed();
    this.send = h("button.button.primary", { type: "submit", dataset: { action: "submit" } }, "Submit");
    return h(
      "form.new-run",
      { onsubmit: (event) => (event.preventDefault(), submission ? this.submit() : this.check()) },
      h(
        "div.stack",
        null,
        h("label.field", null, h("span", null, "Recipe"), this.recipe),
        this.about,
        h("label.field", null, h("span", null, "Settings that differ, one key.sub=value a line"), this.overrides),
        h("label.field", null, h("span", null, "Sweep: values with commas between them; a run for each combination"), this.sweep),
        h("div.field", null, h("span", null, "In a shell"), this.command, h("div.row", null, h("button.button", { type: "button", dataset: { action: "copy" }, onclick: () => this.copy() }, "Copy"), this.number)),
        submission
          ? h("p.note", null, `Runs are jobs of the Ray cluster at ${address}. `, h("a", { href: "#/submissions", onclick: close }, "What was submitted"))
          : h("p.note", null, "This dashboard was started without --ray-address: settings can be checked, runs can't be submitted. Copy the command instead."),
        this.answer,
        h("div.row.end", null, h("button.button", { type: "button", dataset: { action: "check" }, onclick: () => this.check() }, "Check"), submission && this.send),
      ),
      h("div.stack.settings-side", null, h("label.field", null, h("span", null, "All settings; a click takes one over"), this.search), this.found),
    );
  }

  async begin() {
    await this.load();
    if (this.from) await this.fill();
  }

  describe() {
    setText(this.about, this.offered.items.find(({ name }) => name === this.recipe.value)?.summary ?? "");
  }

  async load() {
    this.describe();
    this.changed();
    put(this.found, h("p.note", null, "Asking the learner for its settings…"));
    const recipe = this.recipe.value;
    try {
      const { items } = await get("settings", { recipe });
      if (recipe === this.recipe.value) this.settings = items;
      this.list();
    } catch (error) {
      put(this.found, h("p.wrong", null, error.detail ?? error.message));
    }
  }

  /** What the run has otherwise than the recipe. */
  async fill() {
    try {
      const { config } = await get(at`runs/${this.from.id}/config`);
      const known = new Map(this.settings.map((setting) => [setting.key, setting]));
      const differ = Object.entries(flatten(config)).filter(([key, value]) => known.has(key) && !OF_THE_PLACE.test(key) && JSON.stringify(value) !== JSON.stringify(known.get(key).value));
      this.overrides.value = differ.map(([key, value]) => `${key}=${written(value)}`).join("\n");
      this.changed();
      this.list();
    } catch (error) {
      say(this.answer, "refused", error.detail ?? error.message);
    }
  }

  list() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = (key) => this.given().findLast((text) => text.startsWith(`${key}=`))?.slice(key.length + 1) ?? this.settings.find((setting) => setting.key === key)?.value;
    const fits = ({ belongs_to: variants }) => !variants.length || variants.some((each) => String(chosen(each.split("=")[0])) === each.split("=")[1]);
    const found = this.settings.filter((setting) => !OF_THE_PLACE.test(setting.key) && fits(setting) && words.every((word) => `${setting.key} ${setting.about}`.toLowerCase().includes(word)));
    put(
      this.found,
      found.slice(0, MOST_FOUND).map((setting) => this.row(setting)),
      found.length > MOST_FOUND && h("p.note", null, `and ${found.length - MOST_FOUND} more: say what you look for`),
      !found.length && h("p.note", null, "No setting has these words."),
    );
  }

  row(setting) {
    const { key, about, type, choices, value } = setting;
    return h(
      "button.setting",
      { type: "button", dataset: { key }, onclick: () => this.take(setting) },
      h("b", null, key),
      h("span.mono", null, `${valueText(value)}`),
      h("span.note", null, about, choices ? ` (${choices.map(valueText).join(", ")})` : type === "text" || !type ? "" : ` (${type})`),
    );
  }

  take({ key, value }) {
    const lines = this.overrides.value.split("\n");
    const at = lines.findIndex((line) => line.startsWith(`${key}=`));
    if (at < 0) lines.push(`${key}=${written(value)}`);
    const text = lines.filter((line, index) => line.trim() || index < lines.length - 1).join("\n").replace(/^\n+/, "");
    this.overrides.value = text;
    const begin = text.indexOf(`${key}=`) + key.length + 1;
    const end = text.indexOf("\n", begin);
    this.overrides.focus();
    this.overrides.setSelectionRange(begin, end < 0 ? text.length : end);
    this.changed();
  }

  given() {
    return lines(this.overrides);
  }

  /** The settings of each run, or a sentence that says what is wrong with the sweep. */
  runs() {
    let runs = [this.given()];
    for (const line of lines(this.sweep)) {
      const [, key, values] = /^([\w.]+)\s*=\s*(.+)$/.exec(line) ?? [];
      if (!key) return `Sweep: ${line} is not of the form key.sub=value,value`;
      runs = runs.flatMap((run) => apart(values).map((value) => [...run.filter((text) => !text.startsWith(`${key}=`)), `${key}=${value}`]));
      if (runs.length > MOST_RUNS) return `Sweep: more than ${MOST_RUNS} runs at once; leave some values out`;
    }
    const name = runs[0].find((text) => text.startsWith("run.name="));
    if (name && runs.length > 1) runs = runs.map((run, index) => run.map((text) => (text === name ? `${text}-${index + 1}` : text)));
    return runs;
  }

  changed() {
    const runs = this.runs();
    const fine = Array.isArray(runs);
    setText(this.number, fine ? (runs.length > 1 ? `${runs.length} runs` : "") : runs);
    this.number.classList.toggle("wrong", !fine);
    setText(this.command, fine ? runs.map((run) => commandOf(this.recipe.value, run)).join("\n") : "");
    if (this.send) setText(this.send, fine && runs.length > 1 ? `Submit ${runs.length} runs` : "Submit");
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(this.command.textContent);
      this.app.toast("Copied");
    } catch {
      getSelection().selectAllChildren(this.command);
      this.app.toast("The browser gives no clipboard to this page: the command is marked, copy it with Ctrl+C.");
    }
  }

  async check() {
    const runs = this.runs();
    if (!Array.isArray(runs)) return say(this.answer, "refused", runs);
    try {
      let sent = null;
      for (const [index, overrides] of runs.entries()) {
        say(this.answer, "busy", runs.length > 1 ? `Checking the settings, ${index + 1} of ${runs.length}…` : "Checking the settings…");
        sent = await patiently(() => post("submissions", { recipe: this.recipe.value, overrides, dry: true }));
      }
      say(this.answer, "done", runs.length > 1 ? `The settings of all ${runs.length} runs are sound.` : "The settings are sound.", h("details", null, h("summary", null, runs.length > 1 ? "All settings of the last" : "All settings"), h("pre", null, JSON.stringify(sent.config, null, 2))));
    } catch (error) {
      this.failed(error, "");
    }
  }

  async submit() {
    const runs = this.runs();
    if (!Array.isArray(runs)) return say(this.answer, "refused", runs);
    this.send.disabled = true;
    let done = 0;
    try {
      for (const overrides of runs) {
        say(this.answer, "busy", runs.length > 1 ? `Submitting ${done + 1} of ${runs.length}…` : "Submitting…");
        await patiently(() => post("submissions", { recipe: this.recipe.value, overrides }));
        done += 1;
      }
      this.close();
      location.hash = "#/submissions";
    } catch (error) {
      this.failed(error, done ? `${done} of ${runs.length} are submitted. ` : "");
    } finally {
      this.send.disabled = false;
    }
  }

  failed(error, before) {
    if (error.status === 401) token.set("");
    say(this.answer, "refused", `${before}${error.detail ?? error.message}`);
  }
}

const lines = (field) => field.value.split("\n").map((text) => text.trim()).filter((text) => text && !text.startsWith("#"));

/** As an override writes it: text as it stands, else YAML, of which JSON is a part. */
const written = (value) => (typeof value === "string" ? value : valueText(value));

/** "a,[1, 2],b" as ["a", "[1, 2]", "b"]. */
function apart(text) {
  const found = [""];
  let depth = 0;
  for (const letter of text) {
    depth += "[{(".includes(letter) ? 1 : "]})".includes(letter) ? -1 : 0;
    if (letter === "," && depth === 0) found.push("");
    else found[found.length - 1] += letter;
  }
  return found.map((value) => value.trim()).filter(Boolean);
}

const commandOf = (recipe, overrides) => ["python -m learner.main", `recipe=${recipe}`, ...overrides.map(quoted)].join(" ");

/** For a shell. */
const quoted = (text) => (/^[\w.=,:/+@%-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

/** The service lets a few checks through at once, and says how long to wait for the next. */
async function patiently(question) {
  for (;;) {
    try {
      return await question();
    } catch (error) {
      if (error.status !== 429 || !error.retryAfter) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * error.retryAfter));
    }
  }
}

function say(answer, status, ...parts) {
  answer.dataset.status = status;
  put(answer, h("p", null, parts[0]), parts.slice(1));
}
