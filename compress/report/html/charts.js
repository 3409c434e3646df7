"use strict";
// Replaces each picture that has numbers by a chart with zoom (drag; double click goes back) and values under the pointer.
const UNITS = {
  bytes: [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]],
  seconds: [[1, "s"], [1e-3, "ms"]],
};
function shown(unit, value) {
  if (value == null) return "";
  const units = UNITS[unit];
  if (!units) return String(Number(value.toPrecision(4)));
  const [size, name] = units.find(([each]) => Math.abs(value) >= each) || units[units.length - 1];
  return Number((value / size).toPrecision(3)) + " " + name;
}
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}
function options(chart, width) {
  const log = chart.log ? {distr: 3} : {};
  const axis = {stroke: colour("dim"), grid: {stroke: colour("grid"), width: 1}, ticks: {stroke: colour("grid"), width: 1}};
  const line = (name, i) => ({label: name, stroke: colour(["first", "second"][i]), width: 2, spanGaps: true, points: {show: true, size: 5}, value: (u, v) => shown(chart.unit, v)});
  return {
    title: chart.title, width, height: 0.6 * width,
    scales: {x: {time: false, ...(chart.log ? {distr: 3, log: 2} : {})}, y: log},
    axes: [{...axis, label: chart.of, labelSize: 22}, {...axis, size: 72, values: (u, marks) => marks.map((v) => shown(chart.unit, v))}],
    series: [{label: chart.of}, ...chart.lines.map(([name], i) => line(name, i))],
  };
}
function data(chart) {
  const xs = [...new Set(chart.lines.flatMap(([, points]) => points.map(([x]) => x)))].sort((a, b) => a - b);
  return [xs, ...chart.lines.map(([, points]) => { const by = new Map(points); return xs.map((x) => by.get(x) ?? null); })];
}
function show(figure) {
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const place = document.createElement("div");
  const svg = figure.querySelector("svg");
  let plot = null;
  const draw = () => {
    if (plot) plot.destroy();
    plot = new uPlot(options(chart, figure.clientWidth - 10), data(chart), place);
  };
  figure.appendChild(place);
  try { draw(); } catch (error) { place.remove(); return; }
  svg.style.display = "none";
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", svg.getAttribute("aria-label"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = figure.clientWidth;
  new ResizeObserver(() => { if (figure.clientWidth !== width) { width = figure.clientWidth; draw(); } }).observe(figure);
}
document.querySelectorAll("figure").forEach((figure) => { if (figure.querySelector("script")) show(figure); });
