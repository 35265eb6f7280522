// The shell: routes, theme, keyboard, token, toasts, and the mark that says how fresh the page is.
//
// A page module exports `async function render(root, params, app)` and may return a function that cleans up.
// params: {id, sample, query} (decoded; query is a URLSearchParams). app:
//   api          {get, post, at, url, token} of api.js
//   stream(runId, handlers)  follow events; its state shows in the header; ends with the page
//   title(crumbs)            [[text, href], ...] for the header and the tab
//   state(text)              how the run stands, before the title in the browser's tab
//   keys(bindings)           {"key": [handler, "what it does"]} while this page is open
//   search(element)          the field that "/" goes to
//   toast(text, kind)        kind: "info" or "error"
//   dialog(title, build)     a modal; build(close) returns its content
//   onTheme(f), onLeave(f)   called when colours change; when the page ends
//   alive()                  false once another page has taken over

import * as api from "./api.js";
import { failure, h, loading, put } from "./dom.js";
import { closeDialog, dialog, showHelp, showToken } from "./dialogs.js";

const ROUTES = [
  [/^\/?(?:runs)?$/, [], () => import("./pages/runs.js")],
  [/^\/compare$/, [], () => import("./pages/compare.js")],
  [/^\/comparisons(?:\/([^/]+))?$/, ["name"], () => import("./pages/comparison.js")],
  [/^\/api$/, [], () => import("./pages/api.js")],
  [/^\/submissions$/, [], () => import("./pages/submissions.js")],
  [/^\/run\/([^/]+)\/actions$/, ["id"], () => import("./pages/actions.js")],
  [/^\/run\/([^/]+)\/evaluations$/, ["id"], () => import("./pages/evaluations.js")],
  [/^\/run\/([^/]+)\/workers$/, ["id"], () => import("./pages/workers.js")],
  [/^\/run\/([^/]+)\/play(?:\/([^/]+))?$/, ["id", "sample"], () => import("./pages/playback.js")],
  [/^\/run\/([^/]+)(?:\/(samples|events|config))?$/, ["id", "tab"], () => import("./pages/run.js")],
];

const GLOBAL_KEYS = {
  "/": [() => page.search?.focus(), "go to the search field"],
  t: [() => nextTheme(), "light, dark, or as the system says"],
  r: [() => (location.hash = "#/runs"), "all runs"],
  "?": [() => showHelp(page.keys, GLOBAL_KEYS), "this list"],
  Escape: [() => escape(), "close, leave a field, or go up"],
};

const element = (id) => document.getElementById(id);
const main = element("main");
let page = newPage();

function newPage() {
  return { cleanups: [], keys: {}, search: null, themed: [], open: true, up: "#/runs", failed: null };
}

const RETRY_MS = 4000;

