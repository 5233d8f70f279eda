"""The Responses dialect from end to end: what is asked, what a page sees, and what is booked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from tests.broker import Broker, running
from tests.events import Connection, Event
from tests.money import MODEL, PRICE, Ledger, ledger, price_list, until
from tests.replies import body_of
from tests.responses import (
    CALL,
    CREATED,
    MESSAGE,
    USAGE,
    completed,
    delta,
    event,
    failed,
    incomplete,
    item_done,
    response,
    send,
)
from tests.scripted import Call, ScriptedUpstream
from tests.system.harness import running_valkey

WORDS = [CREATED, delta("Hel"), delta("lo"), item_done(MESSAGE)]


@pytest_asyncio.fixture
async def broker(valkey_url: str, upstream: ScriptedUpstream) -> AsyncIterator[Broker]:
    """One whose upstream has prices."""
    upstream.models = price_list()
    async with running(valkey_url, upstream) as broker:
        await broker.ask("GET", "/models")
        yield broker


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "Say it.", **fields}


async def prepared(broker: Broker, **fields: Any) -> tuple[str, int]:
    """A new session, and the estimate of its prompt."""
    answer = await broker.post(asked(**fields))
    assert answer.status == 201, answer.text
    return answer.json["sessionId"], answer.json["promptTokens"]


def answering(*events: dict[str, Any], mark: bool = False) -> Callable[[Call], None]:
    """A stream of these events that ends cleanly, with `[DONE]` or without."""

    def reply(call: Call) -> None:
        call.open()
        send(call, *events)
        if mark:
            call.event(b"[DONE]")
        call.end()

    return reply


async def answered(broker: Broker, upstream: ScriptedUpstream, *events: dict[str, Any]) -> list[Event]:
    """All events of a new session whose upstream answers so."""
    upstream.replies = [answering(*events)]
    session, _ = await prepared(broker)
    return await broker.read(session)


@asynccontextmanager
async def begun(
    broker: Broker, upstream: ScriptedUpstream, **fields: Any
) -> AsyncIterator[tuple[str, int, Connection, Call]]:
    """A session whose upstream has sent 30 bytes of text; its prompt, its first viewer and its call."""
    session, prompt = await prepared(broker, **fields)
    number = len(upstream.calls) + 1
    async with broker.stream(session) as connection:
        call = (await upstream.call(number)).open()
        send(call, CREATED, delta("x" * 30))
        await connection.take(2)
        yield session, prompt, connection, call


async def booked(broker: Broker) -> Ledger:
    """Return the spending of all clients."""
    return (await ledger(broker.redis))._replace(reserved_tokens=0, reserved_cost=0)


# Requests


async def test_a_request_goes_to_responses_streamed_and_not_stored(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [answering(*WORDS, completed())]
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Say it."}]}]
    session, _ = await prepared(
        broker, input=items, instructions="Be terse.", store=True, max_output_tokens=50
    )
    await broker.read(session)
    [call] = upstream.calls
    assert call.path.endswith("/api/v1/responses")
    assert len(call.body.pop("user")) > 8
    assert call.body == {
        "model": MODEL,
        "input": items,
        "instructions": "Be terse.",
        "max_output_tokens": 50,
        "store": False,
        "stream": True,
        "plugins": [{"id": "context-compression", "enabled": False}],
    }


async def test_the_number_of_dropped_items_is_returned(broker: Broker) -> None:
    items = [
        {"role": "user", "content": "x" * 400_000},
        MESSAGE,
        CALL,
        {"role": "user", "content": "Say it."},
    ]
    answer = await broker.post(asked(input=items))
    assert (answer.status, answer.json["droppedMessages"]) == (201, 3)


async def test_a_conversation_that_cannot_fit_is_refused_at_its_input(broker: Broker) -> None:
    answer = await broker.post(asked(input="x" * 400_000))
    assert (answer.status, answer.code) == (422, "prompt_too_long")
    assert answer.json["error"]["details"][0]["field"] == "input"


async def test_input_and_messages_together_are_refused(broker: Broker) -> None:
    answer = await broker.post(asked(messages=[{"role": "user", "content": "Hi"}]))
    assert (answer.status, answer.code) == (422, "invalid_request")
    assert [detail["field"] for detail in answer.json["error"]["details"]] == ["messages"]


async def test_an_idempotency_key_finds_its_session_again(broker: Broker) -> None:
    first, again, other = [
        await broker.post(asked(input=text), {"Idempotency-Key": "k"}) for text in ("Hi", "Hi", "Ho")
    ]
    assert (first.status, again.status, other.status) == (201, 200, 409)
    assert first.json["sessionId"] == again.json["sessionId"]


@pytest.mark.parametrize("status", [400, 402, 404, 429])
async def test_a_refusal_is_passed_on_and_costs_nothing(
    broker: Broker, upstream: ScriptedUpstream, status: int
) -> None:
    upstream.replies = [
        lambda call: call.reply(status, {"error": {"code": status, "message": "No."}}, {"Retry-After": "60"})
    ]
    session, _ = await prepared(broker)
    [end] = await broker.read(session)
    assert (end.kind, end.json["upstreamStatus"]) == ("error", status)
    assert await booked(broker) == Ledger(1)


# Events


@pytest.mark.parametrize("mark", [False, True])
async def test_events_are_relayed_unchanged_and_end_in_done(
    broker: Broker, upstream: ScriptedUpstream, mark: bool
) -> None:
    events = [*WORDS, completed(usage={**USAGE, "cost": 0.25})]
    upstream.replies = [answering(*events, mark=mark)]
    session, _ = await prepared(broker)
    *chunks, done = await broker.read(session)
    assert [chunk.data for chunk in chunks] == [json.dumps(each) for each in events]
    assert [chunk.id for chunk in chunks] == ["1-1", "1-2", "1-3", "1-4", "1-5"]
    assert (done.kind, done.id) == ("done", "1-6.end")
    told = done.json
    assert told.pop("ttftMs") <= told.pop("totalMs")
    assert told == {
        "finishReason": "stop",
        "nativeFinishReason": "completed",
        "model": MODEL,
        "provider": None,
        "generationId": "gen-response",
        "usage": {**USAGE, "cost": 0.25},
        "cost": 0.25,
        "estimated": False,
    }
    assert await booked(broker) == Ledger(1, 0, 15, 250_000_000)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([*WORDS, completed()], "stop"),
        ([CREATED, item_done(CALL), completed()], "tool_calls"),
        ([*WORDS, incomplete("max_output_tokens")], "length"),
        ([*WORDS, incomplete("content_filter")], "content_filter"),
    ],
)
async def test_each_good_end_has_its_reason_and_is_paid(
    broker: Broker, upstream: ScriptedUpstream, events: list[dict[str, Any]], reason: str
) -> None:
    *chunks, done = await answered(broker, upstream, *events)
    assert [chunk.kind for chunk in chunks] == ["chunk"] * len(events)
    assert (done.kind, done.json["finishReason"], done.json["estimated"]) == ("done", reason, False)
    assert await booked(broker) == Ledger(1, 0, 15, 15 * PRICE)


@pytest.mark.parametrize(
    ("end", "code", "retryable"),
    [
        (failed({"code": "server_error", "message": "It broke."}), "upstream_error", True),
        (failed({"code": "rate_limit_exceeded", "message": "It broke."}), "upstream_rate_limited", True),
        (failed({"code": "invalid_prompt", "message": "It broke."}), "upstream_error", False),
        (event("error", code="server_error", message="It broke."), "upstream_error", True),
        ({"error": {"code": 502, "message": "It broke."}}, "upstream_error", True),
    ],
)
async def test_a_failure_is_our_error_and_no_chunk(
    broker: Broker, upstream: ScriptedUpstream, end: dict[str, Any], code: str, retryable: bool
) -> None:
    *chunks, error = await answered(broker, upstream, *WORDS, end)
    assert [chunk.kind for chunk in chunks] == ["chunk"] * 4
    assert error.kind == "error"
    assert (error.json["code"], error.json["retryable"], error.json["message"]) == (
        code,
        retryable,
        "It broke.",
    )


@pytest.mark.parametrize("mark", [False, True])
async def test_an_answer_without_its_end_was_interrupted(
    broker: Broker, upstream: ScriptedUpstream, mark: bool
) -> None:
    upstream.replies = [answering(*WORDS, mark=mark)]
    session, prompt = await prepared(broker)
    *chunks, error = await broker.read(session)
    assert (len(chunks), error.json["code"]) == (4, "upstream_interrupted")
    assert await booked(broker) == Ledger(1, 1, prompt + 2, (prompt + 2) * PRICE)


async def test_the_last_event_needs_no_blank_line(broker: Broker, upstream: ScriptedUpstream) -> None:
    lines = "".join(f"data: {json.dumps(each)}\n\n" for each in WORDS) + f"data: {json.dumps(completed())}"
    upstream.replies = [body_of("text/event-stream", lines)]
    session, _ = await prepared(broker)
    assert (await broker.read(session))[-1].json["finishReason"] == "stop"


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_a_whole_response_is_one_chunk_and_done(
    broker: Broker, upstream: ScriptedUpstream, kind: str
) -> None:
    document = response(status="completed", output=[MESSAGE], usage=USAGE, error=None)
    upstream.replies = [body_of(kind, json.dumps(document, indent=1))]
    session, _ = await prepared(broker)
    chunk, done = await broker.read(session)
    assert chunk.json == {"type": "response.completed", "sequence_number": 0, "response": document}
    assert (done.json["finishReason"], done.json["usage"]) == ("stop", USAGE)
    assert await booked(broker) == Ledger(1, 0, 15, 15 * PRICE)


@pytest.mark.parametrize(
    ("document", "code"),
    [
        (response(status="failed", error={"code": "server_error", "message": "It broke."}), "upstream_error"),
        ({"error": {"code": 502, "message": "It broke."}}, "upstream_error"),
        (response(status="queued"), "upstream_invalid"),
        ({"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}, "upstream_invalid"),
    ],
)
async def test_an_unfinished_response_document_is_an_error(
    broker: Broker, upstream: ScriptedUpstream, document: dict[str, Any], code: str
) -> None:
    upstream.replies = [body_of("application/json", json.dumps(document))]
    session, _ = await prepared(broker)
    [error] = await broker.read(session)
    assert (error.kind, error.json["code"]) == ("error", code)


# Coming, going and cancelling


async def test_a_cancel_stops_the_upstream_and_costs_the_text(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with begun(broker, upstream) as (session, prompt, connection, call):
        send(
            call, delta("x" * 30, "reasoning_summary_text", 1), delta("x" * 30, "function_call_arguments", 2)
        )
        send(call, item_done({"type": "reasoning", "summary": [], "encrypted_content": "x" * 30}, 3))
        await connection.take(3)
        assert (await broker.cancel(session)).status == 202
        await call.wait_gone()
        [end] = await connection.rest()
    assert (end.kind, end.json["finishReason"], end.json["estimated"]) == ("done", "cancelled", True)
    assert await booked(broker) == Ledger(1, 1, prompt + 40, (prompt + 40) * PRICE)


async def test_a_viewer_comes_back_to_any_worker(
    valkey_url: str, broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with (
        running(valkey_url, upstream) as other,
        begun(broker, upstream) as (session, _, connection, call),
    ):
        async with other.stream(session, "1-1") as second:
            assert [each.id for each in await second.take(1)] == ["1-2"]
            send(call, completed())
            call.end()
            assert [each.kind for each in await second.rest()] == ["chunk", "done"]
        assert [each.kind for each in await connection.rest()] == ["chunk", "done"]
        assert [each.kind for each in await other.read(session)] == ["chunk"] * 3 + ["done"]
    assert len(upstream.calls) == 1


async def test_the_short_form_has_text_and_whole_calls(broker: Broker, upstream: ScriptedUpstream) -> None:
    thought = delta("Hm", "reasoning_summary_text", 1)
    upstream.replies = [answering(*WORDS, thought, item_done(CALL, 2), completed())]
    session, _ = await prepared(broker)
    async with broker.stream(session, query="?events=token") as connection:
        start, *tokens, done = await connection.rest()
    assert (start.kind, done.kind, done.id) == ("start", "done", "1-8.end")
    assert [(each.id, each.json) for each in tokens] == [
        ("1-2", {"text": "Hel"}),
        ("1-3", {"text": "lo"}),
        ("1-5", {"reasoning": "Hm"}),
        ("1-6", {"toolCalls": [CALL]}),
    ]


async def test_a_complete_response_has_a_short_form_too(broker: Broker, upstream: ScriptedUpstream) -> None:
    document = response(status="completed", output=[MESSAGE], usage=USAGE)
    upstream.replies = [body_of("application/json", json.dumps(document))]
    session, _ = await prepared(broker)
    async with broker.stream(session, query="?events=token") as connection:
        _, token, _ = await connection.rest()
    assert token.json == {"text": "Hello"}


async def test_a_page_that_leaves_pays_for_the_written_text(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.models = price_list()
    async with running(valkey_url, upstream, disconnect_grace=0) as broker:
        async with begun(broker, upstream) as (_, prompt, _, call):
            pass
        await call.wait_gone()

        async def settled() -> bool:
            return (await booked(broker)).requests == 1

        await until(settled, within=10)
        assert await booked(broker) == Ledger(1, 1, prompt + 10, (prompt + 10) * PRICE)


async def test_pages_notice_nothing_while_redis_is_away(upstream: ScriptedUpstream) -> None:
    async with running_valkey() as valkey, running(valkey.url, upstream) as broker:
        async with begun(broker, upstream) as (session, _, connection, call):
            valkey.kill()
            send(call, delta("more"))
            assert [each.json["delta"] for each in await connection.take(1)] == ["more"]
            await valkey.start()  # empty
            send(call, completed())
            call.end()
            assert [each.kind for each in await connection.rest()] == ["chunk", "done"]

        async def told() -> bool:
            return [each.kind for each in await broker.read(session)] == ["chunk"] * 4 + ["done"]

        await until(told, within=20)
        assert len(upstream.calls) == 1


# Booking


async def test_a_failure_that_brings_its_bill_is_paid_by_it(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    end = failed({"code": "server_error", "message": "It broke."}, usage={**USAGE, "cost": 0.001})
    assert (await answered(broker, upstream, *WORDS, end))[-1].kind == "error"
    assert await booked(broker) == Ledger(1, 0, 15, 1_000_000)


async def test_a_usage_behind_an_error_is_booked_and_not_waited_for(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with begun(broker, upstream) as (_, _, connection, call):
        send(call, event("error", message="It broke."))
        assert [each.kind for each in await connection.rest()] == ["error"]
        assert (await booked(broker)).estimated == 1
        send(call, failed(None, usage=USAGE))

        async def corrected() -> bool:
            return await booked(broker) == Ledger(1, 0, 15, 15 * PRICE)

        await until(corrected, within=10)


async def test_an_end_without_usage_is_estimated_from_the_text(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [answering(CREATED, completed(usage=None, output=[MESSAGE, CALL]))]
    session, prompt = await prepared(broker)
    done = (await broker.read(session))[-1]
    assert (done.json["usage"], done.json["estimated"]) == (None, True)
    assert await booked(broker) == Ledger(1, 1, prompt + 6, (prompt + 6) * PRICE)


@pytest.mark.parametrize("named", ["header", "response"])
async def test_openrouters_record_is_fetched_by_its_id(
    broker: Broker, upstream: ScriptedUpstream, named: str
) -> None:
    name = "gen-header" if named == "header" else "gen-response"
    record = {"total_cost": 0.000123, "native_tokens_prompt": 11, "native_tokens_completion": 7}
    upstream.generations[name] = record
    session, _ = await prepared(broker)
    async with broker.stream(session) as connection:
        call = await upstream.call()
        call.open(**({"x_generation_id": name} if named == "header" else {}))
        send(call, CREATED, delta("Hello"))
        await connection.take(2)
        call.close()
        await connection.rest()

    async def corrected() -> bool:
        return await booked(broker) == Ledger(1, 0, 18, 123_000)

    await until(corrected, within=15)
    assert upstream.looks == [name]


async def test_budgets_hold_as_for_chats(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.models, upstream.replies = price_list(), [answering(*WORDS, completed())]
    async with running(valkey_url, upstream, daily_tokens=200) as broker:
        refused = await broker.post(asked(max_output_tokens=500))
        assert (refused.status, refused.json["error"]["details"][0]["field"]) == (422, "max_output_tokens")
        session, _ = await prepared(broker, max_output_tokens=100)
        await broker.read(session)
        left = (await broker.ask("GET", "/usage")).json["limits"]["tokens"]["left"]
        assert left == 200 - 15
        answer = await broker.post(asked(max_output_tokens=175))
        assert (answer.status, answer.code) == (429, "budget_exceeded")


async def test_other_upstreams_get_pictures_only_as_data(valkey_url: str, upstream: ScriptedUpstream) -> None:
    picture = {"type": "input_image", "image_url": "https://example.com/a.png"}
    async with running(valkey_url, upstream, upstream_kind="openai") as broker:
        answer = await broker.post(asked(input=[{"role": "user", "content": [picture]}]))
        assert (answer.status, answer.json["error"]["details"][0]["field"]) == (
            422,
            "input.0.content.0.image_url",
        )


async def test_the_systems_message_is_the_head_of_the_instructions(
    valkey_url: str, upstream: ScriptedUpstream, tmp_path: Any
) -> None:
    file = tmp_path / "system.txt"
    file.write_text("Ours.")
    upstream.replies = [answering(*WORDS, completed())]
    async with running(valkey_url, upstream, system_file=file) as broker:
        session, _ = await prepared(broker, instructions="Be terse.")
        await broker.read(session)
    assert upstream.calls[0].body["instructions"] == "Ours.\n\nBe terse."
