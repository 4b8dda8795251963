// What the page shows, as the fragment of its address: it is never sent to a server.

export const EMPTY = { form: "chat", prompt: "", responses: ["", ""], ended: true, show: "value", level: "token" };

const CHOICES = { form: ["chat", "raw"], show: ["value", "change"], level: ["token", "word", "sentence"] };

// The state in a fragment; null if there is none in it.
export function fromFragment(fragment) {
  const given = new URLSearchParams(fragment.replace(/^#/, ""));
  if (!given.has("a")) return null;
  const state = {
    ...EMPTY,
    prompt: given.get("prompt") ?? "",
    responses: [given.get("a"), given.get("b") ?? ""],
    ended: given.get("ended") !== "no",
  };
  for (const [name, allowed] of Object.entries(CHOICES)) {
    if (allowed.includes(given.get(name))) state[name] = given.get(name);
  }
  return state;
}

export function toFragment(state) {
  const [a, b] = state.responses;
  const parts = { prompt: state.prompt, a, b, ended: state.ended ? "" : "no" };
  for (const name of Object.keys(CHOICES)) parts[name] = state[name] === EMPTY[name] ? "" : state[name];
  const kept = Object.entries(parts).filter(([name, value]) => value || name === "a");
  return `#${new URLSearchParams(kept)}`;
}
