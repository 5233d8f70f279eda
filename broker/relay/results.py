"""Pass the result of each answer to the application around the service: best effort, and with limits.

The application's function may fail, hang or take long. Nothing in the relay waits for it except a shutdown, and that
not for long.
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
"""A function of an application that gets the result of each answer."""

TIMEOUT: Final = 10.0
"""Seconds that the application has for one result."""

AT_ONCE: Final = 32
"""Calls of the application's function at the same time. One that never ends keeps its place."""

MAX_WAITING: Final = 64 * 1024 * 1024
"""Characters of results that wait for a place. Above it, results are dropped."""

CANCEL_TIMEOUT: Final = 1.0
"""Seconds for a cancelled call to end; after that, it is not waited for."""

_OVERHEAD: Final = 1024
"""Characters that a result counts in addition to its contents."""


class Results:
    """Passes the results of answers that ended on this worker to an application, `AT_ONCE` at a time.

    Args:
        on_end: the application's function.
    """

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end
        self._waiting: deque[Result] = deque()
        self._size = 0
        self._running: set[asyncio.Task[None]] = set()

    def take(self, generation: Generation) -> None:
        """Pass on the result of a generation that has ended, and drop its transcript. Does not raise."""
        try:
            result = result_of(generation)
        except Exception:  # the objects of an upstream may be odd
            log.exception("no result for on_end", session=short(generation.session_id))
            return
        finally:
            generation.transcript = None  # a finished generation stays in memory for replay
        if result is not None:
            self.add(result)

    def add(self, result: Result) -> None:
        """Call the application's function as soon as there is a place. The result is dropped where too many wait."""
        size = _size_of(result)
        if self._waiting and self._size + size > MAX_WAITING:
            log.warning("on_end is too slow, a result is dropped", session=short(result.id))
            return
        self._waiting.append(result)
        self._size += size
        self._start()

    async def finish(self, timeout: float = TIMEOUT) -> None:
        """Wait until all results are passed on, for ``timeout`` seconds at most."""
        deadline = asyncio.get_running_loop().time() + timeout
        while self._running and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(self._running, timeout=left)

    async def close(self) -> None:
        """Drop all waiting results, and cancel the running calls."""
        if self._waiting:
            log.warning("results are dropped", count=len(self._waiting))
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
                called = self._on_end(result)
                if inspect.isawaitable(called):
                    await called
        except TimeoutError:
            log.warning("on_end took too long", session=short(result.id))
        except Exception:
            log.exception("on_end failed", session=short(result.id))


def result_of(generation: Generation) -> Result | None:
    """Build the result of a generation; None where there is no end, or nothing was collected."""
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
