// Elements, with text that is only ever text.

export function make(name, options = {}, ...children) {
  const { className, ...attributes } = options;
  const element = document.createElement(name);
  if (className) element.className = className;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children); // strings become text nodes
  return element;
}

// What cannot be seen in a text, and the sign that stands before it.
const SIGNS = { "\n": "↵", "\r": "␍", "\t": "⇥" };

// The text as nodes, with a sign at each line break and tab.
export function visible(text) {
  return text.split(/([\n\r\t])/).flatMap((piece) => {
    if (!(piece in SIGNS)) return piece === "" ? [] : [piece];
    const sign = make("span", { className: "sign", "aria-hidden": "true" }, SIGNS[piece]);
    return piece === "\r" ? [sign] : [sign, piece];
  });
}
