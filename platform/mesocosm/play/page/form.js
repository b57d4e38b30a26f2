// A form for the actions of a space, and the keys that act without it.

const MASK_LIMIT = 2000;
const OPTIONS_LIMIT = 1000;
const LONGEST_SLIDER = 1e6;
let count = 0;

function field(name, input, ...rest) {
  const label = document.createElement("label");
  input.id = `field-${count++}`;
  label.append(name, input, ...rest);
  return label;
}

function control(kind, attributes = {}) {
  const node = document.createElement(kind);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

/** The i-th number of a bound that is one value or a flat list; infinities are texts. */
function bound(values, i) {
  return Number(String(Array.isArray(values) ? values[i] : values).replace("inf", "Infinity"));
}

/** A flat list in the shape of the space: nested lists, or the one value. */
function shaped(flat, shape) {
  if (!shape.length) return flat[0];
  if (shape.length === 1) return flat;
  const step = flat.length / shape[0];
  return Array.from({ length: shape[0] }, (_, i) => shaped(flat.slice(i * step, (i + 1) * step), shape.slice(1)));
}

const size = (shape) => shape.reduce((product, n) => product * n, 1);

function numberInput(name, low, high, whole) {
  const slides = Number.isFinite(high - low) && high - low <= LONGEST_SLIDER;
  const start = Math.min(Math.max(0, low), high);
  const input = control("input", { type: slides ? "range" : "number", step: whole ? 1 : "any" });
  if (Number.isFinite(low)) input.min = low;
  if (Number.isFinite(high)) input.max = high;
  input.value = whole ? Math.round(start) : start;
  if (!slides) return { node: field(name, input), read: () => Number(input.value), write: (v) => (input.value = v) };
  const output = control("output");
  const show = () => (output.textContent = Number(Number(input.value).toPrecision(4)));
  input.addEventListener("input", show);
  show();
  const clipped = () => Math.min(Math.max(Number(input.value), low), high);
  const write = (value) => {
    input.value = value;
    show();
  };
  return { node: field(name, input, output), read: clipped, write };
}

function selection(name, entries) {
  const input = control("select");
  for (const [value, text] of entries) {
    const option = control("option", { value });
    option.textContent = text;
    input.append(option);
  }
  return { node: field(name, input), input };
}

function checkbox(name) {
  const input = control("input", { type: "checkbox" });
  return { node: field(name, input), read: () => input.checked };
}

function group(name, parts) {
  if (parts.length === 1 && !name) return parts[0].node;
  const node = control("fieldset");
  const inner = control("div");
  inner.append(...parts.map((part) => part.node));
  if (name) {
    const legend = control("legend");
    legend.textContent = name;
    node.append(legend);
  }
  node.append(inner);
  return node;
}

function choices(name, n, start) {
  if (n > OPTIONS_LIMIT) {
    const part = numberInput(name, start, start + n - 1, true);
    return { ...part, options: [] };
  }
  const entries = Array.from({ length: n }, (_, i) => [start + i, String(start + i)]);
  const { node, input } = selection(name, entries);
  return { node, read: () => Number(input.value), write: (v) => (input.value = v), options: [...input.options] };
}

/** The form of a space: {node, read(), write(value), mask(bits)}. */
export function makeForm(space, name = "") {
  const title = name || "action";
  if (space.kind === "Dict") {
    const parts = space.spaces.map(([key, part]) => [key, makeForm(part, key)]);
    const read = () => Object.fromEntries(parts.map(([key, part]) => [key, part.read()]));
    return { node: group(name, parts.map(([, part]) => part)), read, mask: () => {} };
  }
  if (space.kind === "Tuple") {
    const parts = space.spaces.map((part, i) => makeForm(part, String(i)));
    return { node: group(name, parts), read: () => parts.map((part) => part.read()), mask: () => {} };
  }
  if (space.kind === "Text") return textForm(space, title);
  if (space.kind === "Discrete") {
    const part = choices(title, space.n, space.start);
    const mask = (bits) => allow(part.options, bits);
    return { ...part, mask };
  }
  if (space.kind === "MultiDiscrete") return jointForm(space, title);
  const shape = space.kind === "MultiBinary" ? [space.n].flat() : space.shape;
  const label = (i) => (shape.length ? `${title}[${i}]` : title);
  const indices = [...Array(size(shape)).keys()];
  const bits = space.kind === "MultiBinary" || space.dtype === "bool";
  const whole = /int/.test(space.dtype || "");
  const parts = indices.map((i) => (bits ? checkbox(label(i)) : numberInput(label(i), bound(space.low, i), bound(space.high, i), whole)));
  const value = (part) => (space.kind === "MultiBinary" ? Number(part.read()) : part.read());
  const write = (values) => [values].flat(Infinity).forEach((v, i) => parts[i].write(v));
  return { node: group("", parts), read: () => shaped(parts.map(value), shape), write, mask: () => {} };
}

function allow(options, bits) {
  const any = bits.some(Boolean); // a mask that allows nothing allows all
  options.forEach((option, i) => (option.disabled = any && !bits[i]));
  const chosen = options.find((option) => option.selected);
  const first = options.find((option) => !option.disabled);
  if (chosen && chosen.disabled && first) first.selected = true;
}

/** Selects of each component; with a mask one select of the possible joint actions. */
function jointForm(space, title) {
  const counts = [space.nvec].flat(Infinity);
  const starts = [space.start].flat(Infinity);
  const shape = [];
  for (let level = space.nvec; Array.isArray(level); level = level[0]) shape.push(level.length);
  const parts = counts.map((n, i) => choices(`${title}[${i}]`, n, starts[i]));
  const node = control("div");
  node.append(group("", parts));
  let joint = null;
  const at = (place) => {
    const values = counts.map(() => 0);
    for (let i = counts.length - 1; i >= 0; i--) {
      values[i] = starts[i] + (place % counts[i]);
      place = Math.floor(place / counts[i]);
    }
    return values;
  };
  const mask = (bits) => {
    if (bits.length > MASK_LIMIT) return;
    const any = bits.some(Boolean);
    const places = [...bits.keys()].filter((i) => !any || bits[i]);
    const before = joint ? joint.input.value : null;
    joint = selection(`${title} (the possible ones)`, places.map((place) => [place, at(place).join(", ")]));
    if (places.includes(Number(before))) joint.input.value = before ?? places[0];
    node.replaceChildren(joint.node);
  };
  const read = () => shaped(joint ? at(Number(joint.input.value)) : parts.map((part) => part.read()), shape);
  return { node, read, mask };
}

function textForm(space, title) {
  const long = space.max_length > 200;
  const input = control(long ? "textarea" : "input", { maxlength: space.max_length, autocomplete: "off", size: 40 });
  const list = control("datalist", { id: `list-${count++}` });
  if (!long) input.setAttribute("list", list.id);
  const buttons = control("div", { class: "bar" });
  const commands = (texts) => {
    list.replaceChildren(...texts.map((text) => control("option", { value: text })));
    buttons.replaceChildren(
      ...texts.slice(0, 40).map((text) => {
        const button = control("button", { type: "button" });
        button.textContent = text;
        button.addEventListener("click", () => {
          input.value = text;
          input.form.requestSubmit();
        });
        return button;
      }),
    );
  };
  const node = control("div");
  node.append(field(title, input, list), buttons);
  return { node, read: () => input.value, write: (v) => (input.value = v), mask: () => {}, commands, clear: () => (input.value = "") };
}

const ARROWS = {
  2: { ArrowLeft: 0, ArrowRight: 1 },
  3: { ArrowLeft: 0, ArrowDown: 1, ArrowRight: 2 },
  4: { ArrowLeft: 0, ArrowDown: 1, ArrowRight: 2, ArrowUp: 3 },
};

/** The actions that keys take at once: a map of key -> action. */
export function keysOf(space) {
  const keys = new Map();
  if (space.kind === "Discrete") {
    for (const [key, place] of Object.entries(ARROWS[space.n] || {})) keys.set(key, space.start + place);
    for (let place = 0; place < Math.min(space.n, 10); place++) keys.set(String(place), space.start + place);
  }
  const flat = space.kind === "Box" && space.dtype !== "bool" ? size(space.shape) : 0;
  if (flat === 1 || flat === 2) {
    const [lows, highs] = [space.low, space.high].map((b) => [...Array(flat).keys()].map((i) => bound(b, i)));
    if (![...lows, ...highs].every(Number.isFinite)) return keys;
    const middle = lows.map((low, i) => Math.min(Math.max(0, low), highs[i]));
    const set = (key, i, value) => keys.set(key, shaped(middle.map((m, j) => (i === j ? value : m)), space.shape));
    set("ArrowLeft", 0, lows[0]);
    set("ArrowRight", 0, highs[0]);
    if (flat === 2) set("ArrowDown", 1, lows[1]);
    if (flat === 2) set("ArrowUp", 1, highs[1]);
    keys.set("0", shaped(middle, space.shape));
  }
  return keys;
}
