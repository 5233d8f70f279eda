"""`broker sessions cancel` on a real Valkey without a service: what it reaches, and what it says of the rest."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from broker.cli import sessions
from broker.core.accounts import Quotas, WorstCase
from broker.store import running
from broker.store.accounts import AccountStore, Reservation
from broker.store.buckets import account_of
from broker.store.connection import Store
from broker.store.pending import PendingStore
from broker.store.running import Activity, RunningStore
from broker.store.sessions import Prepared, SessionStore
from tests.wire import wire_to

WORST = WorstCase(100, 100)
QUOTAS = Quotas(pending=50, streams=5000, daily_tokens=0, daily_cost=0, total_daily_cost=0)
NOT_ENDED = "was cancelled, and has not ended within 0 s."


class Stage:
    """Sessions in Redis that no worker runs, and the command."""

    def __init__(self, store: Store, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = store
        self.url = url
        self._monkeypatch = monkeypatch
        self._sessions = SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=300)
        self._pending = PendingStore(store, QUOTAS, session_ttl=600)

    async def prepare(self, number: int, client: str) -> str:
        session_id = f"{number:08x}-9a4d-4e6f-8b7a-1c2d3e4f5a6b"
        prepared = Prepared(
            request=b"{}", model="a/b", prompt_tokens=1, referer="", client=client, worst=WORST
        )
        await self._pending.admit(client, session_id, WORST, stored=2)
        await self._sessions.prepare(session_id, prepared)
        return session_id

    async def run(self, number: int, client: str) -> str:
        session_id = await self.prepare(number, client)
        await AccountStore(self.store, QUOTAS).reserve(
            Reservation(f"c{number}", session_id, client, "a/b", WORST)
        )
        await self._sessions.claim(session_id, f"c{number}", "w1")
        await self._pending.forget(client, session_id)
        return session_id

    async def activities(self, client: str) -> list[str]:
        found = await RunningStore(self.store).read(client=client)
        return [each.activity.value for each in found.sessions]

    async def cancel(self, session: str | None, client: str | None, *, url: str = "") -> int:
        self._monkeypatch.setenv("REDIS_URL", url or self.url)
        return await asyncio.to_thread(sessions.cancel, session, client)


@pytest_asyncio.fixture
async def stage(
    valkey_url: str,
    monkeypatch: pytest.MonkeyPatch,
    log: io.StringIO,
) -> AsyncIterator[Stage]:
    monkeypatch.setattr(sessions, "ENDS_WITHIN", 0.0)  # no worker would end anything
    store = Store(valkey_url, "broker")
    yield Stage(store, valkey_url, monkeypatch)
    await store.close()


async def test_all_of_a_client_is_cancelled_however_much_else_runs(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "MAX_SESSIONS", 2)
    for number in range(6):
        await stage.run(number, "key:acme" if number % 3 == 2 else "key:globex")
    assert not (await RunningStore(stage.store).read()).complete
    assert await stage.cancel(None, "acme") == 1
    out, err = capsys.readouterr()
    assert out == "Cancelled: 0 sessions ended.\n"
    assert err.splitlines() == [f"broker: {number:08x} {NOT_ENDED}" for number in (2, 5)]
    assert await stage.activities("key:acme") == [Activity.STOPPING] * 2
    assert Activity.STOPPING not in await stage.activities("key:globex")


async def test_what_of_a_client_cannot_be_read_is_said(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "MAX_SESSIONS", 2)
    for number in range(3):
        await stage.prepare(number, "key:acme")
    assert await stage.cancel(None, "key:acme") == 1
    out, err = capsys.readouterr()
    assert out == "Cancelled: 2 that were prepared will not start.\n"
    more = "broker: There may be more of key:acme: not all of its sessions can be read. Run this again.\n"
    assert err == more
    assert await stage.cancel(None, "key:acme") == 0
    assert capsys.readouterr() == ("Cancelled: 1 that was prepared will not start.\n", "")
    await stage.store.redis.zadd(account_of(stage.store, "key:acme").shared("open"), {"odd": 10**13})
    await stage.store.redis.set(account_of(stage.store, "key:acme").reservation("odd"), "not a hash")
    assert await stage.cancel(None, "key:acme") == 1
    assert capsys.readouterr() == ("Cancelled: 0 sessions ended.\n", more)


async def test_a_refused_cancel_stops_no_other(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sessions, "AT_ONCE", 1)
    refused, *_ = [await stage.run(number, "key:acme") for number in range(3)]
    await stage.store.redis.set(stage.store.session_keys(refused)["session"], "not a hash")
    assert await stage.cancel(None, "acme") == 1
    told, *late = capsys.readouterr().err.splitlines()
    assert told.startswith("broker: 00000000 could not be cancelled: Redis refuses to be read (")
    assert late == [f"broker: 0000000{number} {NOT_ENDED}" for number in (1, 2)]
    assert sorted(await stage.activities("key:acme")) == ["stopping", "stopping", "unknown"]


async def test_a_redis_that_goes_away_is_not_asked_for_each_session(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sessions, "AT_ONCE", 1)
    ids = [await stage.run(number, "key:acme") for number in range(sessions.SHOWN_COMPLAINTS + 2)]
    async with wire_to(stage.url) as wire:
        wire.block = b"EVALSHA"
        assert await stage.cancel(None, "acme", url=wire.url) == 1
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "broker: 00000000 could not be cancelled: Redis cannot be reached (no answer in time)."
    assert others == [
        *(f"broker: {each[:8]} could not be cancelled: Redis was away." for each in ids[1:-2]),
        "broker: and so 2 more.",
    ]


async def test_an_id_that_is_not_found_in_a_part_of_the_list_says_so(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "MAX_SESSIONS", 1)
    for number in range(2):
        await stage.run(number, "key:acme")
    assert await stage.cancel("abcdef01", None) == 1
    told = "No running session has an id that begins with abcdef01 among the 1 that are read, and more run."
    assert capsys.readouterr().err == f"broker: {told}\n"


async def test_a_list_of_a_client_is_complete_however_much_runs(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "MAX_SESSIONS", 2)
    for number in range(6):
        await stage.run(number, "key:acme" if number % 3 == 2 else "key:globex")
    monkeypatch.setenv("REDIS_URL", stage.url)
    assert await asyncio.to_thread(sessions.sessions, "acme", as_json=False) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["00000002", "00000005"]
    assert err == ""
