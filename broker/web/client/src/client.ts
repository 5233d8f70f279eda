/*! The Session Broker's client. MIT. Types: client.d.ts */

// `npm run build` makes of this file client.js, which is served, and client.d.ts.

/** Follows one session. Iterate over it for the text of the answer, as often as wanted, each time from its start. */
export interface Chat extends AsyncIterable<string> {
  /** Iterate over all events, those of the text included. */
  events(): AsyncIterableIterator<Event>;

  /** The end of the answer. Rejected with a `BrokerError` where it fails; nothing happens if it is not used. */
  readonly result: Promise<Done>;

  /** Stop the session, also while it is prepared or waits in line. Returns `result`, then an end with `cancelled`. */
  stop(): Promise<Done>;

  /** Null while it is prepared. */
  readonly sessionId: string | null;

  /** The cursor of the last event; empty before the first one. */
  readonly lastEventId: string;

  readonly state: State;

  /** Called with each new state, and with the place where the state is `queued`. */
  onstate: ((state: State, place?: Place) => void) | undefined;
}

/**
 * - `preparing`: waits for /prepare.
 * - `queued`: waits in line for a free slot.
 * - `connecting`: waits for the first event.
 * - `streaming`: the answer arrives.
 * - `reconnecting`: the connection was lost, or the broker asked to come again.
 * - `stalled`: connected, but nothing came for `stallAfter` seconds.
 * - `ended`: `result` is settled.
 */
export type State = "preparing" | "queued" | "connecting" | "streaming" | "reconnecting" | "stalled" | "ended";

/** A place in line, counted from 1, of that many pages of this client. */
export interface Place {
  position: number;
  of: number;
}

export interface Options {
  /** The URL of the broker; otherwise the folder from which /client.js was loaded, or, from npm, the page's origin. */
  base?: string | undefined;

  /** For `Authorization: Bearer`. A function is called for each /prepare, and once more, with true, after a 401. */
  token?: string | ((again: boolean) => string | null | undefined | Promise<string | null | undefined>) | undefined;

  /** Leaves the chat when it is aborted, as `break` does. */
  signal?: AbortSignal | undefined;

  /** Prepare once, however often this is called with the same key and request. */
  idempotencyKey?: string | undefined;

  /** The constructor to use where there is none in the platform, as in Node. */
  EventSource?: (new (url: string) => EventSourceLike) | undefined;

  /** Seconds without an event after which the state is `stalled`; 10 by default. */
  stallAfter?: number | undefined;

  /** Leave without stopping the session; then `result` is rejected with the code `left`. */
  keep?: boolean | undefined;

  /** Where session id and cursor are stored until the end, such as `sessionStorage`. */
  remember?: Remember | undefined;

  /** `token`: `events()` tells the short form, events of the type `token` in place of `chunk`. */
  events?: "chunk" | "token" | undefined;

  onstate?: ((state: State, place?: Place) => void) | undefined;
}

/** What is used of a `Storage`. */
export interface Remember {
  getItem(name: string): string | null;
  setItem(name: string, value: string): void;
  removeItem(name: string): void;
}

/** What is used of an `EventSource`. */
export interface EventSourceLike {
  readonly readyState: number;
  addEventListener(type: string, listener: (event: any) => void): void;
  close(): void;
}

/** A chat-completions request, or one of the Responses dialect. */
export type Request = ChatRequest | ResponsesRequest;

export interface ChatRequest {
  model?: string | undefined;
  messages: readonly object[];
  [parameter: string]: unknown;
}

export interface ResponsesRequest {
  model?: string | undefined;
  input: string | readonly object[];
  [parameter: string]: unknown;
}

export type Event =
  | { type: "chunk"; data: Chunk }
  | { type: "token"; data: Token }
  | { type: "queued"; data: Place }
  | { type: "ping"; data: object }
  | { type: "done"; data: Done }
  | { type: "error"; data: StreamError };

