"""Chargeable features of a request besides text, read from the body that is sent."""

from __future__ import annotations

from typing import Any

import pytest

from broker.core.demand import SEARCHES_OF_A_TOOL, demand_of
from broker.core.pricing import Demand

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
SOUND = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}
FUNCTION = {"type": "function", "function": {"name": "f"}}


def asked(*content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}], **more}


@pytest.mark.parametrize(
    ("body", "demand"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, Demand()),
        (asked({"type": "text", "text": "hi"}, "bare", IMAGE, IMAGE), Demand(images=2)),
        ({"messages": [{"role": "assistant", "content": None, "images": [IMAGE]}]}, Demand(images=1)),
        (asked(SOUND), Demand(sounds=1)),
        ({"messages": [{"role": "assistant", "content": None, "audio": {"id": "a"}}]}, Demand(sounds=1)),
        (asked(tools=[FUNCTION], plugins=[{"id": "context-compression", "enabled": False}]), Demand()),
        (asked(web_search_options={}), Demand(searches=1)),
        (asked(plugins=[{"id": "web"}]), Demand(searches=1)),
        (asked(plugins=[{"id": "web", "enabled": False}]), Demand()),
        (
            asked(tools=[FUNCTION, {"type": "openrouter:web_search"}]),
            Demand(searches=SEARCHES_OF_A_TOOL),
        ),
        (asked(modalities=["text"]), Demand()),
        (asked(modalities=["image", "text"]), Demand(draws=True)),
        (asked(modalities=["text", "audio"], audio={"voice": "x"}), Demand(speaks=True)),
        ({**asked(), "messages": 7, "tools": "x", "plugins": [None], "modalities": None}, Demand()),
    ],
)
def test_everything_with_its_own_price_is_counted(body: dict[str, Any], demand: Demand) -> None:
    assert demand_of(body, ["a/b"]) == demand


def test_a_model_that_searches_by_its_name_searches_once() -> None:
    assert demand_of(asked(), ["a/b", "c/d:Online"]) == Demand(searches=1)
