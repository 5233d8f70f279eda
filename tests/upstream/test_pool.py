"""The connections to the upstream: how many, for how long, by TLS and proxies, and what no connection is called."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.core.errors import (
    UpstreamError,
    UpstreamInterrupted,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from broker.upstream import pool as pools
from broker.upstream.client import MAX_EXPANDED, UpstreamClient
from broker.upstream.connection import Connection, Take
from broker.upstream.pool import KEEPALIVE, ConnectError, Pool, tls_context
from tests.scripted import PATIENCE, Call, Reply, ScriptedUpstream, scripted_upstream
from tests.stopwatch import Stopwatch
from tests.upstream.certificates import Authority
from tests.upstream.proxies import running_proxy

KEY = "sk-or-v1-0123456789abcdef"
REQUEST = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
CREDENTIALS = base64.b64encode(b"me:s3cr/t")


@asynccontextmanager
async def pool_of(
    url: str,
    *,
    proxy: str | None = None,
    limit: int = 4,
    timeout: float = 5.0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Pool]:
    pool = Pool(url, proxy=proxy, max_connections=limit, connect_timeout=timeout, tls=tls)
    try:
        yield pool
    finally:
        await pool.close()


@asynccontextmanager
async def client_of(
    url: str, *, proxy: str | None = None, tls: ssl.SSLContext | None = None, timeout: float = 5.0
) -> AsyncIterator[UpstreamClient]:
    client = UpstreamClient(
        base_url=url,
        api_key=KEY,
        title="A title",
        connect_timeout=timeout,
        max_connections=4,
        proxy=proxy,
        tls=tls,
    )
    try:
        yield client
    finally:
        await client.close()


def plain(call: Call) -> None:
    call.open()
    call.send(b"data: [DONE]\n\n")
    call.end()


async def used(pool: Pool) -> Connection:
    """Take a connection, and use it for one complete answer."""
    connection = await pool.take()
    await connection.ask(REQUEST)
    assert await connection.relay(lambda _: False)
    return connection


def taking(blocks: list[bytes]) -> Take:
    """Return a taker that keeps what it gets and wants all of it."""

    def take(block: bytes) -> bool:
        blocks.append(block)
        return False

    return take


async def until(happened: Callable[[], bool]) -> None:
    """Wait for what the event loop does by itself."""
    async with asyncio.timeout(PATIENCE):
        while not happened():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)


async def read(client: UpstreamClient) -> bytes:
    stream = await client.ask(b"{}", referer="")
    try:
        blocks: list[bytes] = []
        assert await stream.relay(taking(blocks))
        return b"".join(blocks)
    finally:
        stream.close()


async def failure(client: UpstreamClient) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        async with asyncio.timeout(PATIENCE):
            await read(client)
    return caught.value


@contextmanager
def silent_address() -> Iterator[tuple[str, int]]:
    """An address where no connection is ever accepted, and none is refused."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):  # takes the one place in the queue
            yield full.getsockname()


@contextmanager
def refusing_address() -> Iterator[tuple[str, int]]:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        yield nobody.getsockname()


# How many, and for how long


