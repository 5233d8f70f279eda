"""Hand-written fakes for the parts around a generation: the upstream, the sessions in Redis, and the settlement."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from broker.core.accounts import Usage, WorstCase
from broker.core.session import State, Terminal
from broker.core.sse import decode_data
from broker.store.accounts import Reservation
from broker.store.sessions import EndConflict, Prepared, SessionStatus
from tests.clock import Clock

if TYPE_CHECKING:
    from broker.core.dialect import Dialect
    from broker.core.replay import Batch
    from broker.relay.source import Source

SESSION = "01234567-89ab-4cde-8f01-23456789abcd"
WORST = WorstCase(tokens=5000, cost=700)
PREPARED = Prepared(
    request=b'{"prompt":1}',
    model="a/b",
    prompt_tokens=100,
    referer="https://page.example",
    client="client",
    worst=WORST,
)
RESERVATION = Reservation("claim", SESSION, "client", "a/b", WORST)
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
COUNTED = Usage(10, 5, cost=3)


def data(*chunks: dict[str, Any]) -> bytes:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks).encode()


def text(words: str, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": words}, **choice}]}


HELLO = data(text("Hello"))
FINISH = data(text("", finish_reason="stop"))
DONE = b"data: [DONE]\n\n"
ERROR = data({"error": {"code": 502, "message": "It broke."}})
TOLD_USAGE = data({"choices": [], "usage": USAGE})


def chunks_in(encoded: Sequence[bytes], event: bytes | None) -> Sequence[bytes]:
    """Return the chunks of a read that a reader passes on."""
    return [decode_data(each) for each in (encoded if event is None else [event.removesuffix(b"\n\n")])]


@contextmanager
def watched(source: Source) -> Iterator[None]:
    """Count a viewer for as long as the block runs."""
    source.add_viewer()
    try:
        yield
    finally:
        source.remove_viewer()


class BugError(Exception):
    """An exception that nobody expects."""


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task, and check that it ends by that."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class Relaying:
    """A stream whose reads come from the generator `blocks`."""

    _blocks: AsyncGenerator[bytes] | None = None

    def blocks(self, max_body: int) -> AsyncGenerator[bytes]:
        raise NotImplementedError

    async def relay(self, take: Callable[[bytes], bool], max_body: int = 0) -> bool:
        """Pass the reads on, as a connection does. Returns True at the end of the body."""
        if self._blocks is None:
            self._blocks = self.blocks(max_body)
        async for block in self._blocks:
            if take(block):
                return False
        return True

    def stop(self) -> None:
        """Pass nothing on: the task that reads is cancelled."""


class FakeStream:
    """An answer whose reads come from the test.

    Attributes:
        closed: `close` was called.
        close_error: is raised by `close`.
        stopped: `stop` was called.
    """

    def __init__(self, *reads: bytes | Exception | None, whole: dict[str, Any] | None = None) -> None:
        self.generation_id = "gen-1"
        self.status = 200
        self.whole = whole
        self.closed = asyncio.Event()
        self.close_error: Exception | None = None
        self.stopped = False
        self._reads: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.send(*reads)

    def send(self, *reads: bytes | Exception | None) -> None:
        """Let these be read next: bytes, an error, or None for the end of the body."""
        for read in reads:
            self._reads.put_nowait(read)

    async def relay(self, take: Callable[[bytes], bool], max_body: int = 0) -> bool:
        del max_body
        while (read := await self._reads.get()) is not None:
            if isinstance(read, Exception):
                raise read
            if take(read):
                return False
        return True

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.closed.set()
        if self.close_error is not None:
            raise self.close_error


class FakeUpstream:
    """A service that answers each request with the next of these: a stream or an error; then not at all.

    Attributes:
        requests: the bodies that were sent, and when.
    """

    secrets = ()

    def __init__(self, clock: Clock, *answers: FakeStream | Exception) -> None:
        self.requests: list[tuple[bytes, float]] = []
        self._clock = clock
        self._answers = list(answers)

    def open_ahead(self) -> None:
        """Open nothing: there are no connections."""

    async def ask(
        self, body: bytes, *, referer: str, model: str, dialect: Dialect, **_: object
    ) -> FakeStream:
        del referer, model, dialect
        self.requests.append((body, self._clock.now))
        if not self._answers:
            await asyncio.Event().wait()
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class FakeSessions:
    """Decides ends as Redis does: the first one that is written stands.

    Attributes:
        answers: what the next calls of `end` return or raise in place of that; an event is waited for first.
        sent: every end that was proposed, with the batch that came with it.
        standing: the end that stands.
    """

    def __init__(self, *answers: SessionStatus | EndConflict | Exception | asyncio.Event) -> None:
        self.answers = list(answers)
        self.sent: list[tuple[Terminal, Batch]] = []
        self.standing: Terminal | None = None

    async def end(
        self, session_id: str, claim_id: str, end: Terminal, rest: Batch, **_: object
    ) -> SessionStatus | EndConflict:
        assert (session_id, claim_id) == (RESERVATION.session_id, RESERVATION.claim_id)
        self.sent.append((end, rest))
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, asyncio.Event):
            await answer.wait()
            answer = None
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            return answer
        self.standing = self.standing or end
        return SessionStatus(self.standing.state, end=self.standing)


class FakeSettlement:
    """Returns a given usage, and notes what is settled.

    Attributes:
        usage: what `count` returns, or raises.
        counts: seconds of every count.
        errors: what the next calls of `settle` raise; an event is waited for.
        settled: usage, state and generation id of every settlement.
        reading_on: the work that was started to read on, and how it is closed.
    """

    def __init__(self, usage: Usage | Exception | asyncio.Event = COUNTED) -> None:
        self.usage = usage
        self.counts: list[float] = []
        self.errors: list[Exception | asyncio.Event] = []
        self.settled: list[tuple[Usage, State, str | None]] = []
        self.reading_on: list[tuple[Callable[[], Coroutine[Any, Any, None]], Any]] = []

    async def count(self, *_: object, seconds: float, **__: object) -> Usage:
        self.counts.append(seconds)
        if isinstance(self.usage, asyncio.Event):
            await self.usage.wait()
            return COUNTED
        if isinstance(self.usage, Exception):
            raise self.usage
        return self.usage

    async def settle(
        self, reservation: Reservation, usage: Usage, state: State, generation_id: str | None
    ) -> None:
        assert reservation == RESERVATION
        if self.errors:
            error = self.errors.pop(0)
            if not isinstance(error, asyncio.Event):
                raise error
            await error.wait()
        self.settled.append((usage, state, generation_id))

    async def settle_later(
        self, reservation: Reservation, usage: Usage, state: State, generation_id: str | None
    ) -> None:
        await self.settle(reservation, usage, state, generation_id)

    def read_on(self, read: Callable[[], Coroutine[Any, Any, None]], close: object) -> bool:
        self.reading_on.append((read, close))
        return True
