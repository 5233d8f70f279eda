/*! The browser client of the Session Broker. MIT. Types: client.d.ts */

// `npm run build` makes client.js of this file, which is what is served and published.
// client.d.ts says what each part does for a page.

const LIFE = 15 * 60_000; // how long a session can live without its page, by the default settings
const PREPARE_TIMEOUT = 60_000;
const STOP_TIMEOUT = 10_000; // the longest wait for the broker's own end of a stopped session
const CANCEL_ATTEMPTS = 5;
const LONGEST_PAUSE = 15_000;

const OPEN = 1; // EventSource.OPEN and CLOSED, which an EventSource for Node need not have
const CLOSED = 2;

const LEFT = "left";

const CANCELLED = {
  finishReason: "cancelled",
  nativeFinishReason: null,
  model: null,
  provider: null,
  generationId: null,
  usage: null,
  cost: null,
  estimated: false,
  ttftMs: null,
  totalMs: null,
};

/** Sessions that several callers in this page share, by what was asked. */
const used = new Map();

export class BrokerError extends Error {
  constructor({ code, message, details, retryable = false, retryAfter, status }) {
    super(message);
    this.name = "BrokerError";
    Object.assign(this, { code, details, retryable, retryAfter, status });
  }
}

export function chat(request, options = {}) {
  const body = JSON.stringify(request);
  const name = options.idempotencyKey && slotOf(options) + body;
  return follow(options, share(name, () => prepare(body, options)));
}

export function resume(sessionId, lastEventId, options = {}) {
  if (!sessionId) {
    const known = recall(options);
    if (!known) return null;
    sessionId = known[0];
    lastEventId ??= known[1];
  }
  // Nothing follows a terminal cursor. At the event before it, the end is told again.
  const cursor = (lastEventId ?? "").replace(/^(\d-)(\d+)\.end$/, (_, epoch, n) => epoch + (n - 1));
  const shared = share(baseOf(options) + sessionId, async () => sessionId);
  return follow(options, shared, sessionId, cursor);
}