async def test_the_last_idle_connection_is_used_first(upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    async with pool_of(upstream.url) as pool:
        first, second = await used(pool), await used(pool)
        pool.give_back(first)
        pool.give_back(second)
        assert await pool.take() is second
        assert await pool.take() is first
    assert upstream.connections == 2


class Timers:
    """The clock and the timers of a pool, which the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> Timers:
        self._due.append((when, call))
        return self

    def call_later(self, delay: float, call: Callable[[], None]) -> Timers:
        return self.call_at(self.now + delay, call)

    def cancel(self) -> None:
        self._due.clear()

    def advance(self, now: float) -> None:
        self.now = now
        due = [call for when, call in self._due if when <= now]
        self._due = [(when, call) for when, call in self._due if when > now]
        for call in due:
            call()


async def test_an_idle_connection_is_closed_in_time(upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    async with pool_of(upstream.url) as pool:
        connections = [await used(pool) for _ in range(3)]
        timers = Timers()
        pool._loop = cast("asyncio.AbstractEventLoop", timers)
        for since, connection in enumerate(connections):
            timers.advance(since)
            pool.give_back(connection)
        for since, connection in enumerate(connections):
            timers.advance(since + KEEPALIVE - 0.1)
            assert connection.is_open
            timers.advance(since + KEEPALIVE)  # not only when the timer of another one is due
            assert not connection.is_open
        for call in upstream.calls:
            await call.wait_gone()


async def test_a_connection_that_is_too_old_is_not_used(
    upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.replies = [plain]
    async with pool_of(upstream.url) as pool:
        first = await used(pool)
        pool.give_back(first)
        monkeypatch.setattr(pools, "KEEPALIVE", 0)
        assert await pool.take() is not first
        await upstream.calls[0].wait_gone()


async def test_a_connection_that_the_service_closed_is_not_used(upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    async with pool_of(upstream.url) as pool:
        first, second = await used(pool), await used(pool)
        pool.give_back(first)
        pool.give_back(second)
        upstream.calls[1].close()
        await until(lambda: not second.is_open)
        assert await pool.take() is first


async def test_any_number_of_closed_connections_is_passed_over(upstream: ScriptedUpstream) -> None:
    async with pool_of(upstream.url, limit=2000) as pool:
        pool._loop = asyncio.get_running_loop()
        pool._idle = [(Connection(), pool._loop.time()) for _ in range(2000)]  # none of them is open
        assert (await pool.take()).is_open


async def test_a_connection_that_cannot_be_used_again_is_closed(upstream: ScriptedUpstream) -> None:
    upstream.replies = [lambda call: call.head(200, {"Content-Length": "0", "Connection": "close"})]
    async with pool_of(upstream.url) as pool:
        pool.give_back(await used(pool))
        await upstream.calls[0].wait_gone()
        assert await pool.take()


async def test_no_more_connections_are_open_than_allowed(upstream: ScriptedUpstream) -> None:
    async with pool_of(upstream.url, limit=2, timeout=0.2) as pool:
        taken = [await pool.take(), await pool.take()]
        with pytest.raises(ConnectError):
            await pool.take()
        pool.give_back(taken[0])
        await pool.take()
        with pytest.raises(ConnectError):
            await pool.take()


async def test_who_waits_gets_the_next_connection_in_turn(upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    async with pool_of(upstream.url, limit=1) as pool:
        connection = await used(pool)
        waiting = [asyncio.create_task(pool.take()) for _ in range(3)]
        await asyncio.sleep(0)
        late = None
        for task in waiting:
            pool.give_back(connection)
            late = late or asyncio.create_task(pool.take())
            async with asyncio.timeout(PATIENCE):
                assert await task is connection
            assert not late.done()
        assert late is not None
        pool.give_back(connection)
        assert await late is connection
    assert upstream.connections == 1


async def test_the_wait_and_the_connection_share_one_time(upstream: ScriptedUpstream) -> None:
    loop = asyncio.get_running_loop()
    with silent_address() as silent:
        async with pool_of("http://service.example", limit=1, timeout=1.0) as pool:
            pool._addresses = (float("inf"), [addresses(upstream)])
            first = await pool.take()
            pool._addresses = (float("inf"), [(socket.AF_INET, socket.SOCK_STREAM, 6, "", silent)])
            first.abort()  # so that a new one is needed
            stopwatch = Stopwatch()
            waiting = asyncio.create_task(pool.take())
            loop.call_later(0.8, pool.give_back, first)
            with pytest.raises(ConnectError):
                await waiting
            assert stopwatch.seconds < 1.7


async def test_a_connection_is_given_back_once(upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain, lambda call: None]
    async with pool_of(upstream.url, limit=1, timeout=0.2) as pool:
        connection = await used(pool)
        pool.give_back(connection)
        pool.give_back(connection)
        await pool.take()
        with pytest.raises(ConnectError):
            await pool.take()


async def test_an_answer_closed_twice_leaves_the_next_one_alone(upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain, lambda call: (call.open(), None)[1]]
    async with client_of(upstream.url) as client:
        first = await client.ask(b"{}", referer="")
        assert await first.relay(lambda _: False)
        first.close()
        second = await client.ask(b"{}", referer="")
        assert upstream.connections == 1
        blocks: list[bytes] = []
        relaying = asyncio.create_task(second.relay(taking(blocks)))
        await asyncio.sleep(0)
        first.stop()
        first.close()
        with pytest.raises(UpstreamInterrupted):
            await first.relay(lambda _: False)
        plain_rest = upstream.calls[1]
        plain_rest.event(b"x")
        plain_rest.done()
        async with asyncio.timeout(PATIENCE):
            assert await relaying
        assert b"".join(blocks) == b"data: x\n\ndata: [DONE]\n\n"
        second.close()


async def test_close_ends_everything(upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain, plain, lambda call: None]
    async with pool_of(upstream.url, limit=3) as pool:
        idle, open_ = await used(pool), await used(pool)
        asking = await pool.take()
        answer = asyncio.create_task(asking.ask(REQUEST))
        await upstream.call(3)
        pool.give_back(idle)
        waiting = asyncio.create_task(pool.take())
        assert await waiting is idle
        waiting = asyncio.create_task(pool.take())
        await asyncio.sleep(0)
        await pool.close()
        assert not any(connection.is_open for connection in (idle, open_, asking))
        with pytest.raises(Exception, match="lost"):
            await answer
        pool.give_back(asking)
        for taking in (waiting, asyncio.create_task(pool.take())):
            with pytest.raises(ConnectError):
                await taking
        for call in upstream.calls:
            await call.wait_gone()


async def test_connections_opened_ahead_keep_the_limit(upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    async with pool_of(upstream.url, limit=3) as pool:
        first = await used(pool)
        for _ in range(5):
            pool.open_ahead()
        await upstream.connected(3)
        others = [await pool.take(), await pool.take()]
        for _ in range(5):
            pool.open_ahead()
        waiting = asyncio.create_task(pool.take())
        await asyncio.sleep(0)
        pool.give_back(first)
        pool.open_ahead()
        async with asyncio.timeout(PATIENCE):
            assert await waiting is first
        for connection in (first, *others):
            pool.give_back(connection)
        pool.open_ahead()
        assert len({await pool.take() for _ in range(3)}) == 3
    assert upstream.connections == 3


async def test_a_connection_opened_ahead_is_used_once_it_is_idle(upstream: ScriptedUpstream) -> None:
    upstream.replies = [lambda call: None]
    async with pool_of(upstream.url) as pool:
        pool.open_ahead()
        await until(lambda: not pool._ahead)
        connection = await pool.take()
        asking = asyncio.create_task(connection.ask(REQUEST))
        await upstream.call()
        assert upstream.connections == 1
        asking.cancel()


async def test_close_ends_what_is_opened_ahead(authority: Authority) -> None:
    async with scripted_upstream(authority.service()) as upstream:
        for pauses in range(20):
            async with pool_of(upstream.url, tls=authority.trust) as pool:
                pool.open_ahead()
                taking = asyncio.create_task(pool.take()) if pauses % 2 else None
                for _ in range(pauses):
                    await asyncio.sleep(0)
                await pool.close()
                pool.open_ahead()
                assert not pool._ahead
                if taking is not None:
                    async with asyncio.timeout(PATIENCE):
                        [result] = await asyncio.gather(taking, return_exceptions=True)
                    assert isinstance(result, ConnectError) or not cast("Connection", result).is_open
            assert not pool._idle
        await until(lambda: not upstream._open)


async def test_a_connection_that_opens_during_close_is_not_given_out(upstream: ScriptedUpstream) -> None:
    async with pool_of(upstream.url) as pool:

        def close(_: object) -> None:
            with contextlib.suppress(StopIteration):  # it has nothing to wait for
                pool.close().send(None)

        pool.open_ahead()
        pool._ahead[0].add_done_callback(close)  # runs before the task that waits goes on
        with pytest.raises(ConnectError):
            await pool.take()
        await until(lambda: not upstream._open)


async def test_the_failure_of_a_connection_opened_ahead_is_told() -> None:
    with refusing_address() as (host, port):
        async with client_of(f"http://{host}:{port}/v1") as client:
            client.open_ahead()
            assert type(await failure(client)) is UpstreamUnreachable
            client.open_ahead()
            await until(lambda: not client._pool._ahead)


class Users:
    """Tasks that take a connection, use it for a while, and give it back, and may be cancelled anywhere."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._tasks: list[asyncio.Task[None]] = []

    async def _use(self, pauses: int, *, ask: bool) -> None:
        connection = await self._pool.take()
        try:
            for _ in range(pauses):
                await asyncio.sleep(0)
            if ask:
                await connection.ask(REQUEST)
                await connection.relay(lambda _: False)
        finally:
            self._pool.give_back(connection)

    async def do(self, step: tuple[str, int]) -> None:
        kind, number = step
        if kind == "cancel" and self._tasks:
            self._tasks[number % len(self._tasks)].cancel()
        elif kind == "ahead":
            self._pool.open_ahead()
        elif kind == "pause":
            for _ in range(number):
                await asyncio.sleep(0)
        elif kind in {"use", "ask"}:
            self._tasks.append(asyncio.create_task(self._use(number, ask=kind == "ask")))

    async def end(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for task in self._tasks:
            if not task.cancelled():
                assert task.exception() is None


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.sampled_from(["use", "ask", "ahead", "cancel", "cancel", "pause"]), st.integers(0, 12)),
        min_size=5,
        max_size=40,
    ),
)
async def test_cancelled_requests_lose_no_connection(limit: int, steps: list[tuple[str, int]]) -> None:
    async with scripted_upstream() as upstream, pool_of(upstream.url, limit=limit) as pool:
        upstream.replies = [plain]
        users = Users(pool)
        for step in steps:
            await users.do(step)
        await users.end()
        taken = [await pool.take() for _ in range(limit)]
        assert len(set(taken)) == limit
        assert all(connection.is_open for connection in taken)
        pool._timeout = 0.001
        with pytest.raises(ConnectError):
            await pool.take()


