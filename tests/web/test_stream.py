"""The bytes of a stream: its head, its events, its heartbeats, and clients of all kinds."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest

from broker.core.session import is_session_id
from broker.web import keys
from tests.broker import Broker, running
from tests.events import Event
from tests.relay.fakes import BugError
from tests.replies import plain
from tests.scripted import Call, ScriptedUpstream, chunk
from tests.web.outcomes import ids, started, text

UNKNOWN = "00000000-1111-4222-8333-444444444444"

ODD_CHUNKS = [
    b'{"choices":[]}',
    b'{ "spaced" : [ 1.0, 1e2, -0 ] , "choices" : [ ] }',
    '{"text": "€ 😀 \u2028\u2029 \u0085 \\n \\u20ac"}'.encode(),
    b'{"half": "\\ud83d", "other": "\\ude00"}',
    b'{"big": 123456789012345678901234567890, "twice": 1, "twice": 2}',
    b'{"looks": "data: x\\n\\nevent: done\\n\\n"}',
    b'{"usage": null, "error": null}',
]


# The format


async def test_a_stream_opens_at_once_with_a_retry_and_a_comment(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with broker.stream(await broker.prepare()) as connection:
        retry, comment = await connection.block(), await connection.block()
        assert retry is not None
        assert comment is not None
        assert 1600 <= int(retry.removeprefix(b"retry: ")) <= 2400
        assert comment.startswith(b":")
        await upstream.call()  # which nobody has answered


async def test_its_headers_keep_it_live_and_whole(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    async with broker.stream(await broker.prepare(), headers={"Accept-Encoding": "gzip, br"}) as connection:
        assert connection.status == 200
        assert connection.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert connection.headers["cache-control"] == "no-cache, no-transform"
        assert connection.headers["x-accel-buffering"] == "no"
        assert "content-encoding" not in connection.headers
        assert connection.headers["x-request-id"]


async def test_pages_get_different_reconnection_times(broker: Broker) -> None:
    times = set()
    for _ in range(8):
        async with broker.stream(UNKNOWN) as connection:
            times.add(await connection.block())
    assert len(times) > 1


async def test_the_time_to_come_back_is_a_setting(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, retry_ms=10_000) as broker, broker.stream(UNKNOWN) as connection:
        assert 8000 <= int((await connection.block() or b"").removeprefix(b"retry: ")) <= 12_000


async def test_events_are_numbered_from_one_and_the_terminal_ends(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    events = await broker.read(await broker.prepare())
    assert ids(events) == ["1-1", "1-2", "1-3", "1-4", "1-5.end"]
    assert [event.kind for event in events] == ["chunk"] * 4 + ["done"]


async def test_a_chunk_is_relayed_the_moment_it_comes(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with started(broker, upstream) as (_, connection, call):
        for word in ("one", "two", "three"):
            call.chunk(word)
            assert text(await connection.take(1)) == word


async def test_chunks_are_relayed_byte_for_byte(broker: Broker, upstream: ScriptedUpstream) -> None:
    def reply(call: Call) -> None:
        call.open()
        for data in ODD_CHUNKS:
            call.event(data)
        call.done()

    upstream.replies = [reply]
    events = await broker.read(await broker.prepare())
    assert [event.data.encode() for event in events[:-1]] == ODD_CHUNKS


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
async def test_a_chunk_of_many_lines_is_one_event(
    broker: Broker, upstream: ScriptedUpstream, line_end: bytes
) -> None:
    def reply(call: Call) -> None:
        lines = [
            b"id: 7",
            b"event: odd",
            b"data: {",
            b'data:   "a": "b",',
            b'data:"c": 1',
            b"data",
            b"data: }",
            b"",
            b"",
        ]
        call.open().send(line_end.join(lines))
        call.done()

    upstream.replies = [reply]
    events = await broker.read(await broker.prepare())
    assert events[0] == Event("chunk", '{\n  "a": "b",\n"c": 1\n\n}', "1-1")


async def test_an_answer_may_come_byte_by_byte(broker: Broker, upstream: ScriptedUpstream) -> None:
    stream = b"\xef\xbb\xbf: comment\r\n\r\n" + b"".join(b"data: %b\r\n\r\n" % data for data in ODD_CHUNKS)

    def reply(call: Call) -> None:
        call.open()
        for byte in stream:
            call.send(bytes([byte]))
        call.done()

    upstream.replies = [reply]
    events = await broker.read(await broker.prepare())
    assert [event.data.encode() for event in events[:-1]] == ODD_CHUNKS


async def test_a_compressed_answer_is_relayed_as_text(broker: Broker, upstream: ScriptedUpstream) -> None:
    def reply(call: Call) -> None:
        call.open(content_encoding="gzip")
        call.send(gzip.compress(b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(chunk("Hello")).encode()))
        call.end()

    upstream.replies = [reply]
    events = await broker.read(await broker.prepare())
    assert text(events) == "Hello"
    assert events[-1].kind == "done"


async def test_events_that_are_not_chunks_are_not_relayed(broker: Broker, upstream: ScriptedUpstream) -> None:
    def reply(call: Call) -> None:
        call.open()
        call.comment()
        call.send(b"data:\n\ndata: \n\nevent: ping\n\nretry: 10\n\nid: 5\n\n")
        call.chunk("Hello")
        call.event(b"[DONE]")
        call.chunk("after the end")
        call.end()

    upstream.replies = [reply]
    events = await broker.read(await broker.prepare())
    assert text(events) == "Hello"
    assert ids(events) == ["1-1", "1-2.end"]


async def test_a_comment_follows_every_silence(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, heartbeat=0.2) as broker:
        async with broker.stream(await broker.prepare()) as connection:
            opening = [await connection.block(), await connection.block()]
            assert len(opening) == 2
            assert (await connection.block() or b"").startswith(b":")
            call = (await upstream.call()).open()
            assert (await connection.block() or b"").startswith(b":")
            call.chunk("Hello")
            while (await connection.block() or b"").startswith(b":"):
                pass  # one may have been on its way
            assert connection.blocks[-1].startswith(b"id: 1-1")
            assert (await connection.block() or b"").startswith(b":")
            assert (await connection.block() or b"").startswith(b":")


async def test_a_heartbeat_can_be_an_event_without_an_id(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, heartbeat=0.2, ping_events=True) as broker:
        async with broker.stream(await broker.prepare()) as connection:
            assert await connection.take(2) == [Event("ping", "{}", None)] * 2
            assert sum(block.startswith(b":") for block in connection.blocks) >= 3


async def test_without_the_setting_there_are_no_pings(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, heartbeat=0.2) as broker:
        async with broker.stream(await broker.prepare()) as connection:
            blocks = [await connection.block() for _ in range(4)]
            assert not any(b"ping" in (block or b"") for block in blocks)


# Odd clients


async def test_an_http_1_0_client_gets_a_plain_body(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    address = urlsplit(broker.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    target = f"{address.path}/stream/{await broker.prepare()}"
    writer.write(f"GET {target} HTTP/1.0\r\nHost: {address.hostname}\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    assert b" 200 " in head
    assert b"chunked" not in head.lower()
    assert body.startswith(b"retry: ")
    assert b"id: 1-5.end\nevent: done\n" in body


async def test_a_connection_can_be_used_again_after_a_stream(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    for _ in range(3):
        session = await broker.prepare()  # on the connection that the last stream has used
        answer = await broker.ask("GET", f"/stream/{session}", headers={"Accept": "text/event-stream"})
        assert "event: done" in answer.text


async def test_an_id_as_we_hand_it_out_is_one(broker: Broker) -> None:
    assert is_session_id(await broker.prepare())


async def test_a_path_beyond_a_session_is_nothing(broker: Broker) -> None:
    assert (await broker.ask("GET", f"/stream/{UNKNOWN}/more")).status == 404


async def test_a_bug_while_a_session_is_claimed_is_told_as_an_event(
    broker: Broker, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The headers of the stream are built by then, so that an answer in JSON would be no HTTP."""
    upstream.replies = [plain]
    session = await broker.prepare()

    hub = broker.app[keys.HUB]
    claim = hub._claim

    async def fail(*args: Any) -> NoReturn:
        await claim(*args)
        raise BugError

    monkeypatch.setattr(hub, "_claim", fail)
    [event] = await broker.read(session)
    assert (event.kind, event.json["code"], event.json["final"]) == ("error", "internal_error", True)
    monkeypatch.undo()
    assert (await broker.read(session))[-1].kind == "done"
