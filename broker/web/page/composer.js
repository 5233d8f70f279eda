// The box for a message, and the one button that sends, or stops while an answer is written.

import { $, put } from "./dom.js";
import { SAY } from "./sentences.js";

const MEANT_MS = 500; // a click that comes sooner after the button has changed was meant for what it was before

let editing = null; // the turn whose question is in the box
let draft = ""; // what was in the box before
let running = false;
let begunAt = -Infinity; // when the button became one that stops, unless by a click on it

/** Connect the composer. `actions` are send(text, turn), stop() and last(), which gives the turn to edit, or nothing. */
export function startComposer({ send, stop, last }) {
  const box = $("text");

  function submit() {
    const text = box.value.trim();
    if (running || !text) return box.focus();
    const turn = editing;
    leaveEdit();
    box.value = "";
    send(text, turn);
    begunAt = -Infinity;
  }

  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) submit();
    else if (performance.now() - begunAt > MEANT_MS) stop();
  });
  box.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      submit();
    } else if (event.key === "ArrowUp" && !box.value && !running) {
      const turn = last();
      if (!turn) return;
      event.preventDefault();
      edit(turn.turn, turn.question);
    }
  });
  $("cancelEdit").addEventListener("click", cancelEdit);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open], :popover-open")) return;
    if (editing) cancelEdit();
    else if (running) stop();
  });
}

/** Put the question of a turn into the box. What was there comes back if the reader cancels. */
export function edit(turn, question) {
  if (!editing) draft = $("text").value;
  editing = turn;
  $("editing").hidden = false;
  $("text").value = question;
  $("text").focus();
}

function leaveEdit() {
  editing = null;
  draft = "";
  $("editing").hidden = true;
}

export function cancelEdit() {
  if (!editing) return;
  const before = draft;
  leaveEdit();
  $("text").value = before;
  $("text").focus();
}

/** Make the button one that sends, or one that stops. */
export function showRunning(now) {
  if (now && !running) begunAt = performance.now(); // another tab has asked, for example
  running = now;
  put($("send"), now ? SAY.stop : SAY.send);
  $("send").classList.toggle("stops", now);
}
