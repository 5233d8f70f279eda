"""What a request can make an upstream charge besides its text tokens, read from the body that is sent. No I/O.

Most such features are closed until an operator opens them. What is open must be part of the worst case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.core.parameters import ONLINE
from broker.core.pricing import Demand

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SEARCHES_OF_A_TOOL = 5
"""Searches that are reserved for a search tool of the server; a search that the request itself asks for counts once."""

_PICTURES = ("image_url", "input_image")
_SEARCH_PLUGINS = frozenset({"web", "web_search"})


def demand_of(body: Mapping[str, Any], models: Iterable[str]) -> Demand:
    """Return the chargeable features that the body of a request uses.

    Args:
        body: the body as it is sent.
        models: every model that the request can reach.
    """
    images = sounds = 0
    for entry in _objects(body.get("messages")) + _objects(body.get("input")):
        for parts in (entry.get("content"), entry.get("output")):
            if isinstance(parts, list):  # most are texts
                for part in _objects(parts):
                    kind = part.get("type")
                    images += kind in _PICTURES
                    sounds += kind == "input_audio"
        images += len(_list(entry.get("images")))
        sounds += bool(entry.get("audio"))
    modalities, tools = _list(body.get("modalities")), _objects(body.get("tools"))
    return Demand(
        images=images,
        sounds=sounds,
        searches=_searches(body, models, tools),
        draws="image" in modalities or bool(body.get("image_config")) or _has_painter(tools),
        speaks="audio" in modalities or bool(body.get("audio")),
    )


def _has_painter(tools: list[dict[str, Any]]) -> bool:
    """Return True if a tool of the server may draw."""
    return any("image_generation" in str(tool.get("type")) for tool in tools)


def _searches(body: Mapping[str, Any], models: Iterable[str], tools: list[dict[str, Any]]) -> int:
    asked = body.get("web_search_options") is not None or any(ONLINE in model.lower() for model in models)
    plugins = _objects(body.get("plugins"))
    searching = [p for p in plugins if p.get("id") in _SEARCH_PLUGINS and p.get("enabled") is not False]
    served = [tool for tool in tools if tool.get("type") != "function"]
    return int(asked) + len(searching) + len(served) * SEARCHES_OF_A_TOOL


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a list; none if it is anything else, such as a text."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