/** A chunk as the upstream sent it. It has what its service writes; only the usual parts are typed. */
export interface Chunk {
  /** In the Responses dialect: the kind of the event. */
  type?: string;
  choices?: { index?: number; delta?: Delta; message?: Delta; finish_reason?: string | null; [key: string]: unknown }[];
  usage?: Record<string, unknown> | null;
  [key: string]: any;
}

export interface Delta {
  role?: string;
  content?: string | { type?: string; text?: string; [key: string]: unknown }[] | null;
  reasoning?: string | null;
  tool_calls?: ToolCall[];
  [key: string]: unknown;
}

/** A piece of a tool call: pieces with the same `index` are one call, their `arguments` follow one another. */
export interface ToolCall {
  index?: number;
  id?: string | null;
  type?: string | null;
  function?: { name?: string | null; arguments?: string };
  [key: string]: unknown;
}

/** What a chunk says, in the short form. Each part is only there where there is any. */
export interface Token {
  text?: string;
  reasoning?: string;
  toolCalls?: ToolCall[];
}

/** How an answer ended. What is not known is null. */
export interface Done {
  /** `stop`, `length`, `tool_calls`, `content_filter`, or `cancelled` for a stopped session. */
  finishReason: string | null;
  nativeFinishReason: string | null;
  model: string | null;
  provider: string | null;
  generationId: string | null;
  /** As the upstream counted it. */
  usage: Record<string, any> | null;
  /** In US dollars. */
  cost: number | null;
  estimated: boolean;
  ttftMs: number | null;
  totalMs: number | null;
}

/** An error that the broker tells in the stream. Where `final` is false, the answer may still come. */
export interface StreamError {
  code: string;
  message: string;
  final: boolean;
  retryable: boolean;
  retryAfter?: number;
  upstreamStatus?: number;
}

/** A refused /prepare, a failed answer, or a broker that cannot be reached. */
export class BrokerError extends Error {
  /**
   * A code of the broker's, or `unreachable`, `status_502` or the like and `invalid_answer` for an answer that is not the
   * broker's, `left` for a page that left with `keep`.
   */
  declare readonly code: string;

  /** For a 422, a list of `{field, message}`. */
  declare readonly details: unknown;

  /** Whether the same request may succeed later. */
  declare readonly retryable: boolean;

  /** In how many seconds. */
  declare readonly retryAfter: number | undefined;

  /** The status of the refused /prepare, or that of the upstream where an answer failed. */
  declare readonly status: number | undefined;

  constructor({ code, message, details, retryable = false, retryAfter, status }: {
    code: string;
    message: string;
    details?: unknown;
    retryable?: boolean | undefined;
    retryAfter?: number | undefined;
    status?: number | undefined;
  }) {
    super(message);
    this.name = "BrokerError";
    Object.assign(this, { code, details, retryable, retryAfter, status });
  }
}

/** A session that one or several callers in this page use. */
interface Shared {
  _users: number;
  _ready: Promise<string>;
  _forget(): void;
}

interface EventLog {
  _iterate<T>(leave: () => void, pick: (event: Event) => T | false | null | undefined | ""): AsyncIterableIterator<T>;
  _any(): number;
  _add(event: Event): void;
  _close(error: unknown): void;
}

const LIFE = 15 * 60_000; // how long a session can live without its page, by the default settings
const PREPARE_TIMEOUT = 60_000;
const STOP_TIMEOUT = 10_000; // the longest wait for the broker's own end of a stopped session
const CANCEL_ATTEMPTS = 5;
const LONGEST_PAUSE = 15_000;
const LATE = 5_000; // a timer that is later than this tells that the device slept

const OPEN = 1; // EventSource.OPEN and CLOSED, which an EventSource for Node need not have
const CLOSED = 2;

const LEFT = "left";

