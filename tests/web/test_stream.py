"""What an EventSource is told in each state of a session, and how the stream is written."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from broker.core.session import is_session_id
from tests.broker import Broker, running
from tests.events import Event, Line, opened
from tests.scripted import Call, ScriptedUpstream, chunk, usage_chunk

UNKNOWN = "00000000-1111-4222-8333-444444444444"
NO_REDIS = "unix:///nowhere/valkey.sock"

ODD_CHUNKS = [
    b'{"choices":[]}',
    b'{ "spaced" : [ 1.0, 1e2, -0 ] , "choices" : [ ] }',
    '{"text": "€ 😀 \u2028\u2029 \u0085 \\n \\u20ac"}'.encode(),
    b'{"half": "\\ud83d", "other": "\\ude00"}',
    b'{"big": 123456789012345678901234567890, "twice": 1, "twice": 2}',
    b'{"looks": "data: x\\n\\nevent: done\\n\\n"}',
    b'{"usage": null, "error": null}',
]


def plain(call: Call) -> None:
    """An answer that ends well."""
    call.open()
    call.chunk("Hello")
    call.chunk(" world")
    call.chunk("", finish="stop")
    call.usage(cost=0.00123)
    call.done()


def ids(events: list[Event]) -> list[str | None]:
    return [event.id for event in events]


def text(events: list[Event]) -> str:
    choices = [event.json["choices"] for event in events if event.kind == "chunk"]
    return "".join(choice[0]["delta"]["content"] for choice in choices if choice)


@asynccontextmanager
async def started(broker: Broker, upstream: ScriptedUpstream) -> AsyncIterator[tuple[str, Line, Call]]:
    """A session whose upstream has begun and sent one chunk, and its first viewer, who has that chunk."""
    session, number = await broker.prepare(), len(upstream.calls) + 1
    async with broker.stream(session) as line:
        call = (await upstream.call(number)).open()
        call.chunk("Hello")
        await line.take(1)
        yield session, line, call


async def refusal(broker: Broker, session: str, cursor: str | None = None, query: str = "") -> Event:
    """The one event of a line that is refused."""
    async with broker.stream(session, cursor, query=query) as line:
        assert line.status == 200
        [event] = await line.rest()
        assert event.kind == "error"
        return event


async def comes_again(line: Line) -> None:
    """Whether this line asks its page to come again, and says nothing else."""
    assert line.status == 200
    assert await line.rest() == []
    [retry, comment] = line.blocks
    assert 2400 <= int(retry.removeprefix(b"retry: ")) <= 3600
    assert comment.startswith(b":")


# The format


async def test_a_stream_opens_at_once_with_a_retry_and_a_comment(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with broker.stream(await broker.prepare()) as line:
        retry, comment = await line.block(), await line.block()
        assert retry is not None
        assert comment is not None
        assert 1600 <= int(retry.removeprefix(b"retry: ")) <= 2400
        assert comment.startswith(b":")
        await upstream.call()  # which nobody has answered


async def test_its_headers_keep_it_live_and_whole(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    async with broker.stream(await broker.prepare(), headers={"Accept-Encoding": "gzip, br"}) as line:
        assert line.status == 200
        assert line.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert line.headers["cache-control"] == "no-cache, no-transform"
        assert line.headers["x-accel-buffering"] == "no"
        assert "content-encoding" not in line.headers
        assert line.headers["x-request-id"]


async def test_pages_are_told_different_times_to_come_back(broker: Broker) -> None:
    times = set()
    for _ in range(8):
        async with broker.stream(UNKNOWN) as line:
            times.add(await line.block())
    assert len(times) > 1


async def test_the_time_to_come_back_is_a_setting(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, retry_ms=10_000) as broker, broker.stream(UNKNOWN) as line:
        assert 8000 <= int((await line.block() or b"").removeprefix(b"retry: ")) <= 12_000


async def test_events_are_numbered_from_one_and_the_terminal_ends(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    events = await broker.read(await broker.prepare())
    assert ids(events) == ["1-1", "1-2", "1-3", "1-4", "1-5.end"]
    assert [event.kind for event in events] == ["chunk"] * 4 + ["done"]


async def test_a_chunk_is_relayed_the_moment_it_comes(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with started(broker, upstream) as (_, line, call):
        for word in ("one", "two", "three"):
            call.chunk(word)
            assert text(await line.take(1)) == word


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
async def test_a_chunk_of_many_lines_stays_one(
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


async def test_what_is_no_chunk_is_not_relayed(broker: Broker, upstream: ScriptedUpstream) -> None:
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


async def test_a_comment_keeps_the_line_alive_in_every_silence(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, heartbeat=0.2) as broker:
        async with broker.stream(await broker.prepare()) as line:
            opening = [await line.block(), await line.block()]
            assert len(opening) == 2
            assert (await line.block() or b"").startswith(b":")
            call = (await upstream.call()).open()
            assert (await line.block() or b"").startswith(b":")
            call.chunk("Hello")
            while (await line.block() or b"").startswith(b":"):
                pass  # one may have been on its way
            assert line.blocks[-1].startswith(b"id: 1-1")
            assert (await line.block() or b"").startswith(b":")
            assert (await line.block() or b"").startswith(b":")


async def test_a_heartbeat_can_be_an_event_without_an_id(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, heartbeat=0.2, ping_events=True) as broker:
        async with broker.stream(await broker.prepare()) as line:
            assert await line.take(2) == [Event("ping", "{}", None)] * 2
            assert sum(block.startswith(b":") for block in line.blocks) >= 3


async def test_without_the_setting_there_are_no_pings(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, heartbeat=0.2) as broker:
        async with broker.stream(await broker.prepare()) as line:
            blocks = [await line.block() for _ in range(4)]
            assert not any(b"ping" in (block or b"") for block in blocks)


# What a session tells at its end


async def test_done_tells_everything(broker: Broker, upstream: ScriptedUpstream) -> None:
    def reply(call: Call) -> None:
        call.open(x_generation_id="gen-header")
        call.chunk("Hello", finish="length")
        call.usage(cost=0.00123, completion_tokens_details={"reasoning_tokens": 2})
        call.done()

    upstream.replies = [reply]
    done = (await broker.read(await broker.prepare()))[-1]
    facts = done.json
    ttft, total = facts.pop("ttftMs"), facts.pop("totalMs")
    assert done.kind == "done"
    assert facts == {
        "finishReason": "length",
        "nativeFinishReason": "native_length",
        "model": "scripted/model-1",
        "provider": "Scripted",
        "generationId": "gen-header",
        "usage": usage_chunk(cost=0.00123, completion_tokens_details={"reasoning_tokens": 2})["usage"],
        "cost": 0.00123,
        "estimated": False,
    }
    assert isinstance(ttft, int)
    assert 0 <= ttft <= total < 5000


async def test_the_first_chunk_names_the_generation_where_no_header_does(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    assert (await broker.read(await broker.prepare()))[-1].json["generationId"] == "gen-chunk"


def with_prices(*, model: str = "scripted/model-1") -> bytes:
    entry = {"id": model, "context_length": 8192, "pricing": {"prompt": "0.000001", "completion": "0.000002"}}
    return json.dumps({"data": [entry]}).encode()


async def test_without_a_told_cost_the_prices_decide(broker: Broker, upstream: ScriptedUpstream) -> None:
    def reply(call: Call) -> None:
        call.open()
        call.chunk("Hello", finish="stop")
        call.usage()
        call.done()

    upstream.models, upstream.replies = with_prices(), [reply]
    facts = (await broker.read(await broker.prepare()))[-1].json
    assert facts["cost"] == pytest.approx(10 * 0.000001 + 5 * 0.000002)
    assert facts["estimated"] is False


async def test_without_a_cost_and_prices_the_cost_is_unknown(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    def reply(call: Call) -> None:
        call.open()
        call.chunk("Hello", finish="stop")
        call.usage()
        call.done()

    upstream.replies = [reply]
    facts = (await broker.read(await broker.prepare()))[-1].json
    assert facts["cost"] is None
    assert facts["estimated"] is False


async def test_without_usage_the_cost_is_estimated_from_what_was_relayed(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    def reply(call: Call) -> None:
        call.open()
        call.chunk("x" * 300, finish="stop")
        call.done()

    upstream.models, upstream.replies = with_prices(), [reply]
    answer = await broker.post()
    facts = (await broker.read(answer.json["sessionId"]))[-1].json
    assert facts["usage"] is None
    assert facts["estimated"] is True
    assert facts["cost"] == pytest.approx(answer.json["promptTokens"] * 0.000001 + 100 * 0.000002)


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk("a", finish="stop"), usage_chunk(cost=1)],
        [chunk("a"), chunk("b", finish="stop", usage={"cost": 1})],
        [chunk("a", finish="stop"), {"usage": {"cost": 1}}],
        [
            chunk("a", usage={"cost": 0.5}),
            chunk("b", usage=None),
            chunk("c", finish="stop", usage={"cost": 1}),
        ],
    ],
)
async def test_usage_is_found_on_any_chunk(
    broker: Broker, upstream: ScriptedUpstream, chunks: list[Any]
) -> None:
    def reply(call: Call) -> None:
        call.open()
        for each in chunks:
            call.event(json.dumps(each).encode())
        call.done()

    upstream.replies = [reply]
    events = await broker.read(await broker.prepare())
    assert [event.json for event in events[:-1]] == chunks
    assert events[-1].json["cost"] == 1
    assert events[-1].json["estimated"] is False


async def test_nothing_follows_the_end(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    async with broker.stream(await broker.prepare()) as line:
        body = await line.body()
    assert body.count(b".end\n") == 1
    assert body.rpartition(b"id: ")[2].startswith(b"1-5.end\nevent: done\ndata: ")
    assert body.endswith(b"\n\n")


# The table of states


async def test_a_prepared_session_is_claimed_once_for_all(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    first, second = await broker.read(session), await broker.read(session)
    assert first == second
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("accept", ["*/*", "text/html", ""])
async def test_any_other_caller_gets_the_stream_as_well(
    broker: Broker, upstream: ScriptedUpstream, accept: str
) -> None:
    upstream.replies = [plain]
    answer = await broker.ask("GET", f"/stream/{await broker.prepare()}", headers={"Accept": accept})
    assert answer.status == 200
    assert "event: done" in answer.text


async def test_a_cursor_never_claims(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    async with broker.stream(session, "1-0") as line:
        await comes_again(line)
    answer = await broker.ask("GET", f"/stream/{session}?lastEventId=1-3")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "3")
    assert upstream.calls == []
    assert (await broker.read(session))[-1].kind == "done"


async def test_a_running_session_is_replayed_and_followed(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with started(broker, upstream) as (session, line, call):
        call.chunk(" world")
        await line.take(1)
        async with broker.stream(session) as late, broker.stream(session, "1-1") as later:
            assert text(await late.take(2)) == "Hello world"
            assert text(await later.take(1)) == " world"
            call.chunk("!", finish="stop")
            call.done()
            rest = await line.rest()
            assert rest == await late.rest() == await later.rest()
            assert ids(rest) == ["1-3", "1-4.end"]
    assert len(upstream.calls) == 1


async def test_a_finished_session_is_replayed_from_any_cursor(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    events = await broker.read(session)
    for seen in range(len(events)):
        assert await broker.read(session, f"1-{seen}") == events[seen:]


async def test_a_cursor_ahead_of_a_running_session_waits_for_it(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with started(broker, upstream) as (session, line, call), broker.stream(session, "1-3") as ahead:
        assert len([await ahead.block(), await ahead.block()]) == 2
        for word in "234":
            call.chunk(word)
        await line.take(3)
        assert ids(await ahead.take(1)) == ["1-4"]
        call.chunk("", finish="stop")
        call.done()
        assert ids(await ahead.rest()) == ["1-5", "1-6.end"]


async def test_a_cursor_ahead_of_the_end_is_told_of_the_gap(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with started(broker, upstream) as (session, _, call), broker.stream(session, "1-30") as ahead:
        call.chunk("", finish="stop")
        call.done()
        [event] = await ahead.rest()
        assert (event.json["code"], event.id) == ("replay_gap", "1-30.end")


async def test_a_cursor_beyond_the_end_of_a_finished_session_is_told_of_the_gap(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    await broker.read(session)
    event = await refusal(broker, session, "1-6")
    assert (event.json["code"], event.json["final"], event.id) == ("replay_gap", True, "1-6.end")


@pytest.mark.parametrize("cursor", ["1-5.end", "2-0.end", "1-9999999999999999.end"])
@pytest.mark.parametrize("session", [UNKNOWN, "no-session"])
async def test_a_terminal_cursor_stops_an_eventsource_without_asking_redis(
    upstream: ScriptedUpstream, cursor: str, session: str
) -> None:
    async with running(NO_REDIS, upstream) as broker, broker.stream(session, cursor) as line:
        assert line.status == 204


async def test_a_terminal_cursor_of_a_running_session_is_204_too(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with started(broker, upstream) as (session, _, _):
        assert (await broker.ask("GET", f"/stream/{session}?lastEventId=1-1.end")).status == 204


@pytest.mark.parametrize(
    ("session", "cursor", "code", "event_id", "status"),
    [
        (UNKNOWN, None, "session_not_found", "1-1.end", 404),
        (UNKNOWN, "1-7", "session_expired", "1-7.end", 404),
        ("malformed", None, "session_not_found", "1-1.end", 404),
        ("ABCDEF00-1111-4222-8333-444444444444", None, "session_not_found", "1-1.end", 404),
        ("malformed", "1-7", "session_not_found", "1-7.end", 404),
        (UNKNOWN, "nonsense", "invalid_cursor", "1-1.end", 400),
        (UNKNOWN, "1-01", "invalid_cursor", "1-1.end", 400),
        ("malformed", "1-01", "invalid_cursor", "1-1.end", 400),
    ],
)
async def test_what_cannot_be_streamed_is_told_for_good(
    broker: Broker, session: str, cursor: str | None, code: str, event_id: str, status: int
) -> None:
    event = await refusal(broker, session, cursor)
    assert (event.json["code"], event.json["final"], event.id) == (code, True, event_id)
    headers = {"Last-Event-ID": cursor} if cursor else {}
    answer = await broker.ask("GET", f"/stream/{session}", headers=headers)
    assert (answer.status, answer.code) == (status, code)


async def test_the_cursor_of_a_reloaded_page_is_in_the_query(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    events = await broker.read(session)
    for cursor, query, rest in [
        (None, "?lastEventId=1-2", events[2:]),
        ("1-3", "?lastEventId=1-2", events[3:]),
        ("", "?lastEventId=1-2", events[2:]),
        (None, "?lastEventId=", events),
        ("", "", events),
    ]:
        async with broker.stream(session, cursor, query=query) as line:
            assert await line.rest() == rest


async def test_a_malformed_cursor_of_a_prepared_session_claims_nothing(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    assert (await refusal(broker, session, query="?lastEventId=x")).json["code"] == "invalid_cursor"
    assert upstream.calls == []
    assert (await broker.read(session))[-1].kind == "done"


@pytest.mark.parametrize(
    ("method", "headers"),
    [("HEAD", {}), ("GET", {"Sec-Purpose": "prefetch"}), ("GET", {"Sec-Purpose": "prefetch;prerender"})],
)
async def test_a_look_ahead_claims_nothing(
    broker: Broker, upstream: ScriptedUpstream, method: str, headers: dict[str, str]
) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    async with broker.stream(session, method=method, headers=headers) as line:
        assert line.status == 204
        assert line.headers["cache-control"] == "no-store"
    assert upstream.calls == []
    assert (await broker.read(session))[-1].kind == "done"


async def test_a_full_worker_asks_to_come_again(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, max_streams=1) as broker:
        session = await broker.prepare()
        async with started(broker, upstream) as (_, line, call):
            async with broker.stream(session) as other:
                await comes_again(other)
            answer = await broker.ask("GET", f"/stream/{session}")
            assert (answer.status, answer.code, answer.headers["Retry-After"]) == (503, "overloaded", "3")
            call.chunk("", finish="stop")
            call.done()
            await line.rest()
        upstream.replies = [plain]
        assert (await broker.read(session))[-1].kind == "done"


async def test_a_worker_has_so_many_viewers_and_no_more(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, max_streams=2) as broker:
        async with started(broker, upstream) as (session, _, _), broker.stream(session) as second:
            await second.take(1)
            async with broker.stream(session, "1-1") as third:
                await comes_again(third)


async def test_an_unknown_session_is_forgotten_after_its_time(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, session_ttl=1) as broker:
        session = await broker.prepare()
        async with asyncio.timeout(5):
            while (await broker.ask("HEAD", f"/stream/{session}")).status == 204:
                answer = await broker.ask("GET", f"/stream/{session}?lastEventId=1-0")
                if answer.status == 404:
                    break
        assert (await refusal(broker, session)).json["code"] == "session_not_found"
        assert upstream.calls == []


# Resuming off


async def test_without_resuming_a_session_streams_once(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, resume_ttl=0) as broker:
        async with started(broker, upstream) as (session, line, call):
            assert (await refusal(broker, session)).json["code"] == "already_claimed"
            event = await refusal(broker, session, "1-1")
            assert (event.json["code"], event.id) == ("already_claimed", "1-1.end")
            assert (await broker.ask("GET", f"/stream/{session}")).status == 409
            call.chunk("", finish="stop")
            call.done()
            assert (await line.rest())[-1].kind == "done"
        assert (await refusal(broker, session)).json["code"] == "already_claimed"
        assert (await broker.ask("GET", f"/stream/{session}")).code == "already_claimed"
        assert len(upstream.calls) == 1


async def test_without_resuming_nobody_waits_for_a_viewer_that_left(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, resume_ttl=0, disconnect_grace=20) as broker:
        async with started(broker, upstream) as (_, line, call):
            line.cut()
            await call.wait_gone()


async def test_without_resuming_a_cancelled_session_is_still_told_as_cancelled(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, resume_ttl=0) as broker:
        session = await broker.prepare()
        assert (await broker.cancel(session)).status == 202
        [event] = await broker.read(session)
        assert event.json["finishReason"] == "cancelled"


# Odd clients


async def test_an_old_client_gets_a_plain_body_that_ends_with_the_line(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    host, port = broker.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET /stream/{await broker.prepare()} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
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
    async with opened(broker.url, f"/stream/{UNKNOWN}/more") as line:
        assert line.status == 404
