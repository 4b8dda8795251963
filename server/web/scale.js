// The diverging scale: white at zero, blue above, orange below, and a bar above or below the text as a second cue.

const WHITE = [255, 255, 255];
// Light enough for dark text (contrast above 6); told apart with every common form of colour blindness.
const ABOVE = [84, 157, 214];
const BELOW = [236, 139, 38];
const THICKEST = 4; // pixels

// The largest distance from zero: the end of the scale.
export function reach(numbers) {
  return numbers.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
}

// Colours an element for `x` on a scale from -limit to limit.
export function paint(element, x, limit) {
  const share = limit > 0 ? Math.min(1, Math.abs(x) / limit) : 0;
  const end = x > 0 ? ABOVE : BELOW;
  const mixed = WHITE.map((white, i) => Math.round(white + (end[i] - white) * share));
  const bar = `${Math.round(share * THICKEST)}px`;
  element.style.backgroundColor = `rgb(${mixed.join(" ")})`;
  element.style.setProperty("--above", x > 0 ? bar : "0px");
  element.style.setProperty("--below", x < 0 ? bar : "0px");
}

export function format(x) {
  const text = Math.abs(x).toFixed(3);
  return x < 0 && Number(text) !== 0 ? `−${text}` : text;
}

export function signed(x) {
  const text = format(x);
  return x > 0 && Number(text) !== 0 ? `+${text}` : text;
}
