// One run: its header and, below, the open tab (overview, samples, events, config).

import { at, get } from "../api.js";
import { failure, loading, put, h } from "../dom.js";
import { configTab } from "../run/config.js";
import { eventsTab } from "../run/events.js";
import { runHeader } from "../run/header.js";
import { overviewTab } from "../run/overview.js";
import { samplesTab } from "../run/samples.js";

const TABS = { samples: samplesTab, events: eventsTab, config: configTab };

export async function render(root, params, app) {
  const { id, tab = "" } = params;
  const crumbs = [["Runs", "#/runs"], [id, `#/run/${encodeURIComponent(id)}`]];
  app.title(tab ? [...crumbs, [tab[0].toUpperCase() + tab.slice(1), null]] : crumbs);
  const run = await findRun(root, id, app);
  if (!run) return;
  const header = runHeader(run, tab, app);
  const host = h("div.tab", null, loading(tab || "metrics"));
  put(root, header.element, host);

  // What is told before the tab can take it waits: the answers that the tab is made of may be older.
  let view = null;
  let waiting = [];
  const tell = (part) => (data) => (view ? view[part]?.(data) : waiting.push([part, data]));
  const open = async () => {
    [view, waiting] = [null, []];
    let opened = {};
    try {
      opened = (await (TABS[tab] ?? overviewTab)(host, id, app, params.query)) ?? {};
    } catch (error) {
      if (!app.alive()) return;
      put(host, failure(error, open));
      if (error.status === 0 || error.status === 503) setTimeout(() => app.alive() && open(), 4000);
    }
    view = opened;
    for (const [part, data] of waiting.splice(0)) view[part]?.(data);
  };
  follow(id, app, header, run, { metrics: tell("metrics"), event: tell("event"), sample: tell("sample"), reload: tell("reload") });
  await open();
}

const LOOK_MS = 2000;

/** The run, as soon as there is one: one that has just been started takes some seconds to appear. Null when the page is
 * left before. */
export async function findRun(root, id, app) {
  while (app.alive()) {
    try {
      const run = await get(at`runs/${id}`);
      if (!app.alive()) return null;
      return run;
    } catch (error) {
      if (error.status !== 404) throw error;
      put(root, h(
        "div.state.empty",
        null,
        h("strong", null, "There is no run of this name yet"),
        h("p", null, `${id} is not among the runs here. One that has just been started appears by itself within seconds; this page looks for it.`),
        h("a.button", { href: "#/runs" }, "All runs"),
      ));
      await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
    }
  }
  return null;
}

/** Keep the header of a run, and what is below it, up to date. `parts`: {metrics, event, worker, reload}. */
export function follow(id, app, header, run, parts) {
  let pending = null;
  let lostAt = null;
  const refresh = (wait = 1000) => {
    pending ??= setTimeout(async () => {
      pending = null;
      try {
        const next = await get(at`runs/${id}`);
        if (!app.alive()) return;
        header.problem(null);
        header.update(next);
      } catch (error) {
        if (!app.alive()) return;
        header.problem(error);
        refresh(4000);
      }
    }, wait);
  };
  app.onLeave(() => clearTimeout(pending));
  app.stream(id, {
    since: run.marker,
    metrics: (data) => (parts.metrics?.(data), refresh()),
    event: (data) => parts.event?.(data),
    worker: (data) => parts.worker?.(data),
    checkpoint: () => refresh(),
    sample: (data) => parts.sample?.(data),
    truncated: () => (parts.reload?.(), refresh(0)), // resumed from an earlier iteration
    reset: () => (parts.reload?.(), refresh(0)),
    run: () => refresh(),
    gone: () => header.problem({ status: 404 }),
    unreadable: (data) => (header.problem({ detail: `The run's store can't be read now: ${data.reason}. It is tried again all the time.` }), refresh(4000)),
    readable: () => refresh(0),
    state: (state, error) => {
      if (state === "live") {
        const away = lostAt === null ? 0 : Date.now() - lostAt;
        lostAt = null;
        refresh(0);
        if (away > 10_000) parts.reload?.();
      } else {
        lostAt ??= Date.now();
        if (state === "gone") header.problem({ status: 404 });
        else if (error?.status === 0 || error instanceof TypeError) header.problem({ status: 0 });
      }
    },
  });
}
