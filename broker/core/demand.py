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
    # The messages of a chat, or the items of a Responses request.
    entries = [
        entry for entry in _list(body.get("messages")) + _list(body.get("input")) if isinstance(entry, dict)
    ]
    parts = [
        part
        for entry in entries
        for part in _list(entry.get("content")) + _list(entry.get("output"))
        if isinstance(part, dict)
    ]
    modalities = _list(body.get("modalities"))
    return Demand(
        images=sum(part.get("type") in _PICTURES for part in parts)
        + sum(len(_list(entry.get("images"))) for entry in entries),
        sounds=sum(part.get("type") == "input_audio" for part in parts)
        + sum(bool(entry.get("audio")) for entry in entries),
        searches=_searches(body, models),
        draws="image" in modalities or bool(body.get("image_config")) or _has_painter(body),
        speaks="audio" in modalities or bool(body.get("audio")),
    )


def _has_painter(body: Mapping[str, Any]) -> bool:
    """Return True if a tool of the server may draw."""
    tools = [tool for tool in _list(body.get("tools")) if isinstance(tool, dict)]
    return any("image_generation" in str(tool.get("type")) for tool in tools)


def _searches(body: Mapping[str, Any], models: Iterable[str]) -> int:
    asked = any(ONLINE in model.lower() for model in models) or body.get("web_search_options") is not None
    plugins = [plugin for plugin in _list(body.get("plugins")) if isinstance(plugin, dict)]
    searching = sum(
        1 for plugin in plugins if plugin.get("id") in _SEARCH_PLUGINS and plugin.get("enabled") is not False
    )
    tools = [tool for tool in _list(body.get("tools")) if isinstance(tool, dict)]
    served = sum(1 for tool in tools if tool.get("type") != "function")
    return int(asked) + searching + served * SEARCHES_OF_A_TOOL


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