# No connection


def addresses(upstream: ScriptedUpstream) -> tuple[Any, ...]:
    host, _, port = upstream.url.removeprefix("http://").removesuffix("/api/v1").partition(":")
    return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, int(port)))


@pytest.mark.parametrize(
    "url",
    [
        "http://nowhere.invalid/v1",
        "http://an..empty.label/v1",
        f"http://{'a' * 70}.example/v1",
        "https://nowhere.invalid/v1",
    ],
)
async def test_a_host_without_address_is_unreachable(url: str) -> None:
    async with client_of(url) as client:
        assert type(await failure(client)) is UpstreamUnreachable
        assert client.statuses == {"none": 1}


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_refused_connection_is_unreachable(scheme: str) -> None:
    with refusing_address() as (host, port):
        async with client_of(f"{scheme}://{host}:{port}/v1") as client:
            assert type(await failure(client)) is UpstreamUnreachable


async def test_a_service_that_does_not_begin_tls_is_unreachable_in_time() -> None:
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.transport.abort()
        gone.set()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with client_of(f"https://127.0.0.1:{port}/v1", timeout=0.3) as client:
            assert type(await failure(client)) is UpstreamUnreachable
            async with asyncio.timeout(PATIENCE):
                await gone.wait()  # the socket is not left open


