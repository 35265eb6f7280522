// What a page shows is in its address, so that reload, back and a copied link show the same.

/**
 * Put these into the query of the open route, in place of what it had by those names: text, numbers, true, or lists.
 * What is empty, null or false is left out. Nothing is loaded anew.
 */
export function keepInAddress(values) {
  const [path, search = ""] = location.hash.slice(1).split("?");
  const query = new URLSearchParams(search);
  for (const [name, value] of Object.entries(values)) {
    query.delete(name);
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item !== null && item !== undefined && item !== "" && item !== false) query.append(name, item === true ? "1" : item);
    }
  }
  const text = query.toString();
  history.replaceState(history.state, "", `#${path}${text ? `?${text}` : ""}`);
}

/** The item of `allowed` that the query names, else `fallback`: anybody may have written an address. */
export function oneOf(query, name, allowed, fallback) {
  const found = query.get(name);
  return allowed.includes(found) ? found : fallback;
}
