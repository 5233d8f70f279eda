"""Scripts of answers that end well, each in its own form. Scripts that fail are in `faults`.

A script is a generator of steps for an answer. It never waits, uses no connection and no clock, so that
`list(script(answer))` tests it.
"""

from __future__ import annotations

import math
from itertools import cycle, islice
from typing import TYPE_CHECKING

import orjson

from broker.rehearsal.steps import DONE, Pause, Reply, Script, Send, comment
from broker.rehearsal.text import (
    PASSAGES,
    THOUGHTS,
    WRITINGS_OF_THE_WORLD,
    opening_of,
    passage_for,
    tokens_of,
)
from broker.rehearsal.tools import calls_for, report_on

if TYPE_CHECKING:
    from collections.abc import Iterable

    from broker.rehearsal.answer import Answer

SPEED = 32.0
"""Tokens per second of an ordinary model."""

FIRST_TOKEN = 0.3
RHYTHM = (0.5, 1.4, 0.8, 1.1, 0.7, 1.6, 0.9, 1.0)
"""Durations of tokens relative to the average: uneven like a real model's, and the same in every run."""

SHORT_ANSWER = 60

SOME_TEXT = 20
"""Tokens before a fault or a cut in the middle of an answer."""

REFUSAL = "I am sorry, but I cannot help with that."


def opening(wait: float = FIRST_TOKEN) -> Script:
    """Yield the headers and a comment at once, then the wait for the first token."""
    yield comment()
    yield Pause(wait)


def say(answer: Answer, text: str, speed: float = SPEED) -> Script:
    """Yield the text, one chunk for each token, at so many tokens per second, up to the room of the answer."""
    tokens = answer.fit(tokens_of(answer.ask.until_stop(text)))
    for token, beat in zip(tokens, cycle(RHYTHM), strict=False):
        yield answer.content(token)
        yield Pause(beat / speed)


def ending(answer: Answer, reason: str = "stop") -> Script:
    """Yield the finish reason, the usage, and the mark of the end."""
    yield answer.finish(reason)
    yield answer.bill()
    yield Send(DONE)


def answer_with(answer: Answer, text: str, speed: float = SPEED, wait: float = FIRST_TOKEN) -> Script:
    """Yield a complete answer of text."""
    yield from opening(wait)
    yield from say(answer, text, speed)
    yield from ending(answer)


def plain(answer: Answer) -> Script:
    """Send a passage at the speed of an ordinary model."""
    return answer_with(answer, passage_for(answer.ask.question))


def slow(answer: Answer) -> Script:
    """Send comments for five seconds, then a few words per second."""
    for _ in range(5):
        yield from opening(wait=1.0)
    yield from say(answer, opening_of(passage_for(answer.ask.question)), speed=6)
    yield from ending(answer)


def fast(answer: Answer) -> Script:
    """Send all passages, as fast as the socket takes them."""
    return answer_with(answer, "\n\n".join(PASSAGES), speed=math.inf, wait=0)


def long(answer: Answer) -> Script:
    """Send thousands of chunks."""
    return answer_with(answer, "\n\n".join(PASSAGES * 3), speed=180)


def echo(answer: Answer) -> Script:
    """Send the question back."""
    return answer_with(answer, answer.ask.question, speed=200, wait=0.05)


def small(answer: Answer) -> Script:
    """Send a summary of the conversation as it arrived, to make trimming visible."""
    count, tokens = len(answer.ask.messages), answer.ask.prompt_tokens
    arrived = f"What reached me of this conversation: messages: {count}, tokens: about {tokens}.\n\n"
    return answer_with(answer, arrived + opening_of(passage_for(answer.ask.question)))


def empty(answer: Answer) -> Script:
    """Finish without any text."""
    yield from opening()
    yield from ending(answer)


def length(answer: Answer) -> Script:
    """Stop in the middle of a sentence because of the length."""
    answer.room = min(answer.room, SHORT_ANSWER)
    return plain(answer)


def reasoning(answer: Answer) -> Script:
    """Send thoughts first, then the text."""
    yield from opening()
    thoughts = answer.fit(tokens_of(THOUGHTS))
    for token, beat in zip(thoughts, cycle(RHYTHM), strict=False):
        answer.reasoning_tokens += 1
        yield answer.thought(token)
        yield Pause(beat / SPEED / 2)
    yield from say(answer, passage_for(answer.ask.question))
    yield from ending(answer)


def refused(answer: Answer) -> Script:
    """Send a refusal in place of the text."""
    yield from opening()
    for token in answer.fit(tokens_of(REFUSAL)):
        yield answer.refusal(token)
        yield Pause(1 / SPEED)
    yield from ending(answer)


def filtered(answer: Answer) -> Script:
    """Send the start of a text that a filter cuts off."""
    yield from opening()
    yield from say(answer, "".join(islice(tokens_of(passage_for(answer.ask.question)), SOME_TEXT)))
    yield from ending(answer, "content_filter")


