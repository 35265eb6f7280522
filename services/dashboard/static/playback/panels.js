// The parts around the cells: what a completion was worth, where it comes from, and its neighbours.

import { clock, figure, h, number } from "../dom.js";
import { nameOf, verdict } from "./words.js";

/** Rewards by component, each as a bar out of the largest value that it can have, where that is known. */
export function rewards(plays) {
  const names = [...new Set(plays.flatMap((play) => Object.keys(play.rewards)))];
  const bar = (play, name) => {
    const value = number(play.rewards[name] ?? null);
    const most = number(play.largest[name] ?? null);
    const share = most && Number.isFinite(value) ? Math.min(1, Math.abs(value ?? 0) / most) : null;
    return h(
      "td",
      null,
      h(
        "div.play-reward",
        { dataset: { sign: value < 0 ? "minus" : "plus" } },
        share !== null && h("i", { ariaHidden: "true", style: { "--share": String(share) } }),
        h("span", null, figure(value, 3), most ? h("small", null, ` of ${figure(most, 3)}`) : null),
      ),
    );
  };
  const most = (play) => names.map((name) => number(play.largest[name] ?? null));
  const whole = (play) => (most(play).every((value) => value !== null) ? h("small", null, ` of ${figure(most(play).reduce((a, b) => a + b, 0), 3)}`) : null);
  const total = (play) => h("td", null, h("strong", null, figure(play.reward)), names.every((name) => number(play.rewards[name]) >= 0) && whole(play));
  const advantage = (play) => h("td", null, play.advantage === null ? "–" : figure(play.advantage));
  return h(
    "table.play-rewards",
    null,
    plays.length > 1 && h("thead", null, h("tr", null, h("td"), plays.map((play) => h("th", { scope: "col" }, nameOf(play))))),
    h(
      "tbody",
      null,
      names.map((name) => h("tr", null, h("th", { scope: "row" }, name), plays.map((play) => bar(play, name)))),
      h("tr", null, h("th", { scope: "row" }, "reward"), plays.map(total)),
      plays.some((play) => play.advantage !== null) && h("tr", null, h("th", { scope: "row", title: "Reward against the group's others" }, "advantage"), plays.map(advantage)),
    ),
  );
}

/** What became of the states that were branched, each filled at once; null where none was. */
export function branches(play) {
  if (!play.branches.length) return null;
  const drawn = play.branches.some((branch) => branch.logp !== null);
  const row = (branch) =>
    h(
      "tr",
      null,
      h("td.num", null, String(branch.step + 1)),
      h("td.num", null, figure(branch.reward)),
      h("td", null, verdict(branch.correct)),
      drawn && h("td.num", null, figure(branch.logp)),
      h("td.mono", null, branch.text),
    );
  return h(
    "div.play-scroll",
    { tabIndex: 0, role: "region", ariaLabel: "Branches" },
    h(
      "table.table",
      null,
      h("thead", null, h("tr", null, h("th.num", { scope: "col" }, "Step"), h("th.num", { scope: "col" }, "Reward"), h("th", { scope: "col" }, "Verdict"), drawn && h("th.num", { scope: "col" }, "Log-prob"), h("th", { scope: "col" }, "Filled at once"))),
      h("tbody", null, play.branches.map(row)),
    ),
  );
}

/** Where a completion comes from. */
export function provenance(play) {
  const { sampler, provenance: from } = play;
  const facts = [
    ["Problem", play.problem_id],
    ["Written", clock(number(play.time), { date: true })],
    ["Policy", from.policy_version === "-1" ? "base, without adapter" : `version ${from.policy_version ?? "?"}`],
    ["Adapter", from.adapter_digest ? from.adapter_digest.slice(0, 12) : "–"],
    ["Actor", from.actor_id || "–"],
    ["Forward passes", from.nfe ?? "–"],
    ["Seed", from.seed ?? "–"],
    ["Order", [sampler.position_rule, sampler.threshold != null && `threshold ${from.threshold ? `${from.threshold} of ${sampler.threshold}` : sampler.threshold}`].filter(Boolean).join(", ") || "–"],
    ["Temperature", sampler.temperature === 0 ? "0 (greedy)" : figure(sampler.temperature ?? null)],
    ["Truncation", [sampler.top_k && `top-k ${sampler.top_k}`, sampler.top_p < 1 && `top-p ${sampler.top_p}`].filter(Boolean).join(", ") || "none"],
    ["Lengths", `${play.cells.text.length} positions, blocks of ${sampler.block_length ?? "?"}, ${play.steps} steps`],
  ];
  return h("dl.play-facts", null, facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, String(value)))));
}

/** Links to the completions of the same group; `link(id)` gives their address. */
export function siblings(play, link) {
  if (play.siblings.length < 2) return null;
  return h(
    "nav.play-siblings",
    { ariaLabel: "Completions of this group" },
    play.siblings.map((sample) =>
      h(
        "a",
        {
          href: link(sample.id),
          title: `${nameOf(sample)}: reward ${figure(sample.reward)}, ${sample.correct ? "right" : "wrong"}`,
          "aria-current": sample.id === play.id ? "true" : null,
          dataset: { correct: sample.correct },
        },
        h("span", { ariaHidden: "true" }, sample.correct ? "✓" : "✗"),
        String(sample.row + 1),
        h("small", null, figure(sample.reward, 3)),
      ),
    ),
  );
}

/** A choice of what to show beside this completion. */
export function besideChoice(play, besideId, onChange) {
  const option = (sample) => h("option", { value: String(sample.id), selected: sample.id === besideId }, `${nameOf(sample)} ${sample.correct ? "✓" : "✗"} ${figure(sample.reward, 3)}`);
  const others = (samples) => samples.filter((sample) => sample.id !== play.id);
  const groups = [
    ["Same group", others(play.siblings)],
    ["Same problem, base and trained", others(play.counterparts).filter((sample) => !play.siblings.some((own) => own.id === sample.id && play.kind === "train"))],
  ].filter(([, samples]) => samples.length);
  if (!groups.length) return null;
  const known = groups.some(([, samples]) => samples.some((sample) => sample.id === besideId));
  return h(
    "label.play-field",
    null,
    h("span", null, "Beside it"),
    h(
      "select",
      { onchange: (event) => onChange(event.target.value || null) },
      h("option", { value: "", selected: !besideId }, "nothing"),
      besideId && !known && h("option", { value: String(besideId), selected: true }, `sample ${besideId}`),
      groups.map(([label, samples]) => h("optgroup", { label }, samples.map(option))),
    ),
  );
}
