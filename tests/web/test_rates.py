"""The rate as a page sees it: headers on every answer to a counted request, and a refusal that says when to come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from broker.core.errors import BrokerError, InvalidRequest
from broker.store.connection import Store
from broker.store.rates import Rates, RateStatus
from broker.web.errors import error_response
from broker.web.rates import RateCheck, add_rate_headers, rate_headers

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler


@pytest.mark.parametrize(("reset", "seconds"), [(12.0, 12), (11.001, 12), (0.001, 1), (0.0, 0)])
def test_headers_give_quota_window_rest_and_whole_seconds(reset: float, seconds: int) -> None:
    status = RateStatus(allowed=True, limit=30, window=60, remaining=29, reset=reset)
    assert rate_headers(status) == {
        "RateLimit-Policy": '"prepare";q=30;w=60',
        "RateLimit": f'"prepare";r=29;t={seconds}',
    }


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except BrokerError as error:
        return error_response(error)


@asynccontextmanager
async def served(rates: Rates) -> AsyncIterator[str]:
    """A service that counts what is asked of it, and answers by path."""

    async def answer(request: web.Request) -> web.Response:
        if request.path != "/uncounted":
            await RateCheck(request, rates, "anna").alone()
        if request.path == "/wrong":
            raise InvalidRequest
        return web.Response(status=201)

    app = web.Application(middlewares=[errors_as_json])
    app.on_response_prepare.append(add_rate_headers)
    app.router.add_get("/{path}", answer)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as http:
        yield http


async def test_every_answer_to_a_counted_request_tells_the_rate(
    store: Store, http: aiohttp.ClientSession
) -> None:
    async with served(Rates(store, limit=2, window=60)) as url:
        async with http.get(f"{url}/right") as answer:
            assert answer.status == 201
            assert answer.headers["RateLimit-Policy"] == '"prepare";q=2;w=60'
            assert answer.headers["RateLimit"] == '"prepare";r=1;t=60'
        async with http.get(f"{url}/wrong") as answer:
            assert answer.status == 422
            assert answer.headers["RateLimit"].startswith('"prepare";r=0;t=')
        async with http.get(f"{url}/uncounted") as answer:
            assert answer.status == 201
            assert "RateLimit" not in answer.headers
            assert "RateLimit-Policy" not in answer.headers


async def test_a_refusal_says_when_to_come_again(store: Store, http: aiohttp.ClientSession) -> None:
    async with served(Rates(store, limit=1, window=60)) as url:
        await (await http.get(f"{url}/right")).read()
        async with http.get(f"{url}/right") as answer:
            assert answer.status == 429
            assert (await answer.json())["error"]["code"] == "rate_limited"
            wait = int(answer.headers["Retry-After"])
            assert 50 < wait <= 60
            assert answer.headers["RateLimit"] == f'"prepare";r=0;t={wait}'
            assert answer.headers["RateLimit-Policy"] == '"prepare";q=1;w=60'


async def test_without_a_redis_nothing_is_said_of_the_rate(
    valkey_url: str, http: aiohttp.ClientSession
) -> None:
    away = Store(f"{valkey_url}-nobody", "test")
    async with served(Rates(away, limit=1, window=60)) as url, http.get(f"{url}/right") as answer:
        assert answer.status == 503
        assert (await answer.json())["error"]["code"] == "store_unavailable"
        assert "RateLimit" not in answer.headers
    await away.close()
