// How curves look: each run its own way, or one look for each value of a setting. Eight colours in four dashes stay apart;
// of more runs than that a setting tells more than looks which several runs share.

import { DASHES } from "../charts.js";
import { h, put } from "../dom.js";
import { settingText, valueText } from "../names.js";
import { groupsOf } from "./bands.js";

export const LOOKS = 32;
const EACH = "run"; // no setting is called so: all have a dot

export const styleOf = (index) => ({ color: (index % 8) + 1, dash: DASHES[Math.floor(index / 8) % DASHES.length] });

export class Colours {
  /** page: {chosen({colour})}. `element` is the choice, `key` says what the looks mean. */
  constructor(page) {
    this.select = h("select", { ariaLabel: "Colour by", onchange: () => page.chosen({ colour: this.select.value }) });
    this.element = h("label.row", { hidden: true }, h("span.note", null, "Colour by"), this.select);
    this.key = h("div.colour-key");
  }

  /** Give each run its look. `asked`: what the address says, if anything; `differing`: keys of settings. */
  show(runs, { differing, asked, bands }) {
    const offered = differing.filter((key) => key !== "run.seed" && valuesOf(runs, key).length <= LOOKS);
    const usual = runs.length > LOOKS && offered.length ? offered[0] : EACH;
    const by = asked === EACH || offered.includes(asked) ? asked : usual;
    put(this.select, [EACH, ...offered].map((key) => h("option", { value: key }, key)));
    this.select.value = by;
    this.element.hidden = !offered.length;
    if (by === EACH) this.each(bands ? groupsOf(runs) : runs.map((item) => ({ runs: [item] })));
    else this.bySetting(runs, by);
  }

  each(groups) {
    groups.forEach(({ runs }, index) => runs.forEach((item) => (item.style = styleOf(index))));
    const known = groups.some(({ runs }) => runs.some(({ config }) => config)); // else a setting may be chosen yet
    put(this.key, known && groups.length > LOOKS && h("p.note", null, `${groups.length} curves share ${LOOKS} looks.`));
  }

  bySetting(runs, key) {
    const entries = valuesOf(runs, key).map((value, index) => {
      const style = styleOf(index);
      const having = runs.filter((item) => same(item.config?.[key], value));
      for (const item of having) item.style = style;
      return h("span.entry", null, h("i", { dataset: { dash: style.dash }, style: { "--swatch": `var(--series-${style.color})` } }), settingText(key, value), h("span.note", null, String(having.length)));
    });
    put(this.key, entries);
  }
}

const same = (one, two) => JSON.stringify(one) === JSON.stringify(two);

/** What some runs have of a setting, numbers by size. */
function valuesOf(runs, key) {
  const found = new Map(runs.map(({ config }) => [JSON.stringify(config?.[key]), config?.[key]]));
  return [...found.values()].sort((one, two) => (typeof one === "number" && typeof two === "number" ? one - two : valueText(one).localeCompare(valueText(two), "en", { numeric: true })));
}
