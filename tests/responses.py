"""Events of a response as an upstream sends them, for tests of the Responses dialect."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.scripted import Call

USAGE = {
    "input_tokens": 10,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 2},
    "total_tokens": 15,
}
MESSAGE = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "Hello"}],
}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "look", "arguments": '{"a":1}'}


def event(kind: str, **fields: Any) -> dict[str, Any]:
    """An event."""
    return {"type": kind, **fields}


def response(**fields: Any) -> dict[str, Any]:
    """Return the response object of some events."""
    return {"id": "gen-response", "object": "response", "model": "scripted/model-1", "output": [], **fields}


def delta(text: Any, kind: str = "output_text", place: int = 0) -> dict[str, Any]:
    """A piece of an item."""
    return event(f"response.{kind}.delta", output_index=place, delta=text)


def item_done(item: dict[str, Any], place: int = 0) -> dict[str, Any]:
    """A whole item."""
    return event("response.output_item.done", output_index=place, item=item)


def completed(**fields: Any) -> dict[str, Any]:
    """The end of a response that is whole."""
    return event("response.completed", response=response(**{"status": "completed", "usage": USAGE, **fields}))


def incomplete(reason: str, **fields: Any) -> dict[str, Any]:
    """The end of a response that was cut."""
    details = {"incomplete_details": {"reason": reason}, "usage": USAGE}
    return event("response.incomplete", response=response(status="incomplete", **{**details, **fields}))


def failed(error: Any, **fields: Any) -> dict[str, Any]:
    """The end of a response that failed."""
    return event("response.failed", response=response(status="failed", error=error, **fields))


CREATED = event("response.created", response=response(status="in_progress", usage=None))


def send(call: Call, *events: dict[str, Any]) -> None:
    """Send events, each under its own name, as the upstream does."""
    for each in events:
        name = f"event: {each['type']}\n" if "type" in each else ""
        call.send(f"{name}data: {json.dumps(each)}\n\n".encode())


def in_responses_names(usage: dict[str, Any]) -> dict[str, Any]:
    """A usage of a chat as a response has it."""
    names = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}
    return {names.get(name, name): value for name, value in usage.items()}
