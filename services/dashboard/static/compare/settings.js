// In what the runs differ: as a table, and drawn against a metric.

import { differencesCard } from "../differences.js";
import { h, put } from "../dom.js";
import { middleClipped, valueText } from "../names.js";
import { scatter } from "./scatter.js";

const ORDER = [/^run\.seed$/, /^(?!evaluation\.|run\.)/, /./]; // what tells runs apart comes before how they are measured
const OF_THE_PLACE = /^(run\.(name|dir|resume|dashboard|restarts|shared)|store\.|resources\.|timeouts\.)/;

/** Keys in which the (flat) settings of some runs differ, but names and places. */
export function settingsThatDiffer(configs) {
  const known = configs.filter(Boolean);
  const place = (key) => ORDER.findIndex((pattern) => pattern.test(key));
  const keys = [...new Set(known.flatMap((config) => Object.keys(config)))].filter((key) => !OF_THE_PLACE.test(key)).sort().sort((one, two) => place(one) - place(two));
  return keys.filter((key) => new Set(known.map((config) => JSON.stringify(config[key]))).size > 1);
}

/** A row for each run, a column for each of these settings. */
export function settingsCard(runs, keys) {
  const equal = new Set(runs.flatMap((item) => Object.keys(item.config ?? {}))).size - keys.length;
  const values = (item) => keys.map((key) => [item.config?.[key], valueText(item.config?.[key])]);
  const rows = runs.map((item) => ({ label: middleClipped("span", {}, item.id), values: values(item), dataset: { run: item.id } }));
  return differencesCard(`${equal} are alike, or say names and places`, "Run", keys, rows);
}

/** A metric, best or newest, against a setting. */
export class Against {
  /** page: {chosen({setting or against}), isolate(id)}. */
  constructor(page) {
    this.page = page;
    this.setting = h("select", { ariaLabel: "Setting", onchange: () => page.chosen({ setting: this.setting.value }) });
    this.metric = h("select", { ariaLabel: "Metric", onchange: () => page.chosen({ against: this.metric.value }) });
    this.plot = h("div.body");
    this.element = h("section.card.against", { hidden: true }, h("header", null, h("h2", null, "A metric against a setting"), this.metric, h("span.note", null, "against"), this.setting), this.plot);
  }

  /** metrics: [[name, title]]; `setting` and `asked` ("best NAME", "newest NAME"): what the address says, if anything. */
  show(runs, { settings, metrics, setting, asked, value, formatFor }) {
    const choices = metrics.flatMap(([name, title]) => [[`best ${name}`, `Best: ${title}`], [`newest ${name}`, `Newest: ${title}`]]);
    this.element.hidden = !settings.length || !choices.length;
    if (this.element.hidden) return;
    const key = settings.includes(setting) ? setting : (settings.find((each) => each !== "run.seed") ?? settings[0]);
    const chosen = choices.some(([each]) => each === asked) ? asked : choices[0][0];
    options(this.setting, settings.map((each) => [each, each]), key);
    options(this.metric, choices, chosen);
    const [which, name] = [chosen.slice(0, chosen.indexOf(" ")), chosen.slice(chosen.indexOf(" ") + 1)];
    const points = runs.map((item) => ({ label: item.id, color: `var(--series-${item.style.color})`, x: item.config?.[key], y: value(item, which, name) }));
    scatter(this.plot, points, { setting: key, metric: choices.find(([each]) => each === chosen)[1], format: formatFor(name), open: this.page.isolate });
  }
}

function options(select, pairs, value) {
  const key = JSON.stringify(pairs);
  if (select.dataset.of !== key) put(select, pairs.map(([name, text]) => h("option", { value: name }, text)));
  select.dataset.of = key;
  select.value = value;
}