def tools(answer: Answer) -> Script:
    """Send calls of functions with their arguments in pieces, or a text once the results are there."""
    if answer.ask.tool_results:
        yield from answer_with(answer, report_on(answer.ask))
        return
    if answer.ask.tool_choice == "none":
        yield from plain(answer)
        return
    yield from opening()
    for index, (name, arguments) in enumerate(calls_for(answer.ask)):
        yield from call(answer, index, name, arguments)
    yield from ending(answer, "tool_calls")


def call(answer: Answer, index: int, name: str, arguments: str) -> Script:
    """Yield one call: its name in the first chunk, its arguments in the following ones."""
    yield answer.call(index, f"call_{answer.id[-8:]}_{index}", name)
    for piece in answer.fit(tokens_of(arguments)):
        yield Pause(1 / SPEED)
        yield answer.call_piece(index, piece)


def cited(answer: Answer) -> Script:
    """Send a text, then the pages that it cites."""
    text = opening_of(passage_for(answer.ask.question))
    yield from opening()
    yield from say(answer, text)
    half, end = len(text) // 2, len(text)
    yield answer.cited(
        [
            citation("https://example.com/streams", "Streams for the patient", 0, half),
            citation("https://example.org/errors?lang=en", "Errors & how to say them", half, end),
        ]
    )
    yield from ending(answer)


def citation(url: str, title: str, start: int, end: int) -> dict[str, object]:
    """Return one annotation; the indices are those of the characters that it supports."""
    cited = {"url": url, "title": title, "content": title, "start_index": start, "end_index": end}
    return {"type": "url_citation", "url_citation": cited}


def unicode(answer: Answer) -> Script:
    """Send many scripts of the world, with every event cut in the middle of a character."""
    yield from opening()
    yield from torn(say(answer, WRITINGS_OF_THE_WORLD))
    yield from ending(answer)


def torn(script: Iterable[object]) -> Script:
    """Yield the same steps, with each write in two halves and a pause between them."""
    for step in script:
        if isinstance(step, Send):
            middle = inside_a_character(step.data)
            yield Send(step.data[:middle])
            yield Pause(0.01)
            yield Send(step.data[middle:])
        elif isinstance(step, Pause):
            yield step


def inside_a_character(data: bytes) -> int:
    """Return an index inside the first character of several bytes; the middle where there is none."""
    starts = (at + 1 for at, byte in enumerate(data) if byte >= 0b1100_0000)
    return next(starts, len(data) // 2)


def no_usage(answer: Answer) -> Script:
    """Send a plain answer without its usage."""
    yield from opening()
    yield from say(answer, passage_for(answer.ask.question))
    yield answer.finish(last=True)
    yield Send(DONE)


def usage_with_choices(answer: Answer) -> Script:
    """Send the usage in the chunk with the finish reason, as older services do."""
    yield from opening()
    yield from say(answer, passage_for(answer.ask.question))
    yield answer.finish(last=True, usage=answer.usage())
    yield Send(DONE)


def usage_first(answer: Answer) -> Script:
    """Send a usage before the first word as well; the last one is right."""
    yield from opening()
    yield answer.bill()
    yield from say(answer, passage_for(answer.ask.question))
    yield from ending(answer)


def no_done(answer: Answer) -> Script:
    """Finish and close cleanly, without the mark of the end."""
    yield from opening()
    yield from say(answer, passage_for(answer.ask.question))
    yield answer.finish()
    yield answer.bill()


def framing(answer: Answer) -> Script:
    """Use every feature of the format that is rarely used."""
    yield Send(b"\xef\xbb\xbf")
    for step in plain(answer):
        yield Send(reframed(step.data)) if isinstance(step, Send) else step


def reframed(data: bytes) -> bytes:
    """Return the events with their data on several lines, without spaces after the colons, and with CRLF."""
    return b"".join(_reframed_event(event) for event in data.split(b"\n\n") if event)


def _reframed_event(event: bytes) -> bytes:
    name, _, data = event.partition(b"data: ")
    if not data.startswith(b"{"):
        return event.replace(b"data: ", b"data:") + b"\r\n\r\n"
    name = name.replace(b"event: ", b"event:").strip() or b"event:message"
    indented = orjson.dumps(orjson.loads(data), option=orjson.OPT_INDENT_2)
    return b"\r\n".join([name, *(b"data:" + line for line in indented.split(b"\n"))]) + b"\r\n\r\n"


def whole(answer: Answer) -> Reply:
    """Return the plain passage as one JSON document."""
    text = "".join(answer.fit(tokens_of(answer.ask.until_stop(passage_for(answer.ask.question)))))
    answer.finish_reason = "length" if answer.cut else "stop"
    return answer.whole(text)


def unstreamed(script: Script, answer: Answer) -> Script:
    """Return the script for a caller that wants no stream: its refusal, or one JSON document."""
    for step in script:
        if isinstance(step, Send):
            yield whole(answer)
            return
        yield step
