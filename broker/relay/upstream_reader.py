"""Reading one answer from the upstream: asking, asking again where that is safe, and taking chunks as they come.

The law of money: nothing here asks twice but before any byte of an answer, and only where the upstream said that it
did not generate or was never reached. `core.upstream_errors.retry_delay` decides.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog

from broker.core.answer import is_readable, says_nothing
from broker.core.errors import ResponseTooLarge, UpstreamError, UpstreamInterrupted, UpstreamInvalid
from broker.core.sse import Decoder, EventTooLarge
from broker.core.upstream_errors import may_have_generated, retry_delay

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from broker.core.dialect import Dialect
    from broker.core.sse import Frame
    from broker.relay.config import GenerationLimits
    from broker.store.sessions import Prepared
    from broker.upstream.client import UpstreamClient, UpstreamStream

log = structlog.get_logger(__name__)

QUIET_END = 10.0
"""Seconds that an upstream may stay silent once it has given a finish reason; then the answer is complete."""

AFTER_ERROR = 2.0
"""Seconds that an upstream is read on, for its usage alone, once an answer has failed or can no longer be read."""

LINGER = 1.0
"""Seconds to wait for an upstream's end of stream after its last event, so that the connection can be used again."""


class UpstreamReader:
    """One answer, from the request to the last chunk.

    Args:
        prepared: what to ask.
        dialect: in which it is asked and answered.
        upstream: whom to ask.
        bounds: how long and how much.
        take: is given the chunks of each read, JSON, and the monotonic time.

    Attributes:
        answer: what has been learned of it.
        data_due: monotonic time by which data must have come; comments are no data.
        first_chunk_at: monotonic time of the first chunk.
        asked: the upstream may have begun to generate.
        asked_at: monotonic time of the last request.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        dialect: Dialect,
        upstream: UpstreamClient,
        bounds: GenerationLimits,
        take: Callable[[list[bytes], float], None],
    ) -> None:
        self.answer = dialect.answer(upstream.secrets, time.time)
        self.first_chunk_at: float | None = None
        self.asked = False
        self.asked_at: float | None = None
        self._dialect = dialect
        self._request = prepared.request
        self._model = prepared.model
        self._referer = prepared.referer
        self._upstream = upstream
        self._bounds = bounds
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(bounds.max_response, error_lines=True)
        self._relayed = 0
        self._failed = False  # by what an event said, not by the connection
        self._failed_at = 0.0
        self._stream: UpstreamStream | None = None
        self._blocks: AsyncGenerator[bytes] | None = None
        self.data_due = self._loop.time() + bounds.first_data_timeout

    async def run(self) -> None:
        """Read until the answer is complete.

        Raises:
            SessionError: it ended otherwise. Chunks that came before have been taken.
        """
        self._stream = await self._open()
        self.answer.generation_id = self._stream.generation_id
        self._blocks = self._stream.blocks(self._bounds.max_response)
        async for block in self._blocks:
            self._read(block)
            if self.answer.complete:
                return
        if self._stream.whole is not None:
            self._read_whole(self._stream.whole)
        else:
            self._read_rest()
        if not self.answer.end():
            raise UpstreamInterrupted

    @property
    def may_tell_usage(self) -> bool:
        """True if the answer has failed and its usage may still come."""
        answer = self.answer
        return self._failed and answer.usage is None and not answer.complete and self._blocks is not None

    async def read_usage(self) -> bool:
        """Read on behind a failure until the usage comes, for `AFTER_ERROR` seconds. Returns True if it came."""
        try:
            async with asyncio.timeout_at(self._failed_at + AFTER_ERROR):
                while self.may_tell_usage and self._blocks is not None:
                    self._read_for_usage(self._decoder.feed(await anext(self._blocks)))
        except StopAsyncIteration:
            self._read_for_usage(self._decoder.flush())
        except (TimeoutError, EventTooLarge, UpstreamError):
            pass
        return self.answer.usage is not None

    def _read_for_usage(self, frames: Iterable[Frame]) -> None:
        for frame in frames:
            with suppress(UpstreamError):
                self.answer.read(frame.data, frame.event)

    async def close(self) -> None:
        """Close the upstream's stream; one that has said its last word gets a moment to end by itself."""
        # A finished session is kept for replay, and with it whatever is held here.
        self._request, self._decoder = b"", Decoder(self._bounds.max_response)
        stream, self._stream = self._stream, None
        if stream is None:
            return
        try:
            if self.answer.complete and self._blocks is not None:
                async with asyncio.timeout(LINGER):
                    async for _ in self._blocks:
                        pass
        except (TimeoutError, UpstreamError):
            pass
        finally:
            with suppress(UpstreamError):
                if self._blocks is not None:
                    await self._blocks.aclose()
                await stream.aclose()

    async def _open(self) -> UpstreamStream:
        attempt = 0
        while True:
            self.data_due = self._loop.time() + self._bounds.first_data_timeout
            self.asked, self.asked_at = True, self._loop.time()
            try:
                return await self._upstream.ask(
                    self._request, referer=self._referer, model=self._model, dialect=self._dialect
                )
            except UpstreamError as error:
                self.asked = may_have_generated(error)
                delay = retry_delay(error, attempt, random.random())  # noqa: S311 - jitter is no secret
                if delay is None or attempt >= self._bounds.max_retries:
                    raise
                log.info(
                    "asking the upstream again", code=error.code, status=error.upstream_status, delay=delay
                )
            attempt += 1
            self.data_due = float("inf")  # this wait has its own bound
            await asyncio.sleep(delay)

    def _read(self, block: bytes) -> None:
        """Take the chunks of one read. What came before a failure is taken as well."""
        try:
            frames = self._decoder.feed(block)
        except EventTooLarge:
            raise ResponseTooLarge from None
        now = self._loop.time()
        if frames and self._take_frames(frames, now):
            self.data_due = now + self._patience()

    def _patience(self) -> float:
        if self.answer.over:
            return AFTER_ERROR
        return QUIET_END if self.answer.finished else self._bounds.idle_timeout

    def _take_frames(self, frames: list[Frame], now: float) -> bool:
        """Take the chunks of these events. Returns True if one of them says anything."""
        chunks: list[bytes] = []
        told = False
        read, over = self.answer.read, self.answer.over
        rest = iter(frames)
        try:
            for frame in rest:
                chunk = read(frame.data, frame.event)
                if chunk is not None:
                    self._relayed += len(chunk)
                    if self._relayed > self._bounds.max_response:
                        raise ResponseTooLarge
                    chunks.append(chunk)
                elif not over and not says_nothing(frame.data):
                    told = True
        except UpstreamError:
            if self.answer.over:
                self._failed, self._failed_at = True, now
                self._read_for_usage(rest)
            raise
        finally:
            if chunks:
                self._hand_on(chunks, now)
        return told or bool(chunks)

    def _hand_on(self, chunks: list[bytes], now: float) -> None:
        if self.first_chunk_at is None:
            self.first_chunk_at = now
        self._take(chunks, now)

    def _read_rest(self) -> None:
        """Take the event that the body ended in without a blank line, if it can be read."""
        frames = self._decoder.flush()
        if frames and (frames[0].event == "error" or is_readable(frames[0].data)):
            self._take_frames(frames, self._loop.time())

    def _read_whole(self, document: dict[str, Any]) -> None:
        """Take a whole answer that came as one JSON document."""
        chunk = self.answer.read_whole(document)
        if chunk is None:
            raise UpstreamInvalid
        if len(chunk) > self._bounds.max_response:
            raise ResponseTooLarge
        self._hand_on([chunk], self._loop.time())
