// Whether a noisy figure rises or falls. A page looks at it time and again, and each look may be wrong: so a trend needs
// a difference beyond Welch's t at 99 % (Welch 1947) in several looks on end, or far beyond it in one, and then holds
// until it is well below.

const WINDOW = 10; // values that are compared with as many others
const FEWEST = 5;
const LOOKS = 4;
const PLAIN = 1.5; // times the quantile: clear at the first look
const HOLD = 0.5; // of what it takes to show a trend keeps it

/** Quantiles of Student's t at 99.5 % for 1 to 30 degrees of freedom; beyond, the normal's and Fisher's first term. */
const T_995 = [63.657, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.25, 3.169, 3.106, 3.055, 3.012, 2.977, 2.947, 2.921, 2.898, 2.878, 2.861, 2.845, 2.831, 2.819, 2.807, 2.797, 2.787, 2.779, 2.771, 2.763, 2.756, 2.75];

/**
 * {mean, n, lately, start} of values in their order: the mean of the last n; by how much it lies above that of the n
 * before, and above that of the first n, each 0 without a clear trend. Null where there are too few to tell.
 */
export function trend(values) {
  const n = windowOf(values.length);
  if (n < FEWEST) return null;
  const recent = values.slice(-n);
  return {
    n,
    mean: mean(recent),
    lately: held(values, (end, size) => values.slice(end - 2 * size, end - size)),
    start: held(values, (_, size) => values.slice(0, size)),
  };
}

const windowOf = (length) => Math.min(WINDOW, Math.floor(length / 2));

/** The difference to what `earlier(end, n)` gives, as after a look at each value in turn. */
function held(values, earlier) {
  let shown = 0;
  let streak = 0;
  let change = 0;
  for (let end = 2 * FEWEST; end <= values.length; end += 1) {
    const n = windowOf(end);
    const [recent, others] = [values.slice(end - n, end), earlier(end, n)];
    change = mean(recent) - mean(others);
    const error = Math.sqrt((variance(recent) + variance(others)) / n);
    const needed = T_995[freedom(recent, others) - 1] ?? 2.576 + 5.2 / freedom(recent, others);
    const size = error > 0 ? Math.abs(change) / error / needed : change === 0 ? 0 : Infinity;
    const sign = size > 1 ? Math.sign(change) : 0;
    streak = sign === 0 ? 0 : sign * streak > 0 ? streak + sign : sign;
    if (Math.abs(streak) >= LOOKS || size > PLAIN) shown = sign;
    else if (shown !== Math.sign(change) || size < HOLD) shown = 0;
  }
  return shown === 0 ? 0 : change;
}

/** Degrees of freedom of Welch's test. */
function freedom(first, second) {
  const parts = [first, second].map((values) => variance(values) / values.length);
  const sum = parts[0] + parts[1];
  if (sum === 0) return first.length + second.length - 2;
  return Math.max(1, Math.floor(sum ** 2 / parts.reduce((total, part, index) => total + part ** 2 / ([first, second][index].length - 1), 0)));
}

export const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const variance = (values) => values.reduce((sum, value) => sum + (value - mean(values)) ** 2, 0) / (values.length - 1);

/** Whether a rate lies below the best by more than twice the standard error, of n independent outcomes each; as the run
 * itself tells it (learner.evaluation.intervals). */
export const hasFallen = (rate, best, n) => best - rate > 2 * Math.sqrt((rate * (1 - rate) + best * (1 - best)) / n);
