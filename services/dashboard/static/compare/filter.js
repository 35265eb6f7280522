// Which runs of a comparison are meant by words and settings, as in the list of runs (services/dashboard/search.py).

/** Whether every word is in the run's name, status, task, method, host, recipe, tags or note, or is a setting of it. */
export function matches({ run, config }, text) {
  const told = [run.id, run.status, run.task, run.method, run.host, run.recipe, run.note, ...run.tags].join("\n").toLowerCase();
  return text.toLowerCase().split(/\s+/).filter(Boolean).every((word) => told.includes(word) || isSetting(config ?? {}, word));
}

/** key=value, where the key may be the end of a longer one: of several the shortest count. */
function isSetting(config, word) {
  const [wanted, value] = [word.slice(0, word.indexOf("=")), word.slice(word.indexOf("=") + 1)];
  if (!wanted || !word.includes("=")) return false;
  const found = Object.keys(config).filter((key) => `.${key.toLowerCase()}`.endsWith(`.${wanted}`));
  const parts = (key) => key.split(".").length;
  const fewest = Math.min(...found.map(parts));
  return found.some((key) => parts(key) === fewest && same(config[key], value));
}

/** As people write it: 3e-3 is 0.003, and names need no quotes. */
function same(value, text) {
  if (typeof value === "number") return text !== "" && Number(text) === value;
  return [value, JSON.stringify(value)].some((each) => String(each).toLowerCase() === text);
}
