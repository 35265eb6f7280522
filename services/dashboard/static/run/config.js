// The resolved settings of a run: what they mean, what differs from the recipe or from another run, and how it was run.

import { keepInAddress } from "../address.js";
import { at, get } from "../api.js";
import { commandLine, copyButton } from "../copy.js";
import { differencesCard } from "../differences.js";
import { bytes, clock, count, empty, failure, h, loading, put } from "../dom.js";

/** Settings by full key: {"rollout.sampler.steps": 8}. */
export function flatten(config, prefix = "", found = {}) {
  for (const [key, value] of Object.entries(config ?? {})) {
    const name = prefix ? `${prefix}.${key}` : key;
    if (value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) flatten(value, name, found);
    else found[name] = value;
  }
  return found;
}

export const shown = (value) => (value === undefined ? "–" : value === null ? "not set" : typeof value === "string" ? value : JSON.stringify(value));

export async function configTab(host, runId, app, query) {
  const [{ config }, { items }, run, starts] = await Promise.all([get(at`runs/${runId}/config`), get("runs", { limit: 500 }), get(at`runs/${runId}`), get(at`runs/${runId}/starts`)]);
  const settings = Object.entries(flatten(config));
  const differs = run.differs ?? {};
  const meanings = new Map(); // key -> what it is
  const filter = h("input.filter", { type: "search", placeholder: "Filter settings", ariaLabel: "Filter settings", value: query.get("q") ?? "", oninput: () => (keep(), show()) });
  const others = items.filter((each) => each.id !== runId);
  const other = h("select", { ariaLabel: "Compare with", onchange: () => (keep(), difference()) }, h("option", { value: "" }, "Difference to…"), others.map((each) => h("option", { value: each.id }, each.id)));
  other.value = others.some((each) => each.id === query.get("other")) ? query.get("other") : "";
  const cards = h("div.config-cards");
  const diff = h("div");
  const command = settings.length > 0 && copyButton(() => asCommand(run, settings), null, "Copy as command");
  put(host, h("div.row.filters", null, filter, others.length > 0 && other, command), diff, startsCard(starts.items, run), cards);
  app.search(filter);

  const keep = () => keepInAddress({ q: filter.value.trim(), other: other.value });

  function show() {
    const text = filter.value.trim().toLowerCase();
    const groups = new Map();
    for (const [key, value] of settings) {
      if (!`${key} ${shown(value)} ${meanings.get(key) ?? ""}`.toLowerCase().includes(text)) continue;
      const group = key.includes(".") ? key.split(".")[0] : "other";
      groups.set(group, [...(groups.get(group) ?? []), [key, group === "other" ? key : key.slice(group.length + 1), value]]);
    }
    put(cards, [...groups].map(([group, rows]) =>
      h("section.card", null, h("header", null, h("h2", null, group)), h("dl.body.settings", null, rows.map(([key, name, value]) => setting(key, name, value))))));
    if (!groups.size) put(cards, empty(settings.length ? "No setting matches" : "No settings", settings.length ? "Clear the filter." : "The run has told none."));
  }

  function setting(key, name, value) {
    const differing = key in differs;
    return h(
      "div",
      { dataset: { differs: String(differing) }, title: differing ? `Not as in recipe ${run.recipe ?? ""}` : "" },
      h("dt", null, h("span.name", null, name), meanings.has(key) && h("span.meaning", null, meanings.get(key))),
      h("dd.mono", { dataset: { empty: String(value === null) } }, shown(value)),
    );
  }

  async function difference() {
    if (!other.value) return put(diff);
    put(diff, loading("the difference"));
    try {
      const answer = await get(at`runs/${runId}/config-diff`, { other: other.value });
      const both = (row) => [side(row, "value", runId), side(row, "other", answer.other_id)].map((value) => [value, shown(value)]);
      const rows = answer.differences.map((row) => ({ label: row.key, values: both(row) }));
      put(diff, differencesCard(`${count(answer.equal)} are alike`, "Setting", [runId, answer.other_id], rows));
    } catch (error) {
      put(diff, failure(error, difference));
    }
  }

  show();
  if (other.value) difference();
  get("settings", run.method === "sft" ? { recipe: "sft_d1_s1k" } : {}).then(({ items: known }) => {
    for (const { key, about } of known) if (about) meanings.set(key, about);
    if (app.alive()) show();
  }, () => {}); // without their meanings they are settings all the same
  return {};
}

/** How each start was asked for, with which code, on which machine; the newest first. */
function startsCard(starts, run) {
  if (!starts.length) return null;
  const [newest, ...older] = starts.toReversed();
  return h(
    "section.card.starts",
    null,
    h("header", null, h("h2", null, "How it was run"), run.recipe && h("span.note", null, `recipe ${run.recipe}; settings that differ from it are marked`)),
    h("div.body.stack", null, startView(newest), older.length > 0 && h("details", null, h("summary", null, `${older.length} earlier ${older.length === 1 ? "start" : "starts"}`), h("div.stack", null, older.map(startView)))),
  );
}

function startView({ time, command, about }) {
  const { code = {}, versions = {}, machine = {} } = about;
  const commit = code.git_commit ? `${code.git_commit}${code.changed ? ", with changes" : ""}` : code.digest ? `no git commit; digest ${code.digest}` : null;
  const facts = [
    ["Begun", clock(time, { date: true })],
    ["In", about.folder],
    ["Went on after", about.goes_on_after === null || about.goes_on_after === undefined ? null : `iteration ${count(about.goes_on_after)}`],
    ["Changed", about.changes?.length ? about.changes.join("; ") : null],
    ["Code", commit],
    ["Versions", Object.entries(versions).filter(([, version]) => version).map(([name, version]) => `${name} ${version}`).join(", ")],
    ["Machine", [machine.host, machine.processor, machine.cpus && `${machine.cpus} CPUs`, machine.memory_bytes && bytes(machine.memory_bytes), ...(machine.gpus ?? []), machine.system].filter(Boolean).join(", ")],
  ];
  return h("div.stack", null, commandLine(command), h("dl.facts", null, facts.filter(([, value]) => value).map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, String(value))))));
}

/** The command of a new run with these settings. */
function asCommand(run, settings) {
  const chosen = run.recipe ? [["recipe", run.recipe], ...Object.entries(run.differs ?? {})] : settings.filter(([key, value]) => value !== null && !key.startsWith("run.dir"));
  const words = chosen.map(([key, value]) => quoted(`${key}=${typeof value === "string" ? value : JSON.stringify(value)}`));
  return ["python -m", run.method === "sft" ? "learner.sft" : "learner.main", ...words].join(" ");
}

const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);

const side = (row, name, runId) => (row.only_in && row.only_in !== runId ? undefined : row[name]);
