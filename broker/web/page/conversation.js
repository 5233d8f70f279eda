// The open conversation: its turns in memory, what is sent of it, its text for export. No document, no network.

import { EXPORT } from "./sentences.js";
import { isRunning } from "./answer.js";
import { shownOf } from "./turn.js";

const TURNS_SENT = 99; // with the new message 199: by default brokers accept 200 messages, and trim by themselves
const GO_ON = "Continue exactly where you stopped, without repeating anything.";

/** Return answers as turns: `{id, tries}`, in the order in which they were first asked. Known turns stay the same object. */
export function toTurns(answers, before = []) {
  const turns = new Map();
  for (const answer of [...answers].sort((one, other) => one.at - other.at)) {
    if (!turns.has(answer.turn)) {
      const known = before.find(({ id }) => id === answer.turn) ?? { id: answer.turn };
      turns.set(answer.turn, Object.assign(known, { tries: [] }));
    }
    turns.get(answer.turn).tries.push(answer);
  }
  return [...turns.values()];
}

/** Return the messages for an answer: the system prompt, the turns before its own, its question, what it continues. */
export function messagesFor(turns, answer, system) {
  const before = turns.slice(0, turns.findIndex(({ id }) => id === answer.turn)).map(shownOf);
  const told = before.filter(({ text }) => text).slice(-TURNS_SENT);
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...told.flatMap(({ question, text }) => [{ role: "user", content: question }, { role: "assistant", content: text }]),
    { role: "user", content: answer.question },
    ...(answer.from ? [{ role: "assistant", content: answer.text }, { role: "user", content: GO_ON }] : []),
  ];
}

export const runningOf = (turns) => turns.flatMap(({ tries }) => tries).filter(isRunning);

/** Return the conversation as Markdown. */
export function toMarkdown(title, turns, nameOf) {
  const parts = turns.map(shownOf).map(({ question, text, model }) => `## ${EXPORT.you}\n\n${question}\n\n## ${nameOf(model)}\n\n${text}\n`);
  return `# ${title}\n\n${parts.join("\n")}`;
}