const CANCELLED: Done = {
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
const used = new Map<string, Shared>();

/**
 * Prepare a chat and follow its answer. Iterate over the returned object for the text:
 *
 *     for await (const text of chat({ model, messages })) show(text);
 *
 * Leaving the loop by `break`, `return` or `throw` stops the session, unless `keep` is set. The loop throws what
 * `result` is rejected with.
 */
export function chat(request: Request, options: Options = {}): Chat {
  const body = JSON.stringify(request);
  const name = options.idempotencyKey && slotOf(options) + body;
  return follow(options, share(name, () => prepare(body, options)));
}

/**
 * Continue a session after a reload of the page, behind the event `lastEventId`, or from its start where that is empty.
 */
export function resume(sessionId: string, lastEventId?: string | null, options?: Options): Chat;

/**
 * Continue the session that `options.remember` holds. Returns null where it holds none. `base` and `idempotencyKey` must
 * be those of the `chat` before.
 *
 * @param lastEventId in place of the remembered one: `""` for the whole answer from its start.
 */
export function resume(
  sessionId: null | undefined,
  lastEventId: string | null | undefined,
  options: Options & { remember: Remember },
): Chat | null;

export function resume(sessionId?: string | null, lastEventId?: string | null, options: Options = {}): Chat | null {
  if (!sessionId) {
    const known = recall(options);
    if (!known) return null;
    sessionId = known[0];
    lastEventId ??= known[1];
  }
  const found = sessionId;
  // Nothing follows a terminal cursor. At the event before it, the end is told again.
  const cursor = (lastEventId ?? "").replace(/^(\d-)(\d+)\.end$/, (_, epoch, n) => epoch + (n - 1));
  return follow(options, share(baseOf(options) + found, async () => found), found, cursor);
}

/** Follow a session from its preparation to its end. */
function follow(options: Options, shared: Shared, sessionId: string | null = null, cursor = ""): Chat {
  const log = eventLog();
  const timers: Record<string, ReturnType<typeof setTimeout>> = {};
  const listeners = new AbortController();
  const stallAfter = (options.stallAfter ?? 10) * 1000;
  let source: EventSourceLike | undefined; // the EventSource of now, once there is one
  let settle: { _resolve(result: Done): void; _reject(error: unknown): void };
  let short: boolean | undefined = options.events === "token" || undefined; // the form to ask for, once it is known
  let over = false;
  let stopping = false;
  let losses = 0; // connections that the browser gave up, without an event between them
  let lostAt = 0;
  let heardAt = Date.now();

  const chat = {
    sessionId,
    lastEventId: cursor,
    onstate: options.onstate,
    result: new Promise<Done>((_resolve, _reject) => (settle = { _resolve, _reject })),
    stop,
    events() {
      if (options.events !== "token") {
        if (!source) short = false;
        // The text is enough for the caller before, so the chunks were not asked for. A viewer of its own gets them.
        else if (short) {
          return resume(chat.sessionId!, cursor, { ...options, remember: undefined, onstate: undefined }).events();
        }
      }
      return log._iterate(leave, (event) => event);
    },
    [Symbol.asyncIterator]() {
      short ??= true;
      return log._iterate(leave, ({ type, data }) => (type === "token" ? data.text : type === "chunk" && textOf(data)));
    },
  } as unknown as { -readonly [name in keyof Chat]: Chat[name] };
  chat.result.catch(() => {}); // who only reads the text gets the error there
  say(sessionId ? "connecting" : "preparing");
  listen();
  begin();
  return chat;

  async function begin() {
    try {
      const found = await shared._ready;
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
    short ??= false;
    const cursor = chat.lastEventId && `&lastEventId=${encodeURIComponent(chat.lastEventId)}`;
    const url = `${address(chat.sessionId!)}?events=${short ? "token" : "chunk"}${cursor}`;
    const opened = (source = new (options.EventSource ?? EventSource)(url));
    const on = (type: string, act: (event: any) => void) =>
      opened.addEventListener(type, (event) => opened === source && act(event));
    on("open", connected);
    for (const type of ["chunk", "token", "ping", "queued", "done", "error"] as const) {
      on(type, (event) => (event.data === undefined ? lost() : hear(type, JSON.parse(event.data), event.lastEventId)));
    }
    if (chat.state !== "queued") say(losses || log._any() ? "reconnecting" : "connecting");
    watch();
  }

  function connected() {
    lostAt = 0;
    if (chat.state === "reconnecting") say(chat.lastEventId ? "streaming" : "connecting");
    watch();
  }

  function hear(type: Event["type"], data: any, id?: string) {
    if (over) return;
    losses = lostAt = 0;
    heardAt = Date.now();
    chat.lastEventId = id || chat.lastEventId;
    log._add({ type, data });
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
    if (source!.readyState === CLOSED) after("open", pause(losses++), open);
  }

  /** Say so when nothing comes for a while, and connect again when the device has slept meanwhile. */
  function watch() {
    const due = Date.now() + stallAfter;
    after("silence", stallAfter, () => {
      if (Date.now() > due + LATE) return back();
      if (chat.state === "connecting" || source!.readyState === OPEN) say("stalled");
    });
  }

  function listen() {
    const { signal } = listeners;
    const on = (target: any, type: string, act: (event: any) => void) => target?.addEventListener?.(type, act, { signal });
    const silent = () => source?.readyState !== OPEN || Date.now() - heardAt > stallAfter;
    const { document } = globalThis;
    on(globalThis, "online", back);
    on(globalThis, "pageshow", (event) => event.persisted && back());
    on(document, "resume", back);
    on(document, "visibilitychange", () => !document.hidden && silent() && back());
    on(options.signal, "abort", leave);
    if (options.signal?.aborted) queueMicrotask(leave); // later, when the caller has the chat
  }

  /** Connect again at once: the page was away, and its connection may be dead without a word. */
  function back() {
    lostAt = losses = 0;
    if (source) open();
  }

  function stop() {
    if (over || stopping) return chat.result;
    stopping = true;
    shared._users--;
    const cancelled = () => hear("done", CANCELLED);
    if (source) after("stop", STOP_TIMEOUT, cancelled);
    else cancelled();
    cancelSession(cancelled);
    return chat.result;
  }

  /** Stop the session at the broker, unless somebody else in this page uses it. */
  async function cancelSession(cancelled: () => void) {
    const found = await shared._ready.catch(() => null);
    if (shared._users) return cancelled();
    shared._forget();
    forget();
    if (found) await cancel(address(found));
    // A line that waits to reconnect would learn of the end too late.
    if (source?.readyState !== OPEN && found) open();
  }

  /** What a page does that breaks off its loop. */
  function leave() {
    if (options.keep) end(new BrokerError({ code: LEFT, message: "The page left." }));
    else stop();
  }

  function end(failure: unknown, result?: Done) {
    if (over) return;
    over = true;
    listeners.abort();
    source?.close();
    Object.values(timers).forEach(clearTimeout);
    if (!stopping && !--shared._users) shared._forget();
    const left = (failure as BrokerError | null)?.code === LEFT;
    if (!left && !stopping) forget();
    if (failure) settle._reject(failure);
    else settle._resolve(result!);
    say("ended");
    log._close(left ? null : failure);
  }

  function say(state: State, place?: Place) {
    if (state === chat.state && !place) return;
    chat.state = state;
    try {
      chat.onstate?.(state, place);
    } catch (error) {
      setTimeout(() => { throw error; }); // the page's bug is told as such, and does not stop the answer
    }
  }

  function after(name: string, ms: number, act: () => void) {
    clearTimeout(timers[name]);
    timers[name] = setTimeout(act, ms);
  }

  function address(id: string) {
    return `${baseOf(options)}/stream/${id}`;
  }

  /** Remember the session no longer. Not at once after a stop: in StrictMode, React stops and resumes in one go. */
  function forget() {
    if (recall(options)?.[0] === chat.sessionId) options.remember!.removeItem(slotOf(options));
  }

  function save() {
    attempt(() => options.remember?.setItem(slotOf(options), JSON.stringify([chat.sessionId, chat.lastEventId])));
  }
}

/** All events of a chat, for any number of iterators, each from the start. */
function eventLog(): EventLog {
  const events: Event[] = [];
  const wakes: (() => void)[] = [];
  let closed = false;
  let failure: unknown;

  function wake() {
    for (const each of wakes.splice(0)) each();
  }

  return {
    /** Iterate over what `pick` makes of the events, but for what is empty. `leave` is called where the reader breaks off. */
    _iterate(leave, pick) {
      let at = 0;
      let left = false;
      return {
        async next() {
          while (!left) {
            while (at < events.length) {
              const value = pick(events[at++]!);
              if (value) return { value, done: false };
            }
            if (failure) throw failure;
            if (closed) break;
            await new Promise<void>((resolve) => wakes.push(resolve));
          }
          return { value: undefined, done: true };
        },
        async return(value) {
          left = true;
          leave();
          wake();
          return { value, done: true };
        },
        [Symbol.asyncIterator]() { return this; },
      };
    },
    _any: () => events.length,
    _add(event) {
      events.push(event);
      wake();
    },
    _close(error) {
      closed = true;
      failure = error;
      wake();
    },
  };
}

function share(name: string | undefined, begin: () => Promise<string>): Shared {
  let shared = used.get(name!);
  if (!shared) {
    const made: Shared = { _users: 0, _ready: begin(), _forget: () => used.get(name!) === made && used.delete(name!) };
    shared = made;
    if (name) used.set(name, shared);
  }
  shared._users++;
  return shared;
}

async function prepare(body: string, options: Options): Promise<string> {
  const { token, idempotencyKey } = options;
  for (let again = false; ; again = true) {
    const headers: Record<string, string> = { "Content-Type": "application/json" };
    const bearer = typeof token === "function" ? await token(again) : token;
    if (bearer) headers.Authorization = `Bearer ${bearer}`;
    if (idempotencyKey) headers["Idempotency-Key"] = idempotencyKey;
    const signal = AbortSignal.timeout?.(PREPARE_TIMEOUT); // React Native has none
    let response, text: string;
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
function attempt<T>(act: () => T): T | undefined {
  try {
    return act();
  } catch {}
}

function refusal({ ok, status, headers }: Response, error: any): BrokerError {
  return new BrokerError({
    code: ok ? "invalid_answer" : `status_${status}`,
    message: `An answer with status ${status} came that is not the broker's.`,
    ...error,
    retryable: status === 408 || status === 429 || status >= 500,
    retryAfter: Number(headers.get("Retry-After")) || undefined,
    status,
  });
}

async function cancel(address: string) {
  for (let n = 0; n < CANCEL_ATTEMPTS; n++) {
    const response = await fetch(address, { method: "DELETE", keepalive: true }).catch(() => null);
    if (response && response.status < 500) return;
    await new Promise((wake) => setTimeout(wake, pause(n)));
  }
}

/** The text in a chunk: a text or a list of parts, in a delta or a message, or an event of the Responses dialect. */
function textOf({ type, delta, choices }: Chunk): string | null | undefined {
  if (type) return type === "response.output_text.delta" ? delta : "";
  const choice = choices?.[0];
  const content = choice?.delta?.content ?? choice?.message?.content;
  return Array.isArray(content) ? content.map((part) => (part?.type === "text" && part.text) || "").join("") : content;
}

function recall({ remember, ...options }: Options): [string, string] | undefined {
  return attempt(() => JSON.parse(remember!.getItem(slotOf(options))!));
}

function unreachable(): BrokerError {
  return new BrokerError({ code: "unreachable", message: "The broker cannot be reached, or does not allow this origin.", retryable: true });
}

/** Milliseconds before the next attempt, of which there were `n` without success. */
function pause(n: number): number {
  return Math.min(LONGEST_PAUSE, 500 * 2 ** n) * (0.75 + Math.random() / 2);
}

function baseOf({ base = import.meta.url.replace(/\/[^/]*$/, "") }: Options): string {
  return base.replace(/\/$/, "");
}

/** Where a session is remembered: one for each broker and idempotency key. */
function slotOf(options: Options): string {
  return `session-broker ${baseOf(options)} ${options.idempotencyKey ?? ""}`;
}
