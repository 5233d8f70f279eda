"""POST /prepare: what it takes, what it refuses, and that it sends nothing upstream."""

from __future__ import annotations

import asyncio
import gzip
import json
import uuid
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.broker import KEY, QUESTION, Broker, running
from tests.scripted import PATIENCE, Call, ScriptedUpstream


def plain(call: Call) -> None:
    call.open()
    call.chunk("Hello", finish="stop")
    call.done()


async def sent(broker: Broker, upstream: ScriptedUpstream, **fields: Any) -> Call:
    """The upstream request of a new session."""
    upstream.replies = [plain]
    await broker.read(await broker.prepare(**fields))
    return upstream.calls[-1]


async def test_a_session_is_made_and_nothing_is_sent(broker: Broker, upstream: ScriptedUpstream) -> None:
    answer = await broker.post()
    session = answer.json["sessionId"]
    assert answer.status == 201
    assert uuid.UUID(session).version == 4
    assert answer.headers["Location"] == f"{urlsplit(broker.url).path}/stream/{session}"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json == {
        "sessionId": session,
        "expiresIn": 600,
        "model": "scripted/model-1",
        "promptTokens": answer.json["promptTokens"],
        "maxOutputTokens": 4096,
        "droppedMessages": 0,
    }
    assert 0 < answer.json["promptTokens"] < 100
    assert upstream.calls == []


async def test_the_request_goes_upstream_with_our_key(broker: Broker, upstream: ScriptedUpstream) -> None:
    call = await sent(broker, upstream, temperature=0.5, stop=["\n"])
    assert call.path == "/api/v1/chat/completions"
    assert call.headers["authorization"] == f"Bearer {KEY}"
    assert call.headers["x-title"] == call.headers["x-openrouter-title"] == "Session Broker"
    assert "http-referer" not in call.headers
    body = {
        name: call.body[name]
        for name in ("model", "messages", "temperature", "stop", "stream", "stream_options")
    }
    assert body == {
        **QUESTION,
        "temperature": 0.5,
        "stop": ["\n"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert call.body["max_tokens"] == 4096


async def test_the_upstream_gets_nothing_about_the_client(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    headers = {
        "Cookie": "a=b",
        "Authorization": "Bearer mine",
        "X-Forwarded-For": "10.1.2.3",
        "User-Agent": "secret",
    }
    async with broker.stream(session, headers=headers) as connection:
        await connection.rest()
    call = upstream.calls[0]
    assert "cookie" not in call.headers
    assert "x-forwarded-for" not in call.headers
    assert "secret" not in call.headers["user-agent"]
    assert call.body["user"].startswith("u_")
    assert "127.0.0.1" not in json.dumps(call.body)


async def test_the_pages_origin_is_the_referer(
    valkey_url: str, broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    answer = await broker.post(headers={"Origin": "http://localhost:5173"})
    await broker.read(answer.json["sessionId"])
    assert upstream.calls[0].headers["http-referer"] == "http://localhost:5173"
    async with running(valkey_url, upstream, referer="https://chat.example", x_title="My chat") as named:
        answer = await named.post(headers={"Origin": "http://localhost:5173"})
        await named.read(answer.json["sessionId"])
    assert upstream.calls[1].headers["http-referer"] == "https://chat.example"
    assert upstream.calls[1].headers["x-title"] == "My chat"


async def test_a_session_waits_so_long_as_it_says(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, session_ttl=7) as broker:
        assert (await broker.post()).json["expiresIn"] == 7


async def test_a_conversation_that_is_too_long_loses_its_oldest_turns(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    messages = [{"role": role, "content": "x" * 300} for _ in range(5) for role in ("user", "assistant")]
    async with running(valkey_url, upstream, max_prompt_tokens=500) as broker:
        answer = await broker.post({**QUESTION, "messages": [*messages, *QUESTION["messages"]]})
        upstream.replies = [plain]
        await broker.read(answer.json["sessionId"])
        kept = upstream.calls[0].body["messages"]
        assert kept == [*messages, *QUESTION["messages"]][-len(kept) :]
        assert answer.json["droppedMessages"] == 11 - len(kept) > 0
        assert answer.json["promptTokens"] <= 500
        too_long = await broker.post({**QUESTION, "messages": [{"role": "user", "content": "x" * 3000}]})
    assert (too_long.status, too_long.code) == (422, "prompt_too_long")
    assert too_long.json["error"]["details"][0]["field"] == "messages"


# Refusals


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}]}', 400, "invalid_json"),
        (b'{"temperature": NaN}', 400, "invalid_json"),
        (b'{"temperature": Infinity}', 400, "invalid_json"),
        (b'{"a": 1, "a": 2}', 400, "invalid_json"),
        (b'{"a": "\\ud83d"}', 400, "invalid_json"),
        (b"[" * 5000 + b"]" * 5000, 422, "invalid_request"),
        (b"[" * 100 + b"]" * 100, 422, "invalid_request"),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, 422, "invalid_request"),
        (b"[]", 422, "invalid_request"),
        (b"null", 422, "invalid_request"),
        (b'"text"', 422, "invalid_request"),
        (b"{}", 422, "invalid_request"),
        (b'{"model": "m", "messages": []}', 422, "invalid_request"),
    ],
)
async def test_a_body_that_is_not_a_request_is_refused(
    broker: Broker, body: bytes, status: int, code: str
) -> None:
    answer = await broker.post(body)
    assert (answer.status, answer.code) == (status, code)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"stream": False}, "stream"),
        ({"temperature": 3}, "temperature"),
        ({"made_up": 1}, "made_up"),
        ({"plugins": [{"id": "web"}]}, "plugins"),
        ({"model": "a/b:online"}, "model"),
        ({"model": None}, "model"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0"),
    ],
)
async def test_a_refused_field_is_named(broker: Broker, changes: dict[str, Any], field: str) -> None:
    answer = await broker.post({**QUESTION, **changes})
    assert (answer.status, answer.code) == (422, "invalid_request")
    details = answer.json["error"]["details"]
    assert any(detail["field"].startswith(field) for detail in details), details
    assert all(set(detail) == {"field", "message"} for detail in details)


