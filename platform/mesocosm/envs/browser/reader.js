// Returns the visible elements of a page, in the order of the document, and remembers the nodes in
// `window.mesocosm.nodes`: a click names one by its place. Arguments: a selector of the elements
// (with all that is in them) that are no part of the task, and the most elements.
const [ignored, most] = arguments;
const memory = (window.mesocosm = window.mesocosm || { nodes: [], touched: new WeakSet() });
const CONTROLS = "a, button, input, select, textarea, [role=button], [onclick]";
const clean = (text) => (text || "").replace(/\s+/g, " ").trim();
const textOf = (node) =>
  clean([...node.childNodes].filter((child) => child.nodeType === 3).map((c) => c.data).join(" "));

function nameOf(node) {
  if (node.labels && node.labels.length) return clean(node.labels[0].textContent);
  if (["button", "submit"].includes(node.type) && node.tagName === "INPUT") return node.value;
  if (["BUTTON", "A"].includes(node.tagName)) return clean(node.textContent);
  return textOf(node) || clean(node.getAttribute("aria-label") || node.placeholder);
}

const elements = [];
memory.nodes = [];
for (const node of document.body.querySelectorAll("*")) {
  if (elements.length >= most) break;
  if (ignored && node.closest(ignored)) continue;
  if (["SCRIPT", "STYLE", "OPTION", "BR", "HR"].includes(node.tagName)) continue;
  const control = node.matches(CONTROLS);
  const inControl = !control && node.parentElement.closest("button, label, a");
  if (node.tagName === "LABEL" && node.control) continue;
  if (inControl && !(inControl.tagName === "LABEL" && !inControl.control)) continue;
  if (!control && node.childElementCount && !textOf(node)) continue;
  const box = node.getBoundingClientRect();
  if (!box.width || !box.height || getComputedStyle(node).visibility !== "visible") continue;
  memory.nodes.push(node);
  const tag = node.tagName.toLowerCase();
  elements.push({
    tag: tag === "input" ? node.type : tag,
    name: nameOf(node),
    hints: `${node.id} ${node.getAttribute("class") || ""}`,
    value: ["checkbox", "radio", "button", "submit"].includes(node.type) ? "" : node.value || "",
    checked: Boolean(node.checked) || Boolean(node.closest("[aria-selected=true]")),
    focused: document.activeElement === node,
    touched: memory.touched.has(node),
    box: [box.left, box.top, box.width, box.height],
  });
}
return elements;
