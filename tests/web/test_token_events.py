"""``?events=token``: a session in the short form, over HTTP, on any worker."""

from __future__ import annotations

import json

import pytest

from tests.broker import Broker, running
from tests.events import Event
from tests.replies import plain, refuse
from tests.scripted import Call, ScriptedUpstream
from tests.web.outcomes import ids, started, text

TOKEN = "?events=token"


def words(call: Call) -> None:
    """A chunk that says nothing before, between and after those that say something."""
    call.open()
    call.chunk("")
    for word in ("one ", "two ", "", "three"):
        call.chunk(word)
    call.chunk("", finish="stop")
    call.usage(cost=0.5)
    call.done()


async def tokens(broker: Broker, session: str, cursor: str | None = None, query: str = TOKEN) -> list[Event]:
    async with broker.stream(session, cursor, query=query) as connection:
        assert connection.status == 200
        return await connection.rest()


def said(events: list[Event]) -> str:
    return "".join(event.json.get("text", "") for event in events if event.kind == "token")


async def test_a_session_is_start_tokens_and_done(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [words]
    session = await broker.prepare()
    events = await tokens(broker, session)
    assert [(event.kind, event.id) for event in events] == [
        ("start", None),
        ("token", "1-2"),
        ("token", "1-3"),
        ("token", "1-5"),
        ("done", "1-8.end"),
    ]
    assert events[0].data == "{}"
    assert [event.json for event in events[1:4]] == [{"text": "one "}, {"text": "two "}, {"text": "three"}]
    assert events[-1] == (await broker.read(session))[-1]
    assert len(upstream.calls) == 1


async def test_token_events_come_live(broker: Broker, upstream: ScriptedUpstream) -> None:
    session = await broker.prepare()
    async with broker.stream(session, query=TOKEN) as connection:
        call = (await upstream.call()).open()
        assert await connection.event() == Event("start", "{}", None)  # before any contents
        call.chunk("one")
        assert await connection.event() == Event("token", '{"text":"one"}', "1-1")
        call.event(b'{"choices":[{"index":0,"delta":{"reasoning":"Hm"}}]}')
        assert await connection.event() == Event("token", '{"reasoning":"Hm"}', "1-2")


async def test_a_cursor_of_one_form_is_valid_in_the_other(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [words]
    session = await broker.prepare()
    short, long = await tokens(broker, session), await broker.read(session)
    for n in range(1, 8):
        cursor = f"1-{n}"
        rest = await tokens(broker, session, cursor)
        assert rest == [event for event in short if event.id and int(event.id[2:].partition(".")[0]) > n]
        assert await tokens(broker, session, query=f"{TOKEN}&lastEventId={cursor}") == rest
    for event in short[1:-1]:
        assert event.id is not None
        assert await broker.read(session, event.id) == long[int(event.id[2:]) :]
    async with broker.stream(session, short[-1].id, query=TOKEN) as connection:
        assert connection.status == 204


async def test_another_worker_sends_the_same(
    valkey_url: str, broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with (
        running(valkey_url, upstream) as other,
        started(broker, upstream) as (session, _, call),
        other.stream(session, query=TOKEN) as connection,
    ):
        assert [event.kind for event in await connection.take(2)] == ["start", "token"]
        call.chunk(" world")
        [live] = await connection.take(1)
        assert (live.id, live.json) == ("1-2", {"text": " world"})
        call.chunk("", finish="stop")
        call.done()
        [done] = await connection.rest()
        assert await tokens(broker, session, "1-1") == [live, done]
        assert await tokens(other, session, "1-1") == [live, done]


async def test_viewers_of_both_forms_get_the_same_answer(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with (
        started(broker, upstream) as (session, long, call),
        broker.stream(session, query=TOKEN) as short,
    ):
        for n in range(20):
            call.chunk(f" {n}")
        call.done()
        heard, rest = await short.rest(), await long.rest()
    assert said(heard) == "Hello" + text(rest)
    assert ids(heard)[2:] == ids(rest)


async def test_heartbeats_are_the_same_in_both_forms(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, heartbeat=0.1, ping_events=True) as broker:
        session = await broker.prepare()
        async with broker.stream(session, query=TOKEN) as connection:
            await upstream.call()
            assert [event.kind for event in await connection.take(3)] == ["start", "ping", "ping"]


async def test_an_error_is_the_same_in_both_forms(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [refuse(402)]
    session = await broker.prepare()
    events = await tokens(broker, session)
    assert [event.kind for event in events] == ["start", "error"]
    assert events[1:] == await broker.read(session)


async def test_the_form_may_be_named_or_left_empty(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    for query in ("?events=chunk", "?events="):
        assert await tokens(broker, session, query=query) == await broker.read(session)


@pytest.mark.parametrize("value", ["tokens", "TOKEN", "x", "%00"])
async def test_an_unknown_form_is_refused_and_claims_nothing(
    broker: Broker, upstream: ScriptedUpstream, value: str
) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    [event] = await tokens(broker, session, query=f"?events={value}")
    assert (event.kind, event.id) == ("error", "1-1.end")
    assert (event.json["code"], event.json["final"], event.json["retryable"]) == (
        "invalid_request",
        True,
        False,
    )
    assert event.json["message"] == "events: Must be chunk or token, or left out."
    answer = await broker.ask("GET", f"/stream/{session}?events={value}")
    assert (answer.status, answer.code) == (422, "invalid_request")
    assert answer.json["error"]["details"][0]["field"] == "events"
    assert upstream.calls == []
    assert said(await tokens(broker, session)) == "Hello world"


async def test_a_session_that_streams_once_does_so_in_either_form(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [words]
    async with running(valkey_url, upstream, resume_ttl=0) as broker:
        session = await broker.prepare()
        assert said(await tokens(broker, session)) == "one two three"
        [refused] = await tokens(broker, session)
        assert json.loads(refused.data)["code"] in ("already_claimed", "session_not_found")


async def test_an_answer_that_came_whole_is_one_token(broker: Broker, upstream: ScriptedUpstream) -> None:
    message = {"role": "assistant", "content": "whole", "reasoning": "Hm"}
    body = {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    upstream.replies = [lambda call: call.reply(200, body)]
    events = await tokens(broker, await broker.prepare())
    assert [event.kind for event in events] == ["start", "token", "done"]
    assert events[1].json == {"text": "whole", "reasoning": "Hm"}
