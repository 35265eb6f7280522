// Building elements and writing figures. Text only ever becomes text: no markup is parsed anywhere.

/** h("p.note", {title: "x", onclick: f}, "text", child): an element with classes, properties or attributes, children. */
export function h(kind, properties, ...children) {
  const [tag, ...classes] = kind.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  return fill(element, properties, children);
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for SVG elements. */
export function s(kind, properties, ...children) {
  const [tag, ...classes] = kind.split(".");
  const element = document.createElementNS(SVG, tag);
  if (classes.length) element.setAttribute("class", classes.join(" "));
  return fill(element, properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, item] of Object.entries(value)) element.style.setProperty(key, item);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name in element && !(element instanceof SVGElement) && name !== "list") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Replace what `host` holds. */
export function put(host, ...children) {
  host.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return host;
}

/** Write text only where it changed, so that a live page doesn't repaint or lose a selection. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Numbers in the API: a non-finite one comes as text ("NaN", "inf", "-inf"). */
export function number(value) {
  if (value === null || value === undefined) return null;
  if (typeof value === "number") return value;
  return { inf: Infinity, "+inf": Infinity, Infinity: Infinity, "-inf": -Infinity, "-Infinity": -Infinity }[value] ?? NaN;
}

/** A figure with `digits` significant digits, "–" for none. */
export function figure(raw, digits = 4) {
  const value = number(raw);
  if (value === null) return "–";
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2).replace("e+", "e").replace("-", "−");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  const text = value.toPrecision(digits);
  return (text.includes(".") ? text.replace(/\.?0+$/, "") : text).replace("-", "−");
}

/** A count with thin grouping. */
export const count = (raw) => (raw === null || raw === undefined ? "–" : Number(raw).toLocaleString("en-US"));

export const percent = (raw) => {
  const value = number(raw);
  return value === null || !Number.isFinite(value) ? figure(raw) : `${(100 * value).toFixed(1)}%`;
};

/** "42 s", "3 min", "5 h 12 min", "3 d 4 h". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const total = Math.max(0, Math.round(seconds));
  if (total < 60) return `${total} s`;
  const minutes = Math.floor(total / 60);
  if (minutes < 60) return minutes < 10 && total % 60 ? `${minutes} min ${total % 60} s` : `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return hours % 24 ? `${Math.floor(hours / 24)} d ${hours % 24} h` : `${Math.floor(hours / 24)} d`;
}

/** How long ago a Unix time was. */
export function ago(time) {
  if (!time) return "–";
  const seconds = Date.now() / 1000 - time;
  return seconds < 5 ? "now" : `${duration(seconds).replace(/ (\d+ (s|min|h))$/, "")} ago`;
}

/** Local date and time of a Unix time. */
export function clock(time, { date = false } = {}) {
  if (!time) return "–";
  const at = new Date(time * 1000);
  const hours = at.toLocaleTimeString("en-GB");
  return date ? `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${hours}` : hours;
}

export function bytes(value) {
  if (value === null || value === undefined || !Number.isFinite(Number(value))) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = Number(value);
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) [size, unit] = [size / 1024, unit + 1];
  return `${size >= 100 || unit === 0 ? size.toFixed(0) : size.toFixed(1)} ${units[unit]}`;
}

const two = (value) => String(value).padStart(2, "0");

/** What a page shows instead of content. */
export const loading = (what) => h("div.state", { role: "status" }, h("span.spinner", { ariaHidden: "true" }), `Loading ${what}…`);

export const empty = (title, detail) => h("div.state.empty", null, h("strong", null, title), detail && h("p", null, detail));

export function failure(error, retry) {
  return h(
    "div.state.failed",
    { role: "alert" },
    h("strong", null, error.title || "Something went wrong"),
    h("p", null, error.detail || error.message || String(error)),
    retry && h("button.button", { type: "button", onclick: retry }, "Try again"),
  );
}

export function pill(status) {
  return h("span.pill", { dataset: { status } }, status);
}
