"""Addresses of other APIs: nothing is served there, and the refusal says what to use."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from tests.broker import Broker
from tests.scripted import NOTHING

PATHS = ["/v1/chat/completions", "/v1/responses", "/v1/models", "/chat/completions", "/chat"]
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]


@pytest.mark.parametrize("path", PATHS)
async def test_the_404_of_another_api_says_what_to_use(broker: Broker, path: str) -> None:
    prefix = urlsplit(broker.url).path
    use = (
        f"use POST {prefix}/prepare with GET {prefix}/stream/<id> for an answer,"
        f" and GET {prefix}/models for the models."
    )
    for method in METHODS:
        answer = await broker.ask(method, path)
        assert (answer.status, answer.code) == (404, "not_found")
        assert answer.json["error"]["message"].endswith(use)


async def test_head_of_another_api_is_a_404(broker: Broker) -> None:
    assert (await broker.ask("HEAD", "/v1/models")).status == 404


async def test_the_404_needs_no_valid_body(broker: Broker) -> None:
    answer = await broker.ask("POST", "/v1/chat/completions", data=b"{", headers=NOTHING)
    assert (answer.status, answer.code) == (404, "not_found")


async def test_a_browser_may_ask_another_api_in_advance(broker: Broker) -> None:
    headers = {"Origin": "http://localhost:1", "Access-Control-Request-Method": "POST"}
    assert (await broker.ask("OPTIONS", "/v1/chat/completions", headers=headers)).status == 204
