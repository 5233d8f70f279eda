"""Fields that only OpenRouter understands are sent only to OpenRouter, and how it is recognised."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker.core.upstream_kind import UpstreamKind
from tests.broker import QUESTION, Broker, running
from tests.money import until
from tests.replies import plain
from tests.scripted import Call, ScriptedUpstream

OPENROUTER_LIST = {"data": [{"id": "scripted/model-1", "pricing": {"prompt": "0.1", "completion": "0.1"}}]}
OTHER_LISTS: list[Any] = [
    {"object": "list", "data": None},
    {"data": []},
    [],
    [{"id": "scripted/model-1"}],
    {"data": [{"id": "scripted/model-1", "pricing": {"input": "0.1", "output": "0.1"}}]},
]
OURS = {"plugins", "provider", "user"}
ATTRIBUTION = {"x-title", "x-openrouter-title", "http-referer"}


async def asked(broker: Broker, upstream: ScriptedUpstream, **fields: Any) -> Call:
    """The request that the upstream gets."""
    upstream.replies = [plain]
    answer = await broker.post({**QUESTION, **fields}, {"Origin": broker.url})
    assert answer.status == 201, answer.text
    assert (await broker.read(answer.json["sessionId"]))[-1].kind == "done"
    return upstream.calls[-1]


@pytest.mark.parametrize(
    ("kind", "url", "openrouter"),
    [
        ("auto", "https://openrouter.ai/api/v1", True),
        ("auto", "https://eu.openrouter.ai/api/v1", True),
        ("auto", "https://notopenrouter.ai/api/v1", False),
        ("auto", "https://openrouter.ai.evil.example/v1", False),
        ("auto", "http://127.0.0.1:8000/v1", False),
        ("openrouter", "http://127.0.0.1:8000/v1", True),
        ("openai", "https://openrouter.ai/api/v1", False),
    ],
)
def test_setting_and_host_come_before_any_list(kind: Any, url: str, *, openrouter: bool) -> None:
    assert UpstreamKind(kind, url).openrouter is openrouter


@pytest.mark.parametrize("listed", OTHER_LISTS, ids=json.dumps)
async def test_another_service_gets_nothing_of_openrouters(
    valkey_url: str, upstream: ScriptedUpstream, listed: Any
) -> None:
    upstream.models = json.dumps(listed).encode()
    async with running(valkey_url, upstream, upstream_kind="auto") as broker:
        assert (await broker.ask("GET", "/models")).status == 200
        call = await asked(broker, upstream)
        assert not OURS & call.body.keys()
        assert not ATTRIBUTION & {name.lower() for name in call.headers}


async def test_a_service_without_a_list_gets_nothing_of_openrouters(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, upstream_kind="auto") as broker:
        call = await asked(broker, upstream)
        assert not OURS & call.body.keys()


async def test_openrouter_behind_another_name_is_known_by_its_list(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.models = json.dumps(OPENROUTER_LIST).encode()
    async with running(valkey_url, upstream, upstream_kind="auto") as broker:
        assert (await broker.ask("GET", "/models")).status == 200

        async def is_known() -> bool:
            return "x-title" in {name.lower() for name in (await asked(broker, upstream)).headers}

        await until(is_known)
        assert "user" in upstream.calls[-1].body


@pytest.mark.parametrize("kind", ["auto", "openai"])
async def test_another_service_fetches_no_pictures(
    valkey_url: str, upstream: ScriptedUpstream, kind: str
) -> None:
    """Another service would fetch addresses of its own network."""

    def message(url: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}

    async with running(valkey_url, upstream, upstream_kind=kind) as broker:
        refused = await broker.post({**QUESTION, "messages": [message("http://169.254.169.254/a")]})
        assert (refused.status, refused.code) == (422, "invalid_request")
        inline = await broker.post({**QUESTION, "messages": [message("data:image/png;base64,AA==")]})
        assert inline.status == 201
    async with running(
        valkey_url, upstream, upstream_kind=kind, extra_parameters=("image_url.http",)
    ) as broker:
        opened = await broker.post({**QUESTION, "messages": [message("https://example.com/a.png")]})
        assert opened.status == 201
