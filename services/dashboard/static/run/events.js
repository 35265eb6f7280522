// Events of a run: the short list of the overview, and the tab with filters.

import { at, get } from "../api.js";
import { clock, empty, failure, h, loading, put } from "../dom.js";
import { cursorKeys } from "../rows.js";
import { Backlog } from "../series.js";

const LEVELS = [["", "All"], ["info", "Info"], ["warning", "Warnings"], ["error", "Errors"]];

/** One event as a list item. */
export function eventRow(event) {
  const data = Object.keys(event.data ?? {}).length > 0;
  return h(
    "li.event",
    { dataset: { level: event.level, id: String(event.id) } },
    h("time.note", { title: clock(event.time, { date: true }) }, clock(event.time)),
    h("span.level", null, event.level),
    h("div.what", null, h("span.kind", null, event.kind), h("span.text", null, event.text), data && h("details", null, h("summary", null, "data"), h("pre", null, JSON.stringify(event.data, null, 2)))),
  );
}

/** The newest few: {element, load(), add(event)}. */
export function eventCard(runId, limit = 8) {
  const list = h("ol.events");
  const none = h("p.note", null, "Nothing happened yet");
  const href = `#/run/${encodeURIComponent(runId)}/events`;
  const element = h("section.card", null, h("header", null, h("h2", null, "Events"), h("a.note", { href }, "All events")), h("div.body", null, none, list));
  const backlog = new Backlog();
  const fetching = () => get(at`runs/${runId}/events`, { limit });
  const show = () => (none.hidden = list.children.length > 0);

  function insert(event) {
    if (list.querySelector(`[data-id="${Number(event.id)}"]`)) return;
    list.prepend(eventRow(event));
    while (list.children.length > limit) list.lastChild.remove();
    show();
  }

  return {
    element,
    load: () =>
      backlog.during(fetching, ({ items }, late) => {
        put(list, items.map(eventRow));
        show();
        late.forEach(insert);
      }),
    add: (event) => (backlog.push(event), insert(event)),
  };
}

/** The tab: filters, the list, older ones on demand. Returns {event(event)} for live ones. */
export async function eventsTab(host, runId, app, query) {
  const asked = query.get("level");
  const state = { level: LEVELS.some(([level]) => level === asked) ? asked : "", kind: query.get("kind") ?? "", next: null };
  const list = h("ol.events");
  const note = h("div");
  const more = h("button.button", { type: "button", hidden: true, onclick: () => load(true) }, "Older events");
  const kind = h("input", { type: "search", placeholder: "Kind, e.g. checkpoint", ariaLabel: "Only this kind", value: state.kind, onchange: () => ((state.kind = kind.value.trim()), load()) });
  const levels = h("div.segments", { role: "group", ariaLabel: "Level" });
  put(host, h("div.row.filters", null, levels, kind), h("section.card", null, h("div.body", null, note, list)), more);
  app.search(kind);
  const cursor = cursorKeys(app, list, { open: (row) => row.querySelector("summary")?.click() });
  const backlog = new Backlog();

  function insert(event) {
    if ((state.level && event.level !== state.level) || (state.kind && event.kind !== state.kind)) return;
    if (list.querySelector(`[data-id="${Number(event.id)}"]`)) return;
    list.prepend(eventRow(event));
    put(note);
  }

  async function load(older = false) {
    put(levels, LEVELS.map(([level, text]) => h("button", { type: "button", ariaPressed: String(state.level === level), onclick: () => ((state.level = level), load()) }, text)));
    if (!older && !list.children.length) put(note, loading("events"));
    try {
      const query = { level: state.level, kind: state.kind, limit: 100, cursor: older ? state.next : null };
      await backlog.during(() => get(at`runs/${runId}/events`, query), (answer, late) => {
        if (!older) list.replaceChildren();
        list.append(...answer.items.map(eventRow));
        state.next = answer.next_cursor;
        more.hidden = state.next === null;
        put(note, !list.children.length && empty("No events", state.level || state.kind ? "None of this level and kind." : "Nothing happened yet."));
        late.forEach(insert);
        cursor.refresh();
      });
    } catch (error) {
      list.replaceChildren();
      put(note, failure(error, () => load()));
    }
  }

  await load();
  return {
    event: (event) => (backlog.push(event), insert(event)),
  };
}
