"""Read the contents of one event of a response, for people. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.core.said import NOTHING, Said

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_TEXT = frozenset({"response.output_text.delta", "response.refusal.delta", "response.content_part.delta"})
_REASONING = frozenset({"response.reasoning_text.delta", "response.reasoning_summary_text.delta"})
_ENDS = frozenset({"response.completed", "response.incomplete"})


def is_event(chunk: Mapping[str, Any]) -> bool:
    """Return True for an event of a response, False for a chunk of another dialect."""
    kind = chunk.get("type")
    return isinstance(kind, str) and kind.startswith("response.")


def said_in_event(event: Mapping[str, Any]) -> Said:
    """Return the contents of an event of a response, whatever it holds.

    Text comes in deltas, and a call when its item is done; events that repeat them give nothing. An end with the
    number 0 has no event before it: it is a complete response in place of a stream, and gives everything.
    """
    kind = event.get("type")
    if kind in _TEXT:
        return Said(text=_text(event.get("delta")))
    if kind in _REASONING:
        return Said(reasoning=_text(event.get("delta")))
    if kind == "response.output_item.done":
        item = event.get("item")
        return (
            Said(calls=(item,)) if isinstance(item, dict) and item.get("type") == "function_call" else NOTHING
        )
    if kind in _ENDS and event.get("sequence_number") == 0:
        response = event.get("response")
        return _said_in_output(response.get("output") if isinstance(response, dict) else None)
    return NOTHING


def _said_in_output(output: Any) -> Said:
    items = list(_objects(output))
    messages = [item for item in items if item.get("type") == "message"]
    thoughts = [item for item in items if item.get("type") == "reasoning"]
    return Said(
        "".join(_texts(part for item in messages for part in _objects(item.get("content")))),
        "".join(_texts(part for item in thoughts for part in _parts_of_thought(item))),
        tuple(item for item in items if item.get("type") == "function_call"),
    )


def _parts_of_thought(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the reasoning where it is shown, else its summary."""
    return list(_objects(item.get("content"))) or list(_objects(item.get("summary")))


def _texts(parts: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    yield from (_text(part.get("text")) or _text(part.get("refusal")) for part in parts)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    yield from (item for item in value if isinstance(item, dict)) if isinstance(value, list) else ()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