@pytest.mark.parametrize("dead", [silent_address, refusing_address])
async def test_a_dead_address_is_passed_over(
    upstream: ScriptedUpstream, dead: Callable[[], contextlib.AbstractContextManager[tuple[str, int]]]
) -> None:
    upstream.replies = [plain]
    with dead() as address:
        async with client_of("http://service.example/api/v1") as client:
            first = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)
            client._pool._addresses = (float("inf"), [first, addresses(upstream)])
            assert await read(client)
    assert upstream.calls[0].headers["host"] == "service.example"


async def test_addresses_that_all_fail_are_asked_for_again() -> None:
    with refusing_address() as address:
        async with pool_of("http://localhost:1/v1") as pool:
            dead = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)
            pool._addresses = (float("inf"), [dead])
            with pytest.raises(ConnectError):
                await pool.take()
            assert dead not in await pool._resolve(pool._url)


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


async def test_requests_share_one_tls_connection(authority: Authority) -> None:
    async with scripted_upstream(authority.service()) as upstream:
        upstream.replies = [plain]
        async with client_of(upstream.url, tls=authority.trust) as client:
            for _ in range(3):
                assert await read(client) == b"data: [DONE]\n\n"
            assert client.statuses == {"200": 3}
        assert (upstream.connections, len(upstream.calls)) == (1, 3)


async def test_all_requests_verify_certificates_alike(authority: Authority, tmp_path: Path) -> None:
    """Those by the library, too: the list of models."""
    async with scripted_upstream(authority.service()) as upstream:
        upstream.models = b'{"data": []}'
        async with client_of(upstream.url, tls=authority.trust) as client:
            assert (await client.openai.models.list()).data == []
        async with client_of(upstream.url, tls=Authority(tmp_path).trust) as client:
            with pytest.raises(openai.APIConnectionError):
                await client.openai.models.list()


async def test_authorities_are_read_only_for_tls() -> None:
    assert tls_context("https://a.example", None).cert_store_stats()["x509_ca"] > 0
    assert tls_context("http://a.example", "https://proxy.example").cert_store_stats()["x509_ca"] > 0
    plain_text = tls_context("http://a.example", "http://proxy.example")
    assert plain_text.cert_store_stats()["x509_ca"] == 0
    assert (plain_text.verify_mode, plain_text.check_hostname) == (ssl.CERT_REQUIRED, True)


async def test_a_large_answer_over_tls_waits_for_its_reader(authority: Authority) -> None:
    body = b"".join(b"data: %d %b\n\n" % (n, b"x" * 50_000) for n in range(100))

    def flood(call: Call) -> None:
        call.head(200, {"Content-Type": "text/event-stream", "Content-Length": str(len(body))})
        call.write(body)

    async with scripted_upstream(authority.service()) as upstream:
        upstream.replies = [flood]
        async with client_of(upstream.url, tls=authority.trust) as client:
            for _ in range(2):
                assert await read(client) == body
        assert upstream.connections == 1


