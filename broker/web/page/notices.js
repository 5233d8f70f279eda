// Two small things for the whole page: a line with Undo, and what a screen reader says.

import { $, button, make } from "./dom.js";
import { UNDO } from "./sentences.js";

const UNDO_MS = 10_000;
let timer = 0;

/** Offer to take something back, for ten seconds. */
export function offerUndo(text, undo) {
  clearTimeout(timer);
  const take = button(UNDO.undo, "quiet", () => {
    close();
    undo();
  });
  $("toast").replaceChildren(make("span", { dir: "auto" }, text), take);
  $("toast").hidden = false;
  timer = setTimeout(close, UNDO_MS);
}

function close() {
  clearTimeout(timer);
  $("toast").hidden = true;
}

/** Say something politely. Never called for each piece of an answer. */
export function announce(text) {
  $("live").textContent = text;
}