/** Follow a session from its preparation to its end. Returns the object that the page gets, `Chat` in client.d.ts. */
function follow(options, shared, sessionId = null, cursor = "") {
  const log = eventLog();
  const timers = {};
  const listeners = new AbortController();
  const stallAfter = (options.stallAfter ?? 10) * 1000;
  let source; // the EventSource of now, once there is one
  let settle;
  let over = false;
  let stopping = false;
  let losses = 0; // connections that the browser gave up, without an event between them
  let lostAt = 0;
  let heardAt = Date.now();

  const chat = {
    sessionId,
    lastEventId: cursor,
    onstate: options.onstate,
    result: new Promise((resolve, reject) => (settle = { resolve, reject })),
    stop,
    events: () => log.iterate(leave, (event) => event),
    [Symbol.asyncIterator]: () => log.iterate(leave, ({ type, data }) => type === "chunk" && textOf(data)),
  };
  chat.result.catch(() => {}); // who only reads the text gets the error there
  say(sessionId ? "connecting" : "preparing");
  listen();
  begin();
  return chat;

  async function begin() {
    try {
      const found = await shared.ready;
      if (over) return;
      chat.sessionId = found;
      save();
      open();
    } catch (error) {
      end(error);
    }
  }

  function open() {
    if (over) return;
    clearTimeout(timers.open);
    source?.close();
    const query = chat.lastEventId && `?lastEventId=${encodeURIComponent(chat.lastEventId)}`;
    const opened = (source = new (options.EventSource ?? EventSource)(address(chat.sessionId) + query));
    const on = (type, act) => opened.addEventListener(type, (event) => opened === source && act(event));
    on("open", connected);
    for (const type of ["chunk", "ping", "queued", "done", "error"]) {
      on(type, (event) => (event.data === undefined ? lost() : hear(type, JSON.parse(event.data), event.lastEventId)));
    }
    if (chat.state !== "queued") say(losses || log.any() ? "reconnecting" : "connecting");
    watch();
  }

  function connected() {
    lostAt = 0;
    if (chat.state === "reconnecting") say(chat.lastEventId ? "streaming" : "connecting");
    watch();
  }

  function hear(type, data, id) {
    if (over) return;
    losses = lostAt = 0;
    heardAt = Date.now();
    chat.lastEventId = id || chat.lastEventId;
    log.add({ type, data });
    if (type === "done") return end(null, data);
    if (type === "error" && data.final) return end(new BrokerError({ ...data, status: data.upstreamStatus }));
    if (type === "queued") say(type, data);
    else say(type === "error" ? "reconnecting" : "streaming");
    save();
    watch();
  }

  /** The connection is lost. The browser reconnects by itself unless it has closed the source. */
  function lost() {
    lostAt ||= Date.now();
    if (Date.now() - lostAt > LIFE) return end(unreachable());
    if (chat.state !== "queued") say("reconnecting");
    if (source.readyState === CLOSED) after("open", pause(losses++), open);
  }

  /** Say so when nothing comes for a while. */
  function watch() {
    const waits = () => chat.state === "connecting" || chat.state === "streaming";
    after("silence", stallAfter, () => waits() && say("stalled"));
  }

  function listen() {
    const { signal } = listeners;
    const on = (target, type, act) => target?.addEventListener?.(type, act, { signal });
    const back = () => {
      lostAt = losses = 0;
      if (source) open();
    };
    const silent = () => source?.readyState !== OPEN || Date.now() - heardAt > stallAfter;
    const { document } = globalThis;
    on(globalThis, "online", back);
    on(globalThis, "pageshow", (event) => event.persisted && back());
    on(document, "resume", back);
    on(document, "visibilitychange", () => !document.hidden && silent() && back());
    on(options.signal, "abort", leave);
    if (options.signal?.aborted) queueMicrotask(leave); // later, when the caller has the chat
  }

  function stop() {
    if (over || stopping) return chat.result;
    stopping = true;
    shared.users--;
    const cancelled = () => hear("done", CANCELLED);
    if (source) after("stop", STOP_TIMEOUT, cancelled);
    else cancelled();
    cancelSession(cancelled);
    return chat.result;
  }

  /** Stop the session at the broker, unless somebody else in this page uses it. */
  async function cancelSession(cancelled) {
    const found = await shared.ready.catch(() => null);
    if (shared.users) return cancelled();
    shared.forget();
    if (found) await cancel(address(found));
    // A line that waits to reconnect would learn of the end too late.
    if (source?.readyState !== OPEN && found) open();
  }

  /** What a page does that breaks off its loop. */
  function leave() {
    if (options.keep) end(new BrokerError({ code: LEFT, message: "The page left; the session goes on." }));
    else stop();
  }

  function end(failure, result) {
    if (over) return;
    over = true;
    listeners.abort();
    source?.close();
    Object.values(timers).forEach(clearTimeout);
    if (!stopping && !--shared.users) shared.forget();
    const left = failure?.code === LEFT;
    if (!left && recall(options)?.[0] === chat.sessionId) options.remember.removeItem(slotOf(options));
    if (failure) settle.reject(failure);
    else settle.resolve(result);
    say("ended");
    log.close(left ? null : failure);
  }

  function say(state, place) {
    if (state === chat.state && !place) return;
    chat.state = state;
    try {
      chat.onstate?.(state, place);
    } catch (error) {
      setTimeout(() => { throw error; }); // the page's bug is told as such, and does not stop the answer
    }
  }

  function after(name, ms, act) {
    clearTimeout(timers[name]);
    timers[name] = setTimeout(act, ms);
  }

  function address(id) {
    return `${baseOf(options)}/stream/${id}`;
  }

  function save() {
    attempt(() => options.remember?.setItem(slotOf(options), JSON.stringify([chat.sessionId, chat.lastEventId])));
  }
}

