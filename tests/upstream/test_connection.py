"""One connection to the upstream, over real sockets: every head, body and end, every fault, every taker."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import pairwise
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.upstream.connection import MAX_HEAD, MAX_UNREAD, ConnectionBroken, Head, Take
from tests.scripted import PATIENCE
from tests.upstream.peer import Peer, connected

REQUEST = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
OPEN = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
T = TypeVar("T")

END = b"0\r\n\r\n"
SHORT = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
WITHOUT_LENGTH = b"HTTP/1.1 200 OK\r\nX-A: b\r\n\r\n"


def piece(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Taken:
    """A taker that keeps what it gets.

    Attributes:
        blocks: what it got.
        enough: bytes after which it needs no more.
    """

    def __init__(self, enough: int | None = None) -> None:
        self.blocks: list[bytes] = []
        self.enough = enough

    def __call__(self, block: bytes) -> bool:
        self.blocks.append(block)
        return self.enough is not None and len(self.body) >= self.enough

    @property
    def body(self) -> bytes:
        return b"".join(self.blocks)


async def within(doing: Awaitable[T]) -> T:
    async with asyncio.timeout(PATIENCE):
        return await doing


async def asked(peer: Peer, *pieces: bytes) -> Head:
    """Ask, answer with these pieces, and return the head."""
    asking = asyncio.create_task(peer.connection.ask(REQUEST))
    assert await peer.heard() == REQUEST
    await peer.say(*pieces)
    return await within(asking)


async def relaying(peer: Peer, take: Take) -> asyncio.Task[bool]:
    """Begin to relay, up to its first wait."""
    task = asyncio.create_task(peer.connection.relay(take))
    await asyncio.sleep(0)
    return task


async def whole(peer: Peer) -> bytes:
    """Relay to the end, which has come."""
    taken = Taken()
    assert await within(peer.connection.relay(taken))
    return taken.body


# The head


async def test_a_head_may_come_byte_by_byte() -> None:
    async with connected() as peer:
        head = b"HTTP/1.1 201 Made\r\nX-Generation-Id: gen-1\r\nContent-Length: 2\r\n\r\n"
        status, headers = await asked(peer, *(bytes([byte]) for byte in head))
        assert (status, headers) == (201, {"x-generation-id": "gen-1", "content-length": "2"})
        await peer.say(b"hi")
        assert await whole(peer) == b"hi"


async def test_a_connection_that_breaks_keeps_nothing_of_the_request() -> None:
    """A prompt may be large. What an error refers to would stay until the next garbage collection, which is rare."""

    class Prompt(bytearray):
        pass

    async def ask(peer: Peer, prompt: Prompt) -> None:
        with pytest.raises(ConnectionBroken):
            await peer.connection.ask(bytes(prompt))

    kept: list[weakref.ref[Prompt]] = []
    gc.disable()
    try:
        async with connected() as peer:
            for _ in range(3):
                prompt = Prompt(REQUEST)
                kept.append(weakref.ref(prompt))
                asking = asyncio.create_task(ask(peer, prompt))
                del prompt
                if len(kept) == 1:
                    await peer.heard()
                    await peer.reset()
                await within(asking)
                del asking
        assert [ref() for ref in kept] == [None] * 3
    finally:
        gc.enable()


async def test_interim_answers_are_skipped() -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 7\r\n\r\n"
    async with connected() as peer:
        head = await asked(peer, b"HTTP/1.1 100 Continue\r\n\r\n", early + early, SHORT)
        assert head == (200, {"content-length": "2"})
        assert await whole(peer) == b"hi"
        assert peer.connection.is_reusable


async def poured_until_closed(peer: Peer, data: bytes) -> int:
    """Send the same bytes until the connection is closed. Returns how many were sent."""
    try:
        while not peer.connection.closed.is_set():
            await peer.pour(data)
            await asyncio.sleep(0)
    except (ConnectionResetError, BrokenPipeError):
        await peer.until_closed()
    return peer.connection.read


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"x" * 1000),
        (b"HTTP/1.1 200 ", b"x" * 1000),
        (b"", b"\r\n" * 100),
    ],
)
async def test_a_head_without_an_end_is_given_up(begin: bytes, more: bytes) -> None:
    async with connected() as peer:
        asking = asyncio.create_task(peer.connection.ask(REQUEST))
        await peer.heard()
        await peer.pour(begin)
        assert await poured_until_closed(peer, more) <= MAX_HEAD + 256 * 1024
        with pytest.raises(ConnectionBroken):
            await within(asking)


async def test_a_head_of_many_headers_is_read() -> None:
    async with connected() as peer:
        lines = b"".join(b"X-%d: %b\r\n" % (n, b"y" * 100) for n in range(500))
        head = await asked(peer, b"HTTP/1.1 200 OK\r\n" + lines + b"Content-Length: 0\r\n\r\n")
        assert head.headers["x-499"] == "y" * 100


ODD_HEADS = [
    b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.1 200 All is \xc3\xa4\xff\r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi",
    b"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\r\nhi\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX-A: b\r\n folded\r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\nContent-Length: \t 2 \t \r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\nX-Empty:\r\nX-Odd: \xe4\x01\x7f\r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\nTRANSFER-ENCODING: Chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2 \r\nhi\r\n0 \r\n\r\n",
    b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b;c="d"\r\nhi\r\n0;last\r\n\r\n',
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0002\r\nhi\r\n0\r\nX-Sum: 1\r\nX-B: c\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nUpgrade: h2,h2c\r\nConnection: Upgrade, Keep-Alive\r\nContent-Length: 2\r\n\r\nhi",
    b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi",
]


@pytest.mark.parametrize("answer", ODD_HEADS)
async def test_answers_that_are_a_little_odd_are_read(answer: bytes) -> None:
    async with connected() as peer:
        assert (await asked(peer, answer)).status == 200
        assert await whole(peer) == b"hi"
        assert peer.connection.is_reusable
        assert (await asked(peer, SHORT)).status == 200


NOT_HTTP = [
    b"nonsense\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"\x15\x03\x01\x00\x02\x02\x46",
    b"<html></html>",
    b"ICY 200 OK\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"HTTP/2 200\r\n\r\n",
    b"HTTP/1.1 OK\r\n\r\n",
    b"HTTP/1.1 2000 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n\x81\x05hello",
]


@pytest.mark.parametrize("answer", NOT_HTTP)
async def test_what_is_not_http_breaks_the_connection(answer: bytes) -> None:
    async with connected() as peer:
        with pytest.raises(ConnectionBroken):
            await asked(peer, answer)
        await peer.until_closed()
        assert not peer.connection.is_reusable
        with pytest.raises(ConnectionBroken):
            await peer.connection.ask(REQUEST)


# The body and its end


@pytest.mark.parametrize(
    ("answer", "body", "reusable"),
    [
        (SHORT, b"hi", True),
        (OPEN + piece(b"hi") + piece(b" you") + END, b"hi you", True),
        (OPEN + END, b"", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi", b"hi", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi", False),
        (SHORT + b"behind", b"hi", False),
        (SHORT + SHORT, b"hi", False),
        (SHORT + b"H", b"hi", False),
        (SHORT + b"HTTP/1.1 200 OK\r\nX-A: ", b"hi", False),
        (OPEN + piece(b"hi") + END + b"HTTP/1.1 500", b"hi", False),
        (b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1", b"", False),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhibehind", b"hi", False),
    ],
)
async def test_the_end_of_an_answer_is_found(answer: bytes, body: bytes, reusable: bool) -> None:
    async with connected() as peer:
        await asked(peer, answer)
        assert await whole(peer) == body
        assert peer.connection.is_reusable is reusable


@pytest.mark.parametrize("behind", [b"HTTP/1.1 200 OK\r\n", SHORT, b"x", b"\r\n"])
async def test_what_comes_unasked_closes_the_connection(behind: bytes) -> None:
    async with connected() as peer:
        await asked(peer, SHORT)
        await peer.say(behind)
        await peer.until_closed()
        assert await whole(peer) == b"hi"
        assert not peer.connection.is_reusable


async def test_what_comes_before_a_request_closes_the_connection() -> None:
    async with connected() as peer:
        await peer.say(SHORT)
        await peer.until_closed()
        with pytest.raises(ConnectionBroken):
            await peer.connection.ask(REQUEST)
        assert await peer.heard() == b""  # nothing was sent


@pytest.mark.parametrize(
    "head",
    [
        WITHOUT_LENGTH,
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
    ],
)
async def test_an_answer_without_length_ends_with_its_connection(head: bytes) -> None:
    async with connected() as peer:
        await asked(peer, head, b"hi")
        taken = Taken()
        task = await relaying(peer, taken)
        await peer.say(b" you")
        assert not task.done()
        await peer.shut()
        assert await within(task)
        assert taken.body == b"hi you"
        assert not peer.connection.is_reusable


async def test_an_answer_that_we_gave_up_has_not_ended() -> None:
    async with connected() as peer:
        await asked(peer, WITHOUT_LENGTH + b"hi")
        peer.connection.abort()
        await peer.until_closed()
        taken = Taken()
        with pytest.raises(ConnectionBroken):
            await within(peer.connection.relay(taken))
        assert taken.body == b"hi"


async def test_trailers_are_no_headers() -> None:
    async with connected() as peer:
        head = await asked(peer, OPEN, piece(b"hi"), b"0\r\nRetry-After: 9\r\nTransfer-Encoding: x\r\n\r\n")
        assert await whole(peer) == b"hi"
        assert dict(head.headers) == {"transfer-encoding": "chunked"}


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"0\r\n", b"X-A: b\r\n" * 100),
        (b"0\r\nX-A: ", b"x" * 1000),
        (b"0\r\n", b"x" * 1000),
        (b"2;", b"x" * 1000),
        (b"", b"0" * 1000),
    ],
)
@pytest.mark.parametrize("relayed", [True, False])
async def test_what_is_no_body_is_bounded(begin: bytes, more: bytes, relayed: bool) -> None:
    async with connected() as peer:
        await asked(peer, OPEN, piece(b"hi"))
        taken = Taken()
        task = await relaying(peer, taken) if relayed else None
        await peer.pour(begin)
        pouring = asyncio.create_task(poured_until_closed(peer, more))
        if task is None:
            await peer.connection.until_read(MAX_UNREAD)
            task = await relaying(peer, taken)
        with pytest.raises(ConnectionBroken):
            await within(task)
        assert await within(pouring) <= MAX_UNREAD + 2 * 256 * 1024
        assert taken.body == b"hi"


async def test_a_long_stream_of_tiny_pieces_is_no_flood() -> None:
    async with connected() as peer:
        await asked(peer, OPEN)
        taken = Taken()
        task = await relaying(peer, taken)
        extension = b"x" * 2000
        for _ in range(2 * MAX_HEAD // len(extension)):
            await peer.say(b"1;%b\r\n" % extension, b"a\r\n")
        await peer.say(END)
        assert await within(task)
        assert taken.body == b"a" * (2 * MAX_HEAD // len(extension))


# Broken lines

STAGES: list[tuple[bytes, ...]] = [
    (),
    (b"HTTP/1.1 200",),
    (b"HTTP/1.1 200 OK\r\nX-A: b\r\n",),
    (b"HTTP/1.1 100 Continue\r\n\r\n",),
    (OPEN,),
    (OPEN, b"5\r\nhe"),
    (OPEN, piece(b"he")),
    (OPEN, piece(b"he"), b"0\r\n"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"he"),
]


@pytest.mark.parametrize("end", [Peer.reset, Peer.shut])
@pytest.mark.parametrize("stage", STAGES)
async def test_a_line_that_breaks_is_told(
    stage: tuple[bytes, ...], end: Callable[[Peer], Awaitable[None]]
) -> None:
    async with connected() as peer:
        asking = asyncio.create_task(peer.connection.ask(REQUEST))
        await peer.heard()
        await peer.say(*stage)
        taken = Taken()
        if not stage or not stage[0].endswith((b"chunked\r\n\r\n", b"5\r\n\r\n")):
            await end(peer)
            with pytest.raises(ConnectionBroken):
                await within(asking)
        else:
            await within(asking)
            task = await relaying(peer, taken)
            await end(peer)
            with pytest.raises(ConnectionBroken):
                await within(task)
            assert taken.body == (b"he" if len(stage) > 1 else b"")
        assert not peer.connection.is_reusable


async def test_a_reset_is_no_end_of_an_answer_without_length() -> None:
    async with connected() as peer:
        await asked(peer, WITHOUT_LENGTH, b"hi")
        taken = Taken()
        task = await relaying(peer, taken)
        await peer.reset()
        with pytest.raises(ConnectionBroken):
            await within(task)
        assert taken.body == b"hi"


@pytest.mark.parametrize("end", [Peer.reset, Peer.shut])
async def test_what_came_before_a_break_is_still_there(end: Callable[[Peer], Awaitable[None]]) -> None:
    async with connected() as peer:
        await asked(peer, OPEN, piece(b"hi"))
        await end(peer)
        taken = Taken()
        for body in (b"hi", b"hi"):
            with pytest.raises(ConnectionBroken):
                await within(peer.connection.relay(taken))
            assert taken.body == body


@pytest.mark.parametrize("end", [Peer.reset, Peer.shut])
async def test_a_complete_answer_survives_the_line(end: Callable[[Peer], Awaitable[None]]) -> None:
    async with connected() as peer:
        await asked(peer, SHORT)
        await end(peer)
        assert await whole(peer) == b"hi"
        assert not peer.connection.is_reusable


async def test_text_before_nonsense_in_one_read_is_passed_on() -> None:
    async with connected() as peer:
        await asked(peer, OPEN)
        taken = Taken()
        task = await relaying(peer, taken)
        await peer.say(piece(b"hi") + b"nonsense")
        with pytest.raises(ConnectionBroken):
            await within(task)
        assert taken.body == b"hi"


# Takers


async def test_a_taker_gets_each_read_at_once() -> None:
    async with connected() as peer:
        await asked(peer, OPEN + piece(b"a"))
        taken = Taken()
        task = await relaying(peer, taken)
        assert taken.blocks == [b"a"]
        await peer.say(piece(b"b"), piece(b"c") + piece(b"d"), piece(b"e") + END)
        assert taken.blocks == [b"a", b"b", b"cd", b"e"]
        assert await within(task)


async def test_a_taker_that_has_enough_gets_no_more() -> None:
    async with connected() as peer:
        await asked(peer, OPEN)
        taken = Taken(enough=2)
        task = await relaying(peer, taken)
        await peer.pour(piece(b"a"))
        await peer.say(piece(b"b"))
        assert await within(task) is False
        await peer.say(piece(b"c"))
        assert taken.body == b"ab"
        rest = Taken(enough=1)
        assert await within(peer.connection.relay(rest)) is False
        assert rest.body == b"c"
        await peer.say(END)
        assert await whole(peer) == b""
        assert peer.connection.is_reusable


async def test_a_taker_that_had_enough_sees_no_later_read() -> None:
    """Several reads may come before the task of the reader runs again."""
    async with connected() as peer:
        await asked(peer, OPEN)
        taken = Taken(enough=1)
        task = await relaying(peer, taken)
        connection = peer.connection
        connection.data_received(piece(b"a"))
        connection.data_received(piece(b"b"))
        connection.data_received(piece(b"c") + END)
        assert await within(task) is False
        assert taken.blocks == [b"a"]
        assert await whole(peer) == b"bc"


class RefusedError(Exception):
    pass


@pytest.mark.parametrize("waiting", [True, False])
async def test_an_error_of_the_taker_is_raised_by_relay(waiting: bool) -> None:
    def refuse(_: bytes) -> bool:
        raise RefusedError

    async with connected() as peer:
        await asked(peer, OPEN + (b"" if waiting else piece(b"a")))
        task = await relaying(peer, refuse)
        if waiting:
            await peer.say(piece(b"a"))
        with pytest.raises(RefusedError):
            await within(task)
        await peer.say(piece(b"b") + END)
        assert await whole(peer) == b"b"
        assert peer.connection.is_reusable


async def test_an_error_of_the_taker_comes_before_nonsense() -> None:
    def refuse(_: bytes) -> bool:
        raise RefusedError

    async with connected() as peer:
        await asked(peer, OPEN)
        task = await relaying(peer, refuse)
        await peer.say(piece(b"a") + b"nonsense")
        with pytest.raises(RefusedError):
            await within(task)
        with pytest.raises(ConnectionBroken):
            await within(peer.connection.relay(Taken()))


async def test_nothing_is_passed_on_after_stop() -> None:
    async with connected() as peer:
        await asked(peer, OPEN)
        taken = Taken()
        task = await relaying(peer, taken)
        peer.connection.stop()
        await peer.say(piece(b"a"), piece(b"b") + END)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert taken.blocks == []
        assert await whole(peer) == b"ab"


async def test_a_cancelled_relay_can_be_begun_again() -> None:
    async with connected() as peer:
        await asked(peer, OPEN)
        taken = Taken()
        for text in (b"a", b"b", b"c"):
            task = await relaying(peer, taken)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            before = taken.body
            await peer.say(piece(text))
            assert taken.body == before
        assert taken.body == b"ab"
        await peer.say(END)
        assert await whole(peer) == b"c"
        assert peer.connection.is_reusable


async def test_a_relay_cancelled_at_the_end_has_lost_nothing() -> None:
    async with connected() as peer:
        await asked(peer, OPEN)
        taken = Taken()
        task = await relaying(peer, taken)
        peer.connection.data_received(piece(b"a") + END)
        task.cancel()  # before the task has seen the end
        await asyncio.wait([task])
        assert task.cancelled()
        assert taken.body == b"a"
        assert await whole(peer) == b""


async def test_a_cancelled_request_is_not_answered_later() -> None:
    async with connected() as peer:
        asking = asyncio.create_task(peer.connection.ask(REQUEST))
        await peer.heard()
        asking.cancel()
        await asyncio.wait([asking])
        assert not peer.connection.is_reusable
        with pytest.raises(ConnectionBroken):
            await peer.connection.ask(REQUEST)


# Back-pressure


async def test_an_upstream_that_floods_has_to_wait() -> None:
    flood = [piece(bytes([65 + n % 26]) * 64_000) for n in range(200)]
    async with connected() as peer:
        await asked(peer, OPEN)

        async def pour() -> None:
            for data in flood:
                await peer.pour(data)
            await peer.pour(END)

        pouring = asyncio.create_task(pour())
        await peer.connection.until_read(MAX_UNREAD)
        read = -1
        while read != peer.connection.read:  # what is under way in the loop comes yet
            read = peer.connection.read
            for _ in range(5):
                await asyncio.sleep(0)
        assert MAX_UNREAD <= read <= MAX_UNREAD + 2 * 256 * 1024
        assert not pouring.done()
        taken = Taken()
        assert await within(peer.connection.relay(taken))
        await within(pouring)
        assert taken.body == b"".join(data.partition(b"\r\n")[2][:-2] for data in flood)
        assert peer.connection.is_reusable


@pytest.mark.parametrize("last", [b"", b"hi"])
async def test_an_answer_that_was_held_leaves_a_usable_connection(last: bytes) -> None:
    body = b"x" * (MAX_UNREAD - 1000)
    async with connected() as peer:
        for _ in range(3):
            await asked(peer, OPEN, *(piece(body[n : n + 8000]) for n in range(0, len(body), 8000)))
            await peer.say(b"400;%b\r\n%b\r\n%b" % (b"x" * 500, b"x" * 1024, END + last))
            assert await whole(peer) == body + b"x" * 1024
            assert peer.connection.is_reusable is not bool(last)
            if last:
                break


async def test_many_requests_fit_on_one_connection() -> None:
    headers = b"X-A: %b\r\n" % (b"y" * 10_000)
    answers = [
        b"HTTP/1.1 204 No Content\r\n%b\r\n" % headers,
        b"HTTP/1.1 200 OK\r\n%bContent-Length: 2\r\n\r\nhi" % headers,
    ]
    async with connected() as peer:
        for answer in answers:
            for _ in range(3 * MAX_UNREAD // len(headers)):
                await asked(peer, answer)
                assert await whole(peer) == answer.partition(b"\r\n\r\n")[2]
                assert peer.connection.is_reusable


async def test_a_request_that_was_not_read_ends_the_connection() -> None:
    """The next request would stand behind the rest of this one."""
    async with connected() as peer:
        asking = asyncio.create_task(peer.connection.ask(b"x" * 20_000_000))
        await peer.heard(1000)
        await peer.say(SHORT)
        assert (await within(asking)).status == 200
        assert await whole(peer) == b"hi"
        assert not peer.connection.is_reusable


# Any reads

ANSWERS = [
    *ODD_HEADS,
    *NOT_HTTP,
    SHORT + b"behind",
    SHORT + SHORT,
    OPEN + piece(b"hi") + b"nonsense",
    OPEN + piece(b"hi") + piece(b" you") + b"0\r\nX-A: b\r\n\r\n",
    OPEN + piece(b"hi") + b"5\r\nab",
    b"HTTP/1.1 100 Continue\r\nX-A: b\r\n\r\n" + SHORT,
    WITHOUT_LENGTH + b"hi",
    b"HTTP/1.1 204 No Content\r\n\r\n",
]


async def outcome(pieces: list[bytes]) -> tuple[Head | None, bytes, object, bool]:
    """Return head, body, end and use of an answer that comes in these reads, and then ends the connection."""
    async with connected() as peer:
        asking = asyncio.create_task(peer.connection.ask(REQUEST))
        await peer.heard()
        taken = Taken()

        async def read() -> tuple[Head | None, object]:
            try:
                head = await asking
            except ConnectionBroken:
                return None, "broken"
            try:
                return head, await peer.connection.relay(taken)
            except ConnectionBroken:
                return head, "broken"

        reading = asyncio.create_task(read())
        with suppress(ConnectionResetError, BrokenPipeError):  # closed after an earlier piece
            await peer.say(*pieces)
        for _ in range(3):
            await asyncio.sleep(0)
        reusable = peer.connection.is_reusable
        if not peer.connection.closed.is_set():
            await peer.shut()
        head, end = await within(reading)
        return head, taken.body, end, reusable


@given(st.sampled_from(ANSWERS), st.data())
async def test_an_answer_means_the_same_in_any_reads(answer: bytes, data: st.DataObject) -> None:
    places = st.lists(st.integers(1, len(answer) - 1), unique=True, max_size=12).map(sorted)
    cuts = [0, *data.draw(places), len(answer)]
    assert await outcome([answer[a:b] for a, b in pairwise(cuts)]) == await outcome([answer])