async def test_a_model_that_is_not_allowed_is_refused(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, allowed_models=("scripted/*",)) as broker:
        await broker.prepare()
        for changes in ({"model": "other/model"}, {"models": ["scripted/model-1", "other/model"]}):
            answer = await broker.post({**QUESTION, **changes})
            assert (answer.status, answer.code) == (403, "model_not_allowed")


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
    ],
)
async def test_only_json_is_accepted(broker: Broker, kind: str) -> None:
    answer = await broker.post(headers={"Content-Type": kind})
    assert (answer.status, answer.code) == (415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON"])
async def test_json_may_be_called_by_its_other_names(broker: Broker, kind: str) -> None:
    assert (await broker.post(headers={"Content-Type": kind})).status == 201


def body_of_size(size: int) -> bytes:
    body = json.dumps(QUESTION).encode()
    return body + b" " * (size - len(body))


async def in_pieces(body: bytes) -> Any:
    for start in range(0, len(body), 1000):
        yield body[start : start + 1000]


async def test_a_body_may_be_as_large_as_the_limit_and_no_larger(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, max_body=10_000) as broker:
        assert (await broker.post(body_of_size(10_000))).status == 201
        for size in (10_001, 50_000, 500_000):
            answer = await broker.post(body_of_size(size))
            assert (answer.status, answer.code) == (413, "body_too_large")


async def test_a_body_without_a_length_has_the_same_limit(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, max_body=10_000) as broker:
        headers = {"Content-Type": "application/json"}
        for size, status in ((10_000, 201), (10_001, 413), (500_000, 413)):
            data = in_pieces(body_of_size(size))
            answer = await broker.ask("POST", "/prepare", data=data, headers=headers)
            assert answer.status == status, answer.text


async def test_a_compressed_body_is_refused_unread(broker: Broker) -> None:
    for _ in range(2):
        answer = await broker.post(gzip.compress(b"{}", mtime=0), {"Content-Encoding": "gzip"})
        assert (answer.status, answer.code) == (415, "unsupported_media_type")


async def test_a_client_that_leaves_during_its_body_does_no_harm(broker: Broker) -> None:
    address = urlsplit(broker.url)
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST {address.path}/prepare HTTP/1.1\r\nHost: {address.hostname}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await broker.prepare()


# Bounded work


async def test_a_body_of_too_many_values_is_refused(broker: Broker) -> None:
    trace = b'"trace": {"x": [' + b'{"": 0},' * 30_000 + b"0]}"
    answer = await broker.post(
        b'{"model": "m", "messages": [{"role": "user", "content": "::"}], ' + trace + b"}"
    )
    assert (answer.status, answer.code) == (422, "invalid_request")
    assert answer.json["error"]["details"] == [
        {"field": "body", "message": "It has more than 50000 JSON values."}
    ]


async def test_a_request_of_very_many_parameters_is_refused(broker: Broker) -> None:
    answer = await broker.post({**QUESTION, **{f"p{n}": 0 for n in range(600)}})
    assert (answer.status, answer.code) == (422, "invalid_request")
    assert "at most 500 parameters" in answer.json["error"]["message"]


@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "k"}])
async def test_the_rate_is_checked_before_a_large_body(
    valkey_url: str, upstream: ScriptedUpstream, key: dict[str, str]
) -> None:
    no_json = b"no JSON" + b" " * 20_000
    async with running(valkey_url, upstream, rate_limit="1/minute") as broker:
        assert (await broker.post(no_json, headers=key)).code == "invalid_json"
        async with running(valkey_url, upstream, rate_limit="1/minute") as other:
            assert (await other.post(no_json, headers=key)).code == "rate_limited"


