// One response: its units as a list box. Arrow keys, Home and End move in it; the pointer shows details.

import { make, visible } from "./dom.js";
import { format, paint, signed } from "./scale.js";
import { rest } from "./units.js";

// The panel of response `number` (from 1). `onPick(unit)` is called for the unit under the pointer or with the focus.
export function makePanel(item, units, number, { show, level, limit, onPick }) {
  const options = units.map((unit, i) => makeUnit(item, unit, i, show, limit));
  const heading = make("h2", { id: `heading-${number}` }, `Response ${number}`);
  const note = make("p", { className: "quiet" }, `${count(units.length, level)}, mean ${format(item.scores.mean)}`);
  const list = make("div", {
    className: "tokens",
    role: "listbox",
    dir: "auto",
    "aria-label": `Response ${number}, ${count(units.length, level)}; move with the arrow keys`,
  });
  units.forEach((unit, i) => list.append(...plain(unit.before), options[i]));
  list.append(...plain(rest(item)));
  if (options.length) options[0].tabIndex = 0;

  let current = null;
  const pick = (option) => {
    current?.setAttribute("aria-selected", "false");
    current = option;
    current.setAttribute("aria-selected", "true");
    onPick(units[Number(option.dataset.unit)], option);
  };
  const optionOf = (event) => event.target.closest?.("[role=option]");
  list.addEventListener("pointerover", (event) => optionOf(event) && pick(optionOf(event)));
  list.addEventListener("focusin", (event) => {
    const option = optionOf(event);
    if (!option) return;
    for (const other of list.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    option.tabIndex = 0;
    pick(option);
  });
  list.addEventListener("keydown", (event) => {
    const option = optionOf(event);
    const target = option && !event.ctrlKey && !event.altKey && !event.metaKey && next(event.key, option, options);
    if (!target) return;
    event.preventDefault();
    target.focus();
  });
  return make("section", { className: "panel", "aria-labelledby": `heading-${number}` }, heading, note, list);
}

export const count = (n, level) => `${n} ${level}${n === 1 ? "" : "s"}`;

export function spoken(item, unit) {
  if (unit.special) return `special token ${item.tokens[unit.first]}`;
  if (unit.text === "") return "part of the character before";
  return unit.text.replaceAll("\n", " line break ").trim() || "space";
}

function makeUnit(item, unit, i, show, limit) {
  const x = show === "value" ? unit.q : unit.change;
  const label = `${spoken(item, unit)}: value ${format(unit.q)}, change ${signed(unit.change)}`;
  const option = make("span", {
    className: unit.special ? "unit special" : "unit",
    role: "option",
    "aria-selected": "false",
    "aria-label": label,
    tabindex: "-1",
    "data-unit": i,
  });
  option.append(...(unit.text === "" ? [unit.special ? item.tokens[unit.first] : "·"] : visible(unit.text)));
  paint(option, x, limit);
  return option;
}

const plain = (text) => (text === "" ? [] : [make("span", { "aria-hidden": "true" }, ...visible(text))]);

// Where a key leads from an option; undefined if nowhere.
function next(key, option, options) {
  const at = Number(option.dataset.unit);
  const sideways = getComputedStyle(option).direction === "rtl" ? -1 : 1;
  switch (key) {
    case "ArrowRight":
      return options[at + sideways];
    case "ArrowLeft":
      return options[at - sideways];
    case "ArrowDown":
      return onLine(option, options.slice(at + 1));
    case "ArrowUp":
      return onLine(option, options.slice(0, at).reverse());
    case "Home":
      return options[0];
    case "End":
      return options.at(-1);
    default:
      return undefined;
  }
}

// Of the candidates (nearest first) the one on the next line that lies closest below or above.
function onLine(option, candidates) {
  const box = (element) => element.getClientRects()[0] ?? element.getBoundingClientRect();
  const from = box(option);
  const apart = (rect) => Math.abs(rect.left + rect.width / 2 - (from.left + from.width / 2));
  let line = null;
  let best;
  for (const candidate of candidates) {
    const rect = box(candidate);
    if (Math.abs(rect.bottom - from.bottom) < from.height / 2) continue;
    line ??= rect.bottom;
    if (Math.abs(rect.bottom - line) > rect.height / 2) break;
    if (!best || apart(rect) < apart(box(best))) best = candidate;
  }
  return best ?? candidates.at(-1);
}
