// The API for people: every route with its parameters, from the description that programs read too.

import { url } from "../api.js";
import { h, put } from "../dom.js";

const ORDER = ["runs", "metrics", "samples", "workers", "comparisons", "live", "control", "service"];

export async function render(root, params, app) {
  app.title([["Runs", "#/runs"], ["API", null]]);
  const place = new URL("../../openapi.json", url(""));
  const answer = await fetch(place, { credentials: "omit" });
  if (!answer.ok) throw new Error(`The description answers ${answer.status}.`);
  const document = await answer.json();
  if (!app.alive()) return;
  const groups = new Map(ORDER.map((tag) => [tag, []]));
  for (const [path, methods] of Object.entries(document.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags?.[0] ?? "service";
      groups.set(tag, [...(groups.get(tag) ?? []), { path, method, operation }]);
    }
  }
  const client = `import requests, io, pandas
api = "${url("").href.replace(/\/$/, "")}"
runs = requests.get(f"{api}/runs", params={"sort": "-held_out_best"}).json()["items"]
table = requests.get(f"{api}/runs/{runs[0]['id']}/metrics", params={"name": ["reward/mean", "loss"], "format": "csv"})
print(pandas.read_csv(io.StringIO(table.text)).pivot(index="iteration", columns="metric", values="value"))`;
  put(
    root,
    h("div.head", null, h("div", null, h("h1", null, "API"), h("p.note", null, "What the pages show, for programs. Reading needs no token.")), h("a.button", { href: place.href }, "openapi.json")),
    h("section.card", null, h("header", null, h("h2", null, "In Python")), h("div.body", null, h("pre.command", null, client), h("p.note", null, "Lists and metrics come as CSV with format=csv or Accept: text/csv. Numbers that are none are the strings NaN, Infinity and -Infinity. Unknown parameters and values are refused with 422; every error says what to do (RFC 9457)."))),
    [...groups].filter(([, routes]) => routes.length).map(([tag, routes]) => h("section.card", null, h("header", null, h("h2", null, tag[0].toUpperCase() + tag.slice(1))), h("div.body.routes", null, routes.map(route)))),
  );
}

function route({ path, method, operation }) {
  const parameters = (operation.parameters ?? []).filter((each) => each.in === "query");
  const needsToken = Boolean(operation.security?.length);
  return h(
    "details",
    { dataset: { operation: operation.operationId } },
    h("summary", null, h("b.mono", null, method.toUpperCase()), " ", h("span.mono", null, path), h("span.note", null, operation.summary), needsToken && h("span.tag", null, "token")),
    h("p.note", null, operation.description),
    parameters.length > 0 && h("dl.settings", null, parameters.map((each) => h("div", null, h("dt.mono", null, each.name), h("dd", null, each.description ?? "", h("span.note", null, kindOf(each)))))),
    method === "get" && !needsToken && !path.includes("{") && !path.endsWith("/stream") && h("p", null, h("a", { href: new URL(`../..${path}`, url("")).href }, "Try it")),
  );
}

/** The type of a parameter in few words. */
function kindOf({ schema, required }) {
  const options = schema.anyOf?.filter((each) => each.type !== "null") ?? [schema];
  const one = options[0]?.items ?? options[0] ?? {};
  const values = one.enum ? one.enum.slice(0, 12).join(", ") + (one.enum.length > 12 ? ", …" : "") : (one.type ?? "");
  const first = schema.default !== undefined && schema.default !== null && !Array.isArray(schema.default) ? `, default ${schema.default}` : "";
  return ` (${values}${first}${required ? ", required" : ""})`;
}
