"""The answers to an EventSource, and to other callers, in each state of a session."""

from __future__ import annotations

import asyncio

import pytest

from tests.broker import Broker, running
from tests.events import Connection, Event
from tests.replies import plain
from tests.scripted import PATIENCE, ScriptedUpstream
from tests.web.outcomes import ids, started, text

UNKNOWN = "00000000-1111-4222-8333-444444444444"
NO_REDIS = "unix:///nowhere/valkey.sock"


async def refusal(broker: Broker, session: str, cursor: str | None = None, query: str = "") -> Event:
    """Return the one event of a refused connection."""
    async with broker.stream(session, cursor, query=query) as connection:
        assert connection.status == 200
        [event] = await connection.rest()
        assert event.kind == "error"
        return event


async def comes_again(connection: Connection) -> None:
    """Return True if this connection asks its page to reconnect, and sends nothing else."""
    assert connection.status == 200
    assert await connection.rest() == []
    [retry, comment] = connection.blocks
    assert 2400 <= int(retry.removeprefix(b"retry: ")) <= 3600
    assert comment.startswith(b":")


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
    async with broker.stream(session, "1-0") as connection:
        await comes_again(connection)
    answer = await broker.ask("GET", f"/stream/{session}?lastEventId=1-3")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "3")
    assert upstream.calls == []
    assert (await broker.read(session))[-1].kind == "done"


async def test_a_running_session_is_replayed_and_followed(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with started(broker, upstream) as (session, connection, call):
        call.chunk(" world")
        await connection.take(1)
        async with broker.stream(session) as late, broker.stream(session, "1-1") as later:
            assert text(await late.take(2)) == "Hello world"
            assert text(await later.take(1)) == " world"
            call.chunk("!", finish="stop")
            call.done()
            rest = await connection.rest()
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
    async with (
        started(broker, upstream) as (session, connection, call),
        broker.stream(session, "1-3") as ahead,
    ):
        assert len([await ahead.block(), await ahead.block()]) == 2
        for word in "234":
            call.chunk(word)
        await connection.take(3)
        assert ids(await ahead.take(1)) == ["1-4"]
        call.chunk("", finish="stop")
        call.done()
        assert ids(await ahead.rest()) == ["1-5", "1-6.end"]


async def test_a_cursor_ahead_of_the_end_gets_a_gap_error(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with started(broker, upstream) as (session, _, call), broker.stream(session, "1-30") as ahead:
        call.chunk("", finish="stop")
        call.done()
        [event] = await ahead.rest()
        assert (event.json["code"], event.id) == ("replay_gap", "1-30.end")


async def test_a_cursor_beyond_a_finished_session_gets_a_gap_error(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    await broker.read(session)
    event = await refusal(broker, session, "1-6")
    assert (event.json["code"], event.json["final"], event.id) == ("replay_gap", True, "1-6.end")


@pytest.mark.parametrize("cursor", ["1-5.end", "2-0.end", "1-9999999999999999.end"])
@pytest.mark.parametrize("session", [UNKNOWN, "no-session"])
async def test_a_terminal_cursor_is_204_without_asking_redis(
    upstream: ScriptedUpstream, cursor: str, session: str
) -> None:
    async with running(NO_REDIS, upstream) as broker, broker.stream(session, cursor) as connection:
        assert connection.status == 204


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
async def test_an_unknown_session_gets_a_final_error(
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
        async with broker.stream(session, cursor, query=query) as connection:
            assert await connection.rest() == rest


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
async def test_head_and_prefetch_claim_nothing(
    broker: Broker, upstream: ScriptedUpstream, method: str, headers: dict[str, str]
) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    async with broker.stream(session, method=method, headers=headers) as connection:
        assert connection.status == 204
        assert connection.headers["cache-control"] == "no-store"
    assert upstream.calls == []
    assert (await broker.read(session))[-1].kind == "done"


async def test_a_full_worker_asks_to_come_again(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, max_streams=1) as broker:
        session = await broker.prepare()
        async with started(broker, upstream) as (_, connection, call):
            async with broker.stream(session) as other:
                await comes_again(other)
            answer = await broker.ask("GET", f"/stream/{session}")
            assert (answer.status, answer.code, answer.headers["Retry-After"]) == (503, "overloaded", "3")
            call.chunk("", finish="stop")
            call.done()
            await connection.rest()
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
        async with asyncio.timeout(PATIENCE):
            while (await broker.ask("HEAD", f"/stream/{session}")).status == 204:
                answer = await broker.ask("GET", f"/stream/{session}?lastEventId=1-0")
                if answer.status == 404:
                    break
        assert (await refusal(broker, session)).json["code"] == "session_not_found"
        assert upstream.calls == []


# Resuming off


async def test_without_resuming_a_session_streams_once(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, resume_ttl=0) as broker:
        async with started(broker, upstream) as (session, connection, call):
            assert (await refusal(broker, session)).json["code"] == "already_claimed"
            event = await refusal(broker, session, "1-1")
            assert (event.json["code"], event.id) == ("already_claimed", "1-1.end")
            assert (await broker.ask("GET", f"/stream/{session}")).status == 409
            call.chunk("", finish="stop")
            call.done()
            assert (await connection.rest())[-1].kind == "done"
        assert (await refusal(broker, session)).json["code"] == "already_claimed"
        assert (await broker.ask("GET", f"/stream/{session}")).code == "already_claimed"
        assert len(upstream.calls) == 1


async def test_without_resuming_nobody_waits_for_a_viewer_that_left(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, resume_ttl=0, disconnect_grace=20) as broker:
        async with started(broker, upstream) as (_, connection, call):
            connection.cut()
            await call.wait_gone()


async def test_a_cancelled_session_is_cancelled_without_resuming_too(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, resume_ttl=0) as broker:
        session = await broker.prepare()
        assert (await broker.cancel(session)).status == 202
        [event] = await broker.read(session)
        assert event.json["finishReason"] == "cancelled"
