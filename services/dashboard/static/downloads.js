// CSV, JSON and PNG of what a page shows, made here.

import { h } from "./dom.js";

/** Have the browser save it. */
export function save(name, content, type) {
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  const link = h("a", { href: URL.createObjectURL(blob), download: name.replace(/[^\w.-]+/g, "_") });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export const saveJson = (name, value) => save(`${name}.json`, JSON.stringify(value, null, 1), "application/json");

/** rows: objects; the first line has all their names. */
export function saveCsv(name, rows) {
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  save(`${name}.csv`, [columns, ...rows.map((row) => columns.map((column) => row[column]))].map((row) => row.map(cell).join(",")).join("\r\n"), "text/csv");
}

const HEAD = 34;
const LINE = 18;

/**
 * A drawn chart of charts.js as a picture, with its title and its legend: entries are {label, color (CSS), dash}.
 * Plotly's own pictures go over blob: addresses, which the content policy refuses; SVG as data: is fine.
 */
export async function savePng(name, plot, { title, entries, ground, text }) {
  const { width, height } = plot.getBoundingClientRect();
  const inner = await window.Plotly.toImage(plot, { format: "svg", width, height });
  const scale = 2;
  const canvas = h("canvas", { width: scale * width, height: scale * (height + HEAD + LINE * entries.length + 6) });
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = ground;
  pen.fillRect(0, 0, width, canvas.height);
  pen.fillStyle = text;
  pen.font = "600 15px system-ui, sans-serif";
  pen.fillText(title, 12, 22);
  pen.drawImage(await picture(inner), 0, HEAD - 6, width, height);
  pen.font = "12px system-ui, sans-serif";
  entries.forEach(({ label, color, dash }, index) => {
    const y = HEAD + height + LINE * index + 6;
    pen.strokeStyle = color;
    pen.lineWidth = 2.5;
    pen.setLineDash({ dash: [7, 4], dot: [2, 3], dashdot: [8, 3, 2, 3] }[dash] ?? []);
    pen.beginPath();
    pen.moveTo(14, y - 4);
    pen.lineTo(44, y - 4);
    pen.stroke();
    pen.fillText(label, 52, y);
  });
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  save(`${name}.png`, blob);
}

function picture(source) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("The browser can't draw this chart as a picture."));
    image.src = source;
  });
}

/** The points of series as rows: {run, metric, [along]: x, value, low, high}. */
export function seriesRows(metric, series, along) {
  return series.flatMap(({ label, data }) => data.x.map((x, index) => ({ run: label, metric, [along]: x, value: data.y[index] ?? badAt(data, x), low: data.low[index], high: data.high[index] })));
}

const badAt = (data, x) => data.bad.find(([at]) => at === x)?.[1] ?? null;
