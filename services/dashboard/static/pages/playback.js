// Playback: scrub through the denoising steps of a sampled completion, alone or beside another one.

import { at, get } from "../api.js";
import { empty, figure, h, loading, put, setText } from "../dom.js";
import { StepAxis, viewTable } from "../playback/axis.js";
import { Cells, describe, isRevealed } from "../playback/cells.js";
import { MODES, legend, scale } from "../playback/colours.js";
import { OrderMap, fifthBars, mapLegend } from "../playback/ordermap.js";
import { besideChoice, branches, nameOf, provenance, rewards, sampleChoice, siblings, verdict } from "../playback/panels.js";

const SPEEDS = [0.25, 0.5, 1, 2, 4];
const WHOLE_MS = 8000; // playing from the first step to the last, at speed 1
const PAUSE_MS = [40, 700]; // least and most between two steps
const REST_MS = 2500; // how long a finished text stands before the run's next one is played

export async function render(root, params, app) {
  app.title([["Runs", "#/runs"], [params.id, `#/run/${encodeURIComponent(params.id)}`], ["Playback", null]]);
  put(root, loading("the completion"));
  const samples = (await get(at`runs/${params.id}/samples`, { limit: 300 })).items;
  if (!params.sample) {
    const newest = samples.find((sample) => sample.kind === "train") ?? samples[0];
    if (newest) location.replace(link(params.id, newest.id, { follow: params.query.get("follow") }));
    else put(root, empty("No completion yet", "A run keeps some of each iteration (samples_per_iteration) and of each evaluation; the first appear with them."));
    return undefined;
  }
  const beside = params.query.get("beside");
  const play = await get(at`runs/${params.id}/samples/${params.sample}`);
  const plays = [play];
  let besideError = null;
  if (beside) {
    try {
      plays.push(await get(at`runs/${params.id}/samples/${beside}`));
    } catch (error) {
      besideError = error;
    }
  }
  const map = await orderMap(params.id, play);
  if (!app.alive()) return undefined;
  const page = new Page(root, params, app, { samples, plays, map, besideError });
  return () => page.close();
}

function orderMap(runId, play) {
  return play.has_order_map ? get(at`runs/${runId}/order-map`, { iteration: play.iteration }) : null;
}

function link(runId, sample, query) {
  const search = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== null && value !== undefined)).toString();
  return `#/run/${encodeURIComponent(runId)}/play/${encodeURIComponent(sample)}${search ? `?${search}` : ""}`;
}

class Page {
  constructor(root, params, app, { samples, plays, map, besideError }) {
    this.runId = params.id;
    this.app = app;
    this.plays = plays;
    this.play = plays[0];
    this.steps = Math.max(...plays.map((play) => play.steps));
    this.mode = params.query.get("colour") in MODES ? params.query.get("colour") : "confidence";
    this.speed = Number(params.query.get("speed")) || 1;
    this.update = Math.max(0, this.play.updates - 1);
    this.position = null;
    this.timer = null;
    this.newest = null; // the first sample of the newest iteration, once the run has told of one
    const asked = params.query.get("step");
    this.done = asked === null ? this.steps : Math.min(this.steps, Math.max(0, Number(asked) || 0));
    this.panels = plays.map((play) => new Cells(play, `${nameOf(play)}, the completion by position`, (position) => this.select(position)));
    this.axis = new StepAxis(this.play, (done) => this.seek(done));
    this.map = new OrderMap(map, plays, { onPick: (position, step) => (this.select(position), this.seek(step + 1)) });
    this.#build(root, samples, map, besideError);
    this.#keys();
    this.app.onTheme(() => this.map.draw());
    this.colour(this.mode);
    this.chooseUpdate(this.update);
    this.select(null);
    this.seek(this.done);
    this.follow(params.query.get("follow") === "1");
  }

