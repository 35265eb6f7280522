// The runs of a comparison that still train: the first few by their event streams, the others asked now and then.

import { at, get } from "../api.js";
import { append } from "../series.js";

const FOLLOWED = 4; // event streams at a time: a browser has six connections
const POLL_MS = 20_000;
const GATHERED_MS = 500;

/** A run takes values of an iteration. */
export function take(item, { iteration, values }) {
  for (const [name, value] of Object.entries(values ?? {})) {
    item.run.latest[name] = { iteration, value };
    if (item.data.has(name)) append(item.data.get(name), iteration, value);
  }
}

/** `runs` may grow and shrink. page: {fetchInto(item, names), changed()}. Returns {follow(item), has(id)}. */
export function following(app, runs, page) {
  const followed = new Set();
  let timer = null;

  function follow(item) {
    if (item.run.status !== "running" || followed.size >= FOLLOWED) return;
    followed.add(item.id);
    app.stream(item.id, {
      since: item.run.marker,
      metrics: (update) => {
        item.backlog.push(update);
        take(item, update);
        timer ??= setTimeout(() => ((timer = null), page.changed()), GATHERED_MS);
      },
      run: (run) => (item.run = { ...run, latest: item.run.latest }),
    });
  }

  const poll = setInterval(async () => {
    const others = runs.filter((item) => item.run.status === "running" && !followed.has(item.id));
    for (const item of others) {
      try {
        item.run = await get(at`runs/${item.id}`);
        await page.fetchInto(item, [...item.data.keys()]);
      } catch {
        // asked again the next time
      }
    }
    if (others.length && app.alive()) page.changed();
  }, POLL_MS);
  app.onLeave(() => [clearInterval(poll), clearTimeout(timer)]);
  return { follow, has: (id) => followed.has(id) };
}
