"""Chargeable features of a request besides text, read from the body that is sent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


PARTS = st.lists(st.sampled_from([IMAGE, SOUND, {"type": "input_image"}, {"type": "text"}, "bare", None]))
ENTRIES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "content": PARTS | st.text(max_size=3) | st.none(),
            "output": PARTS | st.text(max_size=3),
            "images": st.lists(st.just(IMAGE)) | st.none(),
            "audio": st.sampled_from([None, {}, {"id": "a"}]),
        },
    )
    | st.none()
)


@given(ENTRIES, ENTRIES)
def test_every_picture_and_sound_counts_once(messages: list[Any], items: list[Any]) -> None:
    pictures = sounds = 0
    for entry in filter(None, messages + items):
        parts = [part for key in ("content", "output") for part in entry.get(key) or () if type(part) is dict]
        pictures += len([part for part in parts if part["type"] in ("image_url", "input_image")])
        pictures += len(entry.get("images") or ())
        sounds += len([part for part in parts if part["type"] == "input_audio"]) + bool(entry.get("audio"))
    found = demand_of({"messages": messages, "input": items}, ["a/b"])
    assert (found.images, found.sounds) == (pictures, sounds)
