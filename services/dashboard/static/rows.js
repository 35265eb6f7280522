// Moving through the rows of a table with j and k, and opening one with Enter.

/**
 * Bind j/k/Enter to the rows of `body`. `open(row)` is what Enter does; `extra`: {key: [f(row), "what it does"]}.
 * Returns {refresh()}, to be called when rows came or went.
 */
export function cursorKeys(app, body, { open, extra = {} }) {
  let current = null;

  const rows = () => [...body.children].filter((row) => !row.hidden && !row.querySelector("th[scope=colgroup]"));
  const go = (step) => {
    const all = rows();
    if (!all.length) return;
    const at = all.indexOf(current);
    mark(all[at < 0 ? (step > 0 ? 0 : all.length - 1) : Math.min(all.length - 1, Math.max(0, at + step))]);
    current.scrollIntoView({ block: "nearest" });
  };
  const mark = (row) => {
    current?.classList.remove("at");
    current?.removeAttribute("aria-current");
    current = row;
    current?.classList.add("at");
    current?.setAttribute("aria-current", "true");
  };

  app.keys({
    j: [() => go(1), "next row"],
    k: [() => go(-1), "row before"],
    Enter: [() => current && open(current), "open the row"],
    ...Object.fromEntries(Object.entries(extra).map(([key, [action, text]]) => [key, [() => action(current), text]])),
  });
  return { refresh: () => current && !body.contains(current) && mark(null) };
}
