"""The upstream's records: the requests for them, and the meaning of each answer."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from broker.core.errors import UpstreamError, UpstreamUnauthorized, UpstreamUnavailable
from broker.upstream.client import MAX_ERROR_BODY, UpstreamClient
from broker.upstream.generations import fetch_generation

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from typing import Any

    from openai import AsyncOpenAI

KEY = "sk-or-v1-0123456789abcdef"


class Books:
    """A server of one answer; ``asked`` has every request."""

    def __init__(self, status: int, body: bytes) -> None:
        self.asked: list[web.Request] = []
        self._status, self._body = status, body

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request)
        return web.Response(status=self._status, body=self._body, content_type="application/json")


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[AsyncOpenAI]:
    client = UpstreamClient(base_url=url, api_key=KEY, title="T", connect_timeout=1.0, max_connections=2)
    try:
        yield client.openai
    finally:
        await client.close()


@asynccontextmanager
async def asking(usage_rows: Books) -> AsyncIterator[AsyncOpenAI]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", usage_rows.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        async with client_of(f"http://{host}:{port}/api/v1") as client:
            yield client
    finally:
        await runner.cleanup()


async def fetched(status: int, body: bytes) -> Mapping[str, Any] | None:
    async with asking(Books(status, body)) as client:
        return await fetch_generation(client, "gen-1")


async def test_a_generation_is_asked_for_by_its_name_with_our_key() -> None:
    usage_rows = Books(200, b'{"data": {"id": "gen 1&x", "total_cost": 0.5}}')
    async with asking(usage_rows) as client:
        assert await fetch_generation(client, "gen 1&x") == {"id": "gen 1&x", "total_cost": 0.5}
    [request] = usage_rows.asked
    assert (request.method, request.path) == ("GET", "/api/v1/generation")
    assert dict(request.query) == {"id": "gen 1&x"}
    assert request.headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "body", [b'{"error": {"code": 404, "message": "Generation not found"}}', b'{"error":"no"}']
)
async def test_a_404_with_an_error_means_not_yet(body: bytes) -> None:
    assert await fetched(404, body) is None


@pytest.mark.parametrize(
    "body", [b"", b"404 page not found", b"<html>", b'{"detail":"Not Found"}', b"[]", b"null"]
)
async def test_a_404_of_any_proxy_means_not_yet(body: bytes) -> None:
    assert await fetched(404, body) is None


@pytest.mark.parametrize("body", [b'{"data": null}', b'{"data": []}', b"{}", b"[]", b"null"])
async def test_an_answer_without_a_record_means_not_yet(body: bytes) -> None:
    assert await fetched(200, body) is None


@pytest.mark.parametrize("body", [b"", b"<html>Welcome</html>"])
async def test_an_html_page_in_place_of_a_record_means_not_yet(body: bytes) -> None:
    assert await fetched(200, body) is None


@pytest.mark.parametrize("size", [4 * MAX_ERROR_BODY, 50_000_000])
async def test_a_record_without_an_end_is_not_read_to_its_end(size: int) -> None:
    async with asyncio.timeout(10):
        assert await fetched(200, b'{"data": {"id": "gen-1", "x": "' + b"y" * size + b'"}}') is None


@pytest.mark.parametrize(("status", "error"), [(401, UpstreamUnauthorized), (500, UpstreamUnavailable)])
async def test_other_refusals_are_the_upstreams_and_asked_once(
    status: int, error: type[UpstreamError]
) -> None:
    usage_rows = Books(status, b'{"error": {"code": 1, "message": "No."}}')
    async with asking(usage_rows) as client:
        with pytest.raises(error):
            await fetch_generation(client, "gen-1")
    assert len(usage_rows.asked) == 1


async def test_an_unreachable_record_is_an_upstream_error() -> None:
    async with client_of("http://127.0.0.1:9/v1") as client:
        with pytest.raises(UpstreamUnavailable):
            await fetch_generation(client, "gen-1")
