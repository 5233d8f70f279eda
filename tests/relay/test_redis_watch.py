"""Checks of Redis: it is away, came back empty, or is another server."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from broker.core.errors import StoreUnavailable
from broker.relay import redis_watch
from broker.relay.redis_watch import CLAIMS_PAUSE, RedisWatch
from broker.store.workers import WIPED_FOR, MarkerStatus
from tests.clock import Clock


class FakeRedis:
    """Returns the marker and the server of the test, or is away."""

    def __init__(self) -> None:
        self.marker_now = "first"
        self.server = "one"
        self.wiped = False
        self.away = False
        self.why = ""
        self.connections_made = 1
        self.is_lost = False
        self.checks = 0

    async def marker(self) -> MarkerStatus:
        self.checks += 1
        if self.away:
            raise StoreUnavailable from ConnectionError(self.why)
        servers = frozenset(self.server.split())
        return MarkerStatus(self.marker_now, self.wiped, servers, 5_000)

    async def leave_old_primary(self) -> None:
        pass

    async def tell_wiped(self) -> None:
        self.wiped = True


class Watching:
    def __init__(self) -> None:
        self.redis = FakeRedis()
        self.clock = Clock()
        self.watch = RedisWatch(cast("Any", self.redis), clock=self.clock)


@pytest.fixture
async def watching() -> Watching:
    watching = Watching()
    await watching.watch.check()
    return watching


async def test_nothing_is_written_again_in_ordinary_operation(watching: Watching) -> None:
    await watching.watch.check()
    assert not watching.watch.to_rewrite.is_set()
    assert await watching.watch.is_gone()
    assert await watching.watch.claims_paused_since() is None


async def test_a_node_that_comes_to_a_cluster_is_no_failover(watching: Watching) -> None:
    for servers in ("one two", "two three"):
        watching.redis.server = servers
        await watching.watch.check()
        lost_one = servers == "two three"
        assert watching.watch.to_rewrite.is_set() == lost_one
        assert (await watching.watch.claims_paused_since() is not None) == lost_one


async def test_all_workers_are_told_that_redis_came_back_empty(watching: Watching) -> None:
    watching.redis.marker_now, watching.redis.server = "second", "two"
    await watching.watch.check()
    assert watching.watch.to_rewrite.is_set()
    assert watching.redis.wiped
    assert not await watching.watch.is_gone()
    assert await watching.watch.claims_paused_since() is None, "nothing in it was prepared before"


async def test_an_unknown_session_is_gone_again_after_its_time(watching: Watching) -> None:
    watching.redis.marker_now = "second"
    await watching.watch.check()
    watching.redis.wiped = False
    watching.clock.now += WIPED_FOR - 0.1
    assert not await watching.watch.is_gone()
    watching.clock.now += 0.1
    assert await watching.watch.is_gone()


async def test_a_worker_started_without_redis_declares_nothing_gone() -> None:
    watching = Watching()
    watching.redis.away = True
    with pytest.raises(StoreUnavailable):
        await watching.watch.check()
    watching.redis.away = False
    assert not await watching.watch.is_gone()
    watching.clock.now += WIPED_FOR
    assert await watching.watch.is_gone()


async def test_another_server_pauses_claims_while_owners_write(watching: Watching) -> None:
    watching.redis.server = "two"
    await watching.watch.check()
    assert watching.watch.to_rewrite.is_set()
    assert await watching.watch.claims_paused_since() == 5_000
    watching.clock.now += CLAIMS_PAUSE
    assert await watching.watch.claims_paused_since() is None
    assert await watching.watch.is_gone(), "its marker is the same, so it is not empty"


async def test_a_new_connection_is_checked_before_the_next_claim(watching: Watching) -> None:
    checks = watching.redis.checks
    assert await watching.watch.claims_paused_since() is None
    assert watching.redis.checks == checks, "a known connection leads to the known server"
    watching.redis.connections_made += 1
    watching.redis.server = "two"
    assert await watching.watch.claims_paused_since() is not None


async def test_a_lost_connection_is_checked_before_the_next_claim(watching: Watching) -> None:
    """Else the claim itself would be the first to reach the new server."""
    watching.redis.is_lost = True
    watching.redis.server = "two"
    assert await watching.watch.claims_paused_since() is not None


async def test_the_time_of_another_server_is_known_at_its_first_connection(watching: Watching) -> None:
    assert await watching.watch.same_since() == float("-inf")
    watching.clock.now += 3
    watching.redis.connections_made += 1
    assert await watching.watch.same_since() == float("-inf"), "it leads to the same server"
    watching.redis.connections_made += 1
    watching.redis.server = "two"
    found_at = watching.clock.now
    assert await watching.watch.same_since() == found_at
    watching.clock.now += 100
    assert await watching.watch.same_since() == found_at


async def test_no_claim_is_made_if_the_server_cannot_be_reached(watching: Watching) -> None:
    watching.redis.connections_made += 1
    watching.redis.away = True
    with pytest.raises(StoreUnavailable):
        await watching.watch.claims_paused_since()


async def test_a_server_without_a_name_pauses_nothing(watching: Watching) -> None:
    for server in ("", "", "two"):  # the right to ask for it may be taken away and given back
        watching.redis.server = server
        await watching.watch.check()
        assert await watching.watch.claims_paused_since() is None


async def test_checks_continue_through_an_outage(watching: Watching) -> None:
    watching.redis.away = True
    task = asyncio.create_task(watching.watch.run())
    await asyncio.sleep(0)
    watching.redis.away = False
    watching.redis.marker_now = "second"
    async with asyncio.timeout(10):
        await watching.watch.to_rewrite.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_each_reason_of_an_outage_is_logged_once(
    watching: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that refuses a certificate may seem to hang up at first."""
    monkeypatch.setattr(redis_watch, "CHECK", 0)

    async def checked(times: int) -> None:
        wanted = watching.redis.checks + times
        while watching.redis.checks < wanted:  # noqa: ASYNC110 - the next check, not a time
            await asyncio.sleep(0)

    with capture_logs() as lines:
        task = asyncio.create_task(watching.watch.run())
        watching.redis.away = True
        for why in ("closed", "refused"):
            watching.redis.why = why
            await checked(5)
        watching.redis.away = False
        await checked(3)
        task.cancel()
    told = [(line["event"], line.get("why")) for line in lines]
    assert told == [
        ("redis cannot be reached", "ConnectionError closed"),
        ("redis cannot be reached", "ConnectionError refused"),
        ("redis is back", None),
    ]