  /** Keep playing the newest completion of the run, for a screen that nobody touches. */
  follow(on) {
    this.following = on;
    this.followButton.setAttribute("aria-pressed", String(on));
    this.#remember();
    if (!on) return;
    this.stream ??= this.app.stream(this.runId, { sample: (sample) => this.#told(sample) });
    if (!this.timer) this.toggle();
  }

  #told(sample) {
    if (sample.kind !== "train" || sample.iteration <= (this.newest ?? this.play).iteration) return;
    this.newest = sample;
    if (!this.timer) this.#next();
  }

  #next() {
    clearTimeout(this.resting);
    this.resting = setTimeout(() => {
      if (this.following && this.newest && !this.timer) location.replace(link(this.runId, this.newest.id, { ...this.#query(), step: null }));
    }, REST_MS);
  }

  close() {
    clearTimeout(this.resting);
    this.pause();
    this.axis.close();
    this.map.close();
  }

  /** The state after this many steps. */
  seek(done) {
    this.done = Math.min(this.steps, Math.max(0, done));
    for (const panel of this.panels) panel.show(Math.min(this.done, panel.play.steps));
    this.slider.value = String(this.done);
    this.slider.setAttribute("aria-valuetext", `after ${this.done} of ${this.steps} steps`);
    this.axis.show(Math.min(this.done, this.play.steps));
    this.map.show(this.done);
    const masked = this.play.cells.step.filter((_, position) => !isRevealed(this.play, position, this.done)).length;
    setText(this.counter, `${this.done} / ${this.steps}`);
    setText(this.left, masked ? `${masked} masked` : "complete");
    this.#remember();
  }

  toggle() {
    if (this.timer) return this.pause();
    if (this.done >= this.steps) this.seek(0);
    this.#tick();
    return this.#showPlaying();
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
    this.#showPlaying();
  }

  #tick() {
    const [least, most] = PAUSE_MS;
    const wait = Math.min(most, Math.max(least, WHOLE_MS / this.steps)) / this.speed;
    this.timer = setTimeout(() => {
      this.seek(this.done + 1);
      if (this.done < this.steps) return this.#tick();
      this.pause();
      if (this.following) this.#next();
      return undefined;
    }, wait);
  }

  #showPlaying() {
    const playing = this.timer !== null;
    put(this.button, playing ? "❚❚" : "▶");
    this.button.setAttribute("aria-label", playing ? "Pause" : "Play");
    this.button.setAttribute("aria-pressed", String(playing));
  }

  select(position) {
    const last = Math.max(...this.plays.map((play) => play.cells.text.length)) - 1;
    this.position = position === null ? null : Math.min(last, Math.max(0, position));
    this.panels.forEach((panel, index) => {
      panel.select(this.position);
      describe(this.facts[index], panel.play, this.position);
    });
    this.map.select(this.position);
  }

  colour(mode) {
    this.mode = mode;
    const colourOf = scale(mode, this.plays);
    for (const panel of this.panels) panel.colour(colourOf);
    put(this.legend, legend(mode, this.plays));
    for (const button of this.modes.children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    this.#remember();
  }

  chooseUpdate(update) {
    this.update = update;
    this.axis.choose(update);
    for (const panel of this.panels) {
      const scored = panel.play.scored.filter((step) => step.update === update);
      panel.scored(new Set(scored.flatMap((step) => step.tokens.map((token) => token.position))));
    }
    put(this.table, viewTable(this.play, update));
    for (const button of this.updates?.children ?? []) button.setAttribute("aria-pressed", String(Number(button.dataset.update) === update));
  }

  changeSpeed(by) {
    const index = SPEEDS.indexOf(this.speed);
    this.speed = SPEEDS[Math.min(SPEEDS.length - 1, Math.max(0, (index < 0 ? 2 : index) + by))];
    this.speeds.value = String(this.speed);
    this.#remember();
  }

  /** The address shows what is seen, without a new entry in the history. */
  #remember() {
    const query = { ...this.#query(), beside: this.plays[1]?.id ?? null };
    history.replaceState(null, "", link(this.runId, this.play.id, query));
  }

  #query() {
    return {
      step: this.done === this.steps ? null : this.done,
      colour: this.mode === "confidence" ? null : this.mode,
      speed: this.speed === 1 ? null : this.speed,
      follow: this.following ? 1 : null,
    };
  }

  #open(sample, beside) {
    location.hash = link(this.runId, sample, { ...this.#query(), beside });
  }

  #neighbour(by) {
    const { siblings: all, id } = this.play;
    const index = all.findIndex((sample) => sample.id === id);
    const next = all[index + by];
    if (next) this.#open(next.id, this.plays[1]?.id ?? null);
  }

  #keys() {
    const step = (by) => () => (this.pause(), this.seek(this.done + by));
    const far = Math.max(1, Math.round(this.steps / 10));
    this.app.keys({
      " ": [() => this.toggle(), "play or pause"],
      ArrowLeft: [step(-1), "one step back"],
      ArrowRight: [step(1), "one step on"],
      PageDown: [step(far), "a tenth of the steps on"],
      PageUp: [step(-far), "a tenth of the steps back"],
      Home: [step(-this.steps), "before the first step"],
      End: [step(this.steps), "after the last step"],
      "-": [() => this.changeSpeed(-1), "slower"],
      "+": [() => this.changeSpeed(1), "faster"],
      "[": [() => this.select(this.position === null ? 0 : this.position - 1), "position before"],
      "]": [() => this.select(this.position === null ? 0 : this.position + 1), "next position"],
      c: [() => this.#nextColour(), "colour by confidence, entropy or step"],
      f: [() => this.follow(!this.following), "follow the run: play its newest completion, again and again"],
      n: [() => this.#neighbour(1), "next completion of the group"],
      p: [() => this.#neighbour(-1), "completion before"],
    });
  }

  #nextColour() {
    const names = Object.keys(MODES);
    this.colour(names[(names.indexOf(this.mode) + 1) % names.length]);
  }

  #build(root, samples, map, besideError) {
    const { play } = this;
    this.button = h("button.button.primary.play-button", { type: "button", onclick: () => this.toggle() });
    this.slider = h("input", {
      type: "range",
      min: "0",
      max: String(this.steps),
      step: "1",
      ariaLabel: "Denoising step",
      oninput: () => (this.pause(), this.seek(Number(this.slider.value))),
      onkeydown: (event) => event.key === " " && (event.preventDefault(), this.toggle()),
    });
    this.counter = h("output.play-counter");
    this.left = h("span.note");
    this.speeds = h(
      "select",
      { ariaLabel: "Speed", onchange: () => ((this.speed = Number(this.speeds.value)), this.#remember()) },
      SPEEDS.map((speed) => h("option", { value: String(speed), selected: speed === this.speed }, `${speed}×`)),
    );
    this.followButton = h("button.button", { type: "button", title: "Play the newest completion of the run, and the next when there is one (f)", onclick: () => this.follow(!this.following) }, "Follow the run");
    this.modes = h(
      "div.segments",
      { role: "group", ariaLabel: "Colour by" },
      Object.entries(MODES).map(([name, mode]) => h("button", { type: "button", title: mode.about, dataset: { mode: name }, onclick: () => this.colour(name) }, mode.title)),
    );
    this.legend = h("div");
    this.facts = this.plays.map(() => h("div"));
    this.table = h("div");
    const bars = h("div");
    fifthBars(bars, map);
    const open = (id) => link(this.runId, id, { ...this.#query(), beside: this.plays[1]?.id ?? null });
    put(
      root,
      h(
        "div.head.play-head",
        null,
        h("div", null, h("h1", null, play.kind === "train" ? `Iteration ${play.iteration}, ${nameOf(play)}` : nameOf(play)), h("p.note", null, play.problem_id)),
        h("div.row", null, sampleChoice(samples, play, (id) => this.#open(id, null)), besideChoice(play, this.plays[1]?.id ?? null, (id) => this.#open(play.id, id))),
      ),
      siblings(play, open),
      besideError && h("div.banner", { role: "alert" }, `The sample to compare with can't be shown: ${besideError.detail}`),
      play.notes.map((note) => h("div.banner", null, note)),
      h(
        "section.card.play-transport",
        { ariaLabel: "Playback" },
        h("div.play-controls", null, this.button, this.counter, this.left, h("span.play-space"), this.modes, this.legend, this.speeds, this.followButton),
        h("div.play-track", null, this.slider, this.axis.element),
        this.#updateChoice(),
      ),
      h(
        "div.play-columns",
        { dataset: { plays: this.plays.length } },
        h(
          "div.play-main",
          null,
          h("div.play-texts", null, this.panels.map((panel) => this.#panel(panel))),
          h("p.note.play-key", null, h("i.new", { ariaHidden: "true" }), "revealed by this step", this.plays.some((each) => each.scored.length) && [h("i.scored", { ariaHidden: "true" }), "scored by the update"], h("span.mono", null, "∎"), "special token"),
          card("Reward", [rewards(this.plays)]),
        ),
        h(
          "div.play-side",
          null,
          card("Position", [this.#each((_, index) => this.facts[index])]),
          card("Order of writing", [this.map.element, this.#ways(map), bars], map ? `${map.completions} completions of the batch` : "no map of a batch"),
        ),
      ),
      h(
        "div.play-more",
        { dataset: { plays: this.plays.length } },
        card("What the update scored", [this.table]),
        this.plays.some((each) => each.branches.length) && card("Branches", [this.#each(branches)], "states before these steps, filled at once"),
        card("Where it comes from", [this.#each(provenance)]),
        card("Prompt", [h("pre.play-prompt", { tabIndex: 0, ariaLabel: "Prompt" }, play.prompt)]),
      ),
    );
    this.pause();
  }

  #updateChoice() {
    if (this.play.updates < 2) return null;
    const numbers = Array.from({ length: this.play.updates }, (_, update) => update);
    const button = (update) => h("button", { type: "button", dataset: { update }, onclick: () => this.chooseUpdate(update) }, `Update ${update + 1}`);
    this.updates = h("div.segments", { role: "group", ariaLabel: "Update on this batch" }, numbers.map(button));
    return h("div.play-updates", null, this.updates);
  }

  #panel(panel) {
    const { play } = panel;
    return h(
      "section.card.play-text",
      { ariaLabel: nameOf(play) },
      h("header", null, h("h2", null, nameOf(play)), verdict(play.correct), h("span.note", null, `reward ${figure(play.reward)}`)),
      h("div.body", null, panel.element),
    );
  }

  /** What `build` makes of each completion, side by side. */
  #each(build) {
    const named = (play) => this.plays.length > 1 && h("h3", null, nameOf(play));
    return h("div.play-each", null, this.plays.map((play, index) => h("div", null, named(play), build(play, index))));
  }

  #ways(map) {
    return h(
      "div.play-ways",
      null,
      this.plays.map((play, index) => h("span", { dataset: { way: index + 1 } }, h("i", { ariaHidden: "true" }), nameOf(play))),
      map && mapLegend(map),
    );
  }
}

function card(title, body, note) {
  return h("section.card", null, h("header", null, h("h2", null, title), note && h("span.note.clip", null, note)), h("div.body", null, body));
}
