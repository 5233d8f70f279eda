"""The rights in `deploy/redis/rights`: all that a broker needs of Redis, and no more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio
from limits.aio.storage.redis.bridge import RedisBridge

import broker.store
from tests.broker import running
from tests.money import price_list
from tests.replies import plain
from tests.system.harness import running_valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.scripted import ScriptedUpstream
    from tests.system.harness import ValkeyProcess

pytestmark = [pytest.mark.parametrize("redis_server", ["valkey", "redis", "redis8"], indirect=True)]

RIGHTS = Path(__file__).parents[2] / "deploy" / "redis" / "rights"
STORE = Path(broker.store.__file__).parent
OPTIONAL = {"config|get", "wait"}
"""Without the first, the start does not warn of snapshots; the second is for BROKER_REDIS_WAIT."""

OUTSIDE = (
    ("FLUSHALL",),
    ("KEYS", "*"),
    ("CONFIG", "SET", "save", ""),
    ("ACL", "LIST"),
    ("MONITOR",),
    ("EVAL", "return 1", "0"),
    ("SCRIPT", "FLUSH"),
    ("GET", "shop:basket"),
    ("SET", "shop:basket", "1"),
    ("SUBSCRIBE", "shop:orders"),
    ("PUBLISH", "shop:orders", "1"),
    ("SORT", "broker:2:any", "BY", "shop:*"),
)


def rights() -> list[str]:
    return RIGHTS.read_text().split()


def granted() -> set[str]:
    return {word.removeprefix("+") for word in rights() if word.startswith("+")}


@pytest.fixture
async def limited(redis_server: str) -> AsyncIterator[tuple[ValkeyProcess, redis.asyncio.Redis, str]]:
    """A server, its administrator, and the URL of a user who has these rights."""
    async with running_valkey() as valkey, redis.asyncio.Redis(port=valkey.port) as admin:
        words = ("ACL", "SETUSER", "broker", "reset", "on", ">pw", *rights())
        await admin.execute_command(*words)  # type: ignore[no-untyped-call]
        yield valkey, admin, f"redis://broker:pw@127.0.0.1:{valkey.port}/0"


async def denied(admin: redis.asyncio.Redis) -> set[str]:
    """Return what users were refused: commands, keys and channels."""
    entries: Any = await admin.execute_command("ACL", "LOG")  # type: ignore[no-untyped-call]
    found = set()
    for entry in entries:
        named = entry if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True))
        found.add(str(named.get("object", named.get(b"object"))))
    return {text.removeprefix("b'").removesuffix("'") for text in found}


async def test_a_whole_life_needs_no_other_right(
    limited: tuple[ValkeyProcess, redis.asyncio.Redis, str],
    upstream: ScriptedUpstream,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, admin, url = limited
    upstream.models = price_list()
    settings = {
        "redis_wait": 1,
        "total_daily_cost": 5,
        "daily_tokens": 1_000_000,
        "max_concurrent_streams": 1,
    }
    async with running(url, upstream, **settings) as owner, running(url, upstream, **settings) as other:
        assert (await owner.ask("GET", "/health/ready")).json == {"status": "ok"}
        assert (await owner.ask("GET", "/models")).status == 200
        keyed = {"Idempotency-Key": "once"}
        first = (await owner.post(headers=keyed)).json["sessionId"]
        assert (await other.post(headers=keyed)).json["sessionId"] == first
        waiting, dropped = await owner.prepare(), await other.prepare()
        assert (await other.cancel(dropped)).json == {"state": "cancelled"}
        async with owner.stream(first), other.stream(first) as follower:
            call = (await upstream.call()).open()
            call.chunk("Hello")
            assert [event.id for event in await follower.take(1)] == ["1-1"]
            async with other.stream(waiting) as queued:
                assert [event.kind for event in await queued.rest()] == ["queued"]
            assert (await other.cancel(first)).status == 202
            await call.wait_gone()
            assert [event.kind for event in await follower.rest()] == ["done"]
        upstream.replies = [plain]
        third = await owner.prepare()
        await owner.cancel(waiting)
        assert (await owner.read(third))[-1].kind == "done"
        assert (await other.read(third, "1-1"))[-1].kind == "done"
        assert (await other.ask("GET", "/usage")).json["requests"] >= 2
    assert await denied(admin) <= {"config|get"}
    assert "has no rights to channels" not in capsys.readouterr().out
    stats = await admin.info("commandstats")
    of_admin = {"acl|setuser", "acl|log", "hello", "client|setinfo", "info", "auth", "select"}
    used = {name.removeprefix("cmdstat_") for name in stats} - of_admin
    assert used - granted() <= OPTIONAL


async def test_another_database_needs_one_more_right(
    limited: tuple[ValkeyProcess, redis.asyncio.Redis, str],
) -> None:
    _, admin, url = limited
    other = url.removesuffix("/0") + "/3"
    readme = (RIGHTS.parent / "README.md").read_text()
    for right, works in (("-select", False), ("+select", True)):
        await admin.execute_command("ACL", "SETUSER", "broker", right)  # type: ignore[no-untyped-call]
        async with redis.asyncio.Redis.from_url(other) as client:
            if works:
                assert await client.ping()
            else:
                with pytest.raises(redis.exceptions.NoPermissionError):
                    await client.ping()
    assert "`+select`" in readme


async def test_what_is_outside_is_refused(
    limited: tuple[ValkeyProcess, redis.asyncio.Redis, str],
) -> None:
    valkey, _, _ = limited
    for words in OUTSIDE:
        async with redis.asyncio.Redis(
            port=valkey.port, username="broker", password="pw", protocol=2, driver_info=None
        ) as client:
            with pytest.raises(redis.exceptions.NoPermissionError):
                await client.execute_command(*words)  # type: ignore[no-untyped-call]


def test_every_right_is_used(redis_server: str) -> None:
    scripts = "".join(path.read_text() for path in STORE.glob("lua/*.lua"))
    code = "".join(path.read_text() for path in STORE.glob("*.py")).replace('", "', " ")
    scripts += (RedisBridge.SCRIPT_ACQUIRE_MOVING_WINDOW + RedisBridge.SCRIPT_MOVING_WINDOW).decode()
    called = {word.lower() for word in re.findall(r"""call\(["'](\w+)["']""", scripts)}
    unused = {
        name
        for name in granted() - called
        if name.upper().replace("|", " ") not in code and f".{name}(" not in code and name != "unsubscribe"
    }
    assert unused - {"script|load", "evalsha"} == set()
    assert called <= granted()
