// An observation on the page: its leaves, and how one of each kind is drawn.
//
// A new kind of leaf needs a case in `leaves` and a function in DRAWN. An image is a Box whose values
// arrive as base64 of a PNG.

import { lines, shown } from "./plot.js";

const MOST_ROWS = 64; // a part with more numbers is written as a list
const SIDE = 256; // a small image is enlarged by a whole number, to this many pixels at most

/** The parts of a value of a space, in its own order: [{name, kind, read, ...}]. */
export function leaves(space, name = "", read = (value) => value) {
  if (space.kind === "Dict")
    return space.spaces.flatMap(([key, part]) => leaves(part, name ? `${name}.${key}` : key, (value) => read(value)[key]));
  if (space.kind === "Tuple")
    return space.spaces.flatMap((part, i) => leaves(part, name ? `${name}.${i}` : String(i), (value) => read(value)[i]));
  const title = name || "observation";
  if (space.kind === "Text") return [{ name: title, kind: "text", read }];
  const flat = (value) => [read(value)].flat(Infinity).map((number) => (number === null ? null : Number(number)));
  const scalar = space.kind === "Discrete" || (space.kind === "Box" && !space.shape.length);
  const image = (value) => {
    const picture = read(value);
    return typeof picture === "string" ? picture : null;
  };
  return [{ name: title, kind: "numbers", scalar, shape: space.shape, read: flat, image }];
}

/** What reality showed at a moment; null where it was not there, or showed no value of its space. */
const realOf = (moment) => (moment.real ? moment.real.observation : null);

function cell(row, content, kind = "td", name = "") {
  const node = document.createElement(kind);
  if (name) node.className = name;
  node.append(content);
  row.append(node);
}

/** Rows of a table: a number's value in the world, in reality, their difference, and its line. */
function drawNumbers(leaf, moments, beside, { table, texts }) {
  const world = moments.map((moment) => leaf.read(moment.observation));
  if (world[0].length > MOST_ROWS) {
    const read = (value) => leaf.read(value).map(shown).join(" ");
    return drawText({ ...leaf, read }, moments, beside, { texts });
  }
  const real = moments.map(realOf).map((value) => (value === null ? null : leaf.read(value)));
  const [now, actual] = [world[world.length - 1], real[real.length - 1]];
  now.forEach((value, i) => {
    const label = leaf.scalar ? leaf.name : `${leaf.name}[${i}]`;
    const row = document.createElement("tr");
    cell(row, label, "td", "text");
    cell(row, shown(value));
    if (beside) {
      cell(row, actual ? shown(actual[i]) : "–");
      cell(row, actual && value !== null ? shown(value - actual[i]) : "–");
    }
    const series = [world.map((values) => values[i]), real.map((values) => values && values[i])];
    cell(row, lines(label, ...series, { width: 180, height: 30, axis: false }));
    table.append(row);
  });
}

/** A text as it is; reality's below it where it differs. */
function drawText(leaf, moments, beside, { texts }) {
  const moment = moments[moments.length - 1];
  if (leaf.name !== "observation") {
    const title = document.createElement("p");
    title.className = "why";
    title.textContent = leaf.name;
    texts.append(title);
  }
  const add = (text, name) => {
    const node = document.createElement("pre");
    node.className = name;
    node.textContent = text;
    texts.append(node);
  };
  add(leaf.read(moment.observation), "world");
  if (realOf(moment) !== null) {
    const text = leaf.read(realOf(moment));
    add(text === leaf.read(moment.observation) ? "(reality: the same text)" : text, "real");
  }
}

/** A picture of pixels that can be counted, and what it is. */
function framed(node, caption, leaf) {
  const [height, width] = leaf.shape;
  const scale = Math.max(1, Math.floor(SIDE / Math.max(height, width)));
  Object.assign(node.style, { width: `${width * scale}px`, aspectRatio: `${width} / ${height}` });
  const figure = document.createElement("figure");
  const title = document.createElement("figcaption");
  title.textContent = caption;
  figure.append(title, node);
  return figure;
}

function pictureOf(base64, caption) {
  const node = document.createElement("img");
  node.alt = caption;
  node.src = `data:image/png;base64,${base64}`;
  return node;
}

/** How bright each pixel's difference is, once both pictures are decoded. */
async function drawDifference(canvas, pictures) {
  await Promise.all(pictures.map((picture) => picture.decode()));
  const { naturalWidth: width, naturalHeight: height } = pictures[0];
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const [one, two] = pictures.map((picture) => {
    context.drawImage(picture, 0, 0);
    return context.getImageData(0, 0, width, height);
  });
  for (let i = 0; i < one.data.length; i++) if (i % 4 !== 3) one.data[i] = Math.abs(one.data[i] - two.data[i]);
  context.putImageData(one, 0, 0);
}

/** The last frame of the world, of reality, and their difference. */
function drawImage(leaf, moments, beside, { frames }) {
  const moment = moments[moments.length - 1];
  const world = pictureOf(leaf.image(moment.observation), `${leaf.name}, imagined`);
  frames.append(framed(world, beside ? `${leaf.name}: world` : leaf.name, leaf));
  if (realOf(moment) === null) return;
  const actual = pictureOf(leaf.image(realOf(moment)), `${leaf.name}, in reality`);
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${leaf.name}, the difference of world and reality`);
  frames.append(framed(actual, "reality", leaf), framed(canvas, "difference", leaf));
  drawDifference(canvas, [world, actual]).catch((error) => {
    if (canvas.isConnected) throw error; // else the page shows a later moment
  });
}

const DRAWN = { numbers: drawNumbers, text: drawText, image: drawImage };

/** Draw the last of `moments` into places: a table of numbers, one for texts, one for frames. */
export function drawObservation(space, moments, beside, places) {
  const { table } = places;
  for (const place of Object.values(places)) place.replaceChildren();
  const parts = leaves(space);
  for (const leaf of parts) if (leaf.image && leaf.image(moments[0].observation) !== null) leaf.kind = "image";
  if (parts.some((leaf) => leaf.kind === "numbers")) {
    const head = document.createElement("tr");
    for (const title of ["", "world", ...(beside ? ["reality", "difference"] : []), "over time"]) cell(head, title, "th");
    table.append(head);
  }
  for (const leaf of parts) DRAWN[leaf.kind](leaf, moments, beside, places);
}
