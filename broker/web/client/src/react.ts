"use client";

// The hook for React. What it shows lives in a store beside React, so a render never sees half of a change, and a
// component that is mounted twice, as in StrictMode, neither asks twice nor stops the answer.

import { useEffect, useState, useSyncExternalStore } from "react";
import { chat, resume } from "./client.js";
import type { BrokerError, Chat, Done, Options, Place, Remember, State, Token, ToolCall } from "./client.js";
import { joined, placeOf } from "./tool-calls.js";

export interface UseChatOptions extends Omit<Options, "events" | "onstate" | "signal"> {
  /** The model to ask; without one, the broker's own default. */
  model?: string | undefined;

  /** Other parameters of the request, such as `temperature` or `tools`. */
  request?: Record<string, unknown> | undefined;

  /** The conversation to start with. */
  messages?: readonly NewMessage[] | undefined;

  /** Tells the chats of a page apart that remember their messages. */
  id?: string | undefined;
}

export interface NewMessage {
  role: "system" | "developer" | "user" | "assistant" | "tool";

  /** A text, or a list of parts as a chat-completions request has them. */
  content: string | readonly object[];

  /** Of an assistant. */
  toolCalls?: readonly ToolCall[];

  /** Of a tool: the id of the call that this is the result of. */
  toolCallId?: string;
}

export interface Message extends NewMessage {
  readonly id: string;

  /** What a model thought before it answered. */
  reasoning?: string;

  /** How the answer ended, with its cost; absent until then, and where it failed. */
  result?: Done;
}

/** What a component shows. A new object for each change. */
export interface Snapshot {
  readonly messages: readonly Message[];

  /** `idle` before the first question, else the state of the newest answer. */
  readonly state: State | "idle";

  /** The place in line while the state is `queued`. */
  readonly place: Place | undefined;

  /** Why the newest answer failed; what `token` threw, where that failed. */
  readonly error: BrokerError | undefined;

  /** Whether an answer is under way. */
  readonly busy: boolean;
}

export interface UseChat extends Snapshot {
  /** Ask, or give the results of tools. An answer under way is stopped first. */
  send(asked: string | NewMessage | readonly NewMessage[]): void;

  /** Stop the answer; what has come stays. */
  stop(): void;

  /** Ask for the newest answer once more, in place of the one that is there. */
  retry(): void;

  /** Replace the conversation. An answer under way is stopped first. */
  setMessages(messages: readonly NewMessage[]): void;
}

const FLUSH = 30; // ms between two renders of a text that grows, however fast it comes

/**
 * Chat with a model:
 *
 *     const { messages, send, stop, busy, error } = useChat({ base: "https://broker.example", model });
 *
 * A component that is unmounted stops its answer, unless `keep` is set. With `remember`, messages and answer are there
 * again after a reload.
 */
export function useChat(options: UseChatOptions = {}): UseChat {
  const [store] = useState(() => createStore(options));
  useEffect(() => store.use(options));
  const snapshot = useSyncExternalStore(store.subscribe, store.read, store.read);
  return { ...snapshot, send: store.send, stop: store.stop, retry: store.retry, setMessages: store.setMessages };
}