@pytest.mark.parametrize("fault", ["other host", "expired", "self-signed", "unknown authority", "no tls"])
async def test_nothing_is_sent_to_a_service_that_is_not_verified(
    authority: Authority, tmp_path: Path, fault: str
) -> None:
    services = {
        "other host": authority.service("other.example"),
        "expired": authority.service(is_expired=True),
        "self-signed": authority.service(is_self_signed=True),
        "unknown authority": Authority(tmp_path).service(),
        "no tls": None,
    }
    async with scripted_upstream(services[fault]) as upstream:
        url = upstream.url.replace("http:", "https:")
        timeout = 0.5 if fault == "no tls" else PATIENCE
        async with client_of(url, tls=authority.trust, timeout=timeout) as client:
            assert type(await failure(client)) is UpstreamUnreachable
        assert upstream.calls == []


async def test_the_authorities_of_the_system_do_not_know_that_of_a_test(authority: Authority) -> None:
    async with scripted_upstream(authority.service()) as upstream, client_of(upstream.url) as client:
        assert type(await failure(client)) is UpstreamUnreachable
        assert upstream.calls == []


def cut(call: Call) -> None:
    call.open()
    call.event(b"x")
    call.reset()


def hung_up(call: Call) -> None:
    call.open()
    call.event(b"x")
    call._transport.abort()


@pytest.mark.parametrize("end", [Call.close, Call.reset, cut, hung_up])
async def test_a_tls_line_that_breaks_interrupts(authority: Authority, end: Reply) -> None:
    async with scripted_upstream(authority.service()) as upstream:
        upstream.replies = [end]
        async with client_of(upstream.url, tls=authority.trust) as client:
            assert type(await failure(client)) is UpstreamInterrupted
            assert client.statuses["none"] + client.statuses["200"] == 1
        assert len(upstream.calls) == 1


# Proxies


async def test_a_tunnel_leads_to_the_service(authority: Authority) -> None:
    async with scripted_upstream(authority.service()) as upstream, running_proxy() as proxy:
        upstream.replies = [plain]
        async with client_of(upstream.url, proxy=proxy.url, tls=authority.trust) as client:
            for _ in range(3):
                assert await read(client)
        [head] = proxy.heads
        authorized(head)
        assert head.split(b" ")[:2] == [b"CONNECT", upstream.url.split("/")[2].encode()]
        assert upstream.calls[0].path == "/api/v1/chat/completions"
        assert all("proxy-authorization" not in call.headers for call in upstream.calls)
        assert (upstream.connections, len(upstream.calls)) == (1, 3)


def authorized(head: bytes) -> None:
    assert b"\r\nproxy-authorization: basic " + CREDENTIALS.lower() in head.lower()
    assert CREDENTIALS in head
    assert KEY.encode() not in head


async def test_a_proxy_may_be_asked_over_tls(authority: Authority) -> None:
    async with (
        scripted_upstream(authority.service()) as upstream,
        running_proxy(tls=authority.service()) as proxy,
    ):
        upstream.replies = [plain]
        async with client_of(upstream.url, proxy=proxy.url, tls=authority.trust) as client:
            for _ in range(3):
                assert await read(client)
        assert len(proxy.heads) == 1
        authorized(proxy.heads[0])


async def test_names_are_found_by_the_proxy_and_checked_by_us(authority: Authority) -> None:
    async with scripted_upstream(authority.service("service.example")) as upstream:
        upstream.replies = [plain]
        port = int(upstream.url.split("/")[2].partition(":")[2])
        async with running_proxy(target=("127.0.0.1", port)) as proxy:
            for url in ("https://service.example/api/v1", "https://other.example:444/api/v1"):
                async with client_of(url, proxy=proxy.url, tls=authority.trust) as client:
                    if "other" in url:
                        assert type(await failure(client)) is UpstreamUnreachable
                    else:
                        assert await read(client)
        assert [head.split()[1] for head in proxy.heads] == [b"service.example:443", b"other.example:444"]
        assert [call.headers["host"] for call in upstream.calls] == ["service.example"]


@pytest.mark.parametrize("agreed", [b"HTTP/1.1 200\r\n\r\n", b"HTTP/1.0  200  OK\r\nVia: x\r\n\r\n"])
async def test_a_proxy_may_agree_without_a_reason(authority: Authority, agreed: bytes) -> None:
    async with scripted_upstream(authority.service()) as upstream, running_proxy(agreed) as proxy:
        upstream.replies = [plain]
        async with client_of(upstream.url, proxy=proxy.url, tls=authority.trust) as client:
            assert await read(client)