async def test_a_known_key_is_answered_after_the_rate_is_used_up(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    key = {"Idempotency-Key": "k"}
    async with running(valkey_url, upstream, rate_limit="2/minute") as broker:
        first = await broker.post(headers=key)
        await broker.post()
        assert (await broker.post()).code == "rate_limited"
        again = await broker.post(headers=key)
        assert (again.status, again.json["sessionId"]) == (200, first.json["sessionId"])
        conflict = await broker.post({**QUESTION, "temperature": 1}, headers=key)
        assert (conflict.status, conflict.code) == (409, "idempotency_conflict")
        assert (await broker.post(headers={"Idempotency-Key": "other"})).code == "rate_limited"


async def test_many_large_bodies_at_once_are_all_answered(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    question = {**QUESTION, "trace": {"x": [{"": 0}] * 20_000, "text": "::"}}
    async with running(valkey_url, upstream, rate_limit="100/minute") as broker:
        answers = await asyncio.gather(*(broker.post(question) for _ in range(12)))
    assert [answer.status for answer in answers] == [201] * 12


# Idempotency


async def test_the_same_key_and_body_are_the_same_session(broker: Broker, upstream: ScriptedUpstream) -> None:
    first = await broker.post(headers={"Idempotency-Key": "k"})
    second = await broker.post(headers={"Idempotency-Key": "k"})
    assert (first.status, second.status) == (201, 200)
    assert second.json == {**first.json, "expiresIn": second.json["expiresIn"]}
    assert 595 <= second.json["expiresIn"] <= 600
    assert second.headers["Location"] == first.headers["Location"]


async def test_a_session_that_has_begun_is_still_the_keys(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    first = await broker.post(headers={"Idempotency-Key": "k"})
    events = await broker.read(first.json["sessionId"])
    second = await broker.post(headers={"Idempotency-Key": "k"})
    assert (second.status, second.json["sessionId"], second.json["expiresIn"]) == (
        200,
        first.json["sessionId"],
        0,
    )
    assert await broker.read(second.json["sessionId"]) == events


async def test_the_same_key_and_another_body_are_a_conflict(broker: Broker) -> None:
    await broker.post(headers={"Idempotency-Key": "k"})
    answer = await broker.post({**QUESTION, "temperature": 1}, headers={"Idempotency-Key": "k"})
    assert (answer.status, answer.code) == (409, "idempotency_conflict")


async def test_other_keys_are_other_sessions(broker: Broker) -> None:
    keys = ["k", "K", "k1", "!", "~" * 255]
    answers = [await broker.post(headers={"Idempotency-Key": key}) for key in keys]
    assert len({answer.json["sessionId"] for answer in answers}) == len(keys)


async def test_the_same_key_at_once_is_one_session(
    valkey_url: str, broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream) as other:
        answers = await asyncio.gather(
            *((broker, other)[n % 2].post(headers={"Idempotency-Key": "k"}) for n in range(20))
        )
    assert {answer.status for answer in answers} == {200, 201}
    assert len({answer.json["sessionId"] for answer in answers}) == 1
    assert [answer.status for answer in answers].count(201) == 1


async def test_one_key_with_two_bodies_at_once_is_one_conflict(broker: Broker) -> None:
    bodies = [QUESTION, {**QUESTION, "temperature": 1}]
    answers = await asyncio.gather(*(broker.post(body, {"Idempotency-Key": "k"}) for body in bodies))
    assert sorted(answer.status for answer in answers) == [201, 409]


@pytest.mark.parametrize("body", [QUESTION, {**QUESTION, "temperature": 1}])
async def test_the_key_of_a_session_that_is_gone_is_free(
    valkey_url: str, upstream: ScriptedUpstream, body: dict[str, Any]
) -> None:
    async with running(valkey_url, upstream, session_ttl=1) as broker:
        first = await broker.post(headers={"Idempotency-Key": "k"})
        async with asyncio.timeout(PATIENCE):
            while (await broker.ask("DELETE", f"/stream/{uuid.uuid4()}")).status == 404:
                looked = await broker.ask("GET", f"/stream/{first.json['sessionId']}?lastEventId=1-0")
                if looked.status == 404:
                    break
        again = await broker.post(body, headers={"Idempotency-Key": "k"})
        assert again.status == 201
        assert again.json["sessionId"] != first.json["sessionId"]


async def test_the_key_of_a_cancelled_prepared_session_is_free(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    key = {"Idempotency-Key": "k"}
    first = (await broker.post(headers=key)).json["sessionId"]
    await broker.cancel(first)
    again = await broker.post(headers=key)
    assert again.status == 201
    second = again.json["sessionId"]
    assert second != first
    async with broker.stream(second) as connection:
        (await upstream.call()).open().chunk("Hello")
        await connection.take(1)
        await broker.cancel(second)
        await connection.rest()
    late = await broker.post(headers=key)
    assert (late.status, late.json["sessionId"], late.json["expiresIn"]) == (200, second, 0)


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 256, "é", "\t"])
async def test_a_malformed_key_is_refused(broker: Broker, key: str) -> None:
    answer = await broker.post(headers={"Idempotency-Key": key})
    assert (answer.status, answer.code) == (422, "invalid_request")
    assert answer.json["error"]["details"][0]["field"] == "Idempotency-Key"
