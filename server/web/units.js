// From tokens to what is coloured: tokens, words or sentences.

const MARK_ALONE = /(?<=\s)[.!?]+(?=\s)/gu;

// Units of a scored item, in order, each a run of tokens:
// {first, last: token numbers, before: text beside the colour, text: coloured, special, v, q, change}.
// Every token is in exactly one unit, so the changes of all units add up to the same sum at each level.
export function toUnits(item, level) {
  const characters = Array.from(item.text); // the server counts code points
  const home = homes(item, level, characters);
  const runs = [];
  item.tokens.forEach((_, token) => {
    const run = runs.at(-1);
    // White space (null) goes with what comes before it, and at the beginning with what comes after.
    if (run && (home[token] === null || run.home === null || home[token] === run.home)) {
      run.last = token;
      run.home ??= home[token];
    } else {
      runs.push({ first: token, last: token, home: home[token] });
    }
  });
  let shown = 0;
  return runs.map(({ first, last }) => {
    const start = Math.max(shown, item.offsets[first][0]);
    const end = Math.max(start, item.offsets[last][1]);
    const covered = characters.slice(start, end).join("");
    // Spaces before a word are shown beside its colour: words and lines are easier to tell apart.
    const text = covered.replace(/^ +(?=.)/su, "");
    const before = characters.slice(shown, start).join("") + covered.slice(0, covered.length - text.length);
    shown = end;
    return {
      first,
      last,
      before,
      text,
      special: isEmpty(item.offsets[first]),
      v: item.v[first],
      q: item.q[last],
      change: item.q[last] - item.v[first], // q of a token is v of the next
    };
  });
}

export function rest(item) {
  const end = Math.max(0, ...item.offsets.map((span) => span[1]));
  return Array.from(item.text).slice(end).join("");
}

const isEmpty = ([start, end]) => start === end;

// Which unit each token belongs to: that of its first character which is no white space; null if it has none.
function homes(item, level, characters) {
  if (level === "token") return item.tokens.map((_, token) => token);
  const segment = segments(item.text, level);
  return item.offsets.map((span, token) => {
    if (isEmpty(span)) return `special ${token}`;
    for (let i = span[0]; i < span[1]; i++) {
      if (characters[i].trim() !== "") return segment[i];
    }
    return null;
  });
}

// For each code point the number of its word or sentence.
function segments(text, level) {
  const starts = new Set();
  for (const { index } of new Intl.Segmenter("en", { granularity: level }).segment(text)) starts.add(index);
  if (level === "sentence") {
    // A line is a sentence of its own; so is what ends with a mark between spaces, whatever letter follows.
    for (const match of text.matchAll(/\n/g)) starts.add(match.index + 1);
    for (const match of text.matchAll(MARK_ALONE)) starts.add(match.index + match[0].length);
  }
  const found = [];
  let number = 0;
  let at = 0;
  for (const character of text) {
    if (starts.has(at)) number += 1;
    found.push(number);
    at += character.length;
  }
  return found;
}
