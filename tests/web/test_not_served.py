"""Addresses of other APIs: nothing is served there, and the refusal says what to use."""

from __future__ import annotations

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.typedefs import Handler

from broker.core.errors import BrokerError
from broker.web.errors import error_response
from broker.web.not_served import routes_not_served
from tests.broker import Broker
from tests.scripted import NOTHING

PATHS = ["/v1/chat/completions", "/v1/responses", "/v1/models", "/chat/completions", "/chat"]
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]
USE = "use POST /prepare with GET /stream/<id> for an answer, and GET /models for the models."


@pytest.mark.parametrize("path", PATHS)
async def test_the_404_of_another_api_says_what_to_use(broker: Broker, path: str) -> None:
    for method in METHODS:
        answer = await broker.ask(method, path)
        assert (answer.status, answer.code) == (404, "not_found")
        assert answer.json["error"]["message"].endswith(USE)


async def test_head_of_another_api_is_a_404(broker: Broker) -> None:
    assert (await broker.ask("HEAD", "/v1/models")).status == 404


async def test_the_404_needs_no_valid_body(broker: Broker) -> None:
    answer = await broker.ask("POST", "/v1/chat/completions", data=b"{", headers=NOTHING)
    assert (answer.status, answer.code) == (404, "not_found")


async def test_a_browser_may_ask_another_api_in_advance(broker: Broker) -> None:
    headers = {"Origin": "http://localhost:1", "Access-Control-Request-Method": "POST"}
    assert (await broker.ask("OPTIONS", "/v1/chat/completions", headers=headers)).status == 204


async def test_the_404_names_the_prefix_of_the_service() -> None:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except BrokerError as error:
            return error_response(error)

    inner, outer = web.Application(middlewares=[guard]), web.Application()
    inner.add_routes(routes_not_served())
    outer.add_subapp("/ai", inner)
    async with TestClient(TestServer(outer)) as client:
        message = (await (await client.post("/ai/v1/chat/completions")).json())["error"]["message"]
    assert "POST /ai/prepare with GET /ai/stream/<id>" in message
    assert "GET /ai/models" in message
