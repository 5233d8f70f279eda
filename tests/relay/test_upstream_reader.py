"""Reading one answer: its timers, its retries, what is taken, and how it is closed, by a clock that the test moves."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.dialect import CHAT, Dialect
from broker.core.errors import (
    ResponseTooLarge,
    SessionError,
    UpstreamError,
    UpstreamFailed,
    UpstreamInterrupted,
    UpstreamInvalid,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from broker.relay import upstream_reader
from broker.relay.config import GenerationLimits
from broker.relay.upstream_reader import AFTER_ERROR, QUIET_END, UpstreamReader
from tests.clock import Clock, run_ready_tasks
from tests.core.test_skeleton import SlowAnswer, facts
from tests.relay.fakes import (
    DONE,
    ERROR,
    FINISH,
    HELLO,
    PREPARED,
    TOLD_USAGE,
    USAGE,
    FakeStream,
    FakeUpstream,
    cancel,
    chunks_in,
    data,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.core.chat_answer import ChatAnswer
    from broker.upstream.client import UpstreamClient

FIRST_DATA, IDLE = 120.0, 60.0
LIMITS = GenerationLimits(
    first_data_timeout=FIRST_DATA, idle_timeout=IDLE, deadline=600, grace=20, max_response=2000, max_retries=2
)


class Reading:
    """A reader of these answers, and its task once it runs.

    Attributes:
        chunks: what was taken, with the time.
    """

    def __init__(self, *answers: FakeStream | Exception, limits: GenerationLimits = LIMITS) -> None:
        self.clock = Clock(now=1000.0)
        self.upstream = FakeUpstream(self.clock, *answers)
        self.chunks: list[tuple[list[str], float]] = []
        self.reader = UpstreamReader(
            PREPARED,
            dialect=CHAT,
            upstream=cast("UpstreamClient", self.upstream),
            limits=limits,
            take=self._take,
            clock=self.clock,
            pause=self.clock.pause,
            jitter=lambda: 0.5,
        )

    def _take(self, encoded: Sequence[bytes], now: float, event: bytes | None = None) -> None:
        found = chunks_in(encoded, event)
        said = [json.loads(chunk)["choices"][0]["delta"]["content"] for chunk in found]
        self.chunks.append((said, now))

    async def start(self) -> asyncio.Task[None]:
        """Start to read, as far as that is possible without further input."""
        task = asyncio.create_task(self.reader.run())
        await run_ready_tasks()
        return task

    def asked(self) -> bool:
        """Return True if the upstream may have begun to generate."""
        return self.reader.asked

    @property
    def data_in(self) -> float:
        """Seconds from now within which data must come."""
        return self.reader.data_due - self.clock.now


# Taking chunks

TEXTS = ("Hello", " you", "\n", '"', "\\", "\u00e9", "\U0001f600", "")
EVENTS = (
    *(data(text(words)) for words in TEXTS),
    *(b"data: %b\n\n" % json.dumps(text(words), ensure_ascii=False).encode() for words in TEXTS),
    *(FINISH, DONE, ERROR, TOLD_USAGE, FINISH.replace(b"stop", b"error")),
    *(b": silence\n\n", b"event: x\n" + HELLO, b"id: 7\n" + HELLO, b"\n\n", b"data: null\n\n"),
    *(HELLO.replace(b"data: ", b"data:"), HELLO.replace(b"\n", b"\r\n"), HELLO[:-1], b"data: {\n\n"),
    *(HELLO.replace(b"Hello", raw) for raw in (b"\xe2", b"\\x", b'","x":"', b"\0")),
    *(b"error: It broke.\n\n", data(text("a", index=1)), data({**text("b"), "usage": {}})),
)


def read_all(dialect: Dialect, reads: list[bytes], limits: GenerationLimits) -> dict[str, Any]:
    """Return all that a reader finds in these reads."""
    taken: list[bytes] = []
    upstream = cast("UpstreamClient", FakeUpstream(Clock()))
    reader = UpstreamReader(
        *(PREPARED,),
        dialect=dialect,
        upstream=upstream,
        limits=limits,
        take=lambda encoded, _, event=None: taken.extend(chunks_in(encoded, event)),
        clock=Clock(),
    )
    complete, error = False, None
    due = []
    try:
        for read in reads:
            complete = complete or reader._read(read)
            due.append(reader.data_due)
        if not complete:
            reader._read_rest()
    except SessionError as raised:
        error = (type(raised), str(raised))
    known = facts(cast("ChatAnswer", reader.answer))
    return {
        "taken": taken,
        "complete": complete,
        "error": error,
        "known": known,
        "due": due,
        "relayed": reader.relayed,
        "first": reader.first_chunk_at,
        "failed": reader._failed,
    }


@given(
    st.lists(st.sampled_from(EVENTS) | st.sampled_from(EVENTS[: len(TEXTS)]), max_size=20),
    st.lists(st.integers(0, 2000), max_size=6),
    st.sampled_from([300, 1000, 100_000]),
)
def test_events_mean_the_same_read_together_or_alone(events: list[bytes], cuts: list[int], most: int) -> None:
    body = b"".join(events)
    at = [0, *sorted(cuts), len(body)]
    reads = [body[start:end] for start, end in pairwise(at) if start < end]
    limits = replace(LIMITS, max_response=most)
    assert read_all(CHAT, reads, limits) == read_all(replace(CHAT, answer=SlowAnswer), reads, limits)


async def test_each_read_is_taken_at_once_with_its_time() -> None:
    stream = FakeStream()
    reading = Reading(stream)
    task = await reading.start()
    stream.send(HELLO + data(text(" you")))
    await run_ready_tasks()
    assert reading.chunks == [(["Hello", " you"], 1000.0)]
    await reading.clock.advance(7)
    stream.send(FINISH)
    await run_ready_tasks()
    assert reading.chunks[1:] == [([""], 1007.0)]
    assert reading.reader.first_chunk_at == 1000.0
    stream.send(DONE)
    await task
    assert reading.reader.answer.generation_id == "gen-1"


async def test_an_answer_is_complete_without_the_end_of_its_body() -> None:
    reading = Reading(FakeStream(HELLO, FINISH, DONE))
    await (await reading.start())
    assert reading.reader.answer.complete


@pytest.mark.parametrize("last", [FINISH, FINISH.rstrip(), DONE.rstrip()])
async def test_a_body_may_end_after_a_finish_reason_or_done(last: bytes) -> None:
    reading = Reading(FakeStream(HELLO, last, None))
    await (await reading.start())
    assert reading.reader.answer.complete


@pytest.mark.parametrize("last", [b"", b": comment\n\n", b'data: {"choices"', HELLO.rstrip()])
async def test_a_body_that_ends_before_its_finish_is_interrupted(last: bytes) -> None:
    reading = Reading(FakeStream(HELLO, last, None))
    with pytest.raises(UpstreamInterrupted):
        await (await reading.start())


async def test_a_json_completion_is_taken_as_one_chunk() -> None:
    completion = {"choices": [{"index": 0, "message": {"content": "Hello"}, "finish_reason": "stop"}]}
    reading = Reading(FakeStream(None, whole=completion))
    await (await reading.start())
    assert reading.chunks == [(["Hello"], 1000.0)]


async def test_a_completion_without_choices_is_invalid() -> None:
    with pytest.raises(UpstreamInvalid):
        await (await Reading(FakeStream(None, whole={"id": "gen-1"})).start())


@pytest.mark.parametrize(
    "stream",
    [
        lambda: FakeStream(*[data(text("x" * 700))] * 4),
        lambda: FakeStream(b"data: " + b"x" * 3000),
        lambda: FakeStream(None, whole={"choices": [{"message": {"content": "x" * 3000}}]}),
    ],
    ids=["many chunks", "an event without end", "a completion"],
)
async def test_an_answer_over_the_limit_is_too_large(stream: Any) -> None:
    with pytest.raises(ResponseTooLarge):
        await (await Reading(stream()).start())


async def test_chunks_before_a_failure_in_the_same_read_are_taken() -> None:
    reading = Reading(FakeStream(HELLO + ERROR))
    with pytest.raises(UpstreamError):
        await (await reading.start())
    assert reading.chunks == [(["Hello"], 1000.0)]


# Timers


async def test_the_first_data_is_due_from_the_request_on() -> None:
    reading = Reading()
    assert reading.data_in == FIRST_DATA
    await reading.clock.advance(5)
    task = await reading.start()
    assert reading.data_in == FIRST_DATA
    assert (reading.reader.asked, reading.reader.asked_at) == (True, 1005.0)
    await cancel(task)


@pytest.mark.parametrize("silence", [b": comment\n\n", b"data: null\n\n", b"data:\n\n", b"data: half an"])
async def test_empty_events_do_not_count_as_data(silence: bytes) -> None:
    stream = FakeStream()
    reading = Reading(stream)
    task = await reading.start()
    await reading.clock.advance(50)
    stream.send(silence)
    await run_ready_tasks()
    assert reading.data_in == FIRST_DATA - 50
    await cancel(task)


async def test_each_chunk_gives_the_next_one_its_time() -> None:
    stream = FakeStream()
    reading = Reading(stream)
    task = await reading.start()
    for _ in range(3):
        await reading.clock.advance(50)
        stream.send(HELLO)
        await run_ready_tasks()
        assert reading.data_in == IDLE
    await cancel(task)


async def test_after_a_finish_reason_little_time_is_left() -> None:
    stream = FakeStream(HELLO, FINISH)
    reading = Reading(stream)
    task = await reading.start()
    assert reading.data_in == QUIET_END
    stream.send(HELLO)  # the model goes on
    await run_ready_tasks()
    assert reading.data_in == IDLE
    await cancel(task)


# Retries


@pytest.mark.parametrize(
    "error",
    [
        UpstreamUnreachable(),
        UpstreamRateLimited(upstream_status=429),
        UpstreamUnavailable(upstream_status=503),
    ],
    ids=["unreachable", "429", "503"],
)
async def test_a_refusal_without_generation_is_tried_again(error: UpstreamError) -> None:
    reading = Reading(error, error, FakeStream(HELLO, FINISH, DONE))
    task = await reading.start()
    assert not reading.asked()
    assert reading.data_in == float("inf"), "the delay has its own bound"
    await reading.clock.advance(0.5)
    await reading.clock.advance(1.0)
    await task
    assert reading.clock.pauses == [0.5, 1.0]
    assert reading.upstream.requests == [(PREPARED.request, at) for at in (1000.0, 1000.5, 1001.5)]
    assert reading.asked()
    assert reading.reader.data_due == 1001.5 + QUIET_END


async def test_retries_end_with_their_number() -> None:
    reading = Reading(*[UpstreamUnreachable()] * 5)
    task = await reading.start()
    await reading.clock.advance(60)
    with pytest.raises(UpstreamUnreachable):
        await task
    assert len(reading.upstream.requests) == 1 + LIMITS.max_retries
    assert not reading.asked(), "so that nothing is booked"


@pytest.mark.parametrize(
    "error",
    [
        UpstreamTimeout(),
        UpstreamInterrupted(),
        UpstreamFailed(upstream_status=500),
        UpstreamTimeout(upstream_status=504),
    ],
    ids=["timeout", "interrupted", "500", "504"],
)
async def test_a_request_that_may_be_billed_is_sent_once(error: UpstreamError) -> None:
    reading = Reading(error, FakeStream(HELLO, FINISH, DONE))
    with pytest.raises(type(error)):
        await (await reading.start())
    assert len(reading.upstream.requests) == 1
    assert reading.asked()


async def test_nothing_is_tried_again_after_the_first_byte() -> None:
    reading = Reading(FakeStream(UpstreamUnreachable()), FakeStream(HELLO, FINISH, DONE))
    with pytest.raises(UpstreamUnreachable):
        await (await reading.start())
    assert len(reading.upstream.requests) == 1


async def test_a_retry_waits_as_long_as_the_upstream_says() -> None:
    refusal = UpstreamRateLimited(upstream_status=429, retry_after=20)
    reading = Reading(refusal, FakeStream(HELLO, FINISH, DONE))
    task = await reading.start()
    await reading.clock.advance(20)
    await task
    assert reading.clock.pauses == [20]


async def test_a_wait_that_is_too_long_ends_in_the_error() -> None:
    reading = Reading(UpstreamRateLimited(upstream_status=429, retry_after=21))
    with pytest.raises(UpstreamRateLimited) as raised:
        await (await reading.start())
    assert raised.value.retry_after == 21


# The usage behind an error


async def failed(*reads: bytes | Exception | None) -> tuple[Reading, FakeStream]:
    """A reader whose answer has failed, before these reads come."""
    stream = FakeStream(HELLO, ERROR)
    reading = Reading(stream)
    with pytest.raises(UpstreamError):
        await (await reading.start())
    assert reading.reader.may_tell_usage
    stream.send(*reads)
    return reading, stream


@pytest.mark.parametrize(
    "reads",
    [
        (TOLD_USAGE,),
        (b": comment\n\n", TOLD_USAGE[:20], TOLD_USAGE[20:]),
        (b"data: nonsense\n\n", TOLD_USAGE),
        (TOLD_USAGE.rstrip(), None),
    ],
    ids=["at once", "in pieces", "after nonsense", "without a blank line"],
)
async def test_usage_behind_an_error_is_read(reads: tuple[bytes | None, ...]) -> None:
    reading, _ = await failed(*reads)
    assert await reading.reader.read_usage()
    assert reading.reader.answer.usage == USAGE


@pytest.mark.parametrize(
    "reads",
    [(None,), (DONE,), (UpstreamInterrupted(),), (b"data: " + b"x" * 3000,)],
    ids=["end", "done", "reset", "too large"],
)
async def test_reading_for_usage_ends_with_the_stream(reads: tuple[bytes | Exception | None, ...]) -> None:
    reading, _ = await failed(*reads)
    assert not await reading.reader.read_usage()


async def test_reading_for_usage_ends_with_its_time() -> None:
    reading, _ = await failed()
    await reading.clock.advance(AFTER_ERROR)
    assert not await reading.reader.read_usage()


async def test_a_broken_connection_has_no_usage_behind_it() -> None:
    reading = Reading(FakeStream(HELLO, UpstreamInterrupted()))
    with pytest.raises(UpstreamInterrupted):
        await (await reading.start())
    assert not reading.reader.may_tell_usage


# Closing


async def test_a_complete_answer_is_closed_after_the_end_of_its_body() -> None:
    stream = FakeStream(HELLO, FINISH, DONE)
    reading = Reading(stream)
    await (await reading.start())
    closing = asyncio.create_task(reading.reader.close())
    await run_ready_tasks()
    assert not stream.closed.is_set()
    stream.send(None)
    await closing
    assert stream.closed.is_set()


async def test_a_body_that_does_not_end_is_closed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_reader, "LINGER", 0.01)
    stream = FakeStream(HELLO, FINISH, DONE)
    reading = Reading(stream)
    await (await reading.start())
    await reading.reader.close()
    assert stream.closed.is_set()


async def test_an_incomplete_answer_is_closed_at_once() -> None:
    stream = FakeStream(HELLO)
    reading = Reading(stream)
    await cancel(await reading.start())
    await reading.reader.close()
    assert stream.closed.is_set()


async def test_closing_twice_or_before_an_answer_does_nothing() -> None:
    reading = Reading()
    await reading.reader.close()
    await reading.reader.close()


async def test_an_error_while_closing_does_not_matter() -> None:
    stream = FakeStream(HELLO, FINISH, DONE, UpstreamInterrupted())
    reading = Reading(stream)
    await (await reading.start())
    await reading.reader.close()
    assert stream.closed.is_set()


# Cancellation, at each await


async def test_cancel_while_the_request_is_sent() -> None:
    reading = Reading()
    await cancel(await reading.start())
    assert reading.asked(), "it may have been billed"
    await reading.reader.close()


async def test_cancel_during_the_delay_of_a_retry() -> None:
    reading = Reading(UpstreamUnreachable(), FakeStream())
    await cancel(await reading.start())
    await reading.clock.advance(60)
    assert len(reading.upstream.requests) == 1
    assert not reading.asked()
    await reading.reader.close()


async def test_cancel_while_chunks_are_read() -> None:
    stream = FakeStream(HELLO)
    reading = Reading(stream)
    await cancel(await reading.start())
    assert reading.chunks == [(["Hello"], 1000.0)]
    await reading.reader.close()
    assert stream.closed.is_set()


async def test_cancel_while_usage_is_awaited() -> None:
    reading, stream = await failed()
    task = asyncio.create_task(reading.reader.read_usage())
    await run_ready_tasks()
    await cancel(task)
    await reading.reader.close()
    assert stream.closed.is_set()


async def test_cancel_while_the_end_of_the_body_is_awaited() -> None:
    stream = FakeStream(HELLO, FINISH, DONE)
    reading = Reading(stream)
    await (await reading.start())
    closing = asyncio.create_task(reading.reader.close())
    await run_ready_tasks()
    await cancel(closing)
    assert stream.closed.is_set()


async def test_stopping_takes_effect_before_the_cancellation() -> None:
    stream = FakeStream(HELLO)
    reading = Reading(stream)
    task = await reading.start()
    reading.reader.stop()
    assert stream.stopped
    await cancel(task)
