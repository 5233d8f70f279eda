"""Reading one answer from the upstream: asking, asking again where that is safe, and taking chunks as they come.

The law of money: nothing here asks twice but before any byte of an answer, and only where the upstream said that it
did not generate or was never reached. `core.faults.retry_delay` decides.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from broker.core.answer import Answer
from broker.core.errors import ResponseTooLarge, UpstreamError, UpstreamInterrupted
from broker.core.faults import may_have_generated, retry_delay
from broker.core.sse import Decoder, EventTooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from broker.relay.terms import Bounds
    from broker.store.sessions import Prepared
    from broker.upstream.client import UpstreamClient, UpstreamStream

log = structlog.get_logger(__name__)

QUIET_END = 5.0
"""Seconds that an upstream may stay silent once it has given a finish reason; then the answer is complete."""

LINGER = 1.0
"""Seconds to wait for an upstream's end of stream after its last event, so that the connection can be used again."""


class Reading:
    """One answer, from the request to the last chunk.

    Args:
        prepared: what to ask.
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
        upstream: UpstreamClient,
        bounds: Bounds,
        take: Callable[[list[bytes], float], None],
    ) -> None:
        self.answer = Answer(upstream.secrets)
        self.first_chunk_at: float | None = None
        self.asked = False
        self.asked_at: float | None = None
        self._request = prepared.request
        self._referer = prepared.referer
        self._upstream = upstream
        self._bounds = bounds
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(bounds.max_response)
        self._relayed = 0
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
        self._blocks = self._stream.blocks()
        async for block in self._blocks:
            self._read(block)
            if self.answer.complete:
                return
        if not self.answer.end():
            raise UpstreamInterrupted

    async def let_go(self) -> None:
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
                return await self._upstream.open_chat(self._request, referer=self._referer)
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
        chunks: list[bytes] = []
        now = self._loop.time()
        read = self.answer.read
        try:
            frames = self._decoder.feed(block)
            for frame in frames:
                chunk = read(frame.data)
                if chunk is not None:
                    self._relayed += len(chunk)
                    if self._relayed > self._bounds.max_response:
                        raise ResponseTooLarge
                    chunks.append(chunk)
        except EventTooLarge:
            raise ResponseTooLarge from None
        finally:
            if chunks:
                if self.first_chunk_at is None:
                    self.first_chunk_at = now
                self._take(chunks, now)
        if frames:
            self.data_due = now + (QUIET_END if self.answer.finished else self._bounds.idle_timeout)
