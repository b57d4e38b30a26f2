// An observation on the page: its leaves, and how one of each kind is drawn.
//
// A new kind of leaf (an image) needs a case in `leaves` and a function in DRAWN.

import { lines, shown } from "./plot.js";

const MOST_ROWS = 64; // a part with more numbers is written as a list

/** The parts of a value of a space: [{name, kind, labels, read(value)}], in the space's own order. */
export function leaves(space, name = "", read = (value) => value) {
  if (space.kind === "Dict")
    return space.spaces.flatMap(([key, part]) => leaves(part, name ? `${name}.${key}` : key, (value) => read(value)[key]));
  if (space.kind === "Tuple")
    return space.spaces.flatMap((part, i) => leaves(part, name ? `${name}.${i}` : String(i), (value) => read(value)[i]));
  const title = name || "observation";
  if (space.kind === "Text") return [{ name: title, kind: "text", read }];
  const flat = (value) => [read(value)].flat(Infinity).map((number) => (number === null ? null : Number(number)));
  const scalar = space.kind === "Discrete" || (space.kind === "Box" && !space.shape.length);
  return [{ name: title, kind: "numbers", scalar, read: flat }];
}

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
  const real = moments.map((moment) => (moment.real ? leaf.read(moment.real.observation) : null));
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
  if (moment.real) {
    const text = leaf.read(moment.real.observation);
    add(text === leaf.read(moment.observation) ? "(reality: the same text)" : text, "real");
  }
}

const DRAWN = { numbers: drawNumbers, text: drawText };

/** Draw the last of `moments` into a table of numbers and a place for texts. */
export function drawObservation(space, moments, beside, table, texts) {
  table.replaceChildren();
  texts.replaceChildren();
  const parts = leaves(space);
  if (parts.some((leaf) => leaf.kind === "numbers")) {
    const head = document.createElement("tr");
    for (const title of ["", "world", ...(beside ? ["reality", "difference"] : []), "over time"]) cell(head, title, "th");
    table.append(head);
  }
  for (const leaf of parts) DRAWN[leaf.kind](leaf, moments, beside, { table, texts });
}