@pytest.mark.parametrize(
    ("url", "host", "tunnel"),
    [
        ("https://service.example/v1", "service.example", "service.example:443"),
        ("https://service.example:443/v1", "service.example", "service.example:443"),
        ("https://Service.example:8443", "service.example:8443", "service.example:8443"),
        ("https://bücher.example", "xn--bcher-kva.example", "xn--bcher-kva.example:443"),
        ("https://[2001:db8::1]/v1", "[2001:db8::1]", "[2001:db8::1]:443"),
        ("https://[2001:db8::1]:444/v1", "[2001:db8::1]:444", "[2001:db8::1]:444"),
    ],
)
async def test_a_host_is_written_as_http_has_it(url: str, host: str, tunnel: str) -> None:
    async with running_proxy(b"HTTP/1.1 403 Forbidden\r\n\r\n") as proxy:
        async with pool_of(url, proxy=proxy.url) as pool:
            assert pool.host == host
            with pytest.raises(ConnectError):
                await pool.take()
        [head] = proxy.heads
        assert head.split()[1].decode() == tunnel


REFUSALS: list[bytes | None] = [
    b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 403 Forbidden\r\n\r\n<html>s3cr/t</html>",
    b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n",
    b"",
    b"HTTP/1.1 20",
    b"nonsense\r\n\r\n",
    b"\r\n\r\n",
    b"HTTP/1.1 2\r\n\r\n",
    b"x" * 100_000,
    None,
]


@pytest.mark.parametrize("answer", REFUSALS)
@pytest.mark.parametrize("over_tls", [False, True])
async def test_a_proxy_that_opens_no_tunnel_makes_the_service_unreachable(
    authority: Authority, caplog: pytest.LogCaptureFixture, answer: bytes | None, over_tls: bool
) -> None:
    tls = authority.service() if over_tls else None
    async with running_proxy(answer, tls=tls) as proxy:
        timeout = 0.5 if answer is None else PATIENCE
        async with client_of(
            "https://service.example/v1", proxy=proxy.url, tls=authority.trust, timeout=timeout
        ) as client:
            error = await failure(client)
            assert type(error) is UpstreamUnreachable
            assert client.statuses == {"none": 1}
        async with asyncio.timeout(PATIENCE):
            await proxy.gone.wait()
    told = [str(error), repr(error), caplog.text]
    cause: BaseException | None = error
    while cause is not None:
        told.append(repr(cause))
        cause = cause.__cause__ or cause.__context__
    for secret in ("s3cr", CREDENTIALS.decode(), KEY):
        assert secret not in " ".join(told)


async def test_a_proxy_that_is_not_verified_gets_no_password(authority: Authority) -> None:
    async with running_proxy(tls=authority.service(is_expired=True)) as proxy:
        async with client_of("https://service.example/v1", proxy=proxy.url, tls=authority.trust) as client:
            assert type(await failure(client)) is UpstreamUnreachable
        assert proxy.heads == []


async def test_a_service_behind_a_tunnel_without_tls_gets_nothing(
    authority: Authority, upstream: ScriptedUpstream
) -> None:
    async with running_proxy() as proxy:
        url = upstream.url.replace("http:", "https:")
        async with client_of(url, proxy=proxy.url, tls=authority.trust, timeout=0.5) as client:
            assert type(await failure(client)) is UpstreamUnreachable
        assert KEY.encode() not in proxy.passed
    assert upstream.calls == []


@pytest.mark.parametrize("over_tls", [False, True])
async def test_a_tunnel_that_breaks_interrupts(authority: Authority, over_tls: bool) -> None:
    tls = authority.service() if over_tls else None
    async with scripted_upstream(authority.service()) as upstream, running_proxy(tls=tls) as proxy:
        async with client_of(upstream.url, proxy=proxy.url, tls=authority.trust) as client:
            failing = asyncio.create_task(failure(client))
            call = await upstream.call()
            call.open()
            call.event(b"x")
            for task in proxy.tasks:
                task.cancel()
            assert type(await failing) is UpstreamInterrupted
        await call.wait_gone()
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("over_tls", [False, True])
async def test_a_proxy_reads_requests_to_a_service_without_tls(authority: Authority, over_tls: bool) -> None:
    async with scripted_upstream(authority.service() if over_tls else None) as proxy:
        proxy.replies = [plain]
        url = proxy.url.replace("://", "://me:s3cr%2Ft@").removesuffix("/api/v1")
        async with client_of("http://service.example:81/api/v1", proxy=url, tls=authority.trust) as client:
            for _ in range(2):
                assert await read(client)
        call = proxy.calls[0]
        assert call.path == "http://service.example:81/api/v1/chat/completions"
        assert call.headers["host"] == "service.example:81"
        assert call.headers["proxy-authorization"] == f"Basic {CREDENTIALS.decode()}"
        assert proxy.connections == 1


