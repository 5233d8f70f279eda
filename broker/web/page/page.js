// The chat page: connects the open conversation with its views, the store and the broker.

import { Follower, isRunning, newAnswer, newId } from "./answer.js";
import { cancelEdit, edit, showRunning, startComposer } from "./composer.js";
import { messagesFor, runningOf, toMarkdown, toTurns } from "./conversation.js";
import { $, make, translate } from "./dom.js";
import { total } from "./format.js";
import { currentModel, isRehearsal, loadModels, modelOf, nameOf, openModels, startModels } from "./models.js";
import { announce, offerUndo } from "./notices.js";
import { startPainter } from "./painter.js";
import { remedy } from "./problem.js";
import { EXPORT, LANGUAGE, LIVE, SAY, SHORTCUTS, UNDO } from "./sentences.js";
import { accessKey, parameters, setAccessKey, settings, startSettings } from "./settings.js";
import { showConversations, showUsage, titleOf } from "./side.js";
import * as store from "./store.js";
import { shownOf } from "./turn.js";

const SAVE_MS = 500;
const SAID = 600; // characters of an answer that a screen reader is told at its end

let conversation = null; // the record of the open one; a new chat gets it with its first message
let turns = [];
// By answer id, what this tab has asked or follows, in other conversations too: the answer, and its follower once there is
// one. The answer is the object that changes and is shown; what is read from the store is only a copy of it.
const followers = new Map();
let listed = null; // the first load of the models

// ---- asking --------------------------------------------------------------------------------------------------------

async function send(question, turnId = null) {
  const later = turnId === null ? [] : turns.slice(turns.findIndex(({ id }) => id === turnId) + 1);
  if (later.length) removeTurns(later, UNDO.turns(later.length));
  await ask(turnId, question);
}

/** Ask once more, or for the first time. Earlier answers of the turn stay, and can be gone back to. */
async function ask(turnId, question, { model, from } = {}) {
  const now = Date.now();
  conversation ??= { id: newId(), title: titleOf(question), created: now, updated: now };
  conversation.updated = now;
  const answer = newAnswer(conversation.id, turnId ?? newId(), question, model ?? currentModel());
  if (from) Object.assign(answer, { text: from.text, from: from.text.length });
  let turn = turns.find(({ id }) => id === answer.turn);
  if (!turn) turns.push((turn = { id: answer.turn, tries: [] }));
  turn.tries.push(answer);
  followers.set(answer.id, { answer });
  toEnd();
  if (location.hash !== `#${conversation.id}`) history.pushState(null, "", `#${conversation.id}`);
  repaint(turn);
  controls();
  const those = turns; // another conversation may be open when the models are there
  await Promise.all([store.keep(conversation, [answer]), listed]);
  answer.model ||= model ?? currentModel();
  const messages = messagesFor(those, answer, settings.system);
  answer.sent = JSON.stringify(messages).length;
  follow(turn, answer, { ...(answer.model && { model: answer.model }), messages, ...parameters() });
  showList();
}

function follow(turn, answer, request = null) {
  announce(LIVE.writing);
  const follower = new Follower(answer, {
    request,
    key: accessKey(),
    changed: (isNews) => {
      repaint(turn);
      saveSoon(answer, isNews);
    },
    ended: () => ended(turn, answer),
  });
  followers.set(answer.id, { follower, answer });
  repaint(turn);
  controls();
}

function ended(turn, answer) {
  followers.delete(answer.id);
  save(answer, true);
  if (answer.problem?.code === "unauthorized") askKey();
  showUsage();
  if (!turns.some(({ id }) => id === turn.id)) return;
  repaint(turn);
  controls();
  announce(answer.problem ? LIVE.failed(remedy(answer)[0]) : LIVE.ended(answer.text.slice(0, SAID)));
}

function stop() {
  for (const answer of runningOf(turns)) followers.get(answer.id)?.follower?.stop();
}

const saves = new Map();

function saveSoon(answer, isNews) {
  if (isNews) return save(answer, true);
  if (!saves.has(answer.id)) saves.set(answer.id, setTimeout(() => save(answer), SAVE_MS));
}

