// The one request of this page.

export const AGGREGATES = ["mean", "last", "p1", "p5", "p10", "p90", "p95", "p99", "bellman"];

const WHERE = "score_tokens";

// An answer that is no success; `status` is 0 when there was none.
export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function toRequest(state) {
  const [first, ...others] = state.responses;
  const responses = [first, ...others.filter((text) => text !== "")];
  const prompt = state.form === "raw" ? { prompt: state.prompt } : { messages: [{ role: "user", content: state.prompt }] };
  const items = responses.map((response) => ({ ...prompt, response, append_eos: state.ended }));
  return { items, aggregate: AGGREGATES, return: "both" };
}

// The server's reply. Throws Refusal with the server's own sentence.
export async function score(request, key, signal) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  let answer;
  try {
    // With a key of our own the browser is not to ask its user for another one.
    const credentials = key ? "omit" : "same-origin";
    answer = await fetch(WHERE, { method: "POST", body: JSON.stringify(request), headers, credentials, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error.name === "TypeError" && key && /[^ -~]/.test(key)) throw new Refusal("The API key has a character that no key can have; type it again.", 401);
    throw new Refusal("The server cannot be reached; see whether it still runs, then score again.", 0);
  }
  const body = await answer.json().catch(() => null);
  if (answer.ok && body?.items) return body;
  throw new Refusal(body?.error?.message ?? `The server answered ${answer.status} without a reason; ask its operator.`, answer.status);
}
