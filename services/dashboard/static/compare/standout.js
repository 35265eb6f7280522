// One curve of a drawn chart stands out: the others fade, without drawing anything anew.

/** chart: of charts.js; key: of the series, or null for all as before. */
export function standOut(chart, key) {
  const series = chart.spec.series.filter(({ data }) => data.x.length);
  const traces = [...chart.plot.querySelectorAll(".subplot.xy .scatterlayer .trace")];
  const counts = series.map((each) => chart.lines(each).filter((trace) => !trace.yaxis).length);
  if (counts.reduce((sum, n) => sum + n, 0) !== traces.length) return; // it is being drawn
  series.forEach((each, index) => {
    for (const trace of traces.splice(0, counts[index])) trace.style.opacity = key && each.key !== key ? "0.1" : "";
  });
}
