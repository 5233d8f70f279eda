"""The rate as a page sees it: headers on every answer to a counted request, and a refusal that says when to come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from broker.core.rates import RateStatus
from broker.web.rates import rate_headers
from tests.broker import running

if TYPE_CHECKING:
    from tests.scripted import ScriptedUpstream

LARGE = "word " * 10_000
"""More than what is read before it is counted."""


def body(text: str = "Hello", **fields: object) -> dict[str, object]:
    return {"model": "scripted/model-1", "messages": [{"role": "user", "content": text}], **fields}


@pytest.mark.parametrize(("reset", "seconds"), [(12.0, 12), (11.001, 12), (0.001, 1), (0.0, 0)])
def test_headers_give_quota_window_rest_and_whole_seconds(reset: float, seconds: int) -> None:
    status = RateStatus(allowed=True, limit=30, window=60, remaining=29, reset=reset)
    assert rate_headers(status) == {
        "RateLimit-Policy": '"prepare";q=30;w=60',
        "RateLimit": f'"prepare";r=29;t={seconds}',
    }


def test_a_request_that_was_not_counted_has_no_headers() -> None:
    assert rate_headers(None) == {}


@pytest.mark.parametrize("text", ["Hello", LARGE], ids=["small", "large"])
async def test_every_answer_to_a_counted_request_has_the_rate(
    valkey_url: str, upstream: ScriptedUpstream, text: str
) -> None:
    async with running(valkey_url, upstream, rate_limit="2/minute") as broker:
        right = await broker.post(body(text))
        assert right.status == 201
        assert right.headers["RateLimit-Policy"] == '"prepare";q=2;w=60'
        assert right.headers["RateLimit"] == '"prepare";r=1;t=60'
        wrong = await broker.post(body(text, temperature=99))
        assert wrong.status == 422
        assert wrong.headers["RateLimit"].startswith('"prepare";r=0;t=')
        other = await broker.ask("GET", "/models")
        assert "RateLimit" not in other.headers
        assert "RateLimit-Policy" not in other.headers


@pytest.mark.parametrize("text", ["Hello", LARGE], ids=["small", "large"])
async def test_a_refusal_says_when_to_come_again(
    valkey_url: str, upstream: ScriptedUpstream, text: str
) -> None:
    async with running(valkey_url, upstream, rate_limit="1/minute") as broker:
        assert (await broker.post(body(text))).status == 201
        for _ in range(2):  # the second one is refused without asking Redis
            refused = await broker.post(body(text))
            assert refused.status == 429
            assert refused.json["error"]["code"] == "rate_limited"
            wait = int(refused.headers["Retry-After"])
            assert 30 < wait <= 60
            assert refused.headers["RateLimit"] == f'"prepare";r=0;t={wait}'
            assert refused.headers["RateLimit-Policy"] == '"prepare";q=1;w=60'


async def test_a_request_refused_by_another_limit_has_the_rate(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, rate_limit="9/minute", max_prepared=1) as broker:
        await broker.post(body())
        refused = await broker.post(body())
        assert refused.json["error"]["code"] == "too_many_streams"
        assert refused.headers["RateLimit"].startswith('"prepare";r=7;t=')


async def test_without_a_redis_answers_have_no_rate(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(f"{valkey_url}-nobody", upstream) as broker:
        answer = await broker.post(body())
        assert answer.status == 503
        assert answer.json["error"]["code"] == "store_unavailable"
        assert "RateLimit" not in answer.headers
