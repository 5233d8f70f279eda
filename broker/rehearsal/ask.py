"""Parse the body of POST /chat/completions or /responses.

Only parameters that a script uses are read. All others are ignored, as the real service ignores what a model does not
support.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TOKENS_PER_MESSAGE = 4
TOKENS_PER_FILE = 1000
BYTES_PER_TOKEN = 4


class AskError(ValueError):
    """The body is not a valid request; the text is the reason, for the caller."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One valid request for a completion."""

    model: str
    messages: Sequence[Mapping[str, Any]]
    stream: bool = False
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    user: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: Any = None

    @property
    def question(self) -> str:
        """The text of the last user message; empty where there is none."""
        asked = (text_of(m.get("content")) for m in reversed(self.messages) if m.get("role") == "user")
        return next(asked, "")

    @property
    def tool_results(self) -> Sequence[Mapping[str, Any]]:
        """The tool messages since the last user message, the oldest first."""
        since = 0
        for index, message in enumerate(self.messages):
            if message.get("role") == "user":
                since = index
        return [m for m in self.messages[since:] if m.get("role") == "tool"]

    @property
    def prompt_tokens(self) -> int:
        """The tokens of the prompt: exactly four bytes per token, so that a caller's own estimate can agree."""
        tools = len(orjson.dumps(self.tools)) if self.tools else 0
        return sum(weight(m) for m in self.messages) + tools // BYTES_PER_TOKEN

    @property
    def fingerprint(self) -> bytes:
        """A hash that is the same for the same question of the same user to the same model."""
        return blake2b(orjson.dumps([self.model, self.user, self.question]), digest_size=16).digest()

    def until_stop(self, text: str) -> str:
        """Return the text up to the first of the caller's stop sequences."""
        ends = [at for sequence in self.stop if (at := text.find(sequence)) >= 0]
        return text[: min(ends, default=len(text))]


def text_of(content: Any) -> str:
    """Return the text of a message's ``content``, which is a string, a list of parts, or null."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(p.get("text", "")) for p in parts if isinstance(p, dict))


def weight(message: Mapping[str, Any]) -> int:
    """Return the tokens of one message: text and tool calls by their bytes, everything else at a flat rate."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    files = sum(1 for p in parts if isinstance(p, dict) and p.get("type") != "text")
    calls = orjson.dumps(message["tool_calls"]) if message.get("tool_calls") else b""
    letters = len(text_of(content).encode()) + len(calls)
    return TOKENS_PER_MESSAGE + -(-letters // BYTES_PER_TOKEN) + TOKENS_PER_FILE * files


def read_ask(raw: bytes) -> Ask:
    """Parse a request body.

    Raises:
        AskError: it is not JSON, or lacks what every model needs.
    """
    body = _object(raw)
    return Ask(
        model=_model(body),
        messages=_objects(body, "messages", at_least=1),
        stream=body.get("stream") is True,
        max_tokens=_least(body.get("max_tokens"), body.get("max_completion_tokens")),
        stop=_stop(body.get("stop")),
        user=body["user"] if isinstance(body.get("user"), str) else None,
        tools=_objects(body, "tools", at_least=0),
        tool_choice=body.get("tool_choice"),
    )


def read_responses_ask(raw: bytes) -> Ask:
    """Parse the body of a Responses request; its items become the messages of a chat.

    Raises:
        AskError: it is not JSON, or lacks what every model needs.
    """
    body = _object(raw)
    given = body.get("input")
    items = (
        [{"role": "user", "content": given}]
        if isinstance(given, str)
        else _objects(body, "input", at_least=1)
    )
    instructions = body.get("instructions")
    messages = [{"role": "system", "content": instructions}] if isinstance(instructions, str) else []
    return Ask(
        model=_model(body),
        messages=[*messages, *map(_message, items)],
        stream=body.get("stream") is True,
        max_tokens=_least(body.get("max_output_tokens")),
        user=body["user"] if isinstance(body.get("user"), str) else None,
        tools=[{"type": tool.get("type"), "function": tool} for tool in _objects(body, "tools", at_least=0)],
        tool_choice=body.get("tool_choice"),
    )


def _message(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item of an input as a message of a chat."""
    kind = item.get("type", "message")
    if kind == "function_call_output":
        return {"role": "tool", "content": _parts(item.get("output"))}
    if kind == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [item]}
    if kind == "reasoning":
        return {"role": "assistant", "content": _parts(item.get("summary"))}
    return {"role": item.get("role"), "content": _parts(item.get("content"))}


def _parts(content: Any) -> Any:
    """Return the parts of an item as those of a message; every part with a text becomes one."""
    if not isinstance(content, list):
        return content
    return [
        {**part, "type": "text"} if "text" in part else part for part in content if isinstance(part, dict)
    ]


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise AskError("The body is not valid JSON") from None
    if not isinstance(body, dict):
        raise AskError("The body must be a JSON object")
    return body


def _model(body: Mapping[str, Any]) -> str:
    several = body.get("models")
    first = several[0] if isinstance(several, list) and several else None
    model = body.get("model") or first
    if not isinstance(model, str):
        raise AskError("No models provided")
    return model


def _objects(body: Mapping[str, Any], name: str, *, at_least: int) -> list[dict[str, Any]]:
    value = body.get(name)
    found = [] if value is None else value
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise AskError(f"{name} must be a list of objects")
    if len(found) < at_least:
        raise AskError(f"{name} must have at least {at_least}")
    return found


def _least(*limits: Any) -> int | None:
    given = [limit for limit in limits if limit is not None]
    if not all(type(limit) is int and limit > 0 for limit in given):
        raise AskError("max_tokens must be a whole number above 0")
    return min(given, default=None)


def _stop(value: Any) -> tuple[str, ...]:
    sequences = [value] if isinstance(value, str) else value or []
    if not isinstance(sequences, list) or not all(isinstance(s, str) for s in sequences):
        raise AskError("stop must be a string or a list of strings")
    return tuple(s for s in sequences if s)
