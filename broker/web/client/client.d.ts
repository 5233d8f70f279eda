/*! The Session Broker's client. MIT. Types: client.d.ts */
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
export type Event = {
    type: "chunk";
    data: Chunk;
} | {
    type: "token";
    data: Token;
} | {
    type: "queued";
    data: Place;
} | {
    type: "ping";
    data: object;
} | {
    type: "done";
    data: Done;
} | {
    type: "error";
    data: StreamError;
};
/** A chunk as the upstream sent it. It has what its service writes; only the usual parts are typed. */
export interface Chunk {
    /** In the Responses dialect: the kind of the event. */
    type?: string;
    choices?: {
        index?: number;
        delta?: Delta;
        message?: Delta;
        finish_reason?: string | null;
        [key: string]: unknown;
    }[];
    usage?: Record<string, unknown> | null;
    [key: string]: any;
}
export interface Delta {
    role?: string;
    content?: string | {
        type?: string;
        text?: string;
        [key: string]: unknown;
    }[] | null;
    reasoning?: string | null;
    tool_calls?: ToolCall[];
    [key: string]: unknown;
}
/** A piece of a tool call: pieces with the same `index` are one call, their `arguments` follow one another. */
export interface ToolCall {
    index?: number;
    id?: string | null;
    type?: string | null;
    function?: {
        name?: string | null;
        arguments?: string;
    };
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
export declare class BrokerError extends Error {
    /**
     * A code of the broker's, or `unreachable`, `status_502` or the like and `invalid_answer` for an answer that is not the
     * broker's, `left` for a page that left with `keep`.
     */
    readonly code: string;
    /** For a 422, a list of `{field, message}`. */
    readonly details: unknown;
    /** Whether the same request may succeed later. */
    readonly retryable: boolean;
    /** In how many seconds. */
    readonly retryAfter: number | undefined;
    /** The status of the refused /prepare, or that of the upstream where an answer failed. */
    readonly status: number | undefined;
    constructor({ code, message, details, retryable, retryAfter, status }: {
        code: string;
        message: string;
        details?: unknown;
        retryable?: boolean | undefined;
        retryAfter?: number | undefined;
        status?: number | undefined;
    });
}
/**
 * Prepare a chat and follow its answer. Iterate over the returned object for the text:
 *
 *     for await (const text of chat({ model, messages })) show(text);
 *
 * Leaving the loop by `break`, `return` or `throw` stops the session, unless `keep` is set. The loop throws what
 * `result` is rejected with.
 */
export declare function chat(request: Request, options?: Options): Chat;
/**
 * Continue a session after a reload of the page, behind the event `lastEventId`, or from its start where that is empty.
 */
export declare function resume(sessionId: string, lastEventId?: string | null, options?: Options): Chat;
/**
 * Continue the session that `options.remember` holds. Returns null where it holds none. `base` and `idempotencyKey` must
 * be those of the `chat` before.
 *
 * @param lastEventId in place of the remembered one: `""` for the whole answer from its start.
 */
export declare function resume(sessionId: null | undefined, lastEventId: string | null | undefined, options: Options & {
    remember: Remember;
}): Chat | null;