function createStore(options: UseChatOptions) {
  const listeners = new Set<() => void>();
  let snapshot: Snapshot = {
    messages: (options.messages ?? []).map((message, n) => ({ ...message, id: `first-${n}` })),
    state: "idle",
    place: undefined,
    error: undefined,
    busy: false,
  };
  let current: { chat: Chat; leave: AbortController } | null = null;
  let answer: Message | null = null; // the newest state of the answer under way, at most FLUSH ms ahead of the snapshot
  let flushing: ReturnType<typeof setTimeout> | undefined;
  let leaving: ReturnType<typeof setTimeout> | undefined;
  let begun = false;

  return { subscribe, read: () => snapshot, use: (now: UseChatOptions) => void (options = now), send, stop, retry, setMessages };

  function subscribe(listener: () => void) {
    listeners.add(listener);
    clearTimeout(leaving);
    begin();
    return () => {
      listeners.delete(listener);
      // Not at once: React's StrictMode unmounts and mounts again in one go.
      leaving = setTimeout(() => listeners.size || leave());
    };
  }

  function leave() {
    current?.leave.abort();
    begun = false;
  }

  /** Continue what was under way before a reload. */
  function begin() {
    if (begun) return;
    begun = true;
    const remember = slots();
    if (!remember || current) return;
    const known = attempt(() => JSON.parse(remember.getItem("messages")!) as Message[]);
    if (known) change({ messages: known });
    follow((followed) => resume(null, "", { ...followed, remember }));
  }

  function send(asked: string | NewMessage | readonly NewMessage[]) {
    const given = typeof asked === "string" ? [{ role: "user" as const, content: asked }] : [asked].flat();
    // A double click, or an effect that React's StrictMode runs twice, means one question.
    const before = snapshot.messages.slice(-given.length).map(wire);
    if (snapshot.state === "preparing" && JSON.stringify(before) === JSON.stringify(given.map(wire))) return;
    halt();
    ask([...snapshot.messages, ...given.map(named)]);
  }

  function retry() {
    halt();
    const last = snapshot.messages.findLastIndex((message) => message.role !== "assistant");
    ask(snapshot.messages.slice(0, last + 1));
  }

  function stop() {
    current?.chat.stop();
  }

  function setMessages(messages: readonly NewMessage[]) {
    halt();
    change({ messages: messages.map(named), state: "idle", place: undefined, error: undefined, busy: false });
    save();
  }

  /** End the answer under way, with what has come of it. */
  function halt() {
    stop();
    flush();
    current = answer = null;
  }

  function ask(messages: readonly Message[]) {
    const { model, request } = options;
    change({ messages });
    save();
    const asked = messages.filter(({ content, toolCalls }) => content.length || toolCalls?.length).map(wire);
    follow((followed) => chat({ ...request, ...(model && { model }), messages: asked }, followed));
  }

  async function follow(start: (options: Options) => Chat | null) {
    const leave = new AbortController();
    const { model, request, messages, id, ...shared } = options;
    let mine: typeof current = null;
    const followed = start({
      ...shared,
      remember: slots(),
      events: "token",
      signal: leave.signal,
      onstate: (state, place) => {
        // The end is shown with the last words, which are read a moment later.
        if (state !== "ended" && (!mine || current === mine)) change({ state, place, busy: true, error: undefined });
      },
    });
    if (!followed) return;
    current = mine = { chat: followed, leave };
    answer = named({ role: "assistant", content: "" });
    let error: BrokerError | undefined;
    try {
      for await (const event of followed.events()) {
        if (current !== mine) return;
        if (event.type === "token") answer = grown(answer, event.data);
        else if (event.type === "done") answer = { ...answer, result: event.data };
        else continue;
        flushing ??= setTimeout(flush, FLUSH);
      }
    } catch (failure) {
      error = failure as BrokerError;
    }
    if (current !== mine) return;
    flush();
    const left = !error && !answer.result;
    current = answer = null;
    change({ state: "ended", place: undefined, busy: false, error });
    if (!left) save(); // else the whole answer is read again by who continues it
  }

  /** Show what has come of the answer. */
  function flush() {
    clearTimeout(flushing);
    flushing = undefined;
    if (!answer || !(answer.content || answer.reasoning || answer.toolCalls || answer.result)) return;
    const { id } = answer;
    change({ messages: [...snapshot.messages.filter((message) => message.id !== id), answer] });
  }

  function change(part: Partial<Snapshot>) {
    snapshot = { ...snapshot, ...part };
    for (const listener of listeners) listener();
  }

  /** Store the conversation, without the answer under way: that one is read again. */
  function save() {
    attempt(() => slots()?.setItem("messages", JSON.stringify(snapshot.messages)));
  }

  /** The page's storage, where this chat has names of its own. */
  function slots(): Remember | undefined {
    const { remember, id = "" } = options;
    const name = (what: string) => `session-broker-react ${id} ${what}`;
    return remember && {
      getItem: (what) => remember.getItem(name(what)),
      setItem: (what, value) => remember.setItem(name(what), value),
      removeItem: (what) => remember.removeItem(name(what)),
    };
  }
}

function grown(message: Message, { text = "", reasoning, toolCalls }: Token): Message {
  const next: Message = { ...message, content: message.content + text };
  if (reasoning) next.reasoning = (message.reasoning ?? "") + reasoning;
  if (toolCalls) {
    const calls = [...(message.toolCalls ?? [])];
    for (const piece of toolCalls) {
      const at = placeOf(piece, calls);
      if (at < 0) calls.push(piece);
      else calls[at] = joined(calls[at]!, piece);
    }
    next.toolCalls = calls;
  }
  return next;
}

function named(message: NewMessage): Message {
  return { ...message, id: Math.random().toString(36).slice(2) };
}

/** A message as a request has it. */
function wire({ role, content, toolCalls, toolCallId }: NewMessage): object {
  return {
    role,
    content,
    ...(toolCalls?.length && { tool_calls: toolCalls }),
    ...(toolCallId && { tool_call_id: toolCallId }),
  };
}

/** Return what `act` returns, or undefined where it throws: a storage may be full, absent, or hold something else. */
function attempt<T>(act: () => T): T | undefined {
  try {
    return act();
  } catch {}
}
