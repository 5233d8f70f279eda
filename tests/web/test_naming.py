"""Clients keep their names when the upstream's key changes, and after a loss of Redis."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis.asyncio
from structlog.testing import capture_logs

from broker.settings import load_settings
from tests.broker import Broker, running
from tests.money import until
from tests.scripted import ScriptedUpstream


async def used(broker: Broker) -> int:
    """Return how many of these prepares the broker has counted."""
    answer = await broker.post()
    assert answer.status == 201
    return 1000 - int(answer.headers["RateLimit"].split("r=")[1].split(";")[0])


async def test_workers_with_different_keys_share_a_clients_name(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    limit = {"rate_limit": "1000/minute"}
    async with (
        running(valkey_url, upstream, openrouter_api_key="sk-or-one", **limit) as one,
        running(valkey_url, upstream, openrouter_api_key="sk-or-two", **limit) as two,
    ):
        assert [await used(one), await used(two), await used(one)] == [1, 2, 3]
    async with running(valkey_url, upstream, openrouter_api_key="sk-or-three", **limit) as three:
        assert await used(three) == 4


async def test_names_outlive_a_redis_that_came_back_empty(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream) as broker, redis.asyncio.from_url(valkey_url) as server:
        await broker.post()
        [key] = [key async for key in server.scan_iter("*name-secret")]
        kept = await server.get(key)
        await server.flushall()
        await until(lambda: server.get(key), within=10)
        assert await server.get(key) == kept


async def test_an_operators_secret_keeps_nothing_in_redis(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    names = []
    for secret in ("the same secret", "the same secret", "another secret"):
        async with (
            running(valkey_url, upstream, name_secret=secret) as broker,
            redis.asyncio.from_url(valkey_url) as server,
        ):
            await broker.post()
            assert [key async for key in server.scan_iter("*name-secret")] == []
            names.append({key async for key in server.scan_iter("*:{a*}:pending:*")})
    assert names[0] == names[1] != names[2]


def test_the_secret_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of a file\n".replace(" ", "-"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BROKER_NAME_SECRET_FILE", "secret")
    settings = load_settings()
    assert settings.name_secret is not None
    assert settings.name_secret.get_secret_value() == "of-a-file"
    assert "of-a-file" in settings.secrets
    assert "of-a-file" not in repr(settings)


async def test_an_ignored_forwarded_address_is_logged_once(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    with capture_logs() as lines:
        async with running(valkey_url, upstream) as broker:
            for address in ("203.0.113.1", "203.0.113.2"):
                await broker.post(headers={"X-Forwarded-For": address})
        async with running(valkey_url, upstream, trusted_proxies=("private",)) as broker:
            await broker.post(headers={"X-Forwarded-For": "203.0.113.1"})
    told = [line for line in lines if "X-Forwarded-For" in line["event"]]
    assert [line["peer"] for line in told] == ["127.0.0.1"]
    assert "BROKER_TRUSTED_PROXIES" in told[0]["event"]
