// Elements, made so that whatever comes from outside is text: nothing here, or anywhere on this page, parses HTML.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  // A string is appended as a text node.
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

export const el = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);
export const byId = (id) => document.getElementById(id);

// A part of a whole as a bar, from `begin` to `end` of 1.
export function bar(begin, end, kind = "") {
  const least = 0.002;
  const from = Math.min(Math.max(begin, 0), 1 - least);
  const width = Math.max(Math.min(end, 1) - from, end > begin ? least : 0);
  const rect = svg("rect", { x: from * 1000, y: 0, width: width * 1000, height: 10 });
  return svg("svg", { class: `bar ${kind}`, viewBox: "0 0 1000 10", preserveAspectRatio: "none", "aria-hidden": "true" }, rect);
}

// Keep one element for each item, so that what has the focus or is open stays so. `make` gives [element, update].
export function keyed(parent, nothing, keyOf, make) {
  const kept = new Map();
  const empty = el("p", { class: "quiet" }, nothing);
  return (items) => {
    const keys = new Set(items.map(keyOf));
    for (const [key, [element]] of kept) {
      if (!keys.has(key)) {
        element.remove();
        kept.delete(key);
      }
    }
    items.forEach((item, place) => {
      const key = keyOf(item);
      if (!kept.has(key)) kept.set(key, make(item));
      const [element, update] = kept.get(key);
      update(item);
      if (parent.children[place] !== element) parent.insertBefore(element, parent.children[place] ?? null);
    });
    if (items.length) empty.remove();
    else parent.append(empty);
  };
}

// Change children only where their text would be another.
export function show(element, ...children) {
  const made = el("div", {}, ...children);
  if (made.innerHTML !== element.innerHTML) element.replaceChildren(...made.childNodes);
}
