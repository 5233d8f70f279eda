"""Telling the application that the service is a part of what became of each answer: best effort, and bounded.

What the application does with it may fail, hang or take long. Nothing of the relay waits for it but a shutdown, and
that not for long.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import inspect
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import orjson
import structlog

from broker.core.pricing import to_usd
from broker.core.result import Result
from broker.core.session import State, short

if TYPE_CHECKING:
    from broker.relay.generation import Generation

log = structlog.get_logger(__name__)

OnEnd = Callable[[Result], Awaitable[object]]
"""An application's function for the end of an answer."""

TIMEOUT: Final = 10.0
"""Seconds that the application has for one result."""

AT_ONCE: Final = 32
"""Results that the application is told at once. One that it never lets go keeps its place."""

MAX_WAITING: Final = 64 * 1024 * 1024
"""Characters of results that wait for their turn; those beyond are not told."""

CANCEL_TIMEOUT: Final = 1.0
"""Seconds for a call that is cancelled to end; it is not waited for any longer."""

_OVERHEAD: Final = 1024
"""Characters that a result counts beside what was said."""


class Results:
    """Tells an application of the answers that ended on this worker, at most `AT_ONCE` at a time.

    Args:
        on_end: the application's function.
    """

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end
        self._waiting: deque[Result] = deque()
        self._size = 0
        self._running: set[asyncio.Task[None]] = set()

    def tell(self, generation: Generation) -> None:
        """Tell of a generation that has ended. Its transcript is given up. Does not raise."""
        try:
            result = result_of(generation)
        except Exception:  # what an upstream tells may be odd
            log.exception("no result for on_end", session=short(generation.session_id))
            return
        finally:
            generation.transcript = None  # a finished generation is kept for replay
        if result is not None:
            self.add(result)

    def add(self, result: Result) -> None:
        """Tell this as soon as there is room; leave it out where too much waits."""
        size = _size_of(result)
        if self._waiting and self._size + size > MAX_WAITING:
            log.warning("on_end is too slow, a result is not told", session=short(result.id))
            return
        self._waiting.append(result)
        self._size += size
        self._start()

    async def finish(self, timeout: float = TIMEOUT) -> None:
        """Wait until all is told, for ``timeout`` seconds at most."""
        deadline = asyncio.get_running_loop().time() + timeout
        while self._running and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(self._running, timeout=left)

    async def close(self) -> None:
        """Tell no more, and cancel what is still being told."""
        if self._waiting:
            log.warning("results are not told", count=len(self._waiting))
        self._waiting.clear()
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=CANCEL_TIMEOUT)

    def _start(self) -> None:
        while self._waiting and len(self._running) < AT_ONCE:
            result = self._waiting.popleft()
            self._size -= _size_of(result)
            task = asyncio.create_task(self._call(result), name=f"on_end {short(result.id)}")
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    async def _call(self, result: Result) -> None:
        try:
            async with asyncio.timeout(TIMEOUT):
                told = self._on_end(result)
                if inspect.isawaitable(told):
                    await told
        except TimeoutError:
            log.warning("on_end took too long", session=short(result.id))
        except Exception:
            log.exception("on_end failed", session=short(result.id))


def result_of(generation: Generation) -> Result | None:
    """Build what the application is told; None where there is no end, or nothing was gathered."""
    end, said, answer = generation.feed.end, generation.transcript, generation.answer
    if end is None or said is None:
        return None
    usage, facts = generation.finishing.usage, orjson.loads(end.data)
    now, at = generation.clock(), dt.datetime.now(dt.UTC)

    def when(monotonic: float) -> dt.datetime:
        return at - dt.timedelta(seconds=now - monotonic)

    first_chunk_at = generation.first_chunk_at
    return Result(
        id=generation.session_id,
        client=generation.prepared.client,
        model=answer.model or generation.prepared.model,
        state=end.state.value,
        text=said.text,
        reasoning=said.reasoning,
        tool_calls=said.tool_calls,
        usage=answer.usage,
        cost=None if usage.cost is None or end.state is State.LOST else to_usd(usage.cost),
        estimated=usage.estimated,
        finish_reason=facts.get("finishReason"),
        error=facts.get("code"),
        started_at=when(generation.started_at),
        first_chunk_at=None if first_chunk_at is None else when(first_chunk_at),
        ended_at=at,
    )


def _size_of(result: Result) -> int:
    calls = sum(len(call["function"]["arguments"]) for call in result.tool_calls)
    return len(result.text) + len(result.reasoning) + calls + _OVERHEAD