async function route({ again = false } = {}) {
  if (!again) closeDialog();
  const mine = newPage();
  const left = page;
  left.open = false;
  for (const cleanup of left.cleanups.splice(0)) cleanup();
  page = mine;
  mark("off");
  const [path, search = ""] = location.hash.replace(/^#/, "").split("?");
  const params = { query: new URLSearchParams(search) };
  const found = ROUTES.find(([pattern]) => pattern.test(path));
  const app = appFor(mine);
  const root = h("div.page");
  put(main, root);
  if (!found) {
    app.title([["No such page", null]]);
    put(root, failure({ title: "No such page", message: `Nothing is at ${path}.` }, () => (location.hash = "#/runs")));
    return;
  }
  const [pattern, names, load] = found;
  put(root, again ? left.failed : loading("the page"));
  if (!again) scrollTo(0, 0);
  try {
    pattern.exec(path).slice(1).forEach((value, index) => (params[names[index]] = value && decodeURIComponent(value)));
    const module = await load();
    if (!mine.open) return;
    const cleanup = await module.render(root, params, app);
    if (typeof cleanup === "function") mine.open ? mine.cleanups.push(cleanup) : cleanup();
  } catch (error) {
    if (!mine.open || error.name === "AbortError") return;
    mine.failed = failure(error, () => route());
    put(root, mine.failed);
    if (error.status === 0 || error.status === 503) {
      const timer = setTimeout(() => route({ again: true }), RETRY_MS); // the service or the store may come back
      mine.cleanups.push(() => clearTimeout(timer));
    }
  }
}

function appFor(mine) {
  return {
    api,
    token: api.token,
    toast,
    dialog,
    alive: () => mine.open,
    keys: (bindings) => Object.assign(mine.keys, bindings),
    search: (field) => (mine.search = field),
    onTheme: (handler) => mine.themed.push(handler),
    onLeave: (cleanup) => mine.cleanups.push(cleanup),
    state: (text) => {
      if (mine.open) document.title = `${text} · ${mine.title}`;
    },
    stream: (runId, handlers) => {
      let since = Date.now() / 1000;
      const stop = api.stream(runId, {
        ...handlers,
        state: (state, error) => {
          if (!mine.open) return;
          if (state === "live") since = null;
          else since ??= Date.now() / 1000;
          mark(state, since);
          handlers.state?.(state, error);
        },
      });
      mine.cleanups.push(stop);
      return stop;
    },
    title: (crumbs) => {
      if (!mine.open) return;
      mine.up = crumbs.length > 1 ? crumbs.at(-2)[1] : "#/runs";
      mine.title = [...crumbs.slice(crumbs.length > 1 ? 1 : 0).map(([text]) => text), "Unmask"].join(" · ");
      document.title = mine.title;
      put(
        element("crumbs"),
        crumbs.map(([text, href], index) =>
          h(
            "span.crumb",
            null,
            h("span.sep", { ariaHidden: "true" }, "/"),
            index < crumbs.length - 1 && href ? h("a", { href }, text) : h("span.here", null, text),
          )),
      );
    },
  };
}

// How fresh the page is

let marked = { state: "off", since: null };

function mark(state, since = null) {
  marked = { state, since };
  showMark();
}

function showMark() {
  const live = element("live");
  const { state, since } = marked;
  const lost = since ? Date.now() / 1000 - since : 0;
  live.hidden = state === "off";
  live.dataset.state = state !== "live" && lost > 20 ? "stale" : state;
  const clock = since ? new Date(since * 1000).toLocaleTimeString("en-GB") : "";
  const text = { live: "connected", reconnecting: "reconnecting…", stale: `stale since ${clock}`, gone: "run is gone" };
  live.lastElementChild.textContent = text[live.dataset.state] ?? "";
  live.title = state === "live" ? "Updates arrive as they are written" : "The service does not answer; what you see may be old";
}

setInterval(showMark, 1000);

// Theme

const THEMES = { auto: "◐", light: "☀", dark: "☾" };

function nextTheme() {
  const names = Object.keys(THEMES);
  const now = document.documentElement.dataset.theme ?? "auto";
  setTheme(names[(names.indexOf(now) + 1) % names.length]);
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("unmask-theme", theme);
  } catch {
    // no storage: it holds until the page is loaded again
  }
  showTheme();
}

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  element("theme-button").textContent = THEMES[theme];
  element("theme-button").setAttribute("aria-label", `Theme: ${theme}`);
  for (const handler of page.themed) handler();
}

// Toasts and token

function toast(text, kind = "info") {
  const note = h("div.toast", { dataset: { kind } }, text);
  element("toasts").append(note);
  setTimeout(() => note.remove(), kind === "error" ? 10_000 : 5000);
}

function showTokenState() {
  const known = Boolean(api.token.get());
  const button = element("token-button");
  button.dataset.known = known;
  put(button, known ? "Control" : "Read-only");
  button.setAttribute("aria-label", known ? "Token is set: control is possible" : "Read-only: enter a token for control");
}

// Keyboard

function escape() {
  if (closeDialog()) return;
  const focused = document.activeElement;
  if (focused?.matches("input, textarea, select")) focused.blur();
  else if (page.up && location.hash !== page.up) location.hash = page.up;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const typing = event.target.closest?.("input:not([type=checkbox]):not([type=range]), textarea, select, [contenteditable]");
  if ((typing || document.querySelector("dialog[open]")) && event.key !== "Escape") return;
  const binding = page.keys[event.key] ?? GLOBAL_KEYS[event.key];
  if (!binding) return;
  if (["Enter", " "].includes(event.key) && event.target.closest?.("a, button, summary, input")) return;
  event.preventDefault();
  binding[0](event);
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the part behind "#" is the route
  main.focus();
});
element("theme-button").addEventListener("click", nextTheme);
element("help-button").addEventListener("click", () => showHelp(page.keys, GLOBAL_KEYS));
element("token-button").addEventListener("click", () => showToken(showTokenState));
window.addEventListener("unmask-token", showTokenState);
window.addEventListener("hashchange", () => route());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
showTheme();
showTokenState();
route();
