// The chat page: the conversation and its views, the composer, the choice of models.
// page-stream.js follows an answer; this file shows it. All text is inserted as text, never as markup.

import { AnswerStream } from "./page-stream.js";
import { account, advice, context, price, total } from "./page-text.js";

// The number changes with the shape of a turn. Another broker of this origin has another path.
const STORE = `session-broker-1${location.pathname}`;
const TURNS_SENT = 99; // with the new message 199: by default brokers accept 200 messages, and trim by themselves
const MANY_MODELS = 12;
const MODEL_PAUSES = [2_000, 10_000, 30_000];
const MODEL_TIMEOUT = 10_000;

const $ = (id) => document.getElementById(id);
const state = restored();
const views = new Map();
let models = [];
let listed = loadModels(); // the first attempt; a message sent before its end waits for it
let stream = null; // the answer that is being written
let following = true; // whether the reader is at the bottom

// ---- the conversation, stored over a reload ------------------------------------------------------------------------

function restored() {
  try {
    return { turns: [], model: "", key: "", ...JSON.parse(sessionStorage.getItem(STORE)) };
  } catch {
    return { turns: [], model: "", key: "" };
  }
}

function save() {
  const withoutImages = (name, value) => (name === "images" ? undefined : value);
  for (const replacer of [null, withoutImages]) {
    try {
      return sessionStorage.setItem(STORE, JSON.stringify(state, replacer));
    } catch {
      // No room, or no storage: an older state still resumes, from its own cursor.
    }
  }
}

const underWay = (turn) => !turn.result && !turn.problem;

function messages(question) {
  const told = state.turns.filter((turn) => turn.text).slice(-TURNS_SENT);
  const pairs = told.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.text },
  ]);
  return [...pairs, { role: "user", content: question }];
}

function submit() {
  const question = $("text").value.trim();
  if (stream || !question) return $("text").focus();
  const request = { messages: messages(question) };
  const turn = { question, model: "", sessionId: null, cursor: "", text: "", reasoning: "", tools: {}, sources: [] };
  state.turns.push(turn);
  $("text").value = "";
  following = true;
  toText();
  handIn(turn, request);
  save();
}

async function handIn(turn, request) {
  const stream = follow(turn);
  await listed;
  state.model = turn.model = $("model").value;
  await stream.prepare(turn.model ? { ...request, model: turn.model } : request, state.key);
  save();
}

function follow(turn) {
  stream = new AnswerStream(turn, { changed: () => repaint(turn), ended: () => ended(turn) });
  repaint(turn);
  controls();
  return stream;
}

function ended(turn) {
  stream = null;
  if (turn.problem?.code === "withdrawn") putBack(turn);
  else repaint(turn);
  if (turn.problem?.code === "unauthorized") $("access").hidden = false;
  controls();
  save();
}

function stop() {
  toText();
  $("stop").disabled = true;
  stream?.stop();
}

/** Move the focus away from a button before it is disabled, but not on a phone, where the keyboard would open. */
function toText() {
  if (matchMedia("(pointer: fine)").matches) $("text").focus({ preventScroll: true });
}

/** Remove a turn without an answer from the conversation, and put its question back into the box. */
function putBack(turn) {
  state.turns = state.turns.filter((other) => other !== turn);
  views.get(turn)?.root.remove();
  views.delete(turn);
  const box = $("text");
  box.value = [turn.question, box.value].filter(Boolean).join("\n");
  box.focus();
  controls();
  save();
}

function newChat() {
  for (const turn of state.turns.filter((turn) => !underWay(turn))) {
    views.get(turn)?.root.remove();
    views.delete(turn);
  }
  state.turns = state.turns.filter(underWay);
  controls();
  save();
  $("text").focus();
}

// ---- views ---------------------------------------------------------------------------------------------------------

/** Make the elements of one turn, and `paint`, which shows its present contents. */
function view(turn) {
  const root = $("turn").content.cloneNode(true).firstElementChild;
  const part = (selector) => root.querySelector(selector);
  const answer = part(".answer").appendChild(new Text());
  const reasoning = part(".reasoning p").appendChild(new Text());
  part(".question").textContent = turn.question;
  part("h2").classList.toggle("long", turn.question.length > 160 || turn.question.includes("\n"));
  part(".problem button").addEventListener("click", () => putBack(turn));

  function paint() {
    const running = underWay(turn);
    root.classList.toggle("running", running);
    grow(answer, turn.text);
    grow(reasoning, turn.reasoning);
    part(".reasoning").hidden = !turn.reasoning;
    put(part(".tools"), Object.values(turn.tools).map((tool) => `${tool.name}(${tool.arguments})`).join("\n"));
    depict(part(".images"), turn.images ?? []);
    cite(part(".sources"), turn.sources);
    put(part(".status"), running ? status(turn) : "");
    put(part(".account"), turn.result ? account(turn) : "");
    part(".problem").hidden = !turn.problem;
    if (turn.problem) explain(part, turn.problem);
  }
  return { root, paint };
}

