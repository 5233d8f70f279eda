"""Scripts that fail, each in its own way. Scripts that end well are in `scripts`.

A new fault is a short function here, and a row in the table of `behaviours`.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import orjson

from broker.rehearsal.answer import PROVIDER, Answer, Play
from broker.rehearsal.scripts import SOME_TEXT, ending, opening, plain, say, whole
from broker.rehearsal.steps import DONE, Pause, Reply, Reset, Script, Send, comment, event, problem
from broker.rehearsal.text import opening_of, passage_for, tokens_of

if TYPE_CHECKING:
    from collections.abc import Mapping

ARRIVAL = 0.2
"""Seconds for the last bytes to reach the caller, because a reset destroys bytes that were not read."""

KEEP_ALIVE = 5.0

GATEWAY_PAGE = b"""<!DOCTYPE html>
<html><head><title>502 Bad Gateway</title></head>
<body><h1>Bad Gateway</h1><p>The server behind this one did not answer.</p></body></html>
"""
SIGN_IN_PAGE = b"""<!DOCTYPE html>
<html><head><title>Welcome to the guest network</title></head>
<body><h1>Please sign in</h1><p>Accept the terms to use the network.</p></body></html>
"""


def some_text(answer: Answer) -> Script:
    """Yield the start of an answer: enough to see, not enough to be useful."""
    yield from opening()
    tokens = tokens_of(passage_for(answer.ask.question))
    yield from say(answer, "".join(islice(tokens, SOME_TEXT)))


# Refusals, before anything is generated.


def refusing(status: int, message: str, **more: Any) -> Play:
    """Return a script that answers with an error in OpenRouter's form; ``more`` as for `problem`."""

    def refuse(_: Answer) -> Script:
        yield Pause(0.1)
        yield problem(status, message, **more)

    return refuse


def rate_limited(answer: Answer) -> Script:
    """Answer with 429 in the newer form, where the reason is beside the message."""
    availability = {
        "code": "capacity_exhausted",
        "retryable": True,
        "retry_after": 40,
        "requested_models": [answer.ask.model],
        "affected_providers": [PROVIDER.lower()],
        "fallback_models": ["rehearsal/plain"],
    }
    message = f"All providers for {answer.ask.model} are at capacity. Retry after 40 seconds."
    more = {"error_type": "rate_limit_exceeded", "http_status": 429, "availability": availability}
    yield problem(429, message, retry_after=40, **more)


def busy(answer: Answer) -> Script:
    """Answer with 503 when a question comes for the first time."""
    if answer.attempt == 1:
        metadata = {"error_type": "provider_overloaded", "provider_name": PROVIDER}
        yield problem(503, "The provider is overloaded, try again shortly", retry_after=1, metadata=metadata)
        return
    yield from plain(answer)


def moderated(answer: Answer) -> Script:
    """Answer with 403 and the flagged words."""
    metadata = {
        "reasons": ["violence"],
        "flagged_input": answer.ask.question[:100],
        "provider_name": PROVIDER,
        "model_slug": answer.ask.model,
    }
    yield problem(403, "Input flagged", metadata=metadata)


def unavailable(_: Answer) -> Script:
    """Answer with 502 and the HTML of a gateway."""
    yield Reply(502, GATEWAY_PAGE, "text/html")


# Answers that are not event streams.


def html(_: Answer) -> Script:
    """Answer with 200 and the page of a captive portal."""
    yield Reply(200, SIGN_IN_PAGE, "text/html")


def json(answer: Answer) -> Script:
    """Answer with 200 and one JSON completion, like a service without streaming."""
    yield whole(answer)


def json_error(_: Answer) -> Script:
    """Answer with 200 and a JSON error."""
    yield Reply(200, problem(502, "Provider returned error", metadata={"provider_name": PROVIDER}).body)


# Errors in the stream.


def mid_stream_error(code: int | str, message: str, *, done: bool = False, **more: Any) -> Play:
    """Return a script that sends an error after some text; ``more`` goes into its ``error`` object."""

    def play(answer: Answer) -> Script:
        yield from some_text(answer)
        yield answer.finish("error", error={"code": code, "message": message, **more})
        if done:
            yield Send(DONE)

    return play


def vllm_error(answer: Answer) -> Script:
    """Send an error in vLLM's form, which looks like a chunk without choices."""
    yield from some_text(answer)
    body: Mapping[str, Any] = {
        "object": "error",
        "message": "The engine is dead",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
    yield event(body)
    yield Send(DONE)


def not_json(answer: Answer) -> Script:
    """Send a chunk that ends within its JSON, on a stream that is fine otherwise."""
    yield from some_text(answer)
    yield Send(b"data: " + orjson.dumps(answer.head("chat.completion.chunk"))[:-20] + b"\n\n")
    yield from say(answer, " And here the stream goes on as if nothing had been.")
    yield from ending(answer)


# Connections that break, and connections that fall silent.


def truncated(answer: Answer) -> Script:
    """Close cleanly in place of the rest of the answer."""
    yield from some_text(answer)


def blank(_: Answer) -> Script:
    """Send an event stream without a single byte."""
    yield Send(b"")


def reset(answer: Answer) -> Script:
    """Reset the connection in place of the rest of the answer."""
    yield from some_text(answer)
    yield Pause(ARRIVAL)
    yield Reset()


def dropped(_: Answer) -> Script:
    """Reset the connection in place of a status."""
    yield Pause(ARRIVAL)
    yield Reset()


def stall(answer: Answer) -> Script:
    """Send some text, then comments without end."""
    yield from some_text(answer)
    yield from processing(answer)


def processing(_: Answer) -> Script:
    """Send comments without end."""
    while True:
        yield comment()
        yield Pause(KEEP_ALIVE)


def silence(answer: Answer) -> Script:
    """Send some text, then nothing, on a connection that stays open."""
    yield from some_text(answer)
    yield from hang(answer)


def hang(_: Answer) -> Script:
    """Send nothing, not even a status."""
    while True:
        yield Pause(KEEP_ALIVE)


def late(answer: Answer) -> Script:
    """Send a good answer whose stream stays open and silent after the finish reason."""
    yield from opening()
    yield from say(answer, opening_of(passage_for(answer.ask.question)))
    yield answer.finish(last=True)
    yield from hang(answer)
