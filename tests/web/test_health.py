"""Health, request ids, and the shape of errors."""

from __future__ import annotations

import re

import pytest

from broker.web import keys
from tests.broker import Broker, running
from tests.scripted import ScriptedUpstream
from tests.system.harness import ValkeyProcess

UNKNOWN = "/stream/00000000-1111-4222-8333-444444444444"
NO_REDIS = "unix:///nowhere/valkey.sock"


async def test_a_healthy_broker_says_so(broker: Broker) -> None:
    for path in ("/health/live", "/health/ready"):
        answer = await broker.ask("GET", path)
        assert (answer.status, answer.json["status"]) == (200, "ok")


async def test_a_broker_is_not_ready_until_redis_has_answered(upstream: ScriptedUpstream) -> None:
    async with running(NO_REDIS, upstream) as broker:
        assert (await broker.ask("GET", "/health/live")).status == 200
        answer = await broker.ask("GET", "/health/ready")
        assert answer.status == 503
        assert (answer.json["status"], answer.code) == ("starting", "store_unavailable")
        assert answer.headers["Retry-After"]


async def test_a_redis_that_goes_away_later_is_degraded_and_ready(
    exposed_broker: Broker, valkey: ValkeyProcess
) -> None:
    broker = exposed_broker
    assert (await broker.ask("GET", "/health/ready")).json == {"status": "ok"}
    valkey.kill()
    answer = await broker.ask("GET", "/health/ready")
    assert (answer.status, answer.json["status"]) == (200, "degraded")
    assert answer.json["reason"]
    await valkey.start()
    assert (await broker.ask("GET", "/health/ready")).json == {"status": "ok"}


async def test_a_broker_whose_readiness_is_first_asked_after_redis_went_away_is_degraded_and_ready(
    exposed_broker: Broker, valkey: ValkeyProcess
) -> None:
    await exposed_broker.prepare()  # Redis has answered, but no health check has asked it
    valkey.kill()
    answer = await exposed_broker.ask("GET", "/health/ready")
    assert (answer.status, answer.json["status"]) == (200, "degraded")


async def test_a_broker_that_drains_is_not_ready(broker: Broker) -> None:
    await broker.app[keys.WORKER].drain(0)
    answer = await broker.ask("GET", "/health/ready")
    assert (answer.status, answer.json["status"], answer.code) == (503, "draining", "draining")
    assert (await broker.ask("GET", "/health/live")).status == 200


async def test_a_worker_that_is_replaced_sends_pages_to_the_others(broker: Broker) -> None:
    session = await broker.prepare()
    await broker.app[keys.WORKER].leave(0)
    ready = await broker.ask("GET", "/health/ready")
    assert (ready.status, ready.headers["Connection"]) == (200, "close"), "the service is ready"
    async with broker.stream(session) as connection:
        assert await connection.rest() == []
        retry = int(connection.blocks[0].splitlines()[0].removeprefix(b"retry: "))
        assert retry < 500, "another worker is there already"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/prepare", 405, "method_not_allowed"),
        ("PUT", UNKNOWN, 405, "method_not_allowed"),
        ("GET", f"{UNKNOWN}/cancel", 405, "method_not_allowed"),
        ("DELETE", UNKNOWN, 404, "session_not_found"),
        ("GET", UNKNOWN, 404, "session_not_found"),
        ("POST", "/prepare", 415, "unsupported_media_type"),
        ("GET", "/models", 502, "upstream_unavailable"),
        ("GET", "/%00", 404, "not_found"),
    ],
)
async def test_errors_are_json_of_one_shape(
    broker: Broker, method: str, path: str, status: int, code: str
) -> None:
    answer = await broker.ask(method, path)
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["Content-Type"].startswith("application/json")
    assert set(answer.json) == {"error"}
    assert set(answer.json["error"]) <= {"code", "message", "details"}
    assert answer.headers["Cache-Control"] == "no-store"


async def test_a_wrong_method_gets_the_right_ones(broker: Broker) -> None:
    assert (await broker.ask("GET", "/prepare")).headers["Allow"] == "POST"


@pytest.mark.parametrize("path", ["/prepare", "/health/live", "/nothing", UNKNOWN])
async def test_every_answer_has_a_request_id(broker: Broker, path: str) -> None:
    ids = {(await broker.ask("GET", path)).headers["X-Request-Id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", each) for each in ids)


async def test_a_request_id_of_a_proxy_is_used(broker: Broker) -> None:
    answer = await broker.ask("GET", "/health/live", headers={"X-Request-Id": "from-the.proxy_1"})
    assert answer.headers["X-Request-Id"] == "from-the.proxy_1"


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a;b", "<script>"])
async def test_an_invalid_request_id_is_replaced(broker: Broker, given: str) -> None:
    answer = await broker.ask("GET", "/health/live", headers={"X-Request-Id": given})
    assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["X-Request-Id"])
