"""What is learned of an answer from its chunks, as they pass. No I/O, no clock.

The broker relays a chunk as it is and reads only what it needs for itself: whether the answer is finished or has
failed, what it cost, and how much text there was, for an estimate where nobody tells the usage.
"""

from __future__ import annotations

import json
import math
from typing import Any

import orjson

from broker.core.errors import UpstreamFailed, UpstreamInvalid
from broker.core.faults import fault_in_stream

DONE = b"[DONE]"


class Answer:
    """The facts of one answer, fed by `read`.

    Args:
        secrets: words that no error's message may carry.

    Attributes:
        model, provider, generation_id: as the upstream names them, None until it does.
        finish_reason, native_finish_reason: of the first choice that finished.
        usage: the upstream's own object; the last one wins.
        text_bytes: UTF-8 bytes of what the model wrote: text, reasoning and tool arguments.
        complete: the upstream said `[DONE]`.
    """

    __slots__ = (
        "_secrets",
        "complete",
        "finish_reason",
        "generation_id",
        "model",
        "native_finish_reason",
        "provider",
        "text_bytes",
        "usage",
    )

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        self._secrets = secrets
        self.model: str | None = None
        self.provider: str | None = None
        self.generation_id: str | None = None
        self.finish_reason: str | None = None
        self.native_finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self.text_bytes = 0
        self.complete = False

    @property
    def finished(self) -> bool:
        """Whether a clean end has been announced; either sign of it is enough."""
        return self.complete or self.finish_reason is not None

    def read(self, data: bytes) -> bytes | None:
        """Learn from the data of one upstream event; return what is to be relayed of it, None for nothing.

        Raises:
            UpstreamError: the event tells of a failure, or is no JSON object.
        """
        if self.complete:
            return None
        word = data.strip()
        self.complete = word == DONE
        if self.complete or not word:
            return None
        data, chunk = _parse(data)
        if chunk.get("usage") is not None and isinstance(chunk["usage"], dict):
            self.usage = chunk["usage"]
        if "error" in chunk or chunk.get("object") == "error":
            fault = fault_in_stream(chunk, secrets=self._secrets)
            if fault is not None:
                raise fault
        if self.model is None or self.provider is None or self.generation_id is None:
            self._read_names(chunk)
        choices = chunk.get("choices")
        if isinstance(choices, list):
            for choice in choices:
                if isinstance(choice, dict):
                    self._read_choice(choice)
        return data

    def _read_names(self, chunk: dict[str, Any]) -> None:
        self.model = self.model or _text(chunk.get("model"))
        self.provider = self.provider or _text(chunk.get("provider"))
        self.generation_id = self.generation_id or _text(chunk.get("id"))

    def _read_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta")
        if isinstance(delta, dict):
            content = delta.get("content")
            if content and isinstance(content, str):
                self.text_bytes += (
                    len(content) if content.isascii() else len(content.encode("utf-8", "replace"))
                )
            if not content or len(delta) > 2:  # more than a role and a content
                self.text_bytes += _other_text(delta)
        reason = choice.get("finish_reason")
        if reason == "error" or choice.get("error"):
            raise fault_in_stream(choice, secrets=self._secrets) or UpstreamFailed()
        if self.finish_reason is None and reason and isinstance(reason, str):
            self.finish_reason = reason
            self.native_finish_reason = _text(choice.get("native_finish_reason"))


def _parse(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """The chunk as JSON, and as bytes that a JSON parser of a page will read alike."""
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        data, chunk = _parse_leniently(data)
    if not isinstance(chunk, dict):
        raise UpstreamInvalid
    return data, chunk


def _parse_leniently(data: bytes) -> tuple[bytes, Any]:
    # Half a surrogate pair, as a model that is cut between tokens writes it, and a number beyond all floats are fine
    # for a page's JSON.parse and not for orjson. Bytes that are no UTF-8 become U+FFFD, as the event stream format
    # itself decodes them. What we read for ourselves may have to be written again, so there it is made harmless.
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
    return value if isinstance(value, str) and value else None


def _other_text(delta: dict[str, Any]) -> int:
    """Bytes of reasoning and tool arguments."""
    total = 0
    for name in ("reasoning", "reasoning_content", "refusal"):
        if isinstance(value := delta.get(name), str):
            total += len(value.encode("utf-8", "replace"))
    calls = delta.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            for value in (function.get("name"), function.get("arguments")):
                if isinstance(value, str):
                    total += len(value.encode("utf-8", "replace"))
    return total
