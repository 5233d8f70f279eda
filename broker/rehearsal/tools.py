"""The functions that the model of `rehearsal/tools` calls, and their arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from broker.rehearsal.ask import Ask, text_of

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_CALLS = 2
RESULT_SHOWN = 500
DEEPEST = 5

NOT_DECLARED = (
    ("get_weather", {"city": "Lisbon", "unit": "celsius"}),
    ("get_local_time", {"city": "Lisbon"}),
)
"""Called where the request declares no functions, so that a page sees a call in any case."""

_EXAMPLES: Mapping[str, Any] = {
    "string": "Lisbon",
    "integer": 3,
    "number": 2.5,
    "boolean": True,
    "null": None,
}


def calls_for(ask: Ask) -> list[tuple[str, str]]:
    """Return the calls that answer this request, of its first two functions: names, and arguments as JSON text."""
    declared = [(str(f.get("name", "")), f.get("parameters")) for t in ask.tools if (f := _function(t))]
    if not declared:
        return [(name, orjson.dumps(arguments).decode()) for name, arguments in NOT_DECLARED]
    return [(name, orjson.dumps(example_of(schema)).decode()) for name, schema in declared[:MOST_CALLS]]


def example_of(schema: Any, depth: int = 0) -> Any:
    """Return a value that fits a simple JSON schema: its default, its first choice, or a value of its type."""
    if not isinstance(schema, dict) or depth > DEEPEST:
        return {}
    if "default" in schema:
        return schema["default"]
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "array":
        return [example_of(schema["items"], depth + 1)] if "items" in schema else []
    if isinstance(kind, str) and kind in _EXAMPLES:
        return _EXAMPLES[kind]
    properties = schema.get("properties")
    fields = properties.items() if isinstance(properties, dict) else ()
    return {name: example_of(inner, depth + 1) for name, inner in fields}


def report_on(ask: Ask) -> str:
    """Return the text that uses the results of the tools."""
    results = [
        f"- {text_of(m.get('content')).strip()[:RESULT_SHOWN] or '(nothing)'}" for m in ask.tool_results
    ]
    return "\n".join(
        [
            "The tools have answered, and this is what they said:",
            "",
            *results,
            "",
            "I have nothing to add to that.",
        ]
    )


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any] | None:
    function = tool.get("function")
    return function if isinstance(function, dict) else None
