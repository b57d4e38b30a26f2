// The page: it asks the program for the world's moments, and shows them.

import { keysOf, makeForm } from "./form.js";
import { drawObservation } from "./observation.js";
import { lines, shown } from "./plot.js";

const $ = (id) => document.getElementById(id);
const token = location.hash.slice(1);
const NAMES = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓" };
const MASK = "action_mask";
const SPLITS = { generated: "the world's own", logged: "logged", reality: "reality's" };
let about = null;
let form = null;
let keys = new Map();
let moments = [];
let state = null;
let busy = false;

function complain(message) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
}

/** The reply to a request. Throws an Error with the program's sentence. */
async function ask(path, body) {
  const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
  const options = body === undefined ? { headers } : { headers, method: "POST", body: JSON.stringify(body) };
  let reply;
  try {
    reply = await fetch(path, options);
  } catch {
    throw new Error("the program does not answer; start `mesocosm play` again, and open its new address");
  }
  const result = await reply.json();
  if (reply.status === 401) throw new Error("this address lacks its token; open the one that `mesocosm play` printed");
  if (!reply.ok) throw new Error(result.detail);
  return result;
}

/** Do one thing at a time: a key that repeats while a step is under way is left out. */
async function once(work) {
  if (busy) return;
  busy = true;
  document.querySelector("main").setAttribute("aria-busy", "true");
  try {
    await work();
    complain("");
  } catch (error) {
    complain(error.message);
  } finally {
    busy = false;
    document.querySelector("main").setAttribute("aria-busy", "false");
  }
}

function take(next) {
  if (state && moments.length && next.revision !== state.revision + 1) return load(); // another window acted
  for (const moment of next.moments) moments[moment.step] = moment;
  moments.length = next.steps + 1;
  state = next;
  return draw();
}

async function load() {
  const reply = await ask("v1/play");
  if (!about) introduce(reply.about);
  moments = [];
  await take(reply.state);
}

const begin = (split, index, seed) => once(async () => take(await ask("v1/begin", { split, index, seed })));
const step = (action) =>
  once(async () => {
    await take(await ask("v1/step", { action }));
    if (form.clear) form.clear();
  });
const undo = () => once(async () => take(await ask("v1/undo", {})));
const restart = () => begin(state.start.split, state.start.index, state.start.seed);

function nextSeed() {
  const { split, index, seed } = state.start;
  begin(split, split === "logged" ? (index + 1) % about.splits.logged : index, (seed + 1) % 2147483648);
}

function introduce(facts) {
  about = facts;
  document.title = `play ${about.world}`;
  $("title").textContent = `World ${about.world.split("/").pop()}`;
  const members = about.members === 1 ? "1 member" : `${about.members} members`;
  const limit = about.horizon === null ? "no time limit" : `at most ${about.horizon} steps`;
  $("subtitle").textContent = `${about.environment} · ${members} · ${limit}`;
  for (const split of Object.keys(about.splits)) $("split").append(new Option(SPLITS[split], split));
  form = makeForm(about.action_space);
  $("fields").append(form.node);
  keys = keysOf(about.action_space);
  legend();
  $("disagreement-box").hidden = about.members === 1;
  $("members").textContent =
    about.members === 1
      ? "The world has one member, so that it cannot disagree with itself."
      : "Disagreement: 1 is what a tenth of held-out transitions exceed.";
  $("reality").hidden = $("legend").hidden = about.reality === null;
}

function legend() {
  const place = $("keys");
  const add = (name, meaning) => {
    const key = document.createElement("kbd");
    key.textContent = name;
    place.append(key, ` ${meaning}   `);
  };
  for (const [key, action] of keys) if (NAMES[key]) add(NAMES[key], [action].flat(Infinity).map(shown).join(", "));
  const digits = [...keys.keys()].filter((key) => /\d/.test(key));
  if (about.action_space.kind === "Discrete") add(digits.length > 1 ? `${digits[0]}–${digits[digits.length - 1]}` : "0", "that action, counted from 0");
  else if (digits.length) add("0", "the middle");
  for (const [key, meaning] of [["Space", "step with the form"], ["U", "undo"], ["R", "restart"], ["N", "next seed"], ["Esc", "leave a field"]]) add(key, meaning);
}

function plot(name, world, real) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = name;
  figure.append(caption, lines(name, world, real));
  figure.dataset.name = name;
  return figure;
}

