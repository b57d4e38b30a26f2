// Small line plots as SVG: a world's line, and reality's beside it.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

/** A number in at most four digits. */
export function shown(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  return size >= 1e6 || (size < 1e-3 && size > 0) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

/** A path through the points of a series; it is interrupted where a value is null. */
function path(series, x, y) {
  let d = "";
  let open = false;
  series.forEach((value, i) => {
    if (typeof value === "number") d += `${open ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    open = typeof value === "number";
  });
  return d;
}

/**
 * Draw series over the steps of the episode.
 * @param {string} name What is drawn, for those who do not see it.
 * @param {Array} world Numbers or nulls, one a moment.
 * @param {Array} real The same of reality.
 * @param {{width: number, height: number, axis: boolean}} size The size; with or without an axis.
 */
export function lines(name, world, real, { width = 300, height = 90, axis = true } = {}) {
  const numbers = [...world, ...real].filter((value) => typeof value === "number");
  let low = Math.min(...numbers, Infinity);
  let high = Math.max(...numbers, -Infinity);
  if (!numbers.length) [low, high] = [0, 1];
  const range = `${shown(low)} to ${shown(high)}`;
  if (low === high) [low, high] = [low - (Math.abs(low) || 1), high + (Math.abs(high) || 1)];
  const last = Math.max(world.length - 1, 10);
  const edge = axis ? { left: 60, right: 8, top: 8, bottom: 18 } : { left: 3, right: 4, top: 4, bottom: 4 };
  const x = (i) => edge.left + (i / last) * (width - edge.left - edge.right);
  const y = (value) => height - edge.bottom - ((value - low) / (high - low)) * (height - edge.top - edge.bottom);
  const node = element("svg", { class: "lines", viewBox: `0 0 ${width} ${height}`, role: "img" });
  const now = world.length ? shown(world[world.length - 1]) : "nothing";
  node.setAttribute("aria-label", `${name}, ${world.length} moments, ${range}, now ${now}`);
  if (axis) {
    const right = { x: edge.left - 6, "text-anchor": "end" };
    node.append(element("text", { ...right, y: edge.top + 8 }, shown(high)));
    node.append(element("text", { ...right, y: height - edge.bottom }, shown(low)));
    node.append(element("text", { x: edge.left, y: height - 4 }, "0"));
    node.append(element("text", { x: width - edge.right, y: height - 4, "text-anchor": "end" }, String(last)));
  }
  for (const [kind, series] of [["world", world], ["real", real]]) {
    node.append(element("path", { class: kind, d: path(series, x, y) }));
    const i = series.length - 1;
    if (typeof series[i] === "number") node.append(element("circle", { class: kind, cx: x(i), cy: y(series[i]), r: 2.5 }));
  }
  return node;
}
