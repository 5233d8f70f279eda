"""The connection that all calls of a worker share: each gets its own replies, whatever happens to the others."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from redis.asyncio import UnixDomainSocketConnection
from redis.exceptions import ConnectionError as LineError
from redis.exceptions import ResponseError

from broker.core.errors import StoreUnavailable
from broker.store.call import command_call
from broker.store.connection import Store
from broker.store.node import MAX_LARGE, MAX_SMALL
from broker.store.shared_connection import MAX_CALLS, MAX_UNSENT, SharedConnection
from tests.scripted import PATIENCE
from tests.stopwatch import Stopwatch
from tests.system.harness import ValkeyProcess, eventually
from tests.wire import Wire, wire_to

pytestmark = pytest.mark.one_server("what one connection does")


@pytest_asyncio.fixture
async def wire(valkey_url: str) -> AsyncIterator[Wire]:
    async with wire_to(valkey_url) as wire:
        yield wire


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Store]:
    store = Store(url, "test")
    try:
        yield store
    finally:
        await store.close()


async def echo(store: Store, *texts: bytes, timeout: float = PATIENCE) -> None:
    """Check that each text comes back as the reply to its own command."""
    replies = await store.run([command_call("ECHO", text) for text in texts], timeout=timeout)
    assert replies == list(texts)


async def test_each_call_gets_its_own_replies(store: Store) -> None:
    await asyncio.gather(*(echo(store, *[b"%d-%d" % (n, m) for m in range(n % 5 + 1)]) for n in range(500)))
    assert store.connections_made == 1


async def test_a_refused_command_changes_no_other_reply(store: Store) -> None:
    wrong = store.commands([("ECHO", "a"), ("NOSUCH",), ("ECHO", "b")])
    found, *_ = await asyncio.gather(wrong, *(echo(store, b"%d" % n) for n in range(20)))
    assert (found[0], found[2]) == (b"a", b"b")
    assert isinstance(found[1], ResponseError)
    assert store.connections_made == 1


@pytest.mark.parametrize("sent", [False, True])
async def test_a_cancelled_call_leaves_the_others(wire: Wire, sent: bool) -> None:
    async with opened(wire.url) as store:
        await echo(store, b"first")
        wire.block = b"held"
        tasks = [asyncio.create_task(echo(store, b"held", b"%d" % n)) for n in range(9)]
        await asyncio.sleep(0)
        if sent:
            await wire.until_blocked()
        for task in tasks[::2]:
            task.cancel()
        wire.unblock()
        await asyncio.gather(*tasks[1::2])
        assert all(task.cancelled() for task in tasks[::2])
        assert store.connections_made == 1


async def test_a_call_ends_in_time_and_the_next_finds_redis(valkey: ValkeyProcess) -> None:
    async with opened(valkey.url) as store:
        await echo(store, b"before")
        valkey.freeze()
        began = asyncio.get_running_loop().time()
        calls = [echo(store, b"x", timeout=0.3) for _ in range(50)]
        for failed in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(failed, StoreUnavailable)
        assert 0.3 <= asyncio.get_running_loop().time() - began < PATIENCE
        valkey.thaw()
        await echo(store, b"after")


async def test_a_silent_connection_is_replaced(wire: Wire) -> None:
    """As after a failover, where the old host is gone and says nothing."""
    async with opened(wire.url) as store:
        await echo(store, b"before")
        wire.drop = b"lost"
        with pytest.raises(StoreUnavailable):
            await echo(store, b"lost", timeout=1.5)
        wire.drop = b""
        await echo(store, b"after")
        assert store.connections_made == 2


async def test_a_late_answer_still_reaches_who_waits(wire: Wire) -> None:
    """The connection takes no more calls then, and is closed behind the last answer."""
    async with opened(wire.url) as store:
        await echo(store, b"before")
        wire.block = b"slow"
        slow = asyncio.create_task(echo(store, b"slow"))
        with pytest.raises(StoreUnavailable):
            await echo(store, b"impatient", timeout=1.2)
        await echo(store, b"on another connection")
        wire.unblock()
        await slow
        await eventually(lambda: wire.open == 1)


async def test_failures_of_an_old_connection_spare_the_new(wire: Wire) -> None:
    async with opened(wire.url) as store:
        await echo(store, b"before")
        wire.block = b"held"
        held = [asyncio.create_task(echo(store, b"held", timeout=0.1 + 0.05 * n)) for n in range(8)]
        await wire.until_blocked()
        wire.block = b""
        for call in held:
            with pytest.raises(StoreUnavailable):
                await call
            await echo(store, b"after")
        assert store.connections_made == 2


async def test_a_process_that_stood_still_does_not_blame_redis(store: Store) -> None:
    await echo(store, b"before")
    call = asyncio.create_task(echo(store, b"x", timeout=0.2))
    await asyncio.sleep(0)
    time.sleep(0.5)  # noqa: ASYNC251 - this process stands still
    await call
    assert store.connections_made == 1


@asynccontextmanager
async def shared_connection(valkey_url: str) -> AsyncIterator[SharedConnection]:
    connection = UnixDomainSocketConnection(path=valkey_url.removeprefix("unix://"), protocol=2)
    await connection.connect()  # type: ignore[no-untyped-call]  # as the library has it
    shared = SharedConnection(connection)
    try:
        yield shared
    finally:
        shared.close()
        await shared.closed
        await connection.disconnect(nowait=True)


async def test_nothing_is_written_to_a_lost_connection(valkey_url: str) -> None:
    loop = asyncio.get_running_loop()
    errors: list[object] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    async with shared_connection(valkey_url) as shared:
        shared.close()
        assert [LineError] == [
            type(reply) for reply in await shared.ask(b"PING\r\n", 1, loop.time() + PATIENCE)
        ]
    assert errors == []


async def test_the_bound_of_unsent_bytes_is_kept_at_any_moment(valkey_url: str) -> None:
    async with shared_connection(valkey_url) as shared:
        call = command_call("ECHO", bytes(MAX_SMALL)).packed
        answers = []
        while shared.takes_calls:
            answers.append(shared.ask(call, 1, asyncio.get_running_loop().time() + PATIENCE))
        assert len(answers) == MAX_UNSENT // MAX_SMALL
        assert await asyncio.gather(*answers) == [[bytes(MAX_SMALL)]] * len(answers)
        assert shared.takes_calls


async def test_a_closed_connection_fails_who_waits_at_once(store: Store, valkey_url: str) -> None:
    await echo(store, b"before")
    [client] = await store.commands([("CLIENT", "ID")])
    waiting = asyncio.create_task(store.commands([("XREAD", "BLOCK", "9000", "STREAMS", "none", "$")]))
    async with opened(valkey_url) as other:
        assert await other.commands([("CLIENT", "KILL", "ID", client)]) == [1]
    with pytest.raises(StoreUnavailable):
        await waiting
    await echo(store, b"after")
    assert store.connections_made == 2


async def test_a_command_that_waits_holds_up_no_other(store: Store) -> None:
    waiting = asyncio.create_task(store.run([command_call("WAIT", 1, 0)], timeout=PATIENCE))
    await asyncio.gather(*(echo(store, b"%d" % n) for n in range(20)))
    assert not waiting.done()
    waiting.cancel()


async def test_a_large_call_holds_up_no_other(wire: Wire) -> None:
    async with opened(wire.url) as store:
        wire.block = b"large"
        large = asyncio.create_task(echo(store, b"large" + bytes(MAX_SMALL)))
        await wire.until_blocked()
        await echo(store, b"small")
        wire.unblock()
        await large


async def test_large_calls_share_a_connection(store: Store) -> None:
    for _ in range(3):
        await asyncio.gather(*(echo(store, bytes(MAX_SMALL + n)) for n in range(5)))
    assert store.connections_made == 1


async def test_a_very_large_call_holds_up_no_large_one(wire: Wire) -> None:
    async with opened(wire.url) as store:
        wire.block = b"large"
        very_large = asyncio.create_task(echo(store, b"large" + bytes(MAX_LARGE)))
        await wire.until_blocked()
        await echo(store, bytes(MAX_SMALL))
        wire.unblock()
        await very_large


async def test_calls_beyond_the_bound_go_their_own_way(wire: Wire) -> None:
    async with opened(wire.url) as store:
        wire.block = b"held"
        held = [asyncio.create_task(echo(store, b"held")) for _ in range(MAX_CALLS)]
        await wire.until_blocked()
        await echo(store, b"one more")
        assert store.connections_made == 2
        wire.unblock()
        await asyncio.gather(*held)


async def test_what_is_not_the_protocol_of_redis_ends_the_connection() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with opened(f"redis://127.0.0.1:{port}/0") as store:
            with pytest.raises(StoreUnavailable):
                await echo(store, b"x")


async def test_an_unwanted_reply_ends_the_connection() -> None:
    """The replies behind it would reach the wrong callers."""

    async def answer_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"+x\r\n+y\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(answer_twice, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with opened(f"redis://127.0.0.1:{port}/0") as store:
            for made in (1, 2):
                assert await store.commands([("ECHO", "x")]) == [b"x"]
                assert store.connections_made == made


@pytest.mark.parametrize("size", [0, MAX_SMALL, MAX_LARGE], ids=["small", "large", "very large"])
async def test_a_store_that_closes_leaves_nobody_waiting(wire: Wire, size: int) -> None:
    store = Store(wire.url, "test")
    wire.block = b"held"
    held = asyncio.create_task(echo(store, b"held" + bytes(size)))
    await wire.until_blocked()
    await store.close()
    with pytest.raises(StoreUnavailable):
        await held


def certificate(directory: Path) -> ssl.SSLContext:
    """Return the context of a server for `localhost`; its certificate is `cert.pem` in the directory."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    cert = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (directory / "cert.pem").write_bytes(cert.public_bytes(pem))
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    (directory / "key.pem").write_bytes(key.private_bytes(pem, form, plain))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    return context


