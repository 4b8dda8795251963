// The page: reads the form, asks the server, shows the answer, keeps the address in step.

import { Refusal, score, toRequest } from "./api.js";
import { make } from "./dom.js";
import { EXAMPLES } from "./examples.js";
import { makePanel } from "./panel.js";
import { reach } from "./scale.js";
import { EMPTY, fromFragment, toFragment } from "./state.js";
import { toUnits } from "./units.js";
import { about, meaning, said, showDetails, showHint, showLegend, showScores } from "./view.js";

const KEY = "dvpo-api-key";
const $ = (id) => document.getElementById(id);
const responses = [$("response-1"), $("response-2")];

let scored = null; // {state, request, reply} of the values on the page
let running = null; // AbortController of the request under way

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const choose = (name, value) => (document.querySelector(`input[name=${name}][value=${value}]`).checked = true);

function readForm() {
  return {
    form: chosen("form"),
    prompt: $("prompt").value,
    responses: responses.map((field) => field.value),
    ended: $("ended").checked,
    show: chosen("show"),
    level: chosen("level"),
  };
}

function fillForm(state) {
  for (const name of ["form", "show", "level"]) choose(name, state[name]);
  $("prompt").value = state.prompt;
  responses.forEach((field, i) => (field.value = state.responses[i]));
  $("ended").checked = state.ended;
}

function say(text) {
  $("status").textContent = text;
}

function showError(error) {
  $("results").hidden = true; // numbers of another text would mislead
  $("error").textContent = error.message;
  say("");
  if (error.status === 401) {
    $("key-row").hidden = false;
    $("key").focus();
  }
}

async function submit() {
  const state = readForm();
  const request = toRequest(state);
  running?.abort();
  const mine = (running = new AbortController());
  if (!$("key-row").hidden) sessionStorage.setItem(KEY, $("key").value.trim());
  $("error").textContent = "";
  say("Scoring …");
  try {
    const reply = await score(request, sessionStorage.getItem(KEY), mine.signal);
    scored = { state, request, reply };
    $("model").textContent = about(reply);
    show();
    say(said(reply.items));
  } catch (error) {
    if (mine.signal.aborted) return;
    if (!(error instanceof Refusal)) throw error;
    showError(error);
  }
}

// Draws what was scored in the chosen way.
function show() {
  if (!scored) return;
  const { items } = scored.reply;
  const state = { ...scored.state, show: chosen("show"), level: chosen("level") };
  scored.state = state;
  const units = items.map((item) => toUnits(item, state.level));
  const limit = reach(units.flat().map((unit) => (state.show === "value" ? unit.q : unit.change)));
  const panels = items.map((item, i) =>
    makePanel(item, units[i], i + 1, { ...state, limit, onPick: (unit, option) => pick(item, unit, i + 1, option) }),
  );
  $("meaning").textContent = meaning(state);
  showLegend($("legend"), limit);
  showHint($("details"));
  $("panels").replaceChildren(...panels);
  showScores($("scores"), items);
  $("by-hand").hidden = true;
  $("results").hidden = false;
  history.replaceState(null, "", toFragment(state));
}

function pick(item, unit, number, option) {
  document.querySelector(".unit.current")?.classList.remove("current");
  option.classList.add("current");
  showDetails($("details"), item, unit, number, scored.state.level);
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`${what} copied.`);
  } catch {
    // Browsers lend the clipboard to secure pages only.
    $("by-hand").hidden = false;
    $("by-hand").value = text;
    $("by-hand").focus();
    $("by-hand").select();
    say(`${what} is selected below: press Ctrl + C.`);
  }
}

function restore() {
  const state = fromFragment(location.hash);
  if (!state) return;
  fillForm(state);
  submit();
}

$("examples").append(
  ...EXAMPLES.map((example) => {
    const button = make("button", { type: "button" }, example.name);
    button.addEventListener("click", () => {
      fillForm({ ...readForm(), ...EMPTY, ...example, show: chosen("show"), level: chosen("level") });
      submit();
    });
    return button;
  }),
);
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
});
for (const name of ["shows", "levels"]) $(name).addEventListener("change", show);
$("copy-json").addEventListener("click", () => {
  const { request, reply } = scored;
  copy(JSON.stringify({ request, reply }, null, 2), "JSON");
});
$("copy-link").addEventListener("click", () => copy(location.href, "Link"));
window.addEventListener("hashchange", restore);
if (sessionStorage.getItem(KEY)) {
  $("key-row").hidden = false;
  $("key").value = sessionStorage.getItem(KEY);
}
restore();
