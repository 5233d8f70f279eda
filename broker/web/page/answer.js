// One answer, from /prepare to its end. Received contents are added to the record together with their cursor, so that
// both can be stored at any moment.

import { chat, resume } from "./client.js";
import { take } from "./chunk.js";

/** Return an id; browsers make them only on secure addresses, which an intranet may not have. */
export const newId = () => crypto.randomUUID?.() ?? `${Date.now()}-${Math.random().toString(36).slice(2)}`;

/** Make the record of an answer that is going to be asked for. Everything in it can be stored. */
export function newAnswer(conversation, turn, question, model) {
  const now = Date.now();
  return {
    id: newId(), conversation, turn, question, model, at: now, picked: now,
    sessionId: null, cursor: "", text: "", reasoning: "", tools: {}, sources: [], images: [],
  };
}

export const isRunning = (answer) => !answer.result && !answer.problem;

/**
 * Follows one answer. Calls `changed(isNews)` whenever there is something to show, and `ended()` once; the record then
 * has its `result` (the data of `done`) or its `problem`.
 *
 * Attributes: `state` is the client's, or `stopping` or `room`; `place` is that in line; `losses` counts lost connections.
 */
export class Follower {
  #answer;
  #chat;
  #changed;

  constructor(answer, { request, key, changed, ended }) {
    this.#answer = answer;
    this.#changed = changed;
    this.state = "preparing";
    this.place = null;
    this.losses = 0;
    this.since = Date.now();
    const options = { keep: true, token: key, onstate: (state, place) => this.#say(state, place) };
    this.#chat = request ? chat(request, options) : resume(answer.sessionId, answer.cursor, options);
    this.#read().then(ended);
  }

  /** Cancel the session at the broker. The end comes by itself. */
  stop() {
    this.state = "stopping";
    this.#changed(false);
    this.#chat.stop();
  }

  async #read() {
    const answer = this.#answer;
    try {
      for await (const { type, data } of this.#chat.events()) {
        this.since = Date.now();
        if (type === "chunk") this.#take(data);
        else if (type === "error" && !data.final) this.#away(data);
        answer.cursor = this.#chat.lastEventId;
        this.#changed(false);
      }
      answer.result = await this.#chat.result;
    } catch (error) {
      answer.problem = problemOf(error);
    }
    answer.endedAt = Date.now();
    this.#foldReasoning();
  }

  #take(chunk) {
    const answer = this.#answer;
    if (answer.reasoning === "") answer.thinkingAt = Date.now();
    take(answer, chunk);
    if (answer.reasoning || answer.text) answer.firstAt ??= Date.now();
    if (answer.text.length > (answer.from ?? 0)) this.#foldReasoning();
  }

  #foldReasoning() {
    const answer = this.#answer;
    if (answer.reasoning) answer.reasonedMs ??= Date.now() - answer.thinkingAt;
  }

  #away({ code }) {
    if (code === "budget_exceeded" || code === "too_many_streams" || code === "overloaded") this.state = "room";
  }

  #say(state, place) {
    if (this.state === "stopping" && state !== "ended") return;
    if (state === "reconnecting") this.losses++;
    const begins = this.#chat?.sessionId && !this.#answer.sessionId;
    if (begins) this.#answer.sessionId = this.#chat.sessionId;
    this.state = state;
    this.place = place ?? null;
    this.#changed(Boolean(begins));
  }
}

function problemOf(error) {
  const details = Array.isArray(error.details) ? error.details : [];
  const fields = details.map((each) => `${each.field}: ${each.message}`).filter((each) => !error.message.includes(each));
  const noModel = error.code === "invalid_request" && details.some(({ field }) => field === "model");
  return {
    code: noModel ? "no_model" : error.code ?? "internal_error",
    message: [error.message, ...fields].join(" "),
    ...(error.retryAfter && { retryAt: Date.now() + error.retryAfter * 1000 }),
  };
}
