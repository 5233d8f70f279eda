"""Read one answer from the upstream: send the request, send it again where that is safe, and take chunks as they come.

A request that may have been billed is never sent twice. It is sent again only before any byte of an answer, and only
where the upstream said that it did not generate, or was never reached. `core.upstream_errors.retry_delay` decides.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from broker.core.answer import is_readable, says_nothing
from broker.core.errors import ResponseTooLarge, UpstreamError, UpstreamInterrupted, UpstreamInvalid
from broker.core.sse import DATA, Decoder, EventTooLarge, encode_data
from broker.core.upstream_errors import may_have_generated, retry_delay
from broker.telemetry.interface import NO_HEADERS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from broker.core.dialect import Dialect
    from broker.core.sse import Frame
    from broker.relay.config import GenerationLimits
    from broker.store.sessions import Prepared
    from broker.upstream.client import UpstreamClient, UpstreamStream

log = structlog.get_logger(__name__)

QUIET_END = 10.0
"""Seconds that an upstream may stay silent once it has given a finish reason; then the answer is complete."""

AFTER_ERROR = 2.0
"""Seconds that an upstream is read, only for its usage, once an answer has failed or can no longer be read."""

MAX_OTHERS = 4
"""Events of one read that are read one by one, where all others have nothing new but text."""

BLANK_LINE = len(b"\n\n")
"""Bytes of an event behind its data."""

FRAMING = len(DATA) + BLANK_LINE
"""Bytes of an event around its data, if these are one line."""

LINGER = 1.0
"""Seconds to wait for the upstream to end the stream after its last event, so that the connection can be reused."""


def _ignore(_: bytes) -> bool:
    """Take what an upstream sends after its last event."""
    return False


class Take(Protocol):
    """Takes the chunks of a read."""

    def __call__(self, encoded: Sequence[bytes], now: float, event: bytes | None = None) -> None:
        """Take them, or the event of one chunk."""


class UpstreamReader:
    """One answer, from the request to the last chunk.

    Args:
        prepared: the request.
        dialect: the form of request and answer.
        upstream: the service that is asked.
        limits: seconds, bytes and retries.
        take: is called with the chunks of each read, as `encode_data` returns them, and the time. Of a read that is one
            event, whose only line is ``data: `` and a chunk, it gets no chunks but the event.
        clock: seconds that only go forward; by default the event loop's.
        pause: waits for so many seconds.
        jitter: returns a random number from 0 to 1 for the delay of a retry.
        headers: more headers of the request.

    Attributes:
        answer: what is known of the answer so far.
        data_due: time by which data must have come; comments are no data.
        first_chunk_at: time of the first chunk.
        asked: the upstream may have begun to generate.
        asked_at: time of the last request.
        retries: how often the request was sent again.
        status: HTTP status of the last answer; None where there was none.
        relayed: bytes of the chunks so far.
    """

    __slots__ = (
        "_clock",
        "_decoder",
        "_dialect",
        "_failed",
        "_failed_at",
        "_headers",
        "_idle_timeout",
        "_is_ended",
        "_jitter",
        "_limits",
        "_max_response",
        "_model",
        "_pause",
        "_referer",
        "_request",
        "_request_id",
        "_stream",
        "_take",
        "_upstream",
        "answer",
        "asked",
        "asked_at",
        "data_due",
        "first_chunk_at",
        "relayed",
        "retries",
        "status",
    )

    def __init__(
        self,
        prepared: Prepared,
        *,
        dialect: Dialect,
        upstream: UpstreamClient,
        limits: GenerationLimits,
        take: Take,
        clock: Callable[[], float] | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> None:
        self.answer = dialect.answer(upstream.secrets, time.time)
        self.first_chunk_at: float | None = None
        self.asked = False
        self.asked_at: float | None = None
        self.retries = 0
        self.status: int | None = None
        self.relayed = 0
        self._dialect = dialect
        self._request = prepared.request
        self._model = prepared.model
        self._request_id = prepared.request_id
        self._referer = prepared.referer
        self._headers = headers
        self._upstream = upstream
        self._limits = limits
        self._max_response, self._idle_timeout = limits.max_response, limits.idle_timeout
        self._take = take
        self._clock = clock or asyncio.get_running_loop().time
        self._pause = pause
        self._jitter = jitter
        self._decoder = Decoder(limits.max_response, error_lines=True)
        self._failed = False  # by what an event said, not by the connection
        self._failed_at = 0.0
        self._stream: UpstreamStream | None = None
        self._is_ended = False  # the upstream's stream
        self.data_due = self._clock() + limits.first_data_timeout

    async def run(self) -> None:
        """Read until the answer is complete.

        Raises:
            SessionError: the answer is not complete. Chunks that came before have been taken.
        """
        self._stream = await self._open()
        self._request = b""  # it was sent, and no other attempt follows
        self.status = self._stream.status
        self.answer.generation_id = self._stream.generation_id
        self._is_ended = await self._stream.relay(self._read, self._limits.max_response)
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
        return self._failed and answer.usage is None and not answer.complete and not self._is_ended

    async def read_usage(self) -> bool:
        """Read on after a failure until the usage comes, for `AFTER_ERROR` seconds. Returns True if it came."""
        stream = self._stream
        if stream is None or not self.may_tell_usage:
            return self.answer.usage is not None
        try:
            async with asyncio.timeout(self._failed_at + AFTER_ERROR - self._clock()):
                self._is_ended = await stream.relay(self._read_usage, self._limits.max_response)
            if self._is_ended:
                self._read_for_usage(self._decoder.flush())
        except (TimeoutError, EventTooLarge, UpstreamError):
            pass
        return self.answer.usage is not None

    def _read_usage(self, block: bytes) -> bool:
        """Read the usage in these bytes. Returns True if nothing more needs to be read."""
        self._read_for_usage(self._decoder.feed(block))
        return not self.may_tell_usage

    def _read_for_usage(self, frames: Iterable[Frame]) -> None:
        for frame in frames:
            with suppress(UpstreamError):
                self.answer.read(frame.data, frame.event)

    async def close(self) -> None:
        """Close the upstream's stream. A complete answer first gets `LINGER` seconds to end by itself."""
        # Prompt and buffers are not needed any more. Without the reference to who takes the chunks, and who owns this
        # reader, the memory of both is freed at once; the collector would hardly ever come.
        self._request, self._decoder = b"", Decoder(self._limits.max_response)
        self._take = _take_nothing
        stream, self._stream = self._stream, None
        if stream is None:
            return
        try:
            if self.answer.complete and not self._is_ended:
                async with asyncio.timeout(LINGER):
                    await stream.relay(_ignore)
        except (TimeoutError, UpstreamError):
            pass
        finally:
            stream.close()

    def stop(self) -> None:
        """Take no more chunks. The task of `run` has to be cancelled too."""
        if self._stream is not None:
            self._stream.stop()

    async def _open(self) -> UpstreamStream:
        while True:
            self.asked, self.asked_at = True, self._clock()
            self.data_due = self.asked_at + self._limits.first_data_timeout
            try:
                return await self._upstream.ask(
                    self._request,
                    referer=self._referer,
                    model=self._model,
                    dialect=self._dialect,
                    headers=self._headers,
                )
            except UpstreamError as error:
                self.asked, self.status = may_have_generated(error), error.upstream_status
                delay = retry_delay(error, self.retries, self._jitter())
                if delay is None or self.retries >= self._limits.max_retries:
                    raise
                log.info(
                    "asking the upstream again",
                    code=error.code,
                    status=error.upstream_status,
                    delay=delay,
                    request_id=self._request_id,
                )
            self.retries += 1
            self.data_due = float("inf")  # the delay of a retry has a bound of its own
            await self._pause(delay)

    def _read(self, block: bytes) -> bool:
        """Take the chunks of one read, also those before a failure in it. Returns True if the answer is complete."""
        now = self._clock()
        # Nearly every read is one event with a new text and nothing else.
        fits = self.relayed + len(block) <= self._max_response
        if fits and self._decoder.is_between_events and self.answer.read_plain(block):
            self.relayed += len(block) - FRAMING
            self.data_due = now + self._idle_timeout
            self._take((), now, block)
            return False
        encoded: list[bytes] = []
        try:
            has_data = self._read_events(block, encoded, now)
        finally:
            self._pass_on(encoded, now)
        if encoded or has_data:
            self.data_due = now + self._patience()
        return self.answer.complete

    def _pass_on(self, encoded: list[bytes], now: float) -> None:
        if encoded:
            if self.first_chunk_at is None:
                self.first_chunk_at = now
            self._take(encoded, now)

    def _read_events(self, block: bytes, encoded: list[bytes], now: float) -> bool:
        """Add the chunks of one read to `encoded`. Returns True if there was other data.

        Of many events at a time, nearly all have nothing new but a piece of text. Those are read together, the others
        alone, until there are more than `MAX_OTHERS` of them: then all are read one by one.
        """
        events, rest = self._decoder.take_complete(block)
        has_data = False
        try:
            for _ in range(MAX_OTHERS):
                events = events[self._read_plain(events, encoded) :]
                if not events:
                    break
                end = events.find(b"\n\n") + 2
                other, events = events[:end], events[end:]
                has_data |= self._read_frames(other, encoded, now)
            others, events, rest = events + rest, b"", b""
            return self._read_frames(others, encoded, now) or has_data
        except UpstreamError:
            if self._failed:
                with suppress(EventTooLarge):
                    self._read_for_usage(self._decoder.feed(events + rest))
            raise

    def _read_plain(self, events: bytes, encoded: list[bytes]) -> int:
        """Add the chunks of the leading events that need no parsing. Returns the bytes of these events."""
        if self.relayed + len(events) > self._limits.max_response:
            return 0
        plain = self.answer.read_many_plain(events)
        size = sum(map(len, plain)) + BLANK_LINE * len(plain)
        self.relayed += size - FRAMING * len(plain)
        encoded += plain
        return size

    def _read_frames(self, data: bytes, encoded: list[bytes], now: float) -> bool:
        """Decode bytes, and add the chunks in them. Returns True if there was other data."""
        if not data:
            return False
        try:
            frames = self._decoder.feed(data)
        except EventTooLarge:
            raise ResponseTooLarge from None
        return self._take_frames(frames, encoded, now)

    def _patience(self) -> float:
        if self.answer.over:
            return AFTER_ERROR
        return QUIET_END if self.answer.finished else self._limits.idle_timeout

    def _take_frames(self, frames: list[Frame], encoded: list[bytes], now: float) -> bool:
        """Add the chunks of these events to `encoded`. Returns True if there was other data."""
        has_data = False
        read, over = self.answer.read, self.answer.over
        rest = iter(frames)
        try:
            for event, data, _ in rest:
                chunk = read(data, event)
                if chunk is not None:
                    self.relayed += len(chunk)
                    if self.relayed > self._limits.max_response:
                        raise ResponseTooLarge
                    encoded.append(encode_data(chunk))
                elif not over and not says_nothing(data):
                    has_data = True
        except UpstreamError:
            if self.answer.over:
                self._failed, self._failed_at = True, now
                self._read_for_usage(rest)
            raise
        return has_data

    def _read_rest(self) -> None:
        """Take the last event of a body that ends without a blank line, if it can be read."""
        frames = self._decoder.flush()
        if frames and (frames[0].event == "error" or is_readable(frames[0].data)):
            now = self._clock()
            encoded: list[bytes] = []
            try:
                self._take_frames(frames, encoded, now)
            finally:
                self._pass_on(encoded, now)

    def _read_whole(self, document: dict[str, Any]) -> None:
        """Take a complete answer that came as one JSON document."""
        chunk = self.answer.read_whole(document)
        if chunk is None:
            raise UpstreamInvalid
        if len(chunk) > self._limits.max_response:
            raise ResponseTooLarge
        self.relayed = len(chunk)
        self.first_chunk_at = now = self._clock()
        self._take([encode_data(chunk)], now)


def _take_nothing(encoded: Sequence[bytes], now: float, event: bytes | None = None) -> None:
    """Drop what comes after the answer was closed."""
