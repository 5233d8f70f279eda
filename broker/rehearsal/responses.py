"""An answer in the Responses dialect: the same scripts, sent as events with a type.

A response is a list of items. The first piece of an item opens it, and the next item or the end closes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from broker.rehearsal.answer import PROVIDER, Answer
from broker.rehearsal.steps import Reply, Send

if TYPE_CHECKING:
    from collections.abc import Mapping

_CUT = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass(slots=True)
class ResponsesAnswer(Answer):
    """An answer that is being written, as events of a response."""

    _sequence: int = 0
    _output: list[dict[str, Any]] = field(default_factory=list)
    _item: dict[str, Any] = field(default_factory=dict)  # empty where no item is open
    _begun: bool = False
    _over: bool = False

    def content(self, token: str) -> Send:
        """Return events with a piece of text."""
        return Send(self._message_piece("output_text", "text", token))

    def refusal(self, token: str) -> Send:
        """Return events with a piece of a refusal."""
        return Send(self._message_piece("refusal", "refusal", token))

    def thought(self, token: str) -> Send:
        """Return events with a piece of reasoning, as its summary."""
        part = {"type": "summary_text", "text": ""}
        opening = self._open({"type": "reasoning", "id": self._name("rs"), "summary": [part]})
        self._item["summary"][0]["text"] += token
        return Send(opening + self._piece("reasoning_summary_text", token, summary_index=0))

    def call(self, index: int, call_id: str, name: str) -> Send:
        """Return the events that begin a call of a function."""
        item = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
        return Send(self._open({**item, "id": self._name(f"fc{index}")}, again=True))

    def call_piece(self, index: int, piece: str) -> Send:
        """Return the event with a piece of the arguments of the last call."""
        del index
        self._item["arguments"] += piece
        return Send(self._piece("function_call_arguments", piece))

    def cited(self, annotations: list[dict[str, Any]]) -> Send:
        """Return an event for each page that the text leans on."""
        events = []
        for index, annotation in enumerate(annotations):
            flat = {"type": annotation["type"], **annotation["url_citation"]}
            self._item["content"][0]["annotations"].append(flat)
            place = {"content_index": 0, "annotation_index": index}
            events.append(self._of_item("response.output_text.annotation.added", annotation=flat, **place))
        return Send(b"".join(events))

    def finish(self, reason: str = "stop", *, last: bool = False, **more: Any) -> Send:
        """Return the events that close the last item, and the end where no bill follows or it failed."""
        self.finish_reason = "length" if self.cut and reason != "error" else reason
        if reason == "error":
            error = more["error"]
            self._over = True
            failed = {"error": {**error, "code": str(error["code"])}, "usage": None}
            return Send(
                self._begin() + self._event("response.failed", response=self._response("failed", **failed))
            )
        closing = self._begin() + self._close()
        return Send(closing + self._end(more.get("usage")) if last else closing)

    def bill(self) -> Send:
        """Return the end with its usage, or a first usage where nothing has been written yet."""
        if self.finish_reason is not None:
            return Send(self._end(self.usage()))
        usage = {"usage": self.usage()}
        return Send(
            self._begin()
            + self._event("response.in_progress", response=self._response("in_progress", **usage))
        )

    def usage(self) -> dict[str, Any]:
        """Return the ``usage`` object as of now."""
        usage = Answer.usage(self)
        names = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}
        names |= {f"{name}_details": f"{theirs}_details" for name, theirs in names.items()}
        return {names.get(name, name): value for name, value in usage.items()}

    def whole(self, text: str) -> Reply:
        """Return the answer as one JSON document."""
        self._message_piece("output_text", "text", text)
        self._close()
        reason = self.finish_reason or "stop"
        body = self._response(*self._status(reason), usage=self.usage())
        return Reply(200, orjson.dumps(body), headers={"X-Generation-Id": self.id})

    # The pieces of an answer

    def _name(self, kind: str) -> str:
        return f"{kind}_{self.id[-8:]}_{len(self._output)}"

    def _message_piece(self, kind: str, key: str, token: str) -> bytes:
        part: dict[str, Any] = {"type": kind, key: ""}
        if kind == "output_text":
            part |= {"annotations": [], "logprobs": []}
        item = {"type": "message", "id": self._name("msg"), "role": "assistant", "content": [part]}
        opening = self._open(item)
        self._item["content"][0][key] += token
        return opening + self._piece(kind, token, content_index=0)

    def _begin(self) -> bytes:
        """Return the event that every response starts with; nothing where it was sent before."""
        if self._begun:
            return b""
        self._begun = True
        return self._event("response.created", response=self._response("in_progress", usage=None))

    def _open(self, item: dict[str, Any], *, again: bool = False) -> bytes:
        """Open an item, unless one of its kind is open and `again` is False."""
        if self._item.get("type") == item["type"] and not again:
            return b""
        before = self._begin() + self._close()
        self._item = {**item, "status": "in_progress"}
        added = self._of_item("response.output_item.added", item=self._item)
        if item["type"] != "message":
            return before + added
        part = item["content"][0]
        return before + added + self._of_item("response.content_part.added", content_index=0, part=part)

    def _close(self) -> bytes:
        """Close the open item, if there is one."""
        if not self._item:
            return b""
        item = {**self._item, "status": "completed"}
        done = self._of_item("response.output_item.done", item=item)
        self._output.append(item)
        self._item = {}
        return done

    def _piece(self, kind: str, token: str, **more: Any) -> bytes:
        return self._of_item(f"response.{kind}.delta", delta=token, **more)

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        place = {"output_index": len(self._output), "item_id": self._item["id"]}
        return self._event(kind, **place, **fields)

    def _end(self, usage: Mapping[str, Any] | None) -> bytes:
        if self._over:
            return b""
        self._over = True
        status, details = self._status(self.finish_reason or "stop")
        return self._event(f"response.{status}", response=self._response(status, details, usage=usage))

    @staticmethod
    def _status(reason: str) -> tuple[str, dict[str, str] | None]:
        return ("incomplete", {"reason": _CUT[reason]}) if reason in _CUT else ("completed", None)

    def _response(self, status: str, details: Mapping[str, str] | None = None, **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "provider": PROVIDER,
            "status": status,
            "error": None,
            "incomplete_details": details,
            "output": [] if status == "in_progress" else self._output,
            **more,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(body))
