// A transport for the Vercel AI SDK: its useChat speaks with the broker, without a server of its own in between.

import type { ChatRequestOptions, ChatTransport, FinishReason, UIMessage, UIMessageChunk } from "ai";
import { chat, resume } from "./client.js";
import type { BrokerError, Chat, Chunk, Done, Event, Options, Remember, ToolCall } from "./client.js";
import { argumentsOf, joined, placeOf } from "./tool-calls.js";

export interface TransportOptions extends Omit<Options, "events" | "onstate" | "signal" | "idempotencyKey"> {
  /** The model to ask; without one, the broker's own default. */
  model?: string | undefined;

  /** Other parameters of the request, such as `temperature` or `tools`; `body` of a single call comes before them. */
  request?: Record<string, unknown> | (() => Record<string, unknown>) | undefined;

  /** Makes the request's `messages` of those of the AI SDK; `toMessages` by default. */
  convert?: ((messages: UIMessage[]) => object[]) | undefined;

  /** Called with each state of an answer, and with the place where it is `queued`. */
  onstate?: Options["onstate"];
}

const FIRST_EVENT = 1000; // ms in which a session that is gone is told; one that is there may think for longer

/** The metadata of an assistant's message: how it ended, with `cost` in US dollars and `usage`. */
export type BrokerMetadata = Done;

/**
 * A `ChatTransport` for `useChat`:
 *
 *     const chat = useChat({ transport: new BrokerChatTransport({ base: "https://broker.example", model }) });
 *
 * With `remember: sessionStorage` and `useChat({ resume: true })`, an answer goes on after a reload.
 */
export class BrokerChatTransport<UI_MESSAGE extends UIMessage = UIMessage> implements ChatTransport<UI_MESSAGE> {
  /** After a reload the whole answer is read again. */
  readonly resumeStreamIsReplay = true;

  readonly #options: TransportOptions;

  constructor(options: TransportOptions = {}) {
    this.#options = options;
  }

