"""Read an answer in the dialect of chat completions: chunks with choices that have deltas.

A finish reason may be wrong: some services send one with every piece of reasoning and then continue with the text. So
later content revokes it, and the usage that came so far is not final. A usage in a chunk with content that it does not
count is never final.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from broker.core.answer import Answer, size_of, text_of
from broker.core.chat_said import in_place_of_delta, tellings
from broker.core.errors import UpstreamError, UpstreamFailed, UpstreamInvalid
from broker.core.foreign import bounded_object, bounded_text
from broker.core.pricing import completion_of, reported_cost
from broker.core.skeleton import Skeleton
from broker.core.sse import DATA

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MAY_FAIL = frozenset({"error", "error_message", "base_resp"})
"""Keys of a chunk that report a failure, if they are not empty."""

_COUNTED = (
    *("prompt_tokens", "completion_tokens", "total_tokens"),
    *("cost", "cost_in_usd_ticks", "is_byok", "cost_details"),
    *("prompt_tokens_details", "completion_tokens_details"),
)
"""Members of a usage object that are always kept, because the cost is computed from them."""

_MARKS = frozenset({"annotations", "citations"})


class ChatAnswer(Answer):
    """The facts of one chat completion.

    It is complete once the upstream sent `[DONE]`, or its body has ended after a finish reason.
    """

    __slots__ = (
        "_deltas",
        "_has_plain",
        "_quiet_usage",
        "_reason_stands",
        "_reason_was_wrong",
        "_skeleton",
        "_wrote",
    )

    no_text = frozenset(
        {"role", "type", "id", "index", "format", "object", "detail", "p", "obfuscation", "extra_content"}
    )

    def __init__(self, secrets: tuple[str, ...] = (), clock: Callable[[], float] | None = None) -> None:
        super().__init__(secrets, clock)
        self._reason_stands = False
        # Content came after a finish reason, so finish reasons are not trusted before the end.
        self._reason_was_wrong = False
        self._quiet_usage = False  # the interim usage is final if the answer ends now
        self._deltas = False
        self._wrote = False  # this chunk has content
        self._has_plain = False  # a chunk said nothing but a piece of text
        self._skeleton = Skeleton()

    def read(self, data: bytes, event: str = "message") -> bytes | None:
        """Read the data of one upstream event. A chunk of which only the text is new is not parsed.

        Returns:
            The bytes to relay; None for nothing.

        Raises:
            UpstreamError: as `Answer.read`.
        """
        if event == "message" and self.read_plain(b"%b%b\n\n" % (DATA, data)):
            return data
        return super().read(data, event)

    def read_plain(self, event: bytes) -> bool:
        """Read an event of which only the text is new, as `Answer.read_plain`. The text is counted."""
        size = self._skeleton.text_size(event)
        if not size or self._reason_stands or self.over or self.complete:
            return False
        self.text_bytes += size
        self._quiet_usage = False
        return True

    def read_many_plain(self, events: bytes) -> list[bytes]:
        """Read the leading events of which only the text is new, as `Answer.read_many_plain`."""
        if self._reason_stands or self.over or self.complete:
            return []
        lines, size = self._skeleton.match(events)
        if lines:
            self.text_bytes += size
            self._quiet_usage = False
        return lines

    @property
    def finished(self) -> bool:
        """True if a clean end has been announced, by `[DONE]` or by a finish reason."""
        return self.complete or self._reason_stands

    def read_mark(self) -> None:
        """Note that the upstream sent `[DONE]`."""
        self._complete()

    def end(self) -> bool:
        """Note that the body has ended cleanly. Returns True if the answer is complete."""
        if not self.complete and self.finish_reason is not None:
            self._complete()
        return self.complete

    def read_whole(self, document: dict[str, Any]) -> bytes | None:
        """Read a complete JSON completion that came in place of a stream.

        Returns:
            A chunk whose delta is the message; None where the completion has no choices.

        Raises:
            UpstreamError: it reports a failure.
        """
        choices = document.get("choices")
        if not isinstance(choices, list):
            choices = []
        pieces = [_as_delta(choice) for choice in choices]
        chunk = {**document, "choices": pieces}
        if "object" in chunk:
            chunk["object"] = "chat.completion.chunk"
        if isinstance(chunk.get("usage"), dict):
            # Members that cannot be written are left out.
            chunk["usage"] = bounded_object(chunk["usage"], first=_COUNTED)
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
            self._fail(fault, finished=ended)
            return None
        self._note_usage(chunk)
        self._learn(data, chunk, event)
        return data

    def _learn(self, data: bytes, chunk: dict[str, Any], event: str) -> None:
        """Remember a chunk that says nothing but a piece of text, to recognize the next ones.

        Not the first one: a page waits for it, and an answer may have no other.
        """
        if not (self._wrote and event == "message"):
            return
        if not self._has_plain:
            self._has_plain = True
        elif (delta := _plain_delta(chunk)) is not None:
            self._skeleton.learn(data, chunk, delta)

    def _fault_in_choice(self, choice: dict[str, Any]) -> UpstreamError | None:
        if choice.get("finish_reason") != "error" and not choice.get("error"):
            return None
        return self._fault(choice, choice.get("native_finish_reason"))

    def _complete(self) -> None:
        self.complete = True
        self.accept_usage()

    def accept_usage(self) -> None:
        """Note that nothing more comes: the usage that came with the last content is final."""
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
            # Some services send a finish reason and a usage of zeros with every chunk. A usage that does not count the
            # content beside it says nothing about the whole. And after a wrong finish reason, only the end decides.
            self._quiet_usage = self._reason_stands and bool(completion_of(usage) or reported_cost(usage))
            is_final = self._quiet_usage and not self._reason_was_wrong
        if is_final:
            self.usage = usage
        else:
            self.interim_usage = usage

    def _read_names(self, chunk: dict[str, Any]) -> None:
        self.model = self.model or text_of(chunk.get("model"))
        self.provider = self.provider or text_of(chunk.get("provider"))
        self.generation_id = self.generation_id or text_of(chunk.get("id"))

    def _read_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta")
        if isinstance(delta, dict) and delta:
            self._deltas = True
            content = delta.get("content")
            if content and _is_plain(delta):
                self.text_bytes += size_of(content)
                self._go_on()
            elif content or len(delta) > 1 or "content" not in delta:
                self._read_delta(delta)
        elif not self._deltas and (message := in_place_of_delta(choice)) is not None:
            # After deltas, a message repeats the answer so far.
            self._read_delta(message)
        reason = choice.get("finish_reason")
        if reason and isinstance(reason, str):
            before, self.finish_reason = self.finish_reason, bounded_text(reason)
            reason = self.finish_reason
            native = text_of(choice.get("native_finish_reason"))
            if native or reason != before:
                self.native_finish_reason = native
            self._reason_stands = True

    def _go_on(self) -> None:
        """Revoke a finish reason, because the model has written more."""
        self._wrote = True
        self._quiet_usage = False
        if self._reason_stands:
            self._reason_stands = False
            self._reason_was_wrong = True
            self.interim_usage = self.usage or self.interim_usage
            self.usage = None

    def _read_delta(self, delta: Mapping[str, Any]) -> None:
        """Count all strings of a delta or a message, in linear time and without recursion."""
        written, media = self.text_bytes, self.media
        self._count({key: value for key, value in delta.items() if key not in _MARKS})
        thoughts = tellings(delta)
        if len(thoughts) > 1:  # the same reasoning under several names
            sizes = [size_of(text) for text in thoughts]
            self.text_bytes -= sum(sizes) - max(sizes)
        if self.text_bytes > written or self.media > media:
            self._go_on()
        self._count([delta.get(key) for key in _MARKS])


def _native_reason(chunk: dict[str, Any]) -> object:
    """Return the provider's own reason of the choice that failed."""
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("finish_reason"):
            return choice.get("native_finish_reason")
    return None


def _plain_delta(chunk: dict[str, Any]) -> dict[str, Any] | None:
    """Return the delta of a chunk that says nothing but a piece of text; None for any other chunk."""
    choices = chunk.get("choices")
    if not isinstance(choices, list) or len(choices) != 1:
        return None
    if isinstance(chunk.get("usage"), dict) or isinstance(chunk.get("x_groq"), dict):
        return None  # even an empty usage counts: it replaces the one before
    delta = choices[0].get("delta")
    if choices[0].get("finish_reason") or not isinstance(delta, dict):
        return None
    return delta if delta.get("content") and _is_plain(delta) else None


def _is_plain(delta: Mapping[str, Any]) -> bool:
    """Return True for a delta with a text as its content and at most a role beside it, as nearly every delta is."""
    return isinstance(delta.get("content"), str) and (
        len(delta) == 1 or (len(delta) == 2 and "role" in delta)
    )


def _as_delta(choice: object) -> object:
    """Return a choice of a completion as a choice of a chunk."""
    if not isinstance(choice, dict) or "message" not in choice:
        return choice
    piece = {key: value for key, value in choice.items() if key not in {"message", "delta"}}
    return {**piece, "delta": choice["message"]}