function save(answer, isNews = false) {
  clearTimeout(saves.get(answer.id));
  saves.delete(answer.id);
  return store.progress(answer, isNews);
}

// ---- what can be done with a turn ----------------------------------------------------------------------------------

const actions = {
  again: (turn) => ask(turn.id, shownOf(turn).question, { model: modelOf(shownOf(turn).model)?.id }),
  model: (turn) => openModels((model) => ask(turn.id, shownOf(turn).question, { model })),
  continue: (turn) => ask(turn.id, shownOf(turn).question, { model: shownOf(turn).model, from: shownOf(turn) }),
  edit: (turn) => edit(turn.id, shownOf(turn).question),
  remove: (turn) => removeTurns([turn], UNDO.turn),
  newChat: () => open(null),
  key: askKey,
  pick(turn, answer) {
    answer.picked = Date.now();
    repaint(turn);
    store.keep(conversation, [answer]);
  },
};

function removeTurns(some, text) {
  const answers = some.flatMap(({ tries }) => tries);
  const kept = conversation;
  turns = turns.filter((turn) => !some.includes(turn));
  show();
  store.forgetAnswers(kept.id, answers.map(({ id }) => id));
  offerUndo(text, async () => {
    await store.keep(kept, answers);
    if (conversation?.id !== kept.id) return open(kept.id);
    const shown = turns.flatMap(({ tries }) => tries).filter(({ id }) => !answers.some((answer) => answer.id === id));
    turns = toTurns([...shown, ...answers], [...some, ...turns]); // another tab may have had them back already
    show();
  });
}

async function removeConversation(record) {
  const answers = await store.answersOf(record.id);
  if (conversation?.id === record.id) await open(null);
  await store.forgetConversation(record.id);
  showList();
  offerUndo(UNDO.conversation, async () => {
    await store.keep(record, answers);
    open(record.id);
  });
}

// ---- conversations -------------------------------------------------------------------------------------------------

/** Open a conversation, or a new chat with null. Answers of the one before are followed on, unseen. */
async function open(id, isHistory = false) {
  cancelEdit();
  const record = id && (await store.conversations()).find((each) => each.id === id);
  const answers = record ? await store.answersOf(id) : [];
  conversation = record || null;
  turns = toTurns(answers.map((answer) => followers.get(answer.id)?.answer ?? answer));
  toEnd();
  if (!isHistory && location.hash.slice(1) !== (conversation?.id ?? "")) {
    history.pushState(null, "", conversation ? `#${conversation.id}` : location.pathname + location.search);
  }
  show();
  goOn();
  showList();
  if ($("side").matches(":popover-open")) $("side").hidePopover();
  toText();
}

/** Follow what is under way: after a reload, in another tab, when a conversation is opened again. */
function goOn() {
  for (const turn of turns) {
    for (const answer of turn.tries.filter(isRunning)) {
      if (followers.has(answer.id)) continue;
      if (answer.sessionId) follow(turn, answer);
      else if (Date.now() - answer.at > 5_000 || performance.now() < 5_000) {
        answer.problem = { code: "not_sent", message: "" }; // the page was left before the request was sent
        repaint(turn);
        controls();
      }
    }
  }
}

/** Another tab has changed this conversation: take what it knows, and keep what this tab is further with. */
async function merge(id) {
  showList();
  if (conversation?.id !== id) return;
  const stored = await store.answersOf(id);
  if (conversation?.id !== id) return;
  const known = new Map(turns.flatMap(({ tries }) => tries).map((answer) => [answer.id, answer]));
  const merged = stored.map((answer) => {
    const mine = known.get(answer.id) ?? followers.get(answer.id)?.answer;
    if (!mine || isOlder(mine, answer)) return answer;
    mine.picked = Math.max(mine.picked, answer.picked);
    return mine;
  });
  turns = toTurns(merged, turns);
  show();
  for (const turn of turns) {
    for (const answer of turn.tries.filter(isRunning)) {
      if (answer.sessionId && !followers.has(answer.id)) follow(turn, answer);
    }
  }
}

