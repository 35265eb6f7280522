// The ledger of prompt groups as a flow: pending, leased, ready, consumed, and what was dropped or had to go back.

import { count, h, put, s, setText } from "../dom.js";

const STATES = [
  ["pending", "waits for an actor"],
  ["leased", "an actor draws it"],
  ["ready", "drawn, waits for the learner"],
  ["consumed", "learnt from"],
];
const RECOVERIES = {
  expired: "leases timed out",
  failed: "leases failed",
  lost: "drawn groups lost",
  refused: "late deliveries refused",
  relet: "leased again",
  second: "second leases",
  too_stale: "drawn again, too stale",
};
const [BOX, GAP, TALL, TOP] = [148, 44, 62, 18];

/** {element, update(ledger)} for the answer of /ledger. */
export function ledgerView() {
  const width = 4 * BOX + 3 * GAP;
  const boxes = STATES.map(([name, text], index) => {
    const x = index * (BOX + GAP);
    const number = s("text.number", { x: x + 14, y: TOP + 44 }, "–");
    const fill = s("rect.fill", { x, y: TOP + TALL - 3, width: 0, height: 3 });
    const box = s("g.box", { "data-state": name }, s("rect", { x, y: TOP, width: BOX, height: TALL, rx: 7 }), fill, s("text.name", { x: x + 14, y: TOP + 21 }, name), number, s("title", null, text));
    return { name, box, number, fill };
  });
  const arrows = [0, 1, 2].map((index) => {
    const from = index * (BOX + GAP) + BOX + 6;
    const to = from + GAP - 12;
    const y = TOP + TALL / 2;
    return s("path.arrow", { d: `M${from} ${y}H${to}m-6 -5l6 5l-6 5` });
  });
  const back = s("path.arrow.back", { d: `M${BOX + GAP + BOX / 2} ${TOP - 2}v-8q0 -6 -6 -6H${BOX / 2 + 6}q-6 0 -6 6v8m-5 -6l5 6l5 -6` });
  const dropY = TOP + TALL + 44;
  const drop = s("path.arrow.drop", { d: `M${BOX / 2} ${TOP + TALL + 4}V${dropY - 14}q0 6 6 6H${2 * (BOX + GAP) + BOX / 2 - 6}q6 0 6 -6V${TOP + TALL + 4}M${BOX + GAP + BOX / 2} ${TOP + TALL + 4}V${dropY + 6}m-5 -6l5 6l5 -6` });
  const dropped = s("text.number", { x: BOX + GAP + BOX / 2 - 46, y: dropY + 44 }, "–");
  const dropBox = s("g.box", { "data-state": "dropped" }, s("rect", { x: BOX + GAP + BOX / 2 - 60, y: dropY + 10, width: 120, height: 44, rx: 7 }), s("text.name", { x: BOX + GAP + BOX / 2 - 12, y: dropY + 37 }, "dropped"), dropped);
  const svg = s("svg.ledger", { viewBox: `-2 -2 ${width + 4} ${dropY + 60}`, role: "img" }, arrows, back, drop, boxes.map(({ box }) => box), dropBox);
  const reasons = h("ul.reasons");
  const equation = h("p.note");
  const element = h("section.card.ledger-card", null, h("header", null, h("h2", null, "Prompt groups"), h("span.note.when")), h("div.body", null, h("div.ledger-scroll", null, svg), reasons, equation));

  function update(ledger) {
    const largest = Math.max(1, ...STATES.map(([name]) => ledger[name]));
    for (const { name, box, number, fill } of boxes) {
      setText(number, count(ledger[name]));
      fill.setAttribute("width", String(Math.max(ledger[name] ? 6 : 0, (BOX * ledger[name]) / largest)));
      box.classList.toggle("some", ledger[name] > 0);
    }
    setText(dropped, count(ledger.dropped));
    dropBox.classList.toggle("some", ledger.dropped > 0);
    const why = Object.entries(ledger.dropped_by_reason).map(([reason, n]) => [n, `dropped: ${reason.replaceAll("_", " ")}`]);
    const again = Object.entries(ledger.recoveries).filter(([, n]) => n > 0).map(([name, n]) => [n, RECOVERIES[name] ?? name.replaceAll("_", " ")]);
    back.classList.toggle("some", again.length > 0);
    put(reasons, [...why, ...again].map(([n, text]) => h("li", null, h("b", null, count(n)), ` ${text}`)));
    const sum = ["pending", "leased", "ready", "consumed", "dropped"].map((name) => count(ledger[name])).join(" + ");
    setText(equation, `${count(ledger.issued)} issued ${ledger.balanced ? "=" : "≠"} ${sum}`);
    equation.dataset.balanced = String(ledger.balanced);
    setText(element.querySelector(".when"), ledger.iteration === null ? "before the first iteration" : `after iteration ${count(ledger.iteration)}`);
    svg.setAttribute("aria-label", `Prompt groups: ${STATES.map(([name]) => `${ledger[name]} ${name}`).join(", ")}, ${ledger.dropped} dropped`);
  }
  return { element, update };
}
