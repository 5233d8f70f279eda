"""The client of the model side against a scripted one: what is sent, what comes, and what each failure is called."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import cast

import pytest
import pytest_asyncio

from broker.core.errors import (
    BrokerError,
    UpstreamInterrupted,
    UpstreamInvalid,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from broker.upstream.client import MAX_ERROR_BODY, UpstreamClient, UpstreamStream
from tests.memory import bytes_with
from tests.money import until
from tests.scripted import Call, Reply, ScriptedUpstream
from tests.stopwatch import Stopwatch

KEY = "sk-or-v1-0123456789abcdef"
BODY = b'{ "model" : "a/b",  "messages": [] }'


@asynccontextmanager
async def client_of(
    url: str, *, connect_timeout: float = 1.0, max_connections: int = 10
) -> AsyncIterator[UpstreamClient]:
    client = UpstreamClient(
        base_url=url,
        api_key=KEY,
        title="A title",
        connect_timeout=connect_timeout,
        max_connections=max_connections,
    )
    try:
        yield client
    finally:
        await client.close()


@pytest_asyncio.fixture
async def client(upstream: ScriptedUpstream) -> AsyncIterator[UpstreamClient]:
    async with client_of(upstream.url) as client:
        yield client


async def ask(client: UpstreamClient) -> UpstreamStream:
    return await client.ask(BODY, referer="")


def taking(blocks: list[bytes]) -> Callable[[bytes], bool]:
    """Return a taker that keeps what it gets and wants all of it."""

    def take(block: bytes) -> bool:
        blocks.append(block)
        return False

    return take


async def read(client: UpstreamClient) -> bytes:
    """A whole answer."""
    stream = await ask(client)
    try:
        blocks: list[bytes] = []
        assert await stream.relay(taking(blocks))
        return b"".join(blocks)
    finally:
        stream.close()


def plain(call: Call) -> None:
    call.open()
    call.send(b"data: [DONE]\n\n")
    call.end()


async def test_a_request_is_sent_as_it_is(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    stream = await client.ask(BODY, referer="https://a.example")
    stream.close()
    headers = upstream.calls[0].headers
    assert upstream.calls[0].body == json.loads(BODY)
    assert headers["content-length"] == str(len(BODY))
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["content-type"] == "application/json"
    assert headers["accept"] == "text/event-stream"
    assert headers["accept-encoding"] == "identity"
    assert headers["http-referer"] == "https://a.example"
    assert headers["x-title"] == headers["x-openrouter-title"] == "A title"


async def test_an_answer_is_open_with_its_headers(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    upstream.replies = [lambda call: (call.open(x_generation_id="gen-1"), None)[1]]
    stream = await ask(client)
    assert stream.generation_id == "gen-1"
    stream.close()


async def test_bytes_come_as_they_are_sent(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    asking = asyncio.create_task(ask(client))
    call = (await upstream.call()).open()
    stream = await asking
    assert stream.generation_id is None
    reads: asyncio.Queue[bytes] = asyncio.Queue()

    def take(block: bytes) -> bool:
        reads.put_nowait(block)
        return False

    relaying = asyncio.create_task(stream.relay(take))
    for piece in (b"data: x", b"\n\n", b"\x00\xff"):
        call.send(piece)
        assert await reads.get() == piece
    call.end()
    assert await relaying
    stream.close()


async def test_a_connection_whose_answer_was_read_is_used_again(
    client: UpstreamClient, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    for _ in range(3):
        assert await read(client) == b"data: [DONE]\n\n"
    assert (len(upstream.calls), upstream.connections) == (3, 1)


async def test_a_connection_whose_answer_was_left_is_not(
    client: UpstreamClient, upstream: ScriptedUpstream
) -> None:
    asking = asyncio.create_task(ask(client))
    call = (await upstream.call()).open()
    (await asking).close()
    await call.wait_gone()
    upstream.replies = [plain]
    await read(client)
    assert upstream.connections == 2


@pytest.mark.parametrize("begun", [False, True])
async def test_a_cancelled_request_closes_the_connection(
    client: UpstreamClient, upstream: ScriptedUpstream, begun: bool
) -> None:
    reading = asyncio.create_task(read(client))
    call = await upstream.call()
    if begun:
        call.open()
        call.comment()
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()
    await call.wait_gone()


async def test_a_stream_may_be_closed_twice(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    stream = await ask(client)
    stream.close()
    stream.close()


async def failure(client: UpstreamClient) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        await read(client)
    return caught.value


def said(status: int, body: object, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda call: call.reply(status, body, named)


def cut_short(call: Call) -> None:
    call.open()
    call.send(b"data: x")
    call.close()


def half_a_refusal(call: Call) -> None:
    call.head(429, {"Content-Type": "application/json", "Content-Length": "100"})
    call.write(b'{"error":')
    call.close()


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (said(400, {}), UpstreamRejected),
        (said(429, {}), UpstreamRateLimited),
        (said(500, "<html>"), UpstreamUnavailable),
        (said(504, {}), UpstreamTimeout),
        (said(302, {}, Location="http://127.0.0.1:1/"), UpstreamRejected),
        (said(200, "<html>"), UpstreamInvalid),
        (said(200, {"error": {"code": 429, "message": "x"}}), UpstreamRateLimited),
        (Call.close, UpstreamInterrupted),
        (Call.reset, UpstreamInterrupted),
        (cut_short, UpstreamInterrupted),
        (half_a_refusal, UpstreamInterrupted),
        (lambda call: call.write(b"nonsense\r\n\r\n"), UpstreamInterrupted),
    ],
)
async def test_every_failure_has_its_name(
    client: UpstreamClient, upstream: ScriptedUpstream, reply: Reply, kind: type[BrokerError]
) -> None:
    upstream.replies = [reply]
    assert type(await failure(client)) is kind
    assert len(upstream.calls) == 1


async def test_the_message_and_the_wait_of_a_refusal_are_read(
    client: UpstreamClient, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [said(429, {}, Retry_After="7"), said(404, {"error": "no such model"})]
    assert (await failure(client)).retry_after == 7
    assert (await failure(client)).message == "no such model"


@pytest.mark.parametrize("status", [400, 200])
async def test_a_body_without_an_end_is_read_so_far_and_no_further(
    client: UpstreamClient, upstream: ScriptedUpstream, status: int
) -> None:
    failing = asyncio.create_task(failure(client))
    call = await upstream.call()
    call.head(status, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"})
    block = b"x" * (MAX_ERROR_BODY + 1)
    call.write(b"%x\r\n%b\r\n" % (len(block), block))
    assert (await failing).status == 502
    await call.wait_gone()


async def test_an_upstream_that_does_not_listen_is_unreachable() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with client_of("http://{}:{}".format(*nobody.getsockname())) as client:
            assert type(await failure(client)) is UpstreamUnreachable


async def test_a_door_that_stays_shut_is_unreachable_after_its_time() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):  # takes the one place in the queue
            async with client_of("http://{}:{}".format(*full.getsockname()), connect_timeout=0.3) as client:
                stopwatch = Stopwatch()
                assert type(await failure(client)) is UpstreamUnreachable
                assert stopwatch.elapsed > 0.2
                assert stopwatch.seconds < 1


async def test_a_wait_for_a_free_connection_has_its_time_too(upstream: ScriptedUpstream) -> None:
    async with client_of(upstream.url, connect_timeout=5, max_connections=1) as client:
        asking = asyncio.create_task(ask(client))
        (await upstream.call()).open()
        stream = await asking
        client._pool._timeout = 0.3  # the first connection may take its time
        assert type(await failure(client)) is UpstreamUnreachable
        stream.close()
        client._pool._timeout = 5
        upstream.replies = [plain]
        await read(client)
    assert len(upstream.calls) == 2


async def test_plain_text_behind_https_is_unreachable(upstream: ScriptedUpstream) -> None:
    async with client_of(upstream.url.replace("http:", "https:")) as client:
        assert type(await failure(client)) is UpstreamUnreachable
    assert upstream.calls == []


async def test_an_answer_may_take_longer_than_a_connection(upstream: ScriptedUpstream) -> None:
    async with client_of(upstream.url, connect_timeout=0.2) as client:
        reading = asyncio.create_task(read(client))
        call = await upstream.call()
        done, _ = await asyncio.wait([reading], timeout=0.5)
        assert not done
        plain(call)
        assert await reading


class Deaf(asyncio.Protocol):
    """A server that stops reading at the first bytes of a request."""

    def __init__(self) -> None:
        self.spoken_to = asyncio.Event()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.pause_reading()
        self.spoken_to.set()

    def close(self) -> None:
        assert self._transport is not None
        self._transport.abort()


async def test_a_server_that_takes_no_request_can_be_left() -> None:
    deaf, listening = Deaf(), socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that the request is still on its way
    listening.bind(("127.0.0.1", 0))
    server = await asyncio.get_running_loop().create_server(lambda: deaf, sock=listening)
    async with server, client_of("http://{}:{}".format(*listening.getsockname())) as client:
        asking = asyncio.create_task(client.ask(b" " * 1_000_000, referer=""))
        await deaf.spoken_to.wait()
        asking.cancel()
        done, _ = await asyncio.wait([asking], timeout=1)
        assert done
        assert asking.cancelled()
        deaf.close()


# Opening ahead


async def test_a_connection_opened_ahead_is_used(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    client.open_ahead()
    await upstream.connected()
    await read(client)
    assert upstream.connections == 1


async def test_a_request_waits_for_the_connection_opened_ahead(
    client: UpstreamClient, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    client.open_ahead()
    await read(client)
    assert upstream.connections == 1


async def test_nothing_is_opened_ahead_beside_an_idle_connection(
    client: UpstreamClient, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    await read(client)
    client.open_ahead()
    await read(client)
    assert (len(upstream.calls), upstream.connections) == (2, 1)


async def test_a_failure_ahead_is_that_of_the_request() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with client_of("http://{}:{}".format(*nobody.getsockname())) as client:
            client.open_ahead()
            assert type(await failure(client)) is UpstreamUnreachable


@pytest.mark.parametrize("seed", range(20))
async def test_cancelled_requests_lose_no_connection(upstream: ScriptedUpstream, seed: int) -> None:
    random = Random(seed)
    upstream.replies = [plain]
    async with client_of(upstream.url, max_connections=3) as client:
        for _ in range(10):
            asking = []
            for _ in range(random.randint(1, 6)):
                if random.random() < 0.5:
                    client.open_ahead()
                asking.append(asyncio.create_task(read(client)))
            for task in asking:
                for _ in range(random.randint(0, 4)):
                    await asyncio.sleep(0)
                if random.random() < 0.5:
                    task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        # All places are free again: as many requests as the limit has run at the same time.
        assert await asyncio.gather(*(read(client) for _ in range(3)))
        assert client._pool._free._value == 3


async def test_a_stream_that_waits_keeps_no_bytes_that_were_taken(
    client: UpstreamClient, upstream: ScriptedUpstream
) -> None:
    def one_event(call: Call) -> None:
        call.open()
        call.event(b'{"x": "' + b"taken " * 10_000 + b'"}')

    upstream.replies = [one_event]
    stream = await ask(client)
    taken = 0

    def take(block: bytes) -> bool:
        nonlocal taken
        taken += len(block)
        return False

    reading = asyncio.create_task(stream.relay(take))
    await until(lambda: asyncio.sleep(0, taken > 60_000))
    assert bytes_with(b"taken taken") == 0
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    stream.close()