async def test_a_proxy_that_repeats_its_password_tells_nobody(upstream: ScriptedUpstream) -> None:
    refusal = f"No entry for Basic {CREDENTIALS.decode()}, s3cr%2Ft or s3cr/t, nor for {KEY}."
    upstream.replies = [lambda call: call.reply(403, {"error": refusal})]
    url = upstream.url.replace("://", "://me:s3cr%2Ft@").removesuffix("/api/v1")
    async with client_of("http://service.example/v1", proxy=url) as client:
        for key in (KEY, "another-key"):
            client.use_key(key)
            message = (await failure(client)).message
            assert "No entry for" in message
            for secret in ("s3cr", CREDENTIALS.decode(), KEY):
                assert secret not in message


@pytest.mark.parametrize("pauses", range(0, 60, 3))
@pytest.mark.parametrize("over_tls", [False, True])
async def test_a_request_may_be_cancelled_at_each_step(
    authority: Authority, pauses: int, over_tls: bool
) -> None:
    """Before the tunnel, in it, in TLS, before the head and behind it: no socket stays open."""
    tls = authority.service() if over_tls else None
    async with scripted_upstream(authority.service()) as upstream, running_proxy(tls=tls) as proxy:
        upstream.replies = [lambda call: call.open().event(b"x")]
        async with client_of(upstream.url, proxy=proxy.url, tls=authority.trust) as client:
            reading = asyncio.create_task(read(client))
            for _ in range(pauses):
                await asyncio.sleep(0.0005)
            reading.cancel()
            async with asyncio.timeout(PATIENCE):
                await asyncio.wait([reading])
                assert reading.cancelled()
                if proxy.tasks:
                    await proxy.gone.wait()
            taken = [asyncio.create_task(client._pool.take()) for _ in range(4)]
            await asyncio.gather(*taken)  # none was lost


# Encodings


