// Events of a run: the short list of the overview, and the tab with filters.

import { keepInAddress, oneOf } from "../address.js";
import { at, get } from "../api.js";
import { clock, count, empty, failure, h, loading, put } from "../dom.js";
import { cursorKeys } from "../rows.js";
import { Backlog } from "../series.js";

const LEVELS = [["", "All"], ["info", "Info"], ["warning", "Warnings"], ["error", "Errors"]];

/** One event as a list item. */
export function eventRow(event) {
  const data = Object.keys(event.data ?? {}).length > 0;
  return h(
    "li.event",
    { dataset: { level: event.level, kind: event.kind, id: String(event.id) } },
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
  const state = { level: oneOf(query, "level", LEVELS.map(([level]) => level), ""), kind: query.get("kind") ?? "", next: null };
  const kinds = new Map(); // kind -> how many events
  const list = h("ol.events");
  const note = h("div");
  const more = h("button.button", { type: "button", hidden: true, onclick: () => load(true) }, "Older events");
  const levels = h("div.segments", { role: "group", ariaLabel: "Level" });
  const chips = h("div.row.chips", { role: "group", ariaLabel: "Kind" });
  put(host, h("div.row.filters", null, levels, chips), h("section.card", null, h("div.body", null, note, list)), more);
  const cursor = cursorKeys(app, list, { open: (row) => row.querySelector("summary")?.click() });
  const backlog = new Backlog();

  function insert(event) {
    if ((state.level && event.level !== state.level) || (state.kind && event.kind !== state.kind)) return;
    if (list.querySelector(`[data-id="${Number(event.id)}"]`)) return;
    list.prepend(eventRow(event));
    put(note);
  }

  function choose(change) {
    Object.assign(state, change);
    keepInAddress({ level: state.level, kind: state.kind });
    load();
  }

  function showFilters() {
    put(levels, LEVELS.map(([level, text]) => h("button", { type: "button", ariaPressed: String(state.level === level), onclick: () => choose({ level }) }, text)));
    const all = [...new Set([...kinds.keys(), ...(state.kind ? [state.kind] : [])])].sort();
    put(chips, all.map((kind) => {
      const pressed = state.kind === kind;
      return h("button.button.chip", { type: "button", ariaPressed: String(pressed), dataset: { kind }, onclick: () => choose({ kind: pressed ? "" : kind }) }, kind, h("span.n", null, count(kinds.get(kind) ?? 0)));
    }));
  }

  async function load(older = false) {
    showFilters();
    if (!older && !list.children.length) put(note, loading("events"));
    try {
      const wanted = { level: state.level, kind: state.kind, limit: 100, cursor: older ? state.next : null };
      const fetching = () => Promise.all([get(at`runs/${runId}/events`, wanted), get(at`runs/${runId}/event-kinds`)]);
      await backlog.during(fetching, ([answer, there], late) => {
        if (!older) list.replaceChildren();
        list.append(...answer.items.map(eventRow));
        state.next = answer.next_cursor;
        more.hidden = state.next === null;
        put(note, !list.children.length && empty("No events", state.level || state.kind ? "None of this level and kind." : "Nothing happened yet."));
        kinds.clear();
        for (const { kind, count: n } of there.items) kinds.set(kind, n);
        showFilters();
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
    event: (event) => {
      backlog.push(event);
      insert(event);
      kinds.set(event.kind, (kinds.get(event.kind) ?? 0) + 1);
      showFilters();
    },
  };
}
