"""Collect the facts of an answer from its chunks, as they pass. No I/O, no clock.

The broker relays chunks unchanged and reads only what it needs itself: whether the answer is finished or has failed,
what it cost, and how much text there was, for an estimate where the upstream reports no usage.

The shape of a chunk depends on the dialect: see `chat_answer` and `responses_answer`. This module has what both share:
it reads foreign JSON, counts text, and turns failures into errors.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from broker.core.errors import UpstreamError, UpstreamFailed, UpstreamInvalid
from broker.core.foreign import bounded_text, is_too_large_to_parse
from broker.core.upstream_errors import fault_in_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DONE = b"[DONE]"

_NOTHING = frozenset({b"", b"null"})
_ENDS = frozenset({DONE, b'"[DONE]"', b"'[DONE]'"})

_MAX_LENIENT = 1024 * 1024
"""Bytes of a chunk that is not strict JSON and is parsed leniently."""

_MAX_LENIENT_VALUES = 20_000
"""Values of such a chunk."""

_PICTURES = frozenset({"image_url", "image", "output_image", "images"})
_SOUNDS = frozenset({"audio", "input_audio", "output_audio"})


class Answer(ABC):
    """The facts of one answer, which `read` collects.

    Args:
        secrets: texts that no error message may contain.
        clock: returns the seconds since 1970, for errors that name a time.

    Attributes:
        model, provider, generation_id: as the upstream names them; None until it does.
        finish_reason, native_finish_reason: the last ones that were not empty.
        usage: the upstream's final usage object: it came with or after the end or an error.
        interim_usage: the last usage object before that; the real usage is not lower.
        text_bytes: UTF-8 bytes that the model wrote: text, reasoning (encrypted too), tool calls, annotations.
        media: images and sounds that it made.
        complete: the complete answer has been read.
        over: the answer has ended or failed; further events are read only for their usage.
    """

    __slots__ = (
        "_clock",
        "_has_sound",
        "_secrets",
        "complete",
        "finish_reason",
        "generation_id",
        "interim_usage",
        "media",
        "model",
        "native_finish_reason",
        "over",
        "provider",
        "text_bytes",
        "usage",
    )

    no_text: ClassVar[frozenset[str]]
    """Keys whose strings are not written by the model: they describe the rest, or pad it."""

    def __init__(self, secrets: tuple[str, ...] = (), clock: Callable[[], float] | None = None) -> None:
        self._secrets = secrets
        self._clock = clock
        self.model: str | None = None
        self.provider: str | None = None
        self.generation_id: str | None = None
        self.finish_reason: str | None = None
        self.native_finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self.interim_usage: dict[str, Any] | None = None
        self.text_bytes = 0
        self.media = 0
        self.complete = False
        self.over = False
        self._has_sound = False

    @property
    def finished(self) -> bool:
        """True if a clean end has been announced."""
        return self.complete

    @property
    def counts(self) -> dict[str, Any] | None:
        """The final usage with the names of a chat, which all counting uses."""
        return self.usage

    @property
    def interim_counts(self) -> dict[str, Any] | None:
        """The interim usage with the names of a chat."""
        return self.interim_usage

    def read(self, data: bytes, event: str = "message") -> bytes | None:
        """Read the data of one upstream event.

        Returns:
            The bytes to relay; None for nothing.

        Raises:
            UpstreamError: the event reports a failure, or is not a JSON object. After the finish of the answer neither
                is raised.
        """
        if self.complete:
            return None
        word = data.strip()
        if word in _ENDS:
            self.read_mark()
            return None
        if word in _NOTHING and event != "error":
            return None
        try:
            data, chunk = parse_chunk(data)
        except UpstreamInvalid:
            if event == "error":
                self._fail(self._fault({"error": _spoken(word)}))
                return None
            if not self.finished and not self.over:
                raise
            self.over = True
            return None
        return self._read_chunk(data, chunk, event)

    def read_plain(self, event: bytes) -> bool:
        """Read an event if it is like an earlier one but for its text, without parsing it.

        Args:
            event: a complete event as it is encoded, or anything else.

        Returns:
            True if it was read. Its data are to be relayed, as `read` would return them, and are one line, between
            ``data: `` and a blank line. False where the event has to be decoded and read.
        """
        del event
        return False

    def read_many_plain(self, events: bytes) -> list[bytes]:
        """Read the leading events that are like an earlier one but for their text, without parsing them.

        Args:
            events: complete events as they are encoded, and perhaps anything behind them.

        Returns:
            The line of each of these events, ``data: `` included. The data in it are to be relayed, as `read` would
            return them. The events behind them have to be decoded and read.
        """
        del events
        return []

    @abstractmethod
    def read_mark(self) -> None:
        """Note that the upstream sent `[DONE]`."""

    @abstractmethod
    def end(self) -> bool:
        """Note that the body has ended cleanly. Returns True if the answer is whole."""

    @abstractmethod
    def read_whole(self, document: dict[str, Any]) -> bytes | None:
        """Read a whole answer that came as one JSON document instead of a stream.

        Returns:
            A chunk with all of it; None where the document is not an answer.

        Raises:
            UpstreamError: it reports a failure.
        """

    def accept_usage(self) -> None:  # noqa: B027 - a dialect may have nothing to do
        """Note that nothing more comes, so that the usage of the last chunk is final."""

    @abstractmethod
    def _read_chunk(self, data: bytes, chunk: dict[str, Any], event: str) -> bytes | None:
        """Read one chunk. Returns and raises what `read` does."""

    def _fail(self, fault: UpstreamError | None, *, finished: bool | None = None) -> None:
        """Raise the fault, unless the answer was finished before."""
        self.over = True
        if not (self.finished if finished is None else finished):
            raise fault or UpstreamFailed()

    def _fault(self, place: Mapping[str, Any], native_reason: object = None) -> UpstreamError | None:
        now = None if self._clock is None else self._clock()
        return fault_in_stream(place, secrets=self._secrets, now=now, native_reason=native_reason)

    def _count(self, value: object) -> None:
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                self.text_bytes += size_of(item)
            elif isinstance(item, list):
                stack.extend(item)
            elif isinstance(item, dict):
                kind = item.get("type")
                if isinstance(kind, str) and kind in _PICTURES and _PICTURES.isdisjoint(item):
                    self.media += 1
                for key, inner in item.items():
                    if key in _SOUNDS and isinstance(inner, dict):
                        self._count_sound(inner)
                        stack.append(inner.get("transcript"))
                    elif key in _PICTURES and inner:
                        self.media += len(inner) if isinstance(inner, list) else 1
                    elif key not in self.no_text and not (
                        key in {"url", "data"} and isinstance(kind, str) and kind in _PICTURES
                    ):
                        stack.append(inner)

    def _count_sound(self, sound: dict[str, Any]) -> None:
        # A sound comes in many pieces and counts once.
        if sound.get("data") and not self._has_sound:
            self._has_sound = True
            self.media += 1


def says_nothing(data: bytes) -> bool:
    """Return True for an event that only keeps the connection open: empty, or ``null``."""
    return data.strip() in _NOTHING


def is_readable(data: bytes) -> bool:
    """Return True if `read` accepts this data."""
    word = data.strip()
    if word in _NOTHING or word in _ENDS:
        return True
    try:
        parse_chunk(data)
    except UpstreamInvalid:
        return False
    return True


def parse_relayed(data: bytes) -> dict[str, Any]:
    """Parse a relayed chunk like a page's JSON parser, including half surrogate pairs.

    Returns an empty object where that is not possible.
    """
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            chunk = _load_leniently(data.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return {}
    return chunk if isinstance(chunk, dict) else {}


def parse_chunk(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Parse a chunk, and return it as bytes that a page's JSON parser reads alike, and as an object.

    Raises:
        UpstreamInvalid: it is not a JSON object, or is too large.
    """
    if is_too_large_to_parse(data):
        raise UpstreamInvalid
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        data, chunk = _parse_leniently(data)
    if isinstance(chunk, list) and len(chunk) == 1 and isinstance(chunk[0], dict) and chunk[0].get("error"):
        chunk = chunk[0]  # the form of errors of Gemini's own endpoint
    if not isinstance(chunk, dict):
        raise UpstreamInvalid
    return data, chunk