  async sendMessages(asked: Parameters<ChatTransport<UI_MESSAGE>["sendMessages"]>[0]): Promise<ReadableStream<UIMessageChunk>> {
    const { model, request, convert = toMessages } = this.#options;
    const parameters = typeof request === "function" ? request() : request;
    const messages = convert(asked.messages);
    const body = { ...(model && { model }), ...parameters, ...asked.body, messages };
    const continues = asked.messages.at(-1)?.role === "assistant"; // the results of tools are parts of its message
    return answerOf(chat(body, this.#optionsOf(asked)), continues);
  }

  async reconnectToStream(asked: Parameters<ChatTransport<UI_MESSAGE>["reconnectToStream"]>[0]): Promise<ReadableStream<UIMessageChunk> | null> {
    const options = this.#optionsOf(asked);
    const { remember } = options;
    const known = remember && resume(null, "", { ...options, remember });
    return known && !(await isGone(known)) ? answerOf(known) : null;
  }

  #optionsOf({ chatId, headers, abortSignal }: ChatRequestOptions & { chatId: string; abortSignal?: AbortSignal | undefined }): Options {
    const { model, request, convert, remember, ...options } = this.#options;
    const bearer = new Headers(headers).get("Authorization")?.replace(/^Bearer /, "");
    return {
      ...options,
      ...(bearer && { token: bearer }),
      remember: remember && slotsOf(remember, chatId),
      signal: abortSignal,
    };
  }
}

/** The page's storage, where each chat has a name of its own. */
function slotsOf(remember: Remember, chatId: string): Remember {
  const name = (what: string) => `${what} ${chatId}`;
  return {
    getItem: (what) => remember.getItem(name(what)),
    setItem: (what, value) => remember.setItem(name(what), value),
    removeItem: (what) => remember.removeItem(name(what)),
  };
}

/** Whether the broker no longer has a session; a page that was closed for long has nothing to continue. */
async function isGone(followed: Chat): Promise<boolean> {
  const gone = followed.events().next().then(
    () => false,
    ({ code }: BrokerError) => code === "session_not_found" || code === "session_expired",
  );
  const late = new Promise<false>((resolve) => setTimeout(() => resolve(false), FIRST_EVENT));
  return Promise.race([gone, late]);
}

/** Return the answer as the AI SDK reads it. It fails with the `BrokerError`, which `useChat` then has as its `error`. */
function answerOf(followed: Chat, continues = false): ReadableStream<UIMessageChunk> {
  const events = followed.events();
  // The same id after a reload, so that a message which the page has stored by half is replaced.
  const parts = createParts(() => (continues ? {} : { messageId: `answer-${followed.sessionId?.slice(0, 8)}` }));
  return new ReadableStream<UIMessageChunk>({
    async pull(controller) {
      try {
        // A pull has to give something, and not every event says something.
        for (let given = 0; !given; ) {
          const { value, done } = await events.next();
          if (done) return controller.close();
          for (const part of parts(value)) {
            controller.enqueue(part);
            given++;
          }
        }
      } catch (error) {
        controller.error(error);
      }
    },
    cancel() {
      void events.return?.();
    },
  });
}

/** Make the parts of the AI SDK of the events of one session, which are given in order. */
function createParts(head: () => { messageId?: string }) {
  let started = false;
  let open: { type: "text" | "reasoning"; id: string } | null = null;
  let blocks = 0;
  const calls: ToolCall[] = [];
  const details: unknown[] = []; // of the reasoning, which some models want back with the results of their tools
  const sources = new Set<string>();

  return function* (event: Event): Generator<UIMessageChunk> {
    if (event.type !== "chunk" && event.type !== "done") return;
    if (!started) {
      started = true;
      yield { type: "start", ...head() };
      yield { type: "start-step" };
    }
    if (event.type === "chunk") yield* said(event.data);
    else yield* ended(event.data);
  };

  function* said({ choices }: Chunk): Generator<UIMessageChunk> {
    const said = choices?.[0]?.delta ?? choices?.[0]?.message;
    if (!said) return;
    if (Array.isArray(said.reasoning_details)) details.push(...said.reasoning_details);
    yield* written("reasoning", said.reasoning ?? said.reasoning_content);
    yield* written("text", textOf(said.content));
    yield* written("text", said.refusal);
    for (const piece of said.tool_calls ?? []) yield* called(piece);
    for (const annotation of listOf(said.annotations)) {
      const { url, title } = annotation?.url_citation ?? {};
      if (!url || sources.has(url)) continue;
      sources.add(url);
      yield { type: "source-url", sourceId: `source-${sources.size}`, url, ...(title && { title }) };
    }
    for (const image of listOf(said.images)) {
      const url: string | undefined = image?.image_url?.url;
      if (url) yield { type: "file", url, mediaType: /^data:([^;,]+)/.exec(url)?.[1] ?? "image/*" };
    }
  }

  function* written(type: "text" | "reasoning", delta: unknown): Generator<UIMessageChunk> {
    if (typeof delta !== "string" || !delta) return;
    if (open?.type !== type) {
      yield* closed();
      open = { type, id: `${type}-${++blocks}` };
      yield { type: `${type}-start`, id: open.id };
    }
    yield { type: `${type}-delta`, id: open.id, delta };
  }

  function* closed(): Generator<UIMessageChunk> {
    if (open) yield { type: `${open.type}-end`, id: open.id };
    open = null;
  }

  function* called(piece: ToolCall): Generator<UIMessageChunk> {
    let at = placeOf(piece, calls);
    const isNew = at < 0;
    if (isNew) at = calls.push(piece) - 1;
    else calls[at] = joined(calls[at]!, piece);
    const call = calls[at]!;
    if (isNew) {
      yield* closed();
      call.id ||= `call_${at}`; // a few services give none
      yield { type: "tool-input-start", toolCallId: call.id, toolName: call.function?.name ?? "" };
    }
    const inputTextDelta = argumentsOf(piece);
    if (inputTextDelta) yield { type: "tool-input-delta", toolCallId: call.id!, inputTextDelta };
  }

  function* ended(done: Done): Generator<UIMessageChunk> {
    yield* closed();
    for (const call of calls) {
      const { id, index, type, function: named, ...others } = call;
      const extra = { ...others, ...(details.length && { reasoning_details: details }) };
      const input = {
        toolCallId: id!,
        toolName: named?.name ?? "",
        // Signatures of thoughts and the like go back with the results; `toMessages` puts them there.
        ...(Object.keys(extra).length && { providerMetadata: { broker: extra as Record<string, never> } }),
      };
      try {
        yield { ...input, type: "tool-input-available", input: JSON.parse(argumentsOf(call) || "{}") };
      } catch {
        const errorText = "The model wrote arguments that are no JSON.";
        yield { ...input, type: "tool-input-error", input: argumentsOf(call), errorText };
      }
    }
    yield { type: "finish-step" };
    if (done.finishReason === "cancelled") {
      yield { type: "message-metadata", messageMetadata: done };
      yield { type: "abort" };
    } else yield { type: "finish", finishReason: reasonOf(done), messageMetadata: done };
  }
}

function reasonOf({ finishReason }: Done): FinishReason {
  const name = finishReason?.replace("_", "-");
  return name === "stop" || name === "length" || name === "tool-calls" || name === "content-filter" ? name : "other";
}

function textOf(content: unknown): unknown {
  if (!Array.isArray(content)) return content;
  return content.map((part) => (typeof part === "string" ? part : part?.type === "text" ? part.text : "")).join("");
}

function listOf(value: unknown): any[] {
  return Array.isArray(value) ? value : [];
}

/** Make the messages of a chat-completions request of those of the AI SDK. */
export function toMessages(messages: UIMessage[]): object[] {
  return messages.flatMap(({ role, parts }) => {
    if (role === "assistant") return stepsOf(parts).flatMap(toStep);
    const content = parts.flatMap(toPart);
    const text = content.every((part) => "text" in part);
    return [{ role, content: text ? content.map((part) => (part as { text: string }).text).join("") : content }];
  });
}

type Parts = UIMessage["parts"];
type Part = Parts[number];

function toPart(part: Part): object[] {
  if (part.type === "text") return [{ type: "text", text: part.text }];
  if (part.type !== "file") return [];
  if (/^image\b/.test(part.mediaType)) return [{ type: "image_url", image_url: { url: part.url } }];
  return [{ type: "file", file: { filename: part.filename ?? "file", file_data: part.url } }];
}

/** The parts of each step: one answer of the model, with the results of its tools. */
function stepsOf(parts: Parts): Parts[] {
  const steps: Parts[] = [[]];
  for (const part of parts) {
    if (part.type === "step-start") steps.push([]);
    else steps.at(-1)!.push(part);
  }
  return steps;
}

/** The message of one step and those of its tools. A call without a result is left out: services refuse it. */
function toStep(parts: Parts): object[] {
  const content = parts.map((part) => (part.type === "text" ? part.text : "")).join("");
  const used = parts.flatMap((part) => toolOf(part) ?? []);
  if (!content && !used.length) return [];
  const details = used[0]?.details; // the same with each call
  return [
    {
      role: "assistant",
      content,
      ...(used.length && { tool_calls: used.map(({ call }) => call) }),
      ...(details ? { reasoning_details: details } : {}),
    },
    ...used.map(({ call, result }) => ({ role: "tool", tool_call_id: call.id, content: result })),
  ];
}

function toolOf(part: Part): { call: ToolCall; result: string; details: unknown } | null {
  if (!("toolCallId" in part)) return null;
  const name = part.type === "dynamic-tool" ? part.toolName : part.type.slice("tool-".length);
  let result: string;
  if (part.state === "output-available") result = typeof part.output === "string" ? part.output : JSON.stringify(part.output ?? null);
  else if (part.state === "output-error") result = part.errorText;
  else if (part.state === "output-denied") result = "The user did not allow this.";
  else return null;
  const { reasoning_details: details, ...extra } = (part.callProviderMetadata?.broker ?? {}) as Record<string, unknown>;
  const written = { name, arguments: typeof part.input === "string" ? part.input : JSON.stringify(part.input ?? {}) };
  return { call: { ...extra, id: part.toolCallId, type: "function", function: written }, result, details };
}
