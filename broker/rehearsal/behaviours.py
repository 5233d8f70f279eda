"""The table of the models.

Each model is one row: its script decides what it does, and its description says what a page will see.
"""

from __future__ import annotations

from broker.rehearsal import faults, scripts
from broker.rehearsal.faults import mid_stream_error, refusing
from broker.rehearsal.model_entries import DEAR, FREE, PARAMETERS, UNKNOWN, Model

MODELS = (
    # Answers that end well. The first model is the one that a page uses without choosing.
    Model(
        "rehearsal/plain",
        "Rehearsal: Plain",
        "A few paragraphs of Markdown with a list and a piece of code, at the speed of an ordinary model.",
        scripts.plain,
    ),
    Model(
        "rehearsal/plain:free",
        "Rehearsal: Plain (free)",
        "The same text at the same speed, at a price of zero.",
        scripts.plain,
        prices=FREE,
    ),
    Model(
        "rehearsal/slow",
        "Rehearsal: Slow",
        "Five seconds of nothing but comments, then one paragraph at six tokens a second.",
        scripts.slow,
    ),
    Model(
        "rehearsal/fast",
        "Rehearsal: Fast",
        "Over a thousand chunks as fast as the connection takes them.",
        scripts.fast,
    ),
    Model(
        "rehearsal/long",
        "Rehearsal: Long",
        "Thousands of chunks over some twenty seconds, to see how a page copes with a long answer.",
        scripts.long,
        context_length=131_072,
        max_completion_tokens=16_384,
    ),
    Model(
        "rehearsal/reasoning",
        "Rehearsal: Reasoning",
        "Thoughts in `reasoning` and `reasoning_details` first, then the text.",
        scripts.reasoning,
        prices=DEAR,
        parameters=(*PARAMETERS, "reasoning", "include_reasoning"),
    ),
    Model(
        "rehearsal/tools",
        "Rehearsal: Tools",
        "Two tool calls with their arguments in pieces; once their results are sent back, a text that repeats them.",
        scripts.tools,
        prices=DEAR,
        parameters=(*PARAMETERS, "tools", "tool_choice"),
    ),
    Model(
        "rehearsal/annotations",
        "Rehearsal: Annotations",
        "A paragraph, then a chunk with two web pages cited as its sources.",
        scripts.cited,
        prices=DEAR,
    ),
    Model(
        "rehearsal/unicode",
        "Rehearsal: Unicode",
        "Emoji, many scripts, both directions and combining marks, with every event torn within a character.",
        scripts.unicode,
    ),
    Model(
        "rehearsal/echo",
        "Rehearsal: Echo",
        "The last user message, word for word.",
        scripts.echo,
    ),
    Model(
        "rehearsal/echo:free",
        "Rehearsal: Echo (free)",
        "The last user message, word for word, at a price of zero.",
        scripts.echo,
        prices=FREE,
    ),
    Model(
        "rehearsal/small",
        "Rehearsal: Small",
        "A context of only 2048 tokens, and an answer that says how much of the conversation arrived.",
        scripts.small,
        context_length=2048,
        max_completion_tokens=None,
    ),
    Model(
        "rehearsal/auto",
        "Rehearsal: Auto Router",
        "The plain text under the name of another model, with prices that the catalog does not know.",
        scripts.plain,
        prices=UNKNOWN,
        max_completion_tokens=None,
        routes_to="rehearsal/plain",
    ),
    Model(
        "rehearsal/empty",
        "Rehearsal: Empty",
        "An answer that finishes without a single word.",
        scripts.empty,
    ),
    Model(
        "rehearsal/length",
        "Rehearsal: Length",
        "A text that is cut off after sixty tokens with the finish reason `length`.",
        scripts.length,
    ),
    Model(
        "rehearsal/content-filter",
        "Rehearsal: Content filter",
        "A text that is cut off after twenty tokens with the finish reason `content_filter`.",
        scripts.filtered,
    ),
    Model(
        "rehearsal/refusal",
        "Rehearsal: Refusal",
        "A refusal of the model in `refusal`, in place of a text.",
        scripts.refused,
    ),
    Model(
        "rehearsal/no-usage",
        "Rehearsal: No usage",
        "The plain text, but the stream does not say what it cost.",
        scripts.no_usage,
    ),
    Model(
        "rehearsal/usage-with-choices",
        "Rehearsal: Usage with choices",
        "The plain text, with the usage on the chunk that finishes it.",
        scripts.usage_with_choices,
    ),
    Model(
        "rehearsal/usage-first",
        "Rehearsal: Usage first",
        "The plain text, with a first usage before it and the right one after it.",
        scripts.usage_first,
    ),
    Model(
        "rehearsal/no-done",
        "Rehearsal: No [DONE]",
        "The plain text with a finish reason, but the stream closes without `[DONE]`.",
        scripts.no_done,
    ),
    Model(
        "rehearsal/late",
        "Rehearsal: Late",
        "A paragraph with a finish reason, but the connection stays open and silent after it.",
        faults.late,
    ),
    Model(
        "rehearsal/framing",
        "Rehearsal: Framing",
        "The plain text in events of a rare but lawful form: a byte order mark, CRLF, several data lines.",
        scripts.framing,
    ),
    # Refusals, before anything is generated.
    Model(
        "rehearsal/busy",
        "Rehearsal: Busy",
        "503 with a `Retry-After` of one second when a question comes for the first time, the plain text after that.",
        faults.busy,
    ),
    Model(
        "rehearsal/rate-limited",
        "Rehearsal: Rate limited",
        "429 with a `Retry-After` of forty seconds, every time.",
        faults.rate_limited,
    ),
    Model(
        "rehearsal/unavailable",
        "Rehearsal: Unavailable",
        "502 with the HTML page of a gateway.",
        faults.unavailable,
    ),
    Model(
        "rehearsal/server-error",
        "Rehearsal: Server error",
        "500 with a JSON error.",
        refusing(500, "Internal Server Error"),
    ),
    Model(
        "rehearsal/timeout",
        "Rehearsal: Timeout",
        "504 with a JSON error, as if the provider had not answered in time.",
        refusing(504, "The provider did not answer in time", metadata={"error_type": "timeout"}),
    ),
    Model(
        "rehearsal/unauthorized",
        "Rehearsal: Unauthorized",
        "401, as if the key of the service were wrong.",
        refusing(401, "Incorrect API key provided: sk-rehearsal-not-a-key"),
    ),
    Model(
        "rehearsal/no-credit",
        "Rehearsal: No credit",
        "402, as if the account behind the key were empty.",
        refusing(402, "Insufficient credits. Add more to go on."),
    ),
    Model(
        "rehearsal/moderated",
        "Rehearsal: Moderated",
        "403, as if moderation had flagged the question.",
        faults.moderated,
        is_moderated=True,
    ),
    Model(
        "rehearsal/rejected",
        "Rehearsal: Rejected",
        "400, as if the provider could not use the request.",
        refusing(400, "Provider returned error", metadata={"error_type": "invalid_request"}),
    ),
    # Answers that are not event streams.
    Model(
        "rehearsal/html",
        "Rehearsal: HTML",
        "200 with a web page in place of the stream.",
        faults.html,
    ),
    Model(
        "rehearsal/json",
        "Rehearsal: JSON",
        "200 with one JSON completion in place of the stream.",
        faults.json,
    ),
    Model(
        "rehearsal/json-error",
        "Rehearsal: JSON error",
        "200 with a JSON error in place of the stream.",
        faults.json_error,
    ),
    # Errors in the stream.
    Model(
        "rehearsal/mid-stream-error",
        "Rehearsal: Mid-stream error",
        "Some text, then a chunk with the error 502 in it.",
        mid_stream_error(502, "Provider disconnected", metadata={"error_type": "provider_unavailable"}),
    ),
    Model(
        "rehearsal/mid-stream-error-string",
        "Rehearsal: Mid-stream error, string code",
        "Some text, then a chunk with the error `server_error` in it, and `[DONE]`.",
        mid_stream_error("server_error", "Provider disconnected unexpectedly", done=True),
    ),
    Model(
        "rehearsal/mid-stream-rate-limited",
        "Rehearsal: Mid-stream rate limit",
        "Some text, then a chunk with the error 429 in it.",
        mid_stream_error(429, "Rate limit exceeded", metadata={"error_type": "rate_limit_exceeded"}),
    ),
    Model(
        "rehearsal/vllm-error",
        "Rehearsal: vLLM error",
        "Some text, then an error that looks like an ordinary chunk without choices.",
        faults.vllm_error,
    ),
    Model(
        "rehearsal/not-json",
        "Rehearsal: Not JSON",
        "Some text, then one chunk that is broken off within its JSON.",
        faults.not_json,
    ),
    # Connections that break or fall silent.
    Model(
        "rehearsal/truncated",
        "Rehearsal: Truncated",
        "Some text, then a clean close without a finish reason.",
        faults.truncated,
    ),
    Model(
        "rehearsal/blank",
        "Rehearsal: Blank",
        "An event stream that closes without a single byte.",
        faults.blank,
    ),
    Model(
        "rehearsal/reset",
        "Rehearsal: Reset",
        "Some text, then a reset of the connection.",
        faults.reset,
    ),
    Model(
        "rehearsal/dropped",
        "Rehearsal: Dropped",
        "A reset of the connection before any answer.",
        faults.dropped,
    ),
    Model(
        "rehearsal/stall",
        "Rehearsal: Stall",
        "Some text, then keep-alive comments for ever.",
        faults.stall,
    ),
    Model(
        "rehearsal/silence",
        "Rehearsal: Silence",
        "Some text, then nothing for ever on an open connection.",
        faults.silence,
    ),
    Model(
        "rehearsal/processing",
        "Rehearsal: Processing",
        "Keep-alive comments for ever, and never a word.",
        faults.processing,
    ),
    Model(
        "rehearsal/hang",
        "Rehearsal: Hang",
        "Nothing at all, not even a status.",
        faults.hang,
    ),
)
