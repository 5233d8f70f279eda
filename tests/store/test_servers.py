"""Which servers a URL means, and that its secrets can be replaced while a worker runs."""

from __future__ import annotations

import asyncio
from unittest.mock import AsyncMock

import pytest
from redis.asyncio import Redis
from redis.asyncio.sentinel import MasterNotFoundError

from broker.settings import Settings
from broker.store.servers import Address, Credentials, Named, SentinelPool
from tests.scripted import PATIENCE

SENTINELS = "redis+sentinel://ann:one@a:1,b:2/main/3?sentinel_username=eve&sentinel_password=two"
CLUSTER = "redis+cluster://ann:one@a:1,b:2"


def shown(credentials: Credentials) -> tuple[str, str]:
    return credentials.username, credentials.password


@pytest.mark.parametrize("url", ["redis://ann:one@a:1/3", SENTINELS, CLUSTER])
def test_new_passwords_are_taken(url: str) -> None:
    address = Address.parse(url)
    assert address.take_credentials(Address.parse(url.replace("one", "new").replace("two", "newer")))
    assert shown(address.credentials) == ("ann", "new")
    if url is SENTINELS:
        assert shown(address.of_sentinels) == ("eve", "newer")


@pytest.mark.parametrize(
    ("url", "old", "new"),
    [
        (SENTINELS, "b:2", "c:2"),
        (SENTINELS, "/main", "/other"),
        (SENTINELS, "/3", "/4"),
        (SENTINELS, "sentinel_username=eve&sentinel_password=two", ""),
        (SENTINELS, "ann:one@", ""),
        (SENTINELS, "redis+", "rediss+"),
        (CLUSTER, "b:2", "c:2"),
        (CLUSTER, "ann:one@", ""),
        (CLUSTER, "redis+cluster://ann:one@a:1,b:2", "redis://ann:one@a:1"),
    ],
)
def test_whatever_else_has_changed_needs_a_restart(url: str, old: str, new: str) -> None:
    address = Address.parse(url)
    assert not address.take_credentials(Address.parse(url.replace(old, new)))
    assert shown(address.credentials) == ("ann", "one")


def test_the_password_of_the_sentinels_is_a_secret() -> None:
    url = SENTINELS.replace("two", "a%2Fb%20c+d")
    secrets = Settings(redis_url=url).secrets
    assert {"one", "a/b c d", "a%2Fb%20c+d"} <= set(secrets)


class Told(SentinelPool):
    """Its sentinels say what the test says.

    Attributes:
        told: what each says, by its port; None for nothing, as one that is frozen.
        given_up: the ports of the sentinels whose questions were cancelled.
        all_asked: set once each of them has been asked.
    """

    def __init__(self) -> None:
        address = Address.parse("redis+sentinel://s:1,s:2,s:3/main/0")
        assert address.several is not None
        super().__init__(address, address.several, self._connected)
        self.told: dict[int, Named | Exception | None] = {}
        self.given_up: set[int] = set()
        self.all_asked = asyncio.Event()
        self._asked: set[int] = set()

    async def _connected(self, _: object) -> None:
        pass

    async def _ask(self, sentinel: Redis) -> Named:
        port = sentinel.connection_pool.connection_kwargs["port"]
        told = self.told[port]
        self._asked.add(port)
        if self._asked == self.told.keys():
            self.all_asked.set()
        if told is None:
            try:
                await asyncio.Event().wait()
            finally:
                self.given_up.add(port)
        if isinstance(told, Exception):
            raise told
        assert told is not None
        return told


OLD, NEW = ("old", 1), ("new", 1)
BEFORE, AFTER = Named(OLD, lives=True, epoch=1), Named(NEW, lives=True, epoch=2)


async def test_the_newest_primary_is_found() -> None:
    pool = Told()
    pool.told = {1: BEFORE, 2: TimeoutError(), 3: AFTER}  # the first was cut off, and the second is
    assert await pool.get_master_address() == OLD
    assert await pool.find_primary() == NEW
    assert await pool.get_master_address() == NEW


async def test_a_sentinel_that_comes_back_is_not_believed() -> None:
    pool = Told()
    pool.told = {1: AFTER, 2: AFTER, 3: AFTER}
    assert await pool.get_master_address() == NEW
    pool.told = {1: BEFORE, 2: TimeoutError(), 3: TimeoutError()}
    assert await pool.find_primary() is None
    with pytest.raises(MasterNotFoundError):
        await pool.get_master_address()
    pool.told[3] = AFTER
    assert await pool.get_master_address() == NEW


async def test_sentinels_that_were_set_up_anew_are_believed() -> None:
    pool = Told()
    pool.told = {1: AFTER, 2: AFTER, 3: AFTER}
    assert await pool.get_master_address() == NEW
    pool.told = {1: BEFORE, 2: BEFORE, 3: BEFORE}
    assert await pool.get_master_address() == OLD
    assert await pool.find_primary() == OLD


async def test_a_primary_that_seems_dead_is_not_named() -> None:
    pool = Told()
    pool.told = dict.fromkeys((1, 2, 3), Named(OLD, lives=False, epoch=1))
    assert await pool.find_primary() is None
    with pytest.raises(MasterNotFoundError, match="the primary is down"):
        await pool.get_master_address()


async def test_sentinels_that_do_not_answer_are_not_waited_for() -> None:
    pool = Told()
    pool.told = {1: None, 2: None, 3: AFTER}
    async with asyncio.timeout(PATIENCE):
        assert await pool.get_master_address() == NEW
    assert pool.given_up == {1, 2}


async def test_who_gives_up_leaves_no_question_behind() -> None:
    pool = Told()
    pool.told = dict.fromkeys((1, 2, 3))
    asking = asyncio.create_task(pool.get_master_address())
    async with asyncio.timeout(PATIENCE):
        await pool.all_asked.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert pool.given_up == {1, 2, 3}
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("state", [{}, {"is_master": True}, {"is_master": True, "port": "x"}, None])
async def test_a_sentinel_that_is_not_understood_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, state: object
) -> None:
    address = Address.parse("redis+sentinel://s:1,s:2/main/0")
    assert address.several is not None

    async def connected(_: object) -> None:
        pass

    known = {
        "is_master": True,
        "is_sdown": False,
        "is_odown": False,
        "ip": "new",
        "port": "1",
        "config-epoch": "2",
    }
    pool = SentinelPool(address, address.several, connected)
    for sentinel, told in zip(pool._sentinels, (state, known), strict=True):
        monkeypatch.setattr(sentinel, "sentinel_master", AsyncMock(return_value=told))
    assert await pool.get_master_address() == NEW
