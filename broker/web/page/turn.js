// The view of one turn: the question, the answer that is shown of it, what is going on, and what can be done.

import { button, copy, make, put } from "./dom.js";
import { account, duration } from "./format.js";
import { MarkdownView } from "./markdown.js";
import { modelOf, nameOf } from "./models.js";
import { problemView } from "./problem.js";
import { FINISH, STATUS, TURN } from "./sentences.js";
import { isRunning } from "./answer.js";

/** Return the answer of a turn that is shown: the one that was asked for or chosen last. */
export const shownOf = (turn) => turn.tries.reduce((best, each) => (each.picked > best.picked ? each : best));

/** Make the elements of a turn. `actions` are again, model, continue, edit, remove, pick, key, newChat, each with a turn. */
export function turnView(turn, actions) {
  const does = Object.fromEntries(Object.entries(actions).map(([name, act]) => [name, (...more) => act(turn, ...more)]));
  const asked = make("p", { className: "asked", dir: "auto" });
  const who = make("h3", { className: "who" });
  const reasoning = make("div", { className: "thoughts" });
  const summary = make("summary");
  const thoughts = make("details", { className: "reasoning" }, summary, reasoning);
  const notes = make("p", { className: "note" });
  const answer = make("div", { className: "answer" });
  const images = make("div", { className: "images" });
  const tools = make("div", { className: "tools" });
  const sources = make("ol", { className: "sources" });
  sources.ariaLabel = TURN.sources;
  const status = make("p", { className: "status" });
  const finish = make("p", { className: "finish" });
  const paid = make("p", { className: "account" });
  const problem = problemView(does);
  const position = make("span");
  const previous = button("‹", "quiet", () => step(-1));
  const next = button("›", "quiet", () => step(1));
  previous.ariaLabel = TURN.previous;
  next.ariaLabel = TURN.next;
  const pager = make("span", { className: "pager" }, previous, position, next);
  const copies = button(TURN.copy, "quiet", async () => {
    if (!(await copy(shownOf(turn).text))) return;
    copies.textContent = TURN.copied;
    setTimeout(() => (copies.textContent = TURN.copy), 1500);
  });
  const again = button(TURN.again, "quiet", does.again);
  const other = button(TURN.otherModel, "quiet", does.model);
  const edit = button(TURN.edit, "quiet", does.edit);
  const remove = button(TURN.delete, "quiet", does.remove);
  const row = make("div", { className: "actions" }, pager, copies, again, other, remove);
  const root = make("article", {},
    make("div", { className: "question" }, make("h2", { className: "unseen" }, TURN.you), asked, edit),
    make("div", { className: "reply" }, who, thoughts, notes, answer, images, tools, sources, status, finish, problem.root, make("footer", {}, paid, row)));

  let of = null; // the answer whose elements are there
  let text, thinking, opened;

  function step(by) {
    const shown = turn.tries.indexOf(shownOf(turn));
    const target = turn.tries[shown + by];
    if (target) does.pick(target);
  }

  /** Show the present contents. `follower` is the one of an answer under way. */
  function paint(follower) {
    const shown = shownOf(turn);
    if (of !== shown) begin(shown);
    const running = isRunning(shown);
    root.classList.toggle("running", running);
    put(asked, shown.question);
    put(who, nameOf(shown.result?.model ?? shown.model));
    text.write(shown.text, !running);
    answer.hidden = !shown.text;
    answer.classList.toggle("refused", Boolean(shown.refused));
    paintThoughts(shown, running);
    put(notes, noteOf(shown));
    depict(images, shown.images ?? []);
    list(tools, Object.values(shown.tools));
    cite(sources, shown.sources);
    put(status, running ? statusOf(shown, follower) : "");
    put(finish, running ? "" : finishOf(shown));
    put(paid, running ? "" : account(shown, modelOf(shown.model)));
    problem.paint(running ? {} : shown);
    const at = turn.tries.indexOf(shown);
    put(position, TURN.of(at + 1, turn.tries.length));
    pager.hidden = turn.tries.length < 2;
    previous.disabled = at === 0;
    next.disabled = at === turn.tries.length - 1;
    copies.hidden = !shown.text;
    row.hidden = edit.hidden = running;
    // One button for one thing: the problem has its own.
    again.hidden = !problem.root.hidden && problem.root.querySelector(".act").dataset.does === "again";
  }

  function begin(shown) {
    of = shown;
    for (const part of [answer, reasoning, images, tools, sources]) part.replaceChildren();
    text = new MarkdownView(answer);
    thinking = new MarkdownView(reasoning);
    opened = false;
    thoughts.open = false;
  }

  /** Reasoning opens while it is written, and folds when the text begins; after that it is the reader's. */
  function paintThoughts(shown, running) {
    thoughts.hidden = !shown.reasoning;
    if (!shown.reasoning) return;
    const writing = running && shown.reasonedMs == null;
    thinking.write(shown.reasoning, !writing);
    if (writing && !opened) thoughts.open = opened = true;
    if (!writing && opened) thoughts.open = opened = false;
    put(summary, writing ? TURN.reasons : shown.reasonedMs ? TURN.reasoned(duration(shown.reasonedMs)) : TURN.reasoning);
  }

  return { root, paint };
}

function noteOf({ refused, encrypted, reasoning }) {
  return [refused && TURN.refusal, encrypted && !reasoning && TURN.encrypted].filter(Boolean).join(" ");
}

function finishOf({ result, text, tools, images }) {
  if (!result) return "";
  if (FINISH[result.finishReason]) return FINISH[result.finishReason];
  return text || images?.length || Object.keys(tools).length ? "" : TURN.empty;
}

function statusOf(answer, follower) {
  const silent = Date.now() - (follower?.since ?? Date.now());
  switch (follower?.state) {
    case "preparing": return STATUS.preparing;
    case "queued": return follower.place ? STATUS.queued(follower.place.position, follower.place.of) : STATUS.room;
    case "room": return STATUS.room;
    case "reconnecting": return STATUS.reconnecting(follower.losses);
    case "stalled": return STATUS.stalled(duration(Math.round(silent / 1000) * 1000));
    case "stopping": return STATUS.stopping;
    default: return answer.text || answer.reasoning ? "" : STATUS.connecting;
  }
}

function depict(box, urls) {
  for (const src of urls.slice(box.children.length)) box.append(make("img", { src, alt: TURN.image }));
  box.hidden = !urls.length;
}

/** Tool calls as what they are: a name, and arguments in JSON. */
function list(box, calls) {
  box.hidden = !calls.length;
  if (!calls.length) return;
  if (!box.children.length) box.append(make("p", {}, TURN.tools));
  calls.forEach((call, n) => {
    const line = box.children[n + 1] ?? box.appendChild(make("pre", { tabIndex: 0 }));
    put(line, `${TURN.toolName(call.name)}(${call.arguments})`);
  });
}

function cite(box, sources) {
  for (const { url, title } of sources.slice(box.children.length)) {
    const link = make("a", { href: url, textContent: title, target: "_blank", rel: "noopener noreferrer", dir: "auto" });
    box.append(make("li", {}, link));
  }
  box.hidden = !sources.length;
}
