// What went wrong with an answer: one sentence, one button, a countdown where the broker said how long to wait, and the
// broker's own words and code for those who ask.

import { button, make, put } from "./dom.js";
import { duration } from "./format.js";
import { PROBLEMS, TURN, WAIT } from "./sentences.js";

/** Make the part of a turn that tells of a problem. `actions` has a function for each thing that can be done. */
export function problemView(actions) {
  const sentence = make("p", { className: "sentence", dir: "auto" });
  const wait = make("p", { className: "wait" });
  const details = make("details", {}, make("summary", {}, TURN.details), make("p", { dir: "auto" }), make("code"));
  const act = button("", "act", () => actions[act.dataset.does]());
  const root = make("div", { className: "problem" }, sentence, wait, make("div", { className: "row" }, act, details));
  let timer = 0;

  /** Show the problem of this answer; without one, nothing. */
  function paint(answer) {
    clearTimeout(timer);
    const { problem } = answer;
    root.hidden = !problem && !mayContinue(answer);
    if (root.hidden) return;
    const [text, helps] = remedy(answer);
    put(sentence, text);
    act.dataset.does = helps;
    act.textContent = { key: TURN.key, model: TURN.chooseModel, newChat: TURN.newChat, continue: TURN.continue, edit: TURN.edit }[helps] ?? TURN.again;
    details.hidden = !problem;
    details.querySelector("p").textContent = problem?.message ?? "";
    details.querySelector("code").textContent = problem?.code ?? "";
    const left = (problem?.retryAt ?? 0) - Date.now();
    put(wait, left > 0 ? WAIT(duration(Math.ceil(left / 1000) * 1000)) : "");
    act.disabled = left > 0 && helps === "again";
    if (left > 0) timer = setTimeout(() => root.isConnected && paint(answer), 1000 - (Date.now() % 1000));
  }

  return { root, paint };
}

const mayContinue = ({ result }) => result?.finishReason === "length" || result?.finishReason === "cancelled";

/** Return the sentence and what helps. Without a text there is nothing to continue. */
export function remedy({ problem, text }) {
  if (!problem) return ["", text ? "continue" : "again"];
  const [sentence, helps] = PROBLEMS[problem.code] ?? [problem.message, "again"];
  const broken = helps === "again" && text && /^upstream_(error|timeout|unavailable|rate_limited)$/.test(problem.code);
  return [sentence, broken ? "continue" : helps === "continue" && !text ? "again" : helps];
}