def compressed(encoding: str, body: bytes, pieces: int = 1) -> Reply:
    def reply(call: Call) -> None:
        call.open(content_encoding=encoding)
        step = max(1, -(-len(body) // pieces))
        for start in range(0, len(body), step):
            call.send(body[start : start + step])
        call.end()

    return reply


EVENTS = b"data: one\n\ndata: two\n\ndata: [DONE]\n\n"


def bare(data: bytes) -> bytes:
    packing = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packing.compress(data) + packing.flush()


ENCODED = [
    ("gzip", gzip.compress(EVENTS, mtime=0)),
    ("X-GZIP", gzip.compress(EVENTS, mtime=0)),
    ("deflate", zlib.compress(EVENTS)),
    ("deflate", bare(EVENTS)),
    ("deflate", gzip.compress(EVENTS, mtime=0)),
    ("identity", EVENTS),
    ("gzip", gzip.compress(EVENTS, mtime=0) + b"\0" * 200_000),
]


@pytest.mark.parametrize(("encoding", "body"), ENCODED)
@pytest.mark.parametrize("pieces", [1, 7, 10_000])
async def test_a_compressed_answer_is_read(
    upstream: ScriptedUpstream, encoding: str, body: bytes, pieces: int
) -> None:
    upstream.replies = [compressed(encoding, body, min(pieces, len(body)))]
    async with client_of(upstream.url) as client:
        assert await read(client) == EVENTS
        assert await read(client) == EVENTS
    assert upstream.connections == 1


@pytest.mark.parametrize(
    ("encoding", "body"), [("br", b"x"), ("zstd", b"x"), ("gzip, br", b"x"), ("gzip", b"data: x\n\n" * 9)]
)
async def test_what_cannot_be_decompressed_interrupts(
    upstream: ScriptedUpstream, encoding: str, body: bytes
) -> None:
    upstream.replies = [compressed(encoding, body)]
    async with client_of(upstream.url) as client:
        assert type(await failure(client)) is UpstreamInterrupted


async def test_a_refusal_that_cannot_be_decompressed_is_one(upstream: ScriptedUpstream) -> None:
    upstream.replies = [
        lambda call: call.reply(429, "\x1b\x02", {"Content-Encoding": "br", "Retry-After": "7"})
    ]
    async with client_of(upstream.url) as client:
        error = await failure(client)
        assert type(error) is UpstreamRateLimited
        assert error.retry_after == 7


@settings(max_examples=40)
@given(st.lists(st.integers(1, 200), max_size=8), st.sampled_from(ENCODED))
async def test_compressed_data_may_be_cut_anywhere(places: list[int], encoded: tuple[str, bytes]) -> None:
    encoding, body = encoded
    cuts = [0, *sorted({place for place in places if place < len(body)}), len(body)]

    def reply(call: Call) -> None:
        call.open(content_encoding=encoding)
        for start, end in pairwise(cuts):
            call.send(body[start:end])
        call.end()

    async with scripted_upstream() as upstream, client_of(upstream.url) as client:
        upstream.replies = [reply]
        assert await read(client) == EVENTS


async def test_a_taker_may_stop_within_compressed_data(upstream: ScriptedUpstream) -> None:
    events = b"".join(b"data: %d\n\n" % n for n in range(50_000))
    upstream.replies = [compressed("gzip", gzip.compress(events), pieces=3)]
    async with client_of(upstream.url) as client:
        stream = await client.ask(b"{}", referer="")
        blocks: list[bytes] = []

        def one(block: bytes) -> bool:
            blocks.append(block)
            return True

        while not await stream.relay(one):
            assert len(blocks[-1]) <= 64 * 1024
        assert b"".join(blocks) == events
        stream.close()


async def test_a_few_bytes_do_not_become_endless_ones(upstream: ScriptedUpstream) -> None:
    upstream.replies = [compressed("gzip", gzip.compress(b": nothing\n" * 3_000_000))]
    largest = total = 0

    def take(block: bytes) -> bool:
        nonlocal largest, total
        largest, total = max(largest, len(block)), total + len(block)
        return False

    async with client_of(upstream.url) as client:
        stream = await client.ask(b"{}", referer="")
        with pytest.raises(UpstreamInterrupted):
            await stream.relay(take)
        stream.close()
    assert largest <= 64 * 1024
    assert total <= 2 * MAX_EXPANDED


# What is sent


@pytest.mark.parametrize(
    "value",
    [
        "https://a.example\r\nX-Evil: 1",
        "https://a.example\nX-Evil: 1",
        "https://a.example\r\n\r\nGET /evil HTTP/1.1\r\n\r\n",
        "https://a.example\0\x0b\x0c\x1c\x85\u2028X-Evil: 1",
        "https://b\u00fccher.example/\u8a9e\U0001f600\ud800",
    ],
)
async def test_no_value_adds_a_header(upstream: ScriptedUpstream, value: str) -> None:
    upstream.replies = [plain]
    async with client_of(upstream.url) as client:
        stream = await client.ask(b"{}", referer=value, headers={"traceparent": value, "tracestate": value})
        assert await stream.relay(lambda _: False)
        stream.close()
        stream = await client.ask(b"{}", referer="")
        stream.close()
    first, second = upstream.calls
    sent = "".join(letter for letter in value if letter.isprintable()).encode().decode("latin-1")
    assert first.headers["http-referer"] == first.headers["traceparent"] == sent
    assert set(first.headers) == {*second.headers, "http-referer", "traceparent", "tracestate"}
    assert upstream.connections == 1


async def test_statuses_are_counted(upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain, *(status(n) for n in (429, 429, 500, 504)), Call.close]
    async with client_of(upstream.url) as client:
        await read(client)
        for kind in (UpstreamRateLimited, UpstreamRateLimited, UpstreamError, UpstreamTimeout):
            assert isinstance(await failure(client), kind)
        assert type(await failure(client)) is UpstreamInterrupted
        assert client.statuses == {"200": 1, "429": 2, "500": 1, "504": 1, "none": 1}
    assert len(upstream.calls) == 6


def status(number: int) -> Reply:
    return lambda call: call.reply(number, {})


async def test_first_bytes_survive_a_cancelled_relay(upstream: ScriptedUpstream) -> None:
    upstream.replies = [lambda call: call.open().send(b"da")]
    async with client_of(upstream.url) as client:
        stream = await client.ask(b"{}", referer="")
        blocks: list[bytes] = []
        for _ in range(2):
            relaying = asyncio.create_task(stream.relay(taking(blocks)))
            await until(lambda: stream._head == b"da")
            relaying.cancel()
            await asyncio.wait([relaying])
            assert blocks == []
        upstream.calls[0].send(b"ta: x\n\n")
        upstream.calls[0].end()
        async with asyncio.timeout(PATIENCE):
            assert await stream.relay(taking(blocks))
        assert b"".join(blocks) == b"data: x\n\n"
        stream.close()