def _parse_leniently(data: bytes) -> tuple[bytes, Any]:
    # A page's JSON.parse accepts half a surrogate pair, which a model writes when it is cut between tokens, and numbers
    # beyond the range of floats; orjson does not. Invalid UTF-8 becomes U+FFFD, as the event stream format decodes it.
    # Values that the broker reads may be written again, so they are made harmless here. Each number costs a Python
    # call, and each text a copy.
    if len(data) > _MAX_LENIENT or is_too_large_to_parse(data, most_values=_MAX_LENIENT_VALUES):
        raise UpstreamInvalid
    text = data.decode("utf-8", "replace")
    try:
        chunk = _load_leniently(text)
        harmless = json.dumps(chunk, ensure_ascii=False).encode("utf-8", "replace")
        return text.encode(), orjson.loads(harmless)
    except (ValueError, RecursionError):
        raise UpstreamInvalid from None


def _load_leniently(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_finite)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _finite(digits: str) -> int | float | None:
    if len(digits) < 16 and digits.lstrip("-").isdecimal():
        return int(digits)
    number = float(digits)
    return number if math.isfinite(number) else None


def text_of(value: object) -> str | None:
    """Return a name, an id or a reason, cut to a limit; None for an empty one or another value."""
    return bounded_text(value) if isinstance(value, str) and value else None


def _spoken(word: bytes) -> str:
    """Return the text of an error that is not an object: bare, or in quotes."""
    try:
        text = orjson.loads(word)
    except orjson.JSONDecodeError:
        text = None
    return text if isinstance(text, str) else word.decode("utf-8", "replace")


def size_of(text: str) -> int:
    """Return the bytes of a text as UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
