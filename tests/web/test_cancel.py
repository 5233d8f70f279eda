"""DELETE /stream/<id> and POST /stream/<id>/cancel in every state of a session."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import pytest

from tests.broker import Answer, Broker, running
from tests.scripted import Call, Reply, ScriptedUpstream
from tests.stopwatch import Stopwatch

if TYPE_CHECKING:
    from tests.events import Event

UNKNOWN = "00000000-1111-4222-8333-444444444444"


async def by_delete(broker: Broker, session: str) -> Answer:
    return await broker.ask("DELETE", f"/stream/{session}")


async def by_post(broker: Broker, session: str) -> Answer:
    return await broker.ask("POST", f"/stream/{session}/cancel")


async def by_beacon(broker: Broker, session: str) -> Answer:
    """As `navigator.sendBeacon` posts a text."""
    headers = {"Content-Type": "text/plain;charset=UTF-8", "Origin": "http://localhost:5173"}
    return await broker.ask("POST", f"/stream/{session}/cancel", data="bye", headers=headers)


Way = Callable[[Broker, str], Awaitable[Answer]]
WAYS = pytest.mark.parametrize("cancel", [by_delete, by_post, by_beacon])


def accepted(answer: Answer) -> bool:
    return (answer.status, answer.json) == (202, {"state": "cancelled"})


def assert_cancelled(event: Event, event_id: str) -> None:
    assert (event.kind, event.id) == ("done", event_id)
    assert event.json["finishReason"] == "cancelled"


@WAYS
async def test_a_prepared_session_can_no_longer_be_claimed(
    broker: Broker, upstream: ScriptedUpstream, cancel: Way
) -> None:
    session = await broker.prepare()
    assert accepted(await cancel(broker, session))
    for _ in range(2):
        [event] = await broker.read(session)
        assert_cancelled(event, "1-1.end")
        assert (event.json["cost"], event.json["estimated"]) == (0, False)
    assert upstream.calls == []


@WAYS
async def test_a_running_session_ends_for_all_its_viewers(
    broker: Broker, upstream: ScriptedUpstream, cancel: Way
) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as connection, broker.stream(session) as other:
        call = (await upstream.call()).open()
        call.chunk("Hello")
        await connection.take(1)
        await other.take(1)
        stopwatch = Stopwatch()
        assert accepted(await cancel(broker, session))
        await call.wait_gone()
        assert stopwatch.seconds < 1
        [event] = await connection.rest()
        assert_cancelled(event, "1-2.end")
        assert [event] == await other.rest()
        assert event.json["estimated"] is True
    assert (await broker.read(session))[-1] == event


def silent(call: Call) -> None:
    """The upstream has the request and says nothing."""


def thinking(call: Call) -> None:
    call.open()
    call.comment()


def refusing(call: Call) -> None:
    call.reply(503, {}, {"Retry-After": "10"})


@pytest.mark.parametrize("reply", [silent, thinking])
async def test_a_session_can_be_stopped_before_its_first_token(
    broker: Broker, upstream: ScriptedUpstream, reply: Reply
) -> None:
    upstream.replies = [reply]
    session = await broker.prepare()
    async with broker.stream(session) as connection:
        call = await upstream.call()
        stopwatch = Stopwatch()
        assert accepted(await broker.cancel(session))
        await call.wait_gone()
        assert stopwatch.seconds < 1
        [event] = await connection.rest()
    assert_cancelled(event, "1-1.end")
    assert event.json["ttftMs"] is None


async def test_a_session_can_be_stopped_while_it_waits_to_ask_again(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [refusing]
    session = await broker.prepare()
    async with broker.stream(session) as connection:
        await upstream.call()
        assert accepted(await broker.cancel(session))
        [event] = await connection.rest()
    assert_cancelled(event, "1-1.end")
    assert len(upstream.calls) == 1


async def test_cancelling_before_the_request_costs_nothing(valkey_url: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and nobody listens
        url = "http://{}:{}".format(*nobody.getsockname())
        async with running(valkey_url, url) as broker:
            session = await broker.prepare()
            async with broker.stream(session) as connection:
                assert accepted(await broker.cancel(session))
                [event] = await connection.rest()
    assert_cancelled(event, "1-1.end")
    assert (event.json["cost"], event.json["estimated"]) == (0, False)


async def test_cancelling_twice_is_cancelling_once(broker: Broker, upstream: ScriptedUpstream) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as connection:
        (await upstream.call()).open()
        answers = await asyncio.gather(*(broker.cancel(session) for _ in range(5)))
        assert {answer.json["state"] for answer in answers} == {"cancelled"}
        assert {answer.status for answer in answers} <= {200, 202}
        assert_cancelled((await connection.rest())[-1], "1-1.end")
    last = await broker.cancel(session)
    assert (last.status, last.json) == (200, {"state": "cancelled"})


async def test_cancelling_a_prepared_session_twice_works(broker: Broker) -> None:
    session = await broker.prepare()
    assert accepted(await broker.cancel(session))
    again = await broker.cancel(session)
    assert (again.status, again.json) == (200, {"state": "cancelled"})


def ends_well(call: Call) -> None:
    call.open()
    call.chunk("Hello", finish="stop")
    call.done()


def ends_badly(call: Call) -> None:
    call.reply(400, {})


@pytest.mark.parametrize(("reply", "state"), [(ends_well, "done"), (ends_badly, "failed")])
async def test_a_finished_session_stays_as_it_is(
    broker: Broker, upstream: ScriptedUpstream, reply: Reply, state: str
) -> None:
    upstream.replies = [reply]
    session = await broker.prepare()
    events = await broker.read(session)
    answer = await broker.cancel(session)
    assert (answer.status, answer.json) == (200, {"state": state})
    assert await broker.read(session) == events


@pytest.mark.parametrize("session", [UNKNOWN, "malformed"])
@WAYS
async def test_an_unknown_session_cannot_be_cancelled(broker: Broker, session: str, cancel: Way) -> None:
    answer = await cancel(broker, session)
    assert (answer.status, answer.code) == (404, "session_not_found")


async def test_an_accepted_cancel_of_an_ending_session_stands(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    """The last chunk and the cancel come at once: whichever wins, the answer and the end agree."""
    outcomes = set()
    for number in range(1, 31):
        session = await broker.prepare()
        async with broker.stream(session) as connection:
            call = (await upstream.call(number)).open()
            call.chunk("Hello")
            await connection.take(1)
            asking = asyncio.create_task(broker.cancel(session))
            for _ in range(number):  # so that every order is met
                await asyncio.sleep(0)
            call.chunk("", finish="stop")
            call.done()
            answer, rest = await asking, await connection.rest()
        reason = rest[-1].json["finishReason"]
        if answer.status == 202:
            assert (answer.json["state"], reason) == ("cancelled", "cancelled")
        else:
            assert (answer.status, answer.json["state"], reason) == (200, "done", "stop")
        outcomes.add(reason)
    assert outcomes <= {"cancelled", "stop"}


async def test_a_session_that_is_being_claimed_can_be_cancelled(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    for number in range(30):
        session = await broker.prepare()

        async def cancel(session: str = session, steps: int = number) -> Answer:
            for _ in range(steps):
                await asyncio.sleep(0)
            return await broker.cancel(session)

        events, answer = await asyncio.gather(broker.read(session), cancel())
        assert accepted(answer)
        assert_cancelled(events[-1], "1-1.end")
    for call in upstream.calls:
        await call.wait_gone()


async def test_a_session_can_be_cancelled_from_another_worker(
    valkey_url: str, broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream) as other:
        session = await broker.prepare()
        async with broker.stream(session) as connection:
            call = (await upstream.call()).open()
            call.chunk("Hello")
            await connection.take(1)
            stopwatch = Stopwatch()
            assert accepted(await other.cancel(session))
            await call.wait_gone()
            assert stopwatch.seconds < 1
            assert_cancelled((await connection.rest())[-1], "1-2.end")
        assert (await other.cancel(session)).json == {"state": "cancelled"}


async def test_a_prepared_session_can_be_cancelled_on_any_worker(
    valkey_url: str, broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream) as other:
        session = await broker.prepare()
        assert accepted(await other.cancel(session))
        assert_cancelled((await broker.read(session))[-1], "1-1.end")
    assert upstream.calls == []