/** Whether the stored state of an answer tells more than that of this tab, which may only guess that it was not sent. */
function isOlder(mine, stored) {
  if (followers.has(mine.id)) return false;
  if (mine.problem?.code === "not_sent") return Boolean(stored.sessionId) || !isRunning(stored);
  return isRunning(mine);
}

function showList() {
  showConversations(conversation?.id, { open, remove: removeConversation });
}

function exportMarkdown() {
  const text = toMarkdown(conversation.title, turns, nameOf);
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/markdown" })) });
  link.download = `${conversation.title.replace(/[\s.,:;*?"<>|\\/]+/g, "-").slice(0, 50) || EXPORT.fileName}.md`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// ---- what is shown -------------------------------------------------------------------------------------------------

const { repaint, redraw, toEnd } = startPainter({ turnsOf: () => turns, followerOf: (answer) => followers.get(answer.id)?.follower, actions });

/** Show the turns of now, and what goes with them. */
function show() {
  redraw();
  controls();
}

function controls() {
  const running = runningOf(turns).length > 0;
  showRunning(running);
  $("conversation").ariaBusy = String(running);
  $("welcome").hidden = turns.length > 0;
  $("export").hidden = !turns.length;
  $("rehearsal").hidden = !isRehearsal();
  $("rehearsalMore").hidden = !isRehearsal();
  const answers = turns.flatMap(({ tries }) => tries);
  const sum = total(answers, modelOf);
  $("total").hidden = !sum;
  if (sum) $("total").replaceChildren(sum.cost, make("span", {}, ` · ${sum.tokens}`));
  document.title = conversation ? `${conversation.title} · ${SAY.title}` : SAY.title;
}

/** Move the focus to the box, but not on a phone, where the keyboard would open. */
function toText() {
  if (matchMedia("(pointer: fine)").matches) $("text").focus({ preventScroll: true });
}

// A silence is told with its seconds, though nothing comes that would cause a paint.
setInterval(() => {
  for (const turn of turns) if (followers.get(shownOf(turn).id)?.follower?.state === "stalled") repaint(turn);
}, 1000);

// ---- the key, and the keys -----------------------------------------------------------------------------------------

function askKey() {
  $("access").hidden = false;
  $("key").focus();
}

$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  setAccessKey($("key").value.trim());
  $("key").value = "";
  $("access").hidden = true;
  listed = loadModels(askKey);
  showUsage();
  const last = turns.at(-1);
  if (last && shownOf(last).problem?.code === "unauthorized") actions.again(last);
  else toText();
});

const COMMANDS = { k: () => openModels(), O: () => open(null), "/": () => $("shortcuts").showModal() };

document.addEventListener("keydown", (event) => {
  const command = (event.ctrlKey || event.metaKey) && !event.altKey && COMMANDS[event.shiftKey ? event.key.toUpperCase() : event.key];
  if (!command || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  command();
});

// ---- the start -----------------------------------------------------------------------------------------------------

document.documentElement.lang = LANGUAGE;
translate(SAY);
$("shortcutList").append(...SHORTCUTS.flatMap(([keys, does]) => [make("dt", {}, make("kbd", {}, keys)), make("dd", {}, does)]));
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest(".close")) dialog.close();
  });
}
startModels(() => {
  controls();
  turns.forEach(repaint);
});
startSettings();
startComposer({
  send,
  stop,
  last: () => turns.length > 0 && { turn: turns.at(-1).id, question: shownOf(turns.at(-1)).question },
});
$("newChat").addEventListener("click", () => open(null));
$("newChatTop").addEventListener("click", () => open(null));
$("export").addEventListener("click", exportMarkdown);
$("openShortcuts").addEventListener("click", () => $("shortcuts").showModal());
$("rehearsalList").addEventListener("click", () => openModels());
$("toEnd").addEventListener("click", () => {
  toEnd();
  toText();
});
addEventListener("popstate", () => open(location.hash.slice(1) || null, true));
addEventListener("pagehide", () => {
  for (const answer of runningOf(turns)) if (followers.has(answer.id)) save(answer);
});
store.onOtherTab(merge);
listed = loadModels(askKey);
showUsage();
await open(location.hash.slice(1) || null, true);
document.documentElement.dataset.ready = "";
