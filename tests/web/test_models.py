"""GET /models over a real socket: the whole list, parts of it, and nothing where nothing changed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from tests.broker import Answer, running

ENTRIES = [
    {
        "id": "openai/gpt-4o-mini",
        "name": "OpenAI: GPT-4o-mini",
        "pricing": {"prompt": "0.1", "completion": "0.2"},
    },
    {"id": "meta-llama/llama", "name": "Meta: Llama", "pricing": {"prompt": "0.1", "completion": "0.1"}},
    {
        "id": "meta-llama/llama:free",
        "name": "Meta: Llama (free)",
        "pricing": {"prompt": "0", "completion": "0"},
    },
    {"id": "local", "object": "model", "own_field": [1.5, None, "é"]},
]


Get = Callable[..., Awaitable[Answer]]


@asynccontextmanager
async def serving(redis_url: str, *, status: int = 200, **settings: Any) -> AsyncIterator[Get]:
    """A broker before an upstream that has these models; gives GET /models."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"data": ENTRIES, "total_count": len(ENTRIES)}, status=status)

    app = web.Application()
    app.router.add_get("/v1/models", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with running(redis_url, f"http://127.0.0.1:{runner.addresses[0][1]}/v1", **settings) as broker:

        async def get(query: str = "", **headers: str) -> Answer:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await broker.ask("GET", f"/models{query}", headers=named)

        yield get
    await runner.cleanup()


def ids(answer: Answer) -> list[str]:
    return [entry["id"] for entry in answer.json["data"]]


@pytest_asyncio.fixture
async def get(valkey_url: str) -> AsyncIterator[Get]:
    async with serving(valkey_url) as get:
        yield get


async def test_the_list_has_the_upstreams_own_entries(get: Get) -> None:
    answer = await get()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.json == {"data": ENTRIES}


async def test_the_list_is_narrowed_to_the_allowed_models(valkey_url: str) -> None:
    async with serving(valkey_url, allowed_models=("meta-llama/*", "local")) as get:
        assert ids(await get()) == ["meta-llama/llama", "meta-llama/llama:free", "local"]
        assert ids(await get("?q=openai")) == []


@pytest.mark.parametrize("q", ["LLAMA", "meta:", "Meta%3A+Llama"])
async def test_a_search_compares_id_and_name_ignoring_case(get: Get, q: str) -> None:
    assert ids(await get(f"?q={q}")) == ["meta-llama/llama", "meta-llama/llama:free"]


async def test_an_empty_search_and_unknown_keys_change_nothing(get: Get) -> None:
    whole = await get()
    assert (await get("?q=&category=programming")).text == whole.text


async def test_free_shows_only_free_models(get: Get) -> None:
    assert ids(await get("?free=true")) == ["meta-llama/llama:free"]
    assert ids(await get("?free=true&q=openai")) == []
    assert ids(await get("?free=false")) == ids(await get())


@pytest.mark.parametrize("free", ["", "1", "yes", "True", "TRUE"])
async def test_anything_but_true_or_false_is_refused(get: Get, free: str) -> None:
    answer = await get(f"?free={free}")
    assert answer.status == 422
    assert answer.code == "invalid_request"
    assert [detail["field"] for detail in answer.json["error"]["details"]] == ["free"]


async def test_the_tag_is_strong_and_belongs_to_one_query(get: Get) -> None:
    whole, part = await get(), await get("?q=llama")
    assert whole.headers["ETag"].startswith('"')
    assert whole.headers["ETag"] != part.headers["ETag"]
    assert (await get("?q=LLAMA")).headers["ETag"] == part.headers["ETag"]


@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', '"other",W/{}', "*"])
async def test_a_caller_with_the_same_list_gets_304(get: Get, form: str) -> None:
    tag = (await get()).headers["ETag"]
    answer = await get(If_None_Match=form.format(tag))
    assert (answer.status, answer.text) == (304, "")
    assert answer.headers["ETag"] == tag
    assert answer.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("tag", ['"other"', 'W/"other"', "other", "", '"'])
async def test_a_caller_with_another_list_gets_it(get: Get, tag: str) -> None:
    answer = await get(If_None_Match=tag)
    assert answer.status == 200
    assert len(ids(answer)) == len(ENTRIES)


async def test_without_any_list_the_upstream_is_unavailable(valkey_url: str) -> None:
    async with serving(valkey_url, status=500) as get:
        answer = await get()
    assert answer.status == 502
    assert answer.code == "upstream_unavailable"


async def test_an_invalid_query_is_refused_even_without_a_list(valkey_url: str) -> None:
    async with serving(valkey_url, status=500) as get:
        assert (await get("?free=maybe")).status == 422
