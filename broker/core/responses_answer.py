"""Read an answer in the Responses dialect: events with a type; the last one has the complete response.

The text of an answer comes more than once: in deltas, when a part or an item is done, and at the end. An estimate
counts each item once: its deltas or the whole item, whichever is larger.

The events: https://platform.openai.com/docs/api-reference/responses-streaming. OpenRouter ends with ``[DONE]``, which
has no meaning here: only ``response.completed`` and ``response.incomplete`` end an answer well. ``response.done`` is
the older name of both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from broker.core.answer import Answer, size_of, text_of
from broker.core.errors import UpstreamError, UpstreamFailed, UpstreamInvalid
from broker.core.foreign import bounded_object
from broker.core.pricing import completion_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

COMPLETED, INCOMPLETE, FAILED = "response.completed", "response.incomplete", "response.failed"

_MAY_FAIL = frozenset({"error", "error_message", "base_resp"})
"""Keys of an event that report a failure, if they are not empty."""

_END_OF_STATUS = {"completed": COMPLETED, "incomplete": INCOMPLETE, "failed": FAILED, "cancelled": FAILED}
_CUT = {"max_output_tokens": "length", "content_filter": "content_filter"}
_CALLS = frozenset({"function_call", "custom_tool_call"})

_CHAT_NAMES = {
    "input_tokens": "prompt_tokens",
    "output_tokens": "completion_tokens",
    "input_tokens_details": "prompt_tokens_details",
    "output_tokens_details": "completion_tokens_details",
}
_COUNTED = (*_CHAT_NAMES, "total_tokens", "cost", "cost_in_usd_ticks", "is_byok", "cost_details")
"""Members of a usage object that are always kept, because the cost is computed from them."""

_MAX_OPEN = 1000
"""Open items for which the size of the deltas is remembered. For others, deltas and the whole item both count."""


def in_chat_names(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Return a usage object with the names of a chat. If it has both names of a value, that of a chat counts."""
    renamed = {_CHAT_NAMES[name]: value for name, value in usage.items() if name in _CHAT_NAMES}
    return renamed | {name: value for name, value in usage.items() if name not in _CHAT_NAMES}


