// Requests to this service, and its event stream. Everything goes to the origin that the page came from.

const BASE = new URL("../api/v1/", import.meta.url);
const TOKEN_KEY = "unmask-token";

/** A problem document (RFC 9457), or the network's failure with status 0. */
export class ApiError extends Error {
  constructor(status, title, detail, retryAfter = 0) {
    super(detail || title);
    this.retryAfter = retryAfter; // seconds
    this.status = status;
    this.title = title;
    this.detail = detail || title;
  }
}

/** The bearer token typed into this tab, or null. Kept for the tab only. */
export const token = {
  get: () => sessionStorage.getItem(TOKEN_KEY),
  set: (value) => {
    if (value) sessionStorage.setItem(TOKEN_KEY, value);
    else sessionStorage.removeItem(TOKEN_KEY);
    window.dispatchEvent(new Event("unmask-token"));
  },
};

/** The address of `path` (segments are escaped by the caller, see `at`); arrays repeat their key, null is left out. */
export function url(path, query = {}) {
  const target = new URL(path.replace(/^\/+/, ""), BASE);
  for (const [key, value] of Object.entries(query)) {
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item !== null && item !== undefined && item !== "") target.searchParams.append(key, item);
    }
  }
  return target;
}

/** Template tag that escapes each segment: at`runs/${id}/metrics`. */
export function at(strings, ...segments) {
  return strings.reduce((path, text, index) => path + encodeURIComponent(segments[index - 1]) + text);
}

export function get(path, query, { signal } = {}) {
  return request(url(path, query), { signal });
}

/** Reads with the token what can't be read without. */
export function getWithToken(path) {
  return request(url(path), { headers: authorization() });
}

/** Writes, with the token. */
export const post = (path, body) => write("POST", path, body);

/** Changes a part, with the token. */
export const patch = (path, body) => write("PATCH", path, body);

function write(method, path, body) {
  const headers = { "Content-Type": "application/json", ...authorization() };
  return request(url(path), { method, headers, body: JSON.stringify(body ?? {}) });
}

/** Ends with an ApiError of status 401 unless this is the token. */
export function checkToken(value) {
  return request(url("token"), { headers: { Authorization: `Bearer ${value}` } });
}

const authorization = () => (token.get() ? { Authorization: `Bearer ${token.get()}` } : {});

async function request(target, options) {
  let response;
  try {
    response = await fetch(target, { credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "Service unreachable", "The dashboard service does not answer. It may have been stopped.");
  }
  if (response.ok) return response.status === 204 ? null : response.json();
  let problem = {};
  try {
    problem = await response.json();
  } catch {
    // not a problem document: the status has to do
  }
  throw new ApiError(response.status, problem.title || `HTTP ${response.status}`, problem.detail, Number(response.headers.get("Retry-After")) || 0);
}

const SILENCE_MS = 40_000; // the service sends a heartbeat well within this time
const LONGEST_PAUSE_MS = 15_000;

/**
 * Follow a run's events (all runs' when runId is null) until the returned function is called.
 *
 * handlers: {metrics, event, run, worker, ...} get the data of the named event; `state` gets "live", "reconnecting" or
 * "gone" with the error; `since` is the marker of an answer after which to begin. A lost connection is taken up again from the last id, so nothing is missed or seen twice.
 */
export function stream(runId, handlers) {
  const stop = new AbortController();
  let lastId = null;
  let since = handlers.since ?? null;
  let attempt = 0;

  const follow = async () => {
    while (!stop.signal.aborted) {
      const connection = new AbortController();
      const abort = () => connection.abort();
      stop.signal.addEventListener("abort", abort);
      try {
        const headers = { Accept: "text/event-stream" };
        if (lastId !== null) headers["Last-Event-ID"] = lastId;
        const target = url("stream", { run: runId, since: lastId === null ? since : null });
        const response = await fetch(target, { headers, credentials: "omit", cache: "no-store", signal: connection.signal });
        if (response.status === 422 && (lastId || since)) {
          [lastId, since] = [null, null]; // the store is another one: begin anew
          handlers.reset?.({});
        }
        if (!response.ok) throw new ApiError(response.status, `HTTP ${response.status}`);
        attempt = 0;
        handlers.state?.("live");
        await readEvents(response.body.getReader(), connection, (name, data, id) => {
          if (id !== null) lastId = id;
          if (name) deliver(name, data);
        });
      } catch (error) {
        if (stop.signal.aborted) return;
        handlers.state?.(error.status === 404 ? "gone" : "reconnecting", error);
      } finally {
        stop.signal.removeEventListener("abort", abort);
      }
      if (!stop.signal.aborted) handlers.state?.("reconnecting");
      attempt += 1;
      await pause(Math.min(LONGEST_PAUSE_MS, 500 * 2 ** Math.min(attempt, 6)) * (0.7 + 0.6 * Math.random()), stop.signal);
    }
  };

  const deliver = (name, data) => {
    const handler = handlers[name];
    if (!handler) return;
    let value;
    try {
      value = JSON.parse(data);
    } catch {
      return; // a heartbeat's text
    }
    handler(value);
  };

  follow();
  return () => stop.abort();
}

async function readEvents(reader, connection, emit) {
  const decoder = new TextDecoder();
  let buffer = "";
  for (;;) {
    const timer = setTimeout(() => connection.abort(), SILENCE_MS);
    let chunk;
    try {
      chunk = await reader.read();
    } finally {
      clearTimeout(timer);
    }
    if (chunk.done) return;
    buffer = (buffer + decoder.decode(chunk.value, { stream: true })).replace(/\r\n/g, "\n");
    let end;
    while ((end = buffer.indexOf("\n\n")) >= 0) {
      const fields = { event: null, data: [], id: null };
      for (const line of buffer.slice(0, end).split("\n")) {
        const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line);
        if (name === "data") fields.data.push(value);
        else if (name === "event" || name === "id") fields[name] = value;
      }
      buffer = buffer.slice(end + 2);
      emit(fields.data.length ? fields.event || "message" : null, fields.data.join("\n"), fields.id);
    }
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
