"""Redis as it is used: a user without rights to channels, a replica that was a primary, a long distance."""

from __future__ import annotations

import asyncio

import pytest
import redis.asyncio

from tests.broker import running
from tests.replies import plain
from tests.scripted import PATIENCE, ScriptedUpstream
from tests.stopwatch import Stopwatch
from tests.system.harness import running_valkey
from tests.wire import wire_to

pytestmark = [
    pytest.mark.parametrize("redis_server", ["valkey", "redis"], indirect=True),
    pytest.mark.usefixtures("redis_server"),
]


async def test_missing_channel_rights_are_logged_once(
    upstream: ScriptedUpstream, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_valkey() as valkey, redis.asyncio.Redis(port=valkey.port) as admin:
        await admin.execute_command("ACL", "SETUSER", "limited", "on", ">pw", "~*", "+@all", "resetchannels")  # type: ignore[no-untyped-call]
        url = f"redis://limited:pw@127.0.0.1:{valkey.port}/0"
        async with running(url, upstream) as owner, running(url, upstream) as other:
            session = await owner.prepare()
            async with owner.stream(session), other.stream(session) as connection:
                call = (await upstream.call()).open()
                stopwatch = Stopwatch()
                call.chunk("Hello")
                [event] = await connection.take(1)
                assert stopwatch.seconds < 3
                assert event.id == "1-1"
                assert (await other.cancel(session)).status == 202
                stopwatch = Stopwatch()
                await call.wait_gone()
                assert stopwatch.seconds < 3
                assert [event.kind for event in await connection.rest()] == ["done"]
    out = capsys.readouterr().out
    assert out.count("has no rights to channels") == 2  # one a worker
    assert "redis refused" not in out


@pytest.mark.parametrize("emptied", [False, True], ids=["fresh", "emptied"])
async def test_the_first_request_of_a_fresh_server_far_away_is_served(
    valkey_url: str, upstream: ScriptedUpstream, *, emptied: bool
) -> None:
    upstream.replies = [plain]
    async with redis.asyncio.Redis(unix_socket_path=valkey_url.removeprefix("unix://")) as admin:
        await admin.script_flush()
        async with wire_to(valkey_url) as wire:
            wire.delay = 0.1
            async with running(wire.url, upstream) as broker:
                if emptied:  # as after a restart of Redis: the scripts are gone again
                    await admin.script_flush()
                answer = await broker.post()
                assert answer.status == 201, answer.text
                assert (await broker.read(answer.json["sessionId"]))[-1].kind == "done"


async def test_workers_leave_a_primary_that_became_a_replica(
    upstream: ScriptedUpstream,
) -> None:
    async with running_valkey() as old, running_valkey() as new:
        ports = [old.port]

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            except OSError:
                pass
            finally:
                writer.close()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there = await asyncio.open_connection("127.0.0.1", ports[0])
            await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        try:
            async with redis.asyncio.Redis(port=old.port) as admin, running(url, upstream) as broker:
                await broker.prepare()
                assert (await broker.ask("GET", "/health/ready")).json == {"status": "ok"}
                await admin.execute_command("REPLICAOF", "127.0.0.1", str(new.port))  # type: ignore[no-untyped-call]
                answer = await broker.ask("GET", "/health/ready")
                assert (answer.status, answer.json["status"]) == (200, "degraded")
                assert answer.json["reason"] == "redis refuses to write"
                ports[0] = new.port  # the stable name leads to the new primary; old connections stay open
                async with asyncio.timeout(PATIENCE):
                    while (await broker.ask("GET", "/health/ready")).json["status"] != "ok":  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                    while (await broker.post()).status != 201:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
        finally:
            server.close()
