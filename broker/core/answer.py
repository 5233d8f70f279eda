"""What is learned of an answer from its chunks, as they pass. No I/O, no clock.

The broker relays a chunk as it is and reads only what it needs for itself: whether the answer is finished or has
failed, what it cost, and how much text there was, for an estimate where nobody tells the usage.

A finish reason is a promise that may be broken: some services send one with every piece of reasoning and go on with
the text. So content that follows takes it back, and with it the usage that came so far. A usage beside content that
it does not count is never final.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import orjson

from broker.core.errors import UpstreamError, UpstreamFailed, UpstreamInvalid
from broker.core.foreign import bounded_object, bounded_text, is_too_large_to_parse
from broker.core.pricing import completion_of, told_cost
from broker.core.upstream_errors import fault_in_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DONE = b"[DONE]"

_NOTHING = frozenset({b"", b"null"})
_ENDS = frozenset({DONE, b'"[DONE]"', b"'[DONE]'"})

_MAY_FAIL = frozenset({"error", "error_message", "base_resp"})
"""Keys of a chunk that tell of a failure, where they are not empty."""

_MAX_LENIENT = 1024 * 1024
"""Bytes of a chunk that is no strict JSON and is read all the same."""

_MAX_LENIENT_VALUES = 20_000
"""Values of such a chunk."""

_COUNTED = (
    *("prompt_tokens", "completion_tokens", "total_tokens"),
    *("cost", "cost_in_usd_ticks", "is_byok", "cost_details"),
    *("prompt_tokens_details", "completion_tokens_details"),
)
"""Members of a usage object that are kept in any case: what an answer costs is counted by them."""

_NO_TEXT = frozenset(
    {"role", "type", "id", "index", "format", "object", "detail", "p", "obfuscation", "extra_content"}
)
"""Keys of a delta whose strings say how the rest is to be read, pad it, or are not written by the model."""

_REASONING = ("reasoning", "reasoning_content", "reasoning_text")
_PICTURES = frozenset({"image_url", "image", "output_image", "images"})
_SOUNDS = frozenset({"audio", "input_audio", "output_audio"})
_MARKS = frozenset({"annotations", "citations"})


class Answer:
    """The facts of one answer, fed by `read`.

    Args:
        secrets: words that no error's message may carry.
        clock: tells the seconds since 1970, for errors that name a time.

    Attributes:
        model, provider, generation_id: as the upstream names them, None until it does.
        finish_reason, native_finish_reason: the last that were not empty.
        usage: the upstream's own object where it is final: it came with or after the finish reason or an error.
        interim_usage: the last one that came earlier; at least so much was used.
        text_bytes: UTF-8 bytes of what the model wrote: text, reasoning (encrypted too), tool calls, annotations.
        media: images and sounds that it made.
        complete: the upstream said `[DONE]`, or all of a JSON completion has been read.
        over: the answer has ended or failed; whatever follows is read for its usage alone.
    """

    __slots__ = (
        "_clock",
        "_deltas",
        "_has_sound",
        "_quiet_usage",
        "_reason_stands",
        "_reason_was_wrong",
        "_secrets",
        "_wrote",
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
        self._reason_stands = False
        self._reason_was_wrong = (
            False  # content came after a finish reason, so none is trusted before the end
        )
        self._quiet_usage = False  # the interim usage is final if the answer ends here
        self._deltas = False
        self._wrote = False  # this chunk has content
        self._has_sound = False

    @property
    def finished(self) -> bool:
        """Whether a clean end has been announced; either sign of it is enough."""
        return self.complete or self._reason_stands

    def read(self, data: bytes, event: str = "message") -> bytes | None:
        """Learn from the data of one upstream event.

        Returns:
            What is to be relayed of it, None for nothing.

        Raises:
            UpstreamError: the event tells of a failure, or is no JSON object. After a finish reason neither is raised.
        """
        if self.complete:
            return None
        word = data.strip()
        if word in _ENDS:
            self._complete()
            return None
        if word in _NOTHING and event != "error":
            return None
        try:
            data, chunk = _parse(data)
        except UpstreamInvalid:
            if event == "error":
                self._fail(self._fault({"error": _spoken(word)}))
                return None
            if not self.finished and not self.over:
                raise
            self.over = True
            return None
        return self._read_chunk(data, chunk, event)

    def end(self) -> bool:
        """Learn that the body has ended cleanly. Returns True if the answer is whole."""
        if not self.complete and self.finish_reason is not None:
            self._complete()
        return self.complete

    def read_completion(self, completion: dict[str, Any]) -> bytes | None:
        """Learn from a whole JSON completion that came in place of a stream.

        Returns:
            A chunk whose delta is the message, None where the completion has no choices.

        Raises:
            UpstreamError: it tells of a failure.
        """
        choices = completion.get("choices")
        if not isinstance(choices, list):
            choices = []
        pieces = [_as_delta(choice) for choice in choices]
        chunk = {**completion, "choices": pieces}
        if "object" in chunk:
            chunk["object"] = "chat.completion.chunk"
        if isinstance(chunk.get("usage"), dict):
            chunk["usage"] = bounded_object(
                chunk["usage"], first=_COUNTED
            )  # what cannot be written is left out
        try:
            data = orjson.dumps(chunk)
        except orjson.JSONEncodeError:
            raise UpstreamInvalid from None
        relayed = self._read_chunk(data, chunk, "message")
        if not any(isinstance(piece, dict) and isinstance(piece.get("delta"), dict) for piece in pieces):
            return None
        self.usage = self.usage or self.interim_usage
        self.complete = True
        return relayed

    def _read_chunk(self, data: bytes, chunk: dict[str, Any], event: str) -> bytes | None:
        if self.over:
            self._wrote = False
            self._note_usage(chunk)
            return None
        ended = self._reason_stands
        self._wrote = False
        if self.model is None or self.provider is None or self.generation_id is None:
            self._read_names(chunk)
        fault = None
        if not _MAY_FAIL.isdisjoint(chunk) or chunk.get("object") == "error":
            fault = self._fault(chunk, _native_reason(chunk))
        if fault is None and event == "error":
            fault = self._fault({"error": chunk}) or UpstreamFailed()
        choices = chunk.get("choices")
        if isinstance(choices, list):
            for choice in choices:
                if isinstance(choice, dict):
                    fault = fault or self._fault_in_choice(choice)
                    if fault is None or not ended:
                        self._read_choice(choice)
        if fault is not None:
            self.over, self._wrote = True, False
            self._note_usage(chunk)
            self._fail(fault, ended=ended)
            return None
        self._note_usage(chunk)
        return data

    def _fail(self, fault: UpstreamError | None, *, ended: bool | None = None) -> None:
        """Raise the fault, unless the answer had been finished before it came."""
        self.over = True
        if not (self._reason_stands if ended is None else ended):
            raise fault or UpstreamFailed()

    def _fault_in_choice(self, choice: dict[str, Any]) -> UpstreamError | None:
        if choice.get("finish_reason") != "error" and not choice.get("error"):
            return None
        return self._fault(choice, choice.get("native_finish_reason"))

    def _fault(self, place: Mapping[str, Any], native_reason: object = None) -> UpstreamError | None:
        now = None if self._clock is None else self._clock()
        return fault_in_stream(place, secrets=self._secrets, now=now, native_reason=native_reason)

    def _complete(self) -> None:
        self.complete = True
        self.accept_usage()

    def accept_usage(self) -> None:
        """Learn that nothing more comes: the usage that came with the last content is final."""
        if self.usage is None and self._quiet_usage:
            self.usage, self.interim_usage = self.interim_usage, None

    def _note_usage(self, chunk: dict[str, Any]) -> None:
        usage = chunk.get("usage")
        if not isinstance(usage, dict):
            groq = chunk.get("x_groq")
            usage = groq.get("usage") if isinstance(groq, dict) else None
            if not isinstance(usage, dict):
                return
        usage = bounded_object(usage, first=_COUNTED)
        if not self._wrote:
            self._quiet_usage = True
            is_final = self.over or self._reason_stands
        else:
            # Some give a finish reason and a usage of zeros with every chunk. A usage that does not count the content
            # beside it tells nothing of the whole; and once such a finish reason was wrong, only the end decides.
            self._quiet_usage = self._reason_stands and bool(completion_of(usage) or told_cost(usage))
            is_final = self._quiet_usage and not self._reason_was_wrong
        if is_final:
            self.usage = usage
        else:
            self.interim_usage = usage

    def _read_names(self, chunk: dict[str, Any]) -> None:
        self.model = self.model or _text(chunk.get("model"))
        self.provider = self.provider or _text(chunk.get("provider"))
        self.generation_id = self.generation_id or _text(chunk.get("id"))

    def _read_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta")
        if isinstance(delta, dict) and delta:
            self._deltas = True
            content = delta.get("content")
            # a role and a content: nearly every delta
            if (
                content
                and isinstance(content, str)
                and (len(delta) == 1 or (len(delta) == 2 and "role" in delta))
            ):
                self.text_bytes += _size(content)
                self._go_on()
            elif content or len(delta) > 1 or "content" not in delta:
                self._read_delta(delta)
        elif not self._deltas and isinstance(message := choice.get("message"), dict):
            # Beside deltas it is the answer so far, told again.
            self._read_delta(message)
        elif not self._deltas and choice.get("text") and isinstance(choice["text"], str):
            self.text_bytes += _size(choice["text"])
            self._go_on()
        reason = choice.get("finish_reason")
        if reason and isinstance(reason, str):
            before, self.finish_reason = self.finish_reason, bounded_text(reason)
            reason = self.finish_reason
            native = _text(choice.get("native_finish_reason"))
            if native or reason != before:
                self.native_finish_reason = native
            self._reason_stands = True

    def _go_on(self) -> None:
        """Take back a finish reason: the model has written on."""
        self._wrote = True
        self._quiet_usage = False
        if self._reason_stands:
            self._reason_stands = False
            self._reason_was_wrong = True
            self.interim_usage = self.usage or self.interim_usage
            self.usage = None

    def _read_delta(self, delta: dict[str, Any]) -> None:
        """Count every string of a delta or a message. Linear, and without recursion."""
        written, media = self.text_bytes, self.media
        self._count({key: value for key, value in delta.items() if key not in _MARKS})
        details = delta.get("reasoning_details")
        thoughts = [_size(value) for key in _REASONING if isinstance(value := delta.get(key), str)]
        if details or len(thoughts) > 1:  # the same thoughts, told several times
            told = [*thoughts, _size_of_thoughts(details)]
            self.text_bytes -= sum(told) - max(told)
        if self.text_bytes > written or self.media > media:
            self._go_on()
        self._count([delta.get(key) for key in _MARKS])

    def _count(self, value: object) -> None:
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                self.text_bytes += _size(item)
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
                    elif key not in _NO_TEXT and not (
                        key in {"url", "data"} and isinstance(kind, str) and kind in _PICTURES
                    ):
                        stack.append(inner)

    def _count_sound(self, sound: dict[str, Any]) -> None:
        # It comes in many pieces and is one sound all the same.
        if sound.get("data") and not self._has_sound:
            self._has_sound = True
            self.media += 1


def says_nothing(data: bytes) -> bool:
    """Return True for an event that only keeps the line open: empty, or ``null``."""
    return data.strip() in _NOTHING


def is_readable(data: bytes) -> bool:
    """Return True if `read` would not call this data invalid."""
    word = data.strip()
    if word in _NOTHING or word in _ENDS:
        return True
    try:
        _parse(data)
    except UpstreamInvalid:
        return False
    return True


def _parse(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """The chunk as JSON, and as bytes that a JSON parser of a page will read alike."""
    if is_too_large_to_parse(data):
        raise UpstreamInvalid
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        data, chunk = _parse_leniently(data)
    if isinstance(chunk, list) and len(chunk) == 1 and isinstance(chunk[0], dict) and chunk[0].get("error"):
        chunk = chunk[0]  # as Gemini's own endpoint tells an error
    if not isinstance(chunk, dict):
        raise UpstreamInvalid
    return data, chunk


def _parse_leniently(data: bytes) -> tuple[bytes, Any]:
    # Half a surrogate pair, as a model that is cut between tokens writes it, and a number beyond all floats are fine
    # for a page's JSON.parse and not for orjson. Bytes that are no UTF-8 become U+FFFD, as the event stream format
    # itself decodes them. What we read for ourselves may have to be written again, so there it is made harmless.
    # Each number is a call of ours here, and so is each text a copy.
    if len(data) > _MAX_LENIENT or is_too_large_to_parse(data, most_values=_MAX_LENIENT_VALUES):
        raise UpstreamInvalid
    text = data.decode("utf-8", "replace")
    try:
        chunk = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_finite)
        harmless = json.dumps(chunk, ensure_ascii=False).encode("utf-8", "replace")
        return text.encode(), orjson.loads(harmless)
    except (ValueError, RecursionError):
        raise UpstreamInvalid from None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _finite(digits: str) -> int | float | None:
    if len(digits) < 16 and digits.lstrip("-").isdecimal():
        return int(digits)
    number = float(digits)
    return number if math.isfinite(number) else None


def _text(value: object) -> str | None:
    return bounded_text(value) if isinstance(value, str) and value else None


def _native_reason(chunk: dict[str, Any]) -> object:
    """The provider's own reason of the choice that failed."""
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("finish_reason"):
            return choice.get("native_finish_reason")
    return None


def _spoken(word: bytes) -> str:
    """The text of an error that is no object: bare, or in quotes."""
    try:
        text = orjson.loads(word)
    except orjson.JSONDecodeError:
        text = None
    return text if isinstance(text, str) else word.decode("utf-8", "replace")


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _size_of_thoughts(details: object) -> int:
    """Bytes of readable reasoning in ``reasoning_details``, which ``reasoning`` tells too."""
    if not isinstance(details, list):
        return 0
    texts = [detail.get(key) for detail in details if isinstance(detail, dict) for key in ("text", "summary")]
    return sum(_size(text) for text in texts if isinstance(text, str))


def _as_delta(choice: object) -> object:
    """A choice of a completion as a choice of a chunk."""
    if not isinstance(choice, dict) or "message" not in choice:
        return choice
    piece = {key: value for key, value in choice.items() if key not in {"message", "delta"}}
    return {**piece, "delta": choice["message"]}
