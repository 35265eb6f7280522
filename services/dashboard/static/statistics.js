// Means over seeds, with their intervals.

/** Quantiles of Student's t at 97.5 % for 1 to 30 degrees of freedom; beyond, the normal's with Fisher's first term. */
const T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12, 2.11, 2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048, 2.045, 2.042];

const quantile = (freedom) => T_975[freedom - 1] ?? 1.96 + 2.37 / freedom;

/** {n, mean, half}: half the width of the 95 % interval of the mean; null for fewer than two values. */
export function meanOf(values) {
  const finite = values.filter((value) => typeof value === "number" && Number.isFinite(value));
  const n = finite.length;
  if (!n) return { n, mean: null, half: null };
  const mean = finite.reduce((sum, value) => sum + value, 0) / n;
  if (n < 2) return { n, mean, half: null };
  const variance = finite.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (n - 1);
  return { n, mean, half: quantile(n - 1) * Math.sqrt(variance / n) };
}

/** The value of [[x, y], ...] (rising x) at x, on the line between two points; null beyond its ends. */
export function between(points, x) {
  let low = 0;
  let high = points.length - 1;
  if (high < 0 || x < points[0][0] || x > points[high][0]) return null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle;
    else high = middle;
  }
  const [[x0, y0], [x1, y1]] = [points[low], points[high]];
  if (x === x1) return y1;
  return x === x0 || x1 === x0 ? y0 : y0 + ((y1 - y0) * (x - x0)) / (x1 - x0);
}

/** For sorting numbers: missing ones last, whichever way. */
export function inOrder(one, two, down) {
  const missing = (value) => Number(value === null || value === undefined || Number.isNaN(value));
  return missing(one) - missing(two) || (missing(one) ? 0 : down ? two - one : one - two);
}