class ResponsesAnswer(Answer):
    """The facts of one response. It is complete with the event that ends it."""

    __slots__ = ("_calls", "_open")

    no_text = frozenset(
        {"role", "type", "id", "index", "format", "object", "detail", "obfuscation", "status", "phase"}
        | {"call_id", "item_id", "logprobs", "top_logprobs"}
    )

    def __init__(self, secrets: tuple[str, ...] = (), clock: Callable[[], float] | None = None) -> None:
        super().__init__(secrets, clock)
        self._calls = False  # the model has called a function
        self._open: dict[int | str, int] = {}  # bytes that came in deltas, by item

    @property
    def counts(self) -> dict[str, Any] | None:
        """The final usage with the names of a chat, which all counting uses."""
        return None if self.usage is None else in_chat_names(self.usage)

    @property
    def interim_counts(self) -> dict[str, Any] | None:
        """The interim usage with the names of a chat."""
        return None if self.interim_usage is None else in_chat_names(self.interim_usage)

    def read_mark(self) -> None:
        """Note that the upstream sent `[DONE]`, which does not end a response."""

    def end(self) -> bool:
        """Note that the body has ended cleanly. Returns True if the answer is whole."""
        return self.complete

    def read_whole(self, document: dict[str, Any]) -> bytes | None:
        """Read a whole response that came as one JSON document instead of a stream.

        Returns:
            The event that ends a response, with the number 0 because no event came before it; None if the document is
            not a finished response.

        Raises:
            UpstreamError: it reports a failure.
        """
        status = document.get("status") or "completed"
        kind = _END_OF_STATUS.get(status) if isinstance(status, str) else None
        if kind is None or not isinstance(document.get("output"), list):
            return None
        if isinstance(document.get("usage"), dict):
            # Members that cannot be written are left out.
            document = document | {"usage": bounded_object(document["usage"], first=_COUNTED)}
        chunk = {"type": kind, "sequence_number": 0, "response": document}
        try:
            data = orjson.dumps(chunk)
        except orjson.JSONEncodeError:
            raise UpstreamInvalid from None
        return self._read_chunk(data, chunk, "message")

    def _read_chunk(self, data: bytes, chunk: dict[str, Any], event: str) -> bytes | None:
        value = chunk.get("response")
        response: dict[str, Any] = value if isinstance(value, dict) else {}
        kind = chunk.get("type")
        kind = kind if isinstance(kind, str) else ""
        end = self._end_told(kind, response)
        fault = None if self.over else self._fault_told(chunk, kind, end, event)
        self._note_usage(response or chunk, is_final=self.over or end is not None or fault is not None)
        if self.over:
            return None
        self._read_names(response)
        if fault is not None:
            self._fail(fault)
            return None
        if end is not None:
            self._finish(end, response)
        elif kind.endswith(".delta"):
            self._read_delta(kind, chunk)
        elif kind == "response.output_text.annotation.added":
            self._grow(chunk, self._measure(chunk.get("annotation")))
        elif kind in {"response.output_item.added", "response.output_item.done"}:
            self._read_item(chunk, done=kind.endswith(".done"))
        return data

    @staticmethod
    def _end_told(kind: str, response: Mapping[str, Any]) -> str | None:
        """Return the kind of end that an event is; None for another event."""
        if kind in {INCOMPLETE, FAILED}:
            return kind
        if kind == "response.cancelled":
            return FAILED
        if kind not in {COMPLETED, "response.done"}:
            return None
        # Some end every response in the same event, and only its status says that it was cut.
        status = response.get("status")
        return _END_OF_STATUS.get(status, COMPLETED) if isinstance(status, str) else COMPLETED

    def _fault_told(
        self, chunk: dict[str, Any], kind: str, end: str | None, event: str
    ) -> UpstreamError | None:
        if end == FAILED:
            response = chunk.get("response")
            error = response.get("error") if isinstance(response, dict) else None
            return self._fault({"error": error or chunk.get("error")}) or UpstreamFailed()
        if kind == "error" or event == "error":
            error = chunk.get("error") or {key: value for key, value in chunk.items() if key != "type"}
            return self._fault({"error": error}) or UpstreamFailed()
        if end is None and (not _MAY_FAIL.isdisjoint(chunk) or chunk.get("object") == "error"):
            return self._fault(chunk)
        return None

    def _note_usage(self, place: Mapping[str, Any], *, is_final: bool) -> None:
        usage = place.get("usage")
        if not isinstance(usage, dict):
            return
        usage = bounded_object(usage, first=_COUNTED)
        if is_final:
            self.usage = usage
        else:
            self.interim_usage = usage

    def _read_names(self, response: Mapping[str, Any]) -> None:
        self.model = self.model or text_of(response.get("model"))
        self.provider = self.provider or text_of(response.get("provider"))
        self.generation_id = self.generation_id or text_of(response.get("id"))

    def _read_delta(self, kind: str, chunk: Mapping[str, Any]) -> None:
        delta = chunk.get("delta")
        if kind.endswith("audio.delta"):
            self._count_sound({"data": delta})
        elif isinstance(delta, str):
            self._grow(chunk, (size_of(delta), 0))
        else:
            self._grow(chunk, self._measure(delta))

    def _grow(self, chunk: Mapping[str, Any], written: tuple[int, int]) -> None:
        """Count what was written, and remember that it belongs to an item that is not done yet."""
        size, media = written
        self.text_bytes += size
        self.media += media
        place = _place(chunk)
        if place is not None and (place in self._open or len(self._open) < _MAX_OPEN):
            self._open[place] = self._open.get(place, 0) + size

    def _read_item(self, chunk: Mapping[str, Any], *, done: bool) -> None:
        item = chunk.get("item")
        if not isinstance(item, dict):
            return
        self._calls = self._calls or _is_call(item)
        if not done:
            return
        place = _place(chunk)
        seen = self._open.pop(place, 0) if place is not None else 0
        shown, hidden, media = self._measure_item(item)
        self.text_bytes += max(0, shown - seen) + hidden
        self.media += media

    def _measure_item(self, item: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return the size of an item: bytes that deltas may have had too, bytes of encrypted text, and media."""
        kind = item.get("type")
        if kind == "image_generation_call":
            return 0, 0, 1
        if kind != "reasoning":
            size, media = self._measure(item)
            return size, 0, media
        # The same reasoning in two forms.
        thoughts = max(self._measure(item.get("summary"))[0], self._measure(item.get("content"))[0])
        return thoughts, self._measure(item.get("encrypted_content"))[0], 0

    def _measure(self, value: object) -> tuple[int, int]:
        """Return the bytes and the media of a value, and count nothing."""
        before = self.text_bytes, self.media
        self._count(value)
        written = self.text_bytes - before[0], self.media - before[1]
        self.text_bytes, self.media = before
        return written

    def _finish(self, end: str, response: Mapping[str, Any]) -> None:
        output = response.get("output")
        items = [item for item in output if isinstance(item, dict)] if isinstance(output, list) else []
        self.complete = True
        if end == INCOMPLETE:
            details = response.get("incomplete_details")
            reason = text_of(details.get("reason")) if isinstance(details, dict) else None
            self.finish_reason = _CUT.get(reason or "", "length")
            self.native_finish_reason = reason or "incomplete"
        else:
            called = self._calls or any(_is_call(item) for item in items)
            self.finish_reason = "tool_calls" if called else "stop"
            self.native_finish_reason = text_of(response.get("status")) or "completed"
        if completion_of(self.counts or {}) is None:
            measured = [self._measure_item(item) for item in items]
            self.text_bytes = max(self.text_bytes, sum(shown + hidden for shown, hidden, _ in measured))
            self.media = max(self.media, sum(media for *_, media in measured))


def is_response(document: Mapping[str, Any]) -> bool:
    """Return True for a JSON document that is a complete response."""
    return isinstance(document.get("output"), list)


def _is_call(item: Mapping[str, Any]) -> bool:
    kind = item.get("type")
    return isinstance(kind, str) and kind in _CALLS


def _place(chunk: Mapping[str, Any]) -> int | str | None:
    """Return what identifies the item of an event: its place, else its id."""
    place = chunk.get("output_index")
    if isinstance(place, int):
        return place
    return text_of(chunk.get("item_id"))