function drawPlots() {
  const of = (name) => moments.map((moment) => moment[name]);
  const real = (name) => moments.map((moment) => moment.real && moment.real[name]);
  const plots = [plot("reward", of("reward"), real("reward")), plot("return", of("total"), real("total"))];
  if (about.members > 1) plots.push(plot("disagreement of the members", of("disagreement"), []));
  if (about.reality !== null) {
    const gap = moments.map((moment) => moment.difference && moment.difference.numbers);
    if (gap.some((value) => typeof value === "number")) plots.push(plot("world − reality, in standard deviations", gap, []));
    const pixels = moments.map((moment) => moment.difference && moment.difference.pixels);
    if (pixels.some((value) => typeof value === "number")) plots.push(plot("frames: world − reality, in levels of 0 to 255", pixels, []));
    const others = moments.map((moment) => moment.difference && moment.difference.others);
    if (others.some(Boolean)) plots.push(plot("categories and texts that differ", others, []));
  }
  if (moments.some((moment) => moment.duration !== null)) plots.push(plot("duration, in seconds", of("duration"), []));
  $("plots").replaceChildren(...plots);
}

function drawReality() {
  if (about.reality === null) return;
  const moment = moments[moments.length - 1];
  const rewards = moment.real ? `reward ${shown(moment.real.reward)}, return ${shown(moment.real.total)}` : "";
  $("note").textContent = state.note ? `Not stepped: ${state.note}.` : `${about.reality} takes the same actions: ${rewards}.`;
  const bill = state.bill;
  const left = bill.remaining === null ? "" : `, ${bill.remaining} steps left`;
  const money = bill.remaining_money === null ? "" : `, ${shown(bill.remaining_money)} ${bill.currency} left`;
  $("bill").textContent = `Bill: ${bill.steps} real steps, ${bill.resets} resets, ${shown(bill.price)} ${bill.currency}${left}${money} (ledger ${bill.ledger}).${state.picture_note ? ` ${state.picture_note}.` : ""}`;
  const picture = moment.real && moment.real.picture;
  $("picture").hidden = !picture;
  if (picture) $("picture").src = picture;
}

function draw() {
  const moment = moments[moments.length - 1];
  $("step").textContent = moment.step;
  $("reward").textContent = shown(moment.reward);
  $("return").textContent = shown(moment.total);
  $("disagreement").textContent = shown(moment.disagreement);
  const end = moment.diverged ? "diverged" : moment.terminated ? "terminated" : moment.truncated ? "truncated" : "goes on";
  $("state").textContent = end;
  $("go").disabled = state.over;
  $("undo").disabled = !state.undoable;
  const { split, index, seed, task } = state.start;
  $("split").value = split;
  $("index").value = index;
  $("seed").value = seed;
  chooseSplit();
  const bits = about.observation_space.kind === "Dict" && moment.observation[MASK];
  if (bits) form.mask(bits);
  if (form.commands) form.commands(moment.commands || []);
  $("task").textContent = Object.keys(task).length ? `Task: ${JSON.stringify(task)}` : "";
  drawPlots();
  drawReality();
  const places = { table: $("values"), texts: $("texts"), frames: $("frames") };
  drawObservation(about.observation_space, moments, about.reality !== null, places);
}

function chooseSplit() {
  $("index-label").hidden = $("split").value !== "logged";
  $("index").max = (about.splits.logged || 1) - 1;
}

const submit = () => step(form.read());

document.addEventListener("keydown", (event) => {
  if (!state || event.ctrlKey || event.metaKey || event.altKey) return;
  const inField = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape") event.target.blur();
  if (inField || (event.target.tagName === "BUTTON" && /^( |Enter)$/.test(event.key))) return;
  const work = { " ": submit, u: undo, r: restart, n: nextSeed }[event.key.toLowerCase()];
  if (keys.has(event.key)) {
    form.write(keys.get(event.key));
    step(keys.get(event.key));
  } else if (work) work();
  else return;
  event.preventDefault();
});
$("act").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("begin").addEventListener("submit", (event) => {
  event.preventDefault();
  begin($("split").value, Number($("index").value), Number($("seed").value));
});
$("split").addEventListener("change", chooseSplit);
$("undo").addEventListener("click", undo);
$("restart").addEventListener("click", restart);
$("next").addEventListener("click", nextSeed);
window.addEventListener("hashchange", () => location.reload());
once(load);
