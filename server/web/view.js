// The results around the panels: legend, scores, details of one unit.

import { AGGREGATES } from "./api.js";
import { make } from "./dom.js";
import { format, paint, signed } from "./scale.js";
import { count } from "./panel.js";

const STEPS = [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1];

const MEANINGS = {
  value: {
    token: "Colour: the value after each token (q).",
    word: "Colour: the value at the last token of each word (q).",
    sentence: "Colour: the value at the last token of each sentence (q).",
  },
  change: {
    token: "Colour: the change that each token brings (q − v).",
    word: "Colour: the changes of a word's tokens, summed.",
    sentence: "Colour: the changes of a sentence's tokens, summed.",
  },
};

export const meaning = ({ show, level }) => MEANINGS[show][level];

export function showLegend(box, limit) {
  box.setAttribute("aria-label", `Scale from ${format(-limit)} (orange) over 0 (white) to ${format(limit)} (blue)`);
  const swatches = STEPS.map((step) => {
    const swatch = make("span", { className: "swatch" }, format(step * limit));
    paint(swatch, step, 1);
    return swatch;
  });
  box.replaceChildren(...swatches);
}

export function showScores(box, items) {
  const two = items.length === 2;
  const names = ["Score", ...items.map((_, i) => `Response ${i + 1}`), ...(two ? ["1 − 2"] : [])];
  const head = make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
  const rows = AGGREGATES.map((how) => {
    const scores = items.map((item) => item.scores[how]);
    const cells = scores.map((score) => make("td", {}, format(score)));
    if (two) cells.push(make("td", {}, signed(scores[0] - scores[1])));
    return make("tr", {}, make("th", { scope: "row" }, how), ...cells);
  });
  const caption = make("caption", {}, "Scores of the whole response");
  box.replaceChildren(make("table", {}, caption, make("thead", {}, head), make("tbody", {}, ...rows)));
}

export function showHint(box) {
  box.replaceChildren(make("p", {}, "Point at the coloured text, or go there with Tab and move with the arrow keys."));
}

// The numbers of one unit; `number` is the response's, from 1.
export function showDetails(box, item, unit, number, level) {
  const { first, last } = unit;
  const one = first === last;
  const ids = item.token_ids.slice(first, last + 1);
  const place = one ? `token ${first + 1} of ${item.tokens.length}` : `tokens ${first + 1} to ${last + 1} of ${item.tokens.length}`;
  const pairs = [
    [`Response ${number}`, level === "token" ? place : `${level}, ${place}`],
    [one ? "id" : "ids", ids.length > 12 ? `${ids.slice(0, 12).join(" ")} … (${ids.length})` : ids.join(" ")],
    ["text", JSON.stringify(one ? item.tokens[first] : shorten(unit.text))],
    ["q (after)", format(unit.q)],
    ["v (before)", format(unit.v)],
    ["change q − v", signed(unit.change)],
  ];
  box.replaceChildren(make("dl", {}, ...pairs.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text)))));
}

const shorten = (text) => (text.length > 80 ? `${text.slice(0, 80)}…` : text);

export function said(items) {
  const parts = items.map((item, i) => `response ${i + 1} has ${count(item.tokens.length, "token")}, mean ${format(item.scores.mean)}`);
  return `Scored: ${parts.join("; ")}.`;
}

export function about(reply) {
  const { provenance: p } = reply;
  return `Model ${reply.model}, ${p.dtype}, weights ${p.weights_sha256.slice(0, 12)}.`;
}