async def test_a_failed_call_waits_for_no_close(valkey_url: str, tmp_path: Path) -> None:
    """With TLS, the close of a connection waits for the server, which may not answer any more."""
    far = Wire(valkey_url.removeprefix("unix://"))
    socket = f"{tmp_path}/tls.sock"
    async with (
        await asyncio.start_unix_server(far.connected, socket, ssl=certificate(tmp_path)) as server,
        wire_to(socket) as wire,
        opened(
            wire.url.replace("redis:", "rediss:").replace("127.0.0.1", "localhost")
            + f"?ssl_ca_certs={tmp_path}/cert.pem"
        ) as store,
    ):
        await asyncio.gather(
            store.redis.ping(), echo(store, b"before")
        )  # an idle connection, and the shared one
        wire.block = b"\x17\x03\x03"  # the head of all that is encrypted
        stopwatch = Stopwatch()
        with pytest.raises(StoreUnavailable):
            await echo(store, b"lost", timeout=0.1)
        assert stopwatch.seconds < 0.9
        wire.unblock()
        server.close()
    await far.close()


async def test_redis_behind_tls_is_served_as_well(valkey_url: str, tmp_path: Path) -> None:
    wire = Wire(valkey_url.removeprefix("unix://"))
    async with await asyncio.start_server(
        wire.connected, "localhost", 0, ssl=certificate(tmp_path)
    ) as server:
        port = server.sockets[0].getsockname()[1]
        async with opened(f"rediss://localhost:{port}/0?ssl_ca_certs={tmp_path}/cert.pem") as store:
            await asyncio.gather(*(echo(store, b"%d" % n) for n in range(100)))
            assert store.connections_made == 1
        await wire.close()
