// One answer, from /prepare to its end: the only part of the page that talks to /prepare and /stream.
// Received contents are added to the turn together with their cursor, so that both can be stored at any moment.

import { take } from "./page-chunk.js";

const COMINGS = 200; // connection errors without an event between them; about ten minutes at the broker's retry time
const REOPENINGS = 8; // after the browser has stopped reconnecting; about a minute with their pauses
const PREPARE_TIMEOUT = 30_000;
const STOP_TIMEOUT = 10_000;

const UNREACHABLE = { code: "unreachable", message: "The broker cannot be reached." };
const STOP_UNCONFIRMED = { code: "stop_unconfirmed", message: "Stopped here, but the broker did not confirm it." };

/**
 * Follows one turn. Calls `changed()` whenever there is something new to show, and `ended()` once; the turn then has
 * its `result` (the data of `done`) or its `problem`.
 *
 * `state` is one of preparing, connecting, open, waiting (for room on the broker), reconnecting, stopping.
 */
export class AnswerStream {
  #turn;
  #changed;
  #ended;
  #source = null;
  #comings = 0;
  #reopenings = 0;
  #reopening = 0;
  #stopping = 0;
  #over = false;
  #abort = new AbortController();

  constructor(turn, { changed, ended }) {
    this.#turn = turn;
    this.#changed = changed;
    this.#ended = ended;
    this.state = "preparing";
    this.notice = "";
  }

  /** Prepare the request, and follow its session. */
  async prepare(request, key) {
    try {
      const session = await this.#post(request, key);
      this.#turn.sessionId = session.sessionId;
      this.#turn.dropped = session.droppedMessages;
    } catch (problem) {
      return this.#end({ problem });
    }
    this.open();
  }

  async #post(request, key) {
    const headers = { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    const signal = AbortSignal.any([this.#abort.signal, AbortSignal.timeout(PREPARE_TIMEOUT)]);
    let response, body;
    try {
      response = await fetch("prepare", { method: "POST", headers, body: JSON.stringify(request), signal });
      body = await response.json();
    } catch {
      throw this.#abort.signal.aborted ? { code: "withdrawn", message: "Stopped before it was handed in." } : UNREACHABLE;
    }
    if (!response.ok) throw refusal(response, body.error);
    return body;
  }

  /** Open the event stream at the turn's cursor. From then on the browser reconnects by itself. */
  open() {
    this.#source?.close();
    const { sessionId, cursor } = this.#turn;
    const query = cursor ? `?lastEventId=${encodeURIComponent(cursor)}` : "";
    const source = (this.#source = new EventSource(`stream/${sessionId}${query}`));
    this.#say("connecting");
    source.addEventListener("open", () => this.#opened());
    source.addEventListener("chunk", (event) => this.#heard(event, (chunk) => take(this.#turn, chunk)));
    source.addEventListener("queued", (event) => this.#heard(event, (place) => this.#queued(place)));
    source.addEventListener("done", (event) => this.#heard(event, (result) => this.#end({ result })));
    source.addEventListener("error", (event) => {
      if (event.data === undefined) this.#lost();
      else this.#heard(event, (problem) => this.#refused(problem));
    });
  }

  /** Cancel the session at the broker, and wait for its end. */
  async stop() {
    if (!this.#turn.sessionId) return this.#abort.abort();
    this.#say("stopping");
    const signal = AbortSignal.timeout(STOP_TIMEOUT);
    const address = `stream/${this.#turn.sessionId}`;
    const response = await fetch(address, { method: "DELETE", keepalive: true, signal }).catch(() => null);
    if (this.#over) return;
    if (!response?.ok) return this.#end({ problem: STOP_UNCONFIRMED });
    if (this.#source.readyState !== EventSource.OPEN) this.open(); // the browser's own pause may be long
    this.#stopping = setTimeout(() => this.#end({ problem: STOP_UNCONFIRMED }), STOP_TIMEOUT);
  }

  #opened() {
    this.#reopenings = 0;
    if (this.state !== "waiting") this.#say("open");
  }

  #heard(event, act) {
    this.#comings = 0;
    this.#turn.cursor = event.lastEventId || this.#turn.cursor;
    if (this.state !== "open") this.#say("open");
    act(JSON.parse(event.data));
    if (!this.#over) this.#changed();
  }

  #refused(problem) {
    if (problem.final) return this.#end({ problem });
    this.#say("waiting", problem.message);
  }

  #queued({ position, of }) {
    this.#say("waiting", `Other answers of yours are being written. This one is number ${position} of ${of} in line.`);
  }

  #lost() {
    if (++this.#comings > COMINGS || this.#reopenings >= REOPENINGS) return this.#end({ problem: UNREACHABLE });
    if (this.state !== "waiting") this.#say("reconnecting");
    if (this.#source.readyState !== EventSource.CLOSED) return; // the browser reconnects by itself
    const pause = Math.min(15_000, 1000 * 2 ** this.#reopenings++) * (0.8 + 0.4 * Math.random());
    clearTimeout(this.#reopening);
    this.#reopening = setTimeout(() => this.open(), pause);
  }

  #say(state, notice = "") {
    if (this.state === "stopping") return;
    this.state = state;
    this.notice = notice;
    this.#changed();
  }

  #end(end) {
    if (this.#over) return;
    this.#over = true;
    this.#source?.close();
    clearTimeout(this.#reopening);
    clearTimeout(this.#stopping);
    Object.assign(this.#turn, end);
    this.#ended();
  }
}

function refusal(response, error) {
  const details = Array.isArray(error?.details) ? error.details : [];
  const retryAfter = Number(response.headers.get("Retry-After")) || undefined;
  const message = error?.message ?? `The broker answered with status ${response.status}.`;
  // The message names the first field already.
  const more = details.map((each) => `${each.field}: ${each.message}`).filter((each) => !message.includes(each));
  const exactly = more.join("; ");
  return { code: error?.code ?? `status_${response.status}`, message: [message, exactly].filter(Boolean).join(" "), retryAfter };
}
