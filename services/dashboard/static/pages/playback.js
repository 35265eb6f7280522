// Playback: scrub through the denoising steps of a sampled completion, alone or beside another one.

import { at, get } from "../api.js";
import { empty, h, loading, put, setText } from "../dom.js";
import { StepAxis, scalesOf, viewTable, whyNone } from "../playback/axis.js";
import { Cells, describe } from "../playback/cells.js";
import { MODES, legend, scale } from "../playback/colours.js";
import { film } from "../playback/film.js";
import { Finder } from "../playback/finder.js";
import { answerCard, card, keyOf, phaseNote, questionCard } from "../playback/hero.js";
import { layoutOf } from "../playback/layout.js";
import { OrderMap, fifthBars, mapLegend } from "../playback/ordermap.js";
import { besideChoice, branches, provenance, rewards, siblings } from "../playback/panels.js";
import { animationAddress, copied } from "../playback/share.js";
import { nameOf, sentence } from "../playback/words.js";

const SPEEDS = [0.25, 0.5, 1, 2, 4];
const WHOLE_MS = 8000; // playing from the first step to the last, at speed 1
const PAUSE_MS = [40, 900]; // least and most between two steps
const REST_MS = 2500; // how long a finished text stands before the run's next one is played

export async function render(root, params, app) {
  app.title([["Runs", "#/runs"], [params.id, `#/run/${encodeURIComponent(params.id)}`], ["Playback", null]]);
  put(root, loading("the completion"));
  if (!params.sample) {
    const kind = params.query.get("kind") ?? "train";
    const newest = (await get(at`runs/${params.id}/samples`, { kind, limit: 1 })).items[0] ?? (await get(at`runs/${params.id}/samples`, { limit: 1 })).items[0];
    if (newest) location.replace(link(params.id, newest.id, { follow: params.query.get("follow") }));
    else put(root, empty("No completion yet", "A run keeps some of each iteration (samples_per_iteration) and of each evaluation; the first appear with them."));
    return undefined;
  }
  const beside = params.query.get("beside");
  const [play, index, { config }] = await Promise.all([
    get(at`runs/${params.id}/samples/${params.sample}`),
    get(at`runs/${params.id}/sample-iterations`),
    get(at`runs/${params.id}/config`),
  ]);
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
  const page = new Page(root, params, app, { index, config, plays, map, besideError });
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
  constructor(root, params, app, { index, config, plays, map, besideError }) {
    this.runId = params.id;
    this.app = app;
    this.config = config;
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
    this.chosen = asked !== null; // whether somebody chose the step in view, which the address then says
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.done = asked !== null ? Math.min(this.steps, Math.max(0, Number(asked) || 0)) : still ? this.steps : 0;
    const select = (position) => this.select(position);
    this.panels = plays.map((play) => new Cells(play, `${nameOf(play)}, the completion by position`, select));
    this.answers = plays.map((play) => layoutOf(play, select));
    const scales = scalesOf(plays);
    this.axes = plays.map((play) => new StepAxis(play, this.steps, scales, (done) => this.go(done)));
    this.map = new OrderMap(map, plays, { onPick: (position, step) => (this.select(position), this.go(step + 1)) });
    this.finder = new Finder(this.runId, this.play, index, (id) => this.#open(id, null));
    this.#build(root, map, besideError);
    this.#keys();
    this.app.search(this.finder.search);
    this.app.onTheme(() => this.map.draw());
    this.colour(this.mode);
    this.chooseUpdate(this.update);
    this.select(null);
    this.seek(this.done);
    this.follow(params.query.get("follow") === "1");
    if (asked === null && !still && !this.timer) this.toggle();
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
    this.#stop();
    for (const axis of this.axes) axis.close();
    this.map.close();
  }

  /** The state after this many steps. */
  seek(done) {
    this.done = Math.min(this.steps, Math.max(0, done));
    this.plays.forEach((play, index) => {
      const own = Math.min(this.done, play.steps);
      this.panels[index].show(own);
      this.answers[index]?.show(own);
      this.axes[index].show(own);
    });
    this.slider.value = String(this.done);
    this.slider.setAttribute("aria-valuetext", `after ${this.done} of ${this.steps} steps`);
    this.map.show(this.done);
    setText(this.counter, `${this.done} / ${this.steps}`);
    setText(this.caption, sentence(this.plays, this.done, this.steps));
    if (this.chosen) this.#remember();
  }

  /** To a step that somebody chose. */
  go(done) {
    this.#stop();
    this.chosen = true;
    this.seek(done);
  }

  toggle() {
    if (this.timer) return this.go(this.done);
    this.chosen = false;
    if (this.done >= this.steps) this.seek(0);
    this.#remember();
    this.#tick();
    return this.#showPlaying();
  }

  #stop() {
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
      this.#stop();
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
      this.answers[index]?.select(this.position);
      describe(this.facts[index], panel.play, this.position);
    });
    this.factsCard.hidden = this.position === null;
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
    for (const axis of this.axes) axis.choose(update);
    this.#underline();
    const view = (play) => (index) => this.#underline(play, index);
    this.tables.forEach((host, index) => {
      const play = this.plays[index];
      const scored = play.scored.some((each) => each.update === update);
      put(host, scored ? viewTable(play, update, view(play)) : h("p.note", null, play.kind === "train" ? whyNone(play) : "Evaluations aren't learnt from."));
    });
    for (const button of this.updates?.children ?? []) button.setAttribute("aria-pressed", String(Number(button.dataset.update) === update));
  }

  /** Underline what the update scored: all of it, or of one document one view alone. */
  #underline(only = null, index = null) {
    for (const panel of this.panels) {
      const scored = panel.play.scored.filter((each) => each.update === this.update);
      const views = panel.play === only && index !== null ? [scored[index]] : scored;
      panel.scored(new Set(views.flatMap((each) => each.tokens.map((token) => token.position))));
    }
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
      step: this.chosen ? this.done : null,
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
    const step = (by) => () => this.go(this.done + by);
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

  #build(root, map, besideError) {
    const { play } = this;
    const several = this.plays.length > 1;
    this.button = h("button.button.primary.play-button", { type: "button", onclick: () => this.toggle() });
    this.slider = h("input", {
      type: "range",
      min: "0",
      max: String(this.steps),
      step: "1",
      ariaLabel: "Denoising step",
      oninput: () => this.go(Number(this.slider.value)),
      onkeydown: (event) => event.key === " " && (event.preventDefault(), this.toggle()),
    });
    this.counter = h("output.play-counter");
    this.caption = h("p.play-caption");
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
    this.factsCard = card("Position", [this.#each((_, index) => this.facts[index])]);
    this.tables = this.plays.map(() => h("div"));
    const bars = h("div");
    fifthBars(bars, map, play);
    const open = (id) => link(this.runId, id, { ...this.#query(), beside: this.plays[1]?.id ?? null });
    const frames = film(play, (id) => link(this.runId, id, { ...this.#query(), beside: null }));
    const learnt = this.plays.some((each) => each.kind === "train");
    put(
      root,
      h(
        "div.head.play-head",
        null,
        h("div", null, h("h1", null, play.kind === "train" ? `Iteration ${play.iteration}, ${nameOf(play)}` : nameOf(play)), h("p.note", null, play.problem_id)),
        h(
          "div.row",
          null,
          besideChoice(play, this.plays[1]?.id ?? null, (id) => this.#open(play.id, id)),
          h("button.button", { type: "button", title: "Copy the address of what is seen, at this step", onclick: () => this.#copy() }, "Copy link"),
          h("a.button", { href: animationAddress(this.runId, this.plays), download: "", title: "An animated SVG for slides and pages, without any script; see the API for its parameters" }, "Save as SVG"),
        ),
      ),
      h("section.card.play-places", { ariaLabel: "Samples of this run" }, this.finder.element, siblings(play, open), frames && [h("h2.play-film-name", null, "The same problem through training"), frames]),
      besideError && h("div.banner", { role: "alert" }, `The sample to compare with can't be shown: ${besideError.detail}`),
      play.notes.map((note) => h("div.banner", null, note)),
      h(
        "section.card.play-transport",
        { ariaLabel: "Playback" },
        h("div.play-controls", null, this.button, this.counter, this.slider, this.speeds, this.followButton),
        this.caption,
      ),
      h(
        "div.play-hero",
        { dataset: { plays: this.plays.length } },
        questionCard(play),
        this.plays.map((each, index) => answerCard(each, this.answers[index], this.panels[index])),
      ),
      keyOf(this.plays, this.modes, this.legend),
      h(
        "div.play-more",
        { dataset: { plays: this.plays.length } },
        card("Step by step", [this.#updateChoice(), this.#each((_, index) => this.axes[index].element)], "click a step to go there"),
        card("Reward", [rewards(this.plays)]),
        learnt && card("What the update scored", [phaseNote(this.config, play), this.#each((_, index) => this.tables[index])]),
        this.plays.some((each) => each.branches.length) && card("Branches", [this.#each(branches)], "states before these steps, filled at once"),
        this.factsCard,
        card("Order of writing", [this.map.element, this.#ways(map), bars], map ? `${map.completions} completions of the batch` : several ? "of these two completions" : "of this completion"),
        card("Where it comes from", [this.#each(provenance), h("details.play-raw", null, h("summary", null, "The prompt as the model got it"), h("pre.play-prompt", { tabIndex: 0, ariaLabel: "Prompt" }, play.prompt))]),
      ),
    );
    this.#showPlaying();
  }

  async #copy() {
    const address = new URL(link(this.runId, this.play.id, { ...this.#query(), step: this.done, beside: this.plays[1]?.id ?? null }), location.href);
    if (!(await copied(address.href))) this.go(this.done); // then the address line has it
    this.app.toast("The link opens this step: copied, or in the address line.");
  }

  #updateChoice() {
    if (this.play.updates < 2) return null;
    const numbers = Array.from({ length: this.play.updates }, (_, update) => update);
    const button = (update) => h("button", { type: "button", dataset: { update }, onclick: () => this.chooseUpdate(update) }, `Update ${update + 1}`);
    this.updates = h("div.segments", { role: "group", ariaLabel: "Update on this batch" }, numbers.map(button));
    return h("div.play-updates", null, this.updates);
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
      map && mapLegend(),
    );
  }
}