function depict(box, urls) {
  for (const src of urls.slice(box.children.length)) {
    box.append(Object.assign(document.createElement("img"), { src, alt: "Image of the answer" }));
  }
  box.hidden = !urls.length;
}

function cite(list, sources) {
  for (const { url, title } of sources.slice(list.children.length)) {
    const link = document.createElement("a");
    Object.assign(link, { href: url, textContent: title, target: "_blank", rel: "noopener noreferrer" });
    list.appendChild(document.createElement("li")).append(link);
  }
  list.hidden = !sources.length;
}

function explain(part, problem) {
  put(part(".sentence"), problem.message);
  put(part(".advice"), advice(problem));
  put(part(".problem code"), problem.code);
}

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
  element.hidden = !text;
}

/** Append new text, so that the reader's selection stays. */
function grow(node, text) {
  if (node.length < text.length) node.appendData(text.slice(node.length));
}

function status(turn) {
  switch (stream?.state) {
    case "preparing": return "Sending…";
    case "waiting": return `${stream.notice} It goes on by itself as soon as there is room.`;
    case "reconnecting": return "Reconnecting… The answer goes on where it was.";
    case "stopping": return "Stopping…";
    default: return turn.text ? "" : turn.reasoning ? "Thinking…" : "Waiting for the first word…";
  }
}

const pending = new Set();

/** Paint a turn with the next frame, however many chunks come before it. */
function repaint(turn) {
  if (!pending.size) requestAnimationFrame(paintPending);
  pending.add(turn);
}

function paintPending() {
  const turns = [...pending];
  pending.clear();
  for (const turn of turns.filter((turn) => state.turns.includes(turn))) {
    if (!views.has(turn)) {
      views.set(turn, view(turn));
      $("conversation").append(views.get(turn).root);
    }
    views.get(turn).paint();
  }
  if (following) window.scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
}

function controls() {
  $("send").disabled = stream !== null;
  $("stop").disabled = stream === null;
  $("conversation").setAttribute("aria-busy", String(stream !== null));
  $("welcome").hidden = state.turns.length > 0;
  $("newChat").hidden = state.turns.every(underWay);
  put($("total"), total(state.turns));
}

// ---- models --------------------------------------------------------------------------------------------------------

/** Load the list, again until it is there. All attempts but the first run in the background. */
async function loadModels([pause, ...later] = MODEL_PAUSES) {
  const headers = state.key ? { Authorization: `Bearer ${state.key}` } : {};
  try {
    const response = await fetch("models", { headers, signal: AbortSignal.timeout(MODEL_TIMEOUT) });
    if (response.ok) return offer((await response.json()).data);
    if (response.status === 401) {
      $("access").hidden = false;
      return;
    }
  } catch {
    // Handled like an answer without a list: shown below, and tried again.
  }
  $("model").replaceChildren(new Option("Default model", ""));
  put($("about"), "The list of models is not available right now; the broker's default model is used.");
  if (pause) setTimeout(() => loadModels(later), pause);
}

function offer(list) {
  models = list.map((model) => ({ ...model, label: `${model.id} — ${price(model.pricing)}` }));
  $("filter").hidden = models.length <= MANY_MODELS;
  narrow();
}

/** List the models that match the filter; the chosen one stays chosen while it is among them. */
function narrow() {
  const sought = $("filter").value.trim().toLowerCase();
  const left = models.filter((model) => `${model.label} ${model.name ?? ""}`.toLowerCase().includes(sought));
  const chosen = left.find((model) => model.id === state.model) ?? left[0];
  if (!chosen) return put($("about"), models.length ? "No model matches this filter." : "This broker offers no model.");
  $("model").replaceChildren(...left.map((model) => new Option(model.label, model.id)));
  $("model").value = chosen.id;
  describe();
}

function describe() {
  const model = models.find(({ id }) => id === $("model").value);
  if (!model) return;
  const unit = price(model.pricing).startsWith("$") && "$ per 1M tokens";
  put($("about"), [model.name, context(model.context_length), unit].filter(Boolean).join(" · "));
}

// ---- actions of the reader -----------------------------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && stream && !$("stop").disabled && event.target !== $("filter")) stop();
});
$("stop").addEventListener("click", stop);
$("newChat").addEventListener("click", newChat);
$("filter").addEventListener("input", narrow);
$("filter").addEventListener("keydown", (event) => {
  if (event.key === "Enter") event.preventDefault();
});
$("model").addEventListener("change", () => {
  state.model = $("model").value;
  describe();
  save();
});
$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  $("access").hidden = true;
  save();
  listed = loadModels();
});
addEventListener("scroll", () => {
  const { scrollTop, clientHeight, scrollHeight } = document.documentElement;
  following = scrollHeight - scrollTop - clientHeight < 48;
}, { passive: true });
addEventListener("pagehide", save);

// ---- the start -----------------------------------------------------------------------------------------------------

for (const turn of [...state.turns]) {
  repaint(turn);
  if (!underWay(turn)) continue;
  if (turn.sessionId) follow(turn).open();
  else putBack(turn); // the page was left before the request was sent
}
controls();
