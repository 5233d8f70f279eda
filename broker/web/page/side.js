// The list of conversations beside the chat, with what was used today.

import { $, button, make, put } from "./dom.js";
import { count, money } from "./format.js";
import { FIGURES, SAY, UNDO } from "./sentences.js";
import { authorization } from "./settings.js";
import { conversations } from "./store.js";

const TITLE = 80;
const TIMEOUT = 10_000;

/** Return the name of a conversation: the beginning of its first question. */
export function titleOf(question) {
  const line = question.replace(/\s+/g, " ").trim();
  return line.length > TITLE ? `${line.slice(0, TITLE - 1)}…` : line;
}

/** Show the list. `actions` are open(id) and remove(conversation). */
export async function showConversations(current, { open, remove }) {
  const all = await conversations();
  $("list").replaceChildren(...all.map((each) => {
    const link = make("a", { href: `#${each.id}`, textContent: each.title, title: each.title, dir: "auto" });
    if (each.id === current) link.ariaCurrent = "page";
    link.addEventListener("click", (event) => {
      event.preventDefault();
      open(each.id);
    });
    const away = button("×", "quiet", () => remove(each));
    away.ariaLabel = UNDO.deleteConversation(each.title);
    return make("li", {}, link, away);
  }));
  put($("noConversations"), all.length ? "" : SAY.noConversations);
}

/** Show what the broker has counted for this reader, and what is left of the limits that are set. */
export async function showUsage() {
  let usage;
  try {
    const response = await fetch("usage", { headers: authorization(), signal: AbortSignal.timeout(TIMEOUT) });
    if (!response.ok) return;
    usage = await response.json();
  } catch {
    return; // the last figures stay
  }
  const { limits, month } = usage;
  const left = [
    limits.cost.left !== null && money(limits.cost.left),
    limits.tokens.left !== null && FIGURES.totalTokens(count(limits.tokens.left)),
  ].filter(Boolean).join(", ");
  const lines = [
    FIGURES.today(money(usage.cost), count(usage.requests)),
    left && FIGURES.left(left),
    month.limits.cost.left !== null && FIGURES.leftOfMonth(money(month.limits.cost.left)),
  ].filter(Boolean);
  $("usage").replaceChildren(...lines.map((line) => make("p", {}, line)));
}