/** All events of a chat, for any number of iterators, each from the start. */
function eventLog() {
  const events = [];
  const wakes = [];
  let closed = false;
  let failure;

  function wake() {
    for (const each of wakes.splice(0)) each();
  }

  /** Iterate over what `pick` makes of the events, but for what is empty. `leave` is called where the reader breaks off. */
  function iterate(leave, pick) {
    let at = 0;
    let left = false;
    const next = async () => {
      while (!left) {
        while (at < events.length) {
          const value = pick(events[at++]);
          if (value) return { value, done: false };
        }
        if (failure) throw failure;
        if (closed) break;
        await new Promise((resolve) => wakes.push(resolve));
      }
      return { value: undefined, done: true };
    };
    const leaving = async (value) => {
      left = true;
      leave();
      wake();
      return { value, done: true };
    };
    return { next, return: leaving, [Symbol.asyncIterator]() { return this; } };
  }

  return {
    iterate,
    any: () => events.length,
    add(event) {
      events.push(event);
      wake();
    },
    close(error) {
      closed = true;
      failure = error;
      wake();
    },
  };
}

function share(name, begin) {
  let shared = used.get(name);
  if (!shared) {
    const forget = () => used.get(name) === shared && used.delete(name);
    shared = { users: 0, ready: begin(), forget };
    if (name) used.set(name, shared);
  }
  shared.users++;
  return shared;
}

async function prepare(body, options) {
  const { token, idempotencyKey } = options;
  for (let again = false; ; again = true) {
    const headers = { "Content-Type": "application/json" };
    const bearer = typeof token === "function" ? await token() : token;
    if (bearer) headers.Authorization = `Bearer ${bearer}`;
    if (idempotencyKey) headers["Idempotency-Key"] = idempotencyKey;
    const signal = AbortSignal.timeout(PREPARE_TIMEOUT);
    let response, text;
    try {
      response = await fetch(`${baseOf(options)}/prepare`, { method: "POST", headers, body, signal });
      text = await response.text();
    } catch {
      throw unreachable();
    }
    if (response.status === 401 && typeof token === "function" && !again) continue;
    const answer = attempt(() => JSON.parse(text));
    if (response.ok && answer?.sessionId) return answer.sessionId;
    throw refusal(response, answer?.error);
  }
}

/** Return what `act` returns, or undefined where it throws: a page of a proxy is no JSON, a storage may be full or absent. */
function attempt(act) {
  try {
    return act();
  } catch {}
}

function refusal({ ok, status, headers }, error) {
  return new BrokerError({
    code: ok ? "invalid_answer" : `status_${status}`,
    message: `An answer with status ${status} came that is not the broker's.`,
    ...error,
    retryable: status === 408 || status === 429 || status >= 500,
    retryAfter: Number(headers.get("Retry-After")) || undefined,
    status,
  });
}

async function cancel(address) {
  for (let n = 0; n < CANCEL_ATTEMPTS; n++) {
    const response = await fetch(address, { method: "DELETE", keepalive: true }).catch(() => null);
    if (response?.status < 500) return;
    await new Promise((wake) => setTimeout(wake, pause(n)));
  }
}

/** The text in a chunk: a text or a list of parts, in a delta or a message, or an event of the Responses dialect. */
function textOf({ type, delta, choices }) {
  if (type) return type === "response.output_text.delta" ? delta : "";
  const choice = choices?.[0];
  const content = choice?.delta?.content ?? choice?.message?.content;
  return Array.isArray(content) ? content.map((part) => (part?.type === "text" && part.text) || "").join("") : content;
}

function recall({ remember, ...options }) {
  return attempt(() => JSON.parse(remember.getItem(slotOf(options))));
}

function unreachable() {
  return new BrokerError({ code: "unreachable", message: "The broker cannot be reached.", retryable: true });
}

/** Milliseconds before the next attempt, of which there were `n` without success. */
function pause(n) {
  return Math.min(LONGEST_PAUSE, 500 * 2 ** n) * (0.75 + Math.random() / 2);
}

function baseOf({ base = import.meta.url.replace(/\/[^/]*$/, "") }) {
  return base.replace(/\/$/, "");
}

/** Where a session is remembered: one for each broker and idempotency key. */
function slotOf(options) {
  return `session-broker ${baseOf(options)} ${options.idempotencyKey ?? ""}`;
}
