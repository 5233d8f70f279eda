"""Refusals: what pages get, when the broker retries, and when it sends another form of the request."""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from broker.core.dialect import RESPONSES
from tests.broker import KEY, QUESTION, Broker, running
from tests.recordings import LINE_ENDS, RECORDINGS, Recording, with_line_ends
from tests.replies import plain, refuse, streaming
from tests.scripted import NOTHING, Call, ScriptedUpstream, chunk
from tests.web.outcomes import fields_of, outcome

RESPONSES_QUESTION = {"model": QUESTION["model"], "input": "Say it."}
LIMITED = {"code": 429, "message": "Rate limit exceeded"}
DATES: dict[str, Callable[[float], str]] = {
    "IMF": lambda at: email.utils.formatdate(at, usegmt=True),
    "RFC 850": lambda at: time.strftime("%A, %d-%b-%y %H:%M:%S GMT", time.gmtime(at)),
    "asctime": lambda at: time.asctime(time.gmtime(at)),
}
RESETS: dict[str, Callable[[float], str]] = {
    "ms": lambda at: str(int(at * 1000)),
    "seconds since 1970": lambda at: str(int(at)),
    "seconds from now": lambda at: str(int(at - time.time() + 0.5)),
}
PLACES: dict[str, Callable[[str], tuple[Any, Any]]] = {
    **{name: lambda wait: (LIMITED, {"Retry-After": wait}) for name in DATES},
    "header": lambda wait: (LIMITED, {"X-RateLimit-Reset": wait}),
    "body": lambda wait: ({**LIMITED, "metadata": {"headers": {"X-RateLimit-Reset": wait}}}, NOTHING),
}
WAITS = [
    *((write, PLACES[name]) for name, write in DATES.items()),
    *((write, PLACES[place]) for write in RESETS.values() for place in ("header", "body")),
]


@pytest.mark.parametrize(("write", "place"), WAITS)
@pytest.mark.parametrize("status", [429, 503])
async def test_a_long_wait_of_any_form_ends_at_once(
    broker: Broker, upstream: ScriptedUpstream, write: Callable[[float], str], place: Any, status: int
) -> None:
    error, headers = place(write(time.time() + 90))
    upstream.replies = [refuse(status, error, headers)]
    data = await outcome(broker)
    assert data["retryable"] is True
    assert 85 < data["retryAfter"] <= 91
    assert len(upstream.calls) == 1


@pytest.mark.parametrize(("write", "place"), WAITS)
async def test_a_short_wait_of_any_form_is_honoured(
    broker: Broker, upstream: ScriptedUpstream, write: Callable[[float], str], place: Any
) -> None:
    called: list[float] = []

    def limited(call: Call) -> None:
        called.append(time.time())
        error, headers = place(write(called[0] + 2))  # of whole seconds, so 1 to 2
        refuse(429, error, headers)(call)

    def answered(call: Call) -> None:
        called.append(time.time())
        plain(call)

    upstream.replies = [limited, answered]
    assert (await broker.read(await broker.prepare()))[-1].kind == "done"
    assert called[1] - called[0] > 0.9


@pytest.mark.parametrize(("write", "place"), [*WAITS[:3], *WAITS[3:7]])
async def test_a_time_in_the_past_means_no_wait(
    broker: Broker, upstream: ScriptedUpstream, write: Callable[[float], str], place: Any
) -> None:
    error, headers = place(write(time.time() - 600))
    upstream.replies = [refuse(429, error, headers), plain]
    assert (await broker.read(await broker.prepare()))[-1].kind == "done"
    assert len(upstream.calls) == 2


@pytest.mark.parametrize("wait", ["soon", "-5", "nan", "", "Mon, 99 Foo 2025 00:00:00 GMT", "1e3"])
async def test_an_invalid_time_means_the_usual_wait(
    broker: Broker, upstream: ScriptedUpstream, wait: str
) -> None:
    upstream.replies = [refuse(429, LIMITED, {"Retry-After": wait}), plain]
    assert (await broker.read(await broker.prepare()))[-1].kind == "done"
    assert len(upstream.calls) == 2


@pytest.mark.parametrize("wait", ["9" * 60, "Fri, 31 Dec 9999 23:59:59 GMT"])
async def test_an_absurd_wait_is_passed_on_as_a_month(
    broker: Broker, upstream: ScriptedUpstream, wait: str
) -> None:
    upstream.replies = [refuse(429, LIMITED, {"Retry-After": wait})]
    assert (await outcome(broker))["retryAfter"] == 31 * 86_400
    assert len(upstream.calls) == 1


# Words


@pytest.mark.parametrize(
    ("status", "kind", "body", "code", "message"),
    [
        (502, "text/plain", "upstream connect error", "upstream_unavailable", "upstream connect error"),
        (400, "text/plain; charset=utf-8", "no such model: é", "upstream_rejected", "no such model: é"),
        (400, "application/json", '"no such model"', "upstream_rejected", "no such model"),
        (403, "text/plain", "Failed check: SAFETY_CHECK_TYPE_BIO", "upstream_moderated", None),
        (404, "text/html", "<html>nginx</html>", "upstream_rejected", None),
        (404, "application/json", "<h1>nginx</h1>", "upstream_rejected", None),
        (404, "text/plain", "\x00\x01nginx", "upstream_rejected", None),
        (404, "application/json", '{"error": {"message": "nginx', "upstream_rejected", None),
        (404, "application/json", "", "upstream_rejected", None),
        (401, "text/plain", "the key of nginx is wrong", "upstream_unauthorized", None),
    ],
)
async def test_a_refusal_as_plain_text_is_passed_on(
    broker: Broker,
    upstream: ScriptedUpstream,
    status: int,
    kind: str,
    body: str,
    code: str,
    message: str | None,
) -> None:
    def reply(call: Call) -> None:
        data = body.encode()
        call.head(status, {"Content-Type": kind, "Content-Length": str(len(data)), "Retry-After": "60"})
        call.write(data)

    upstream.replies = [reply]
    data = await outcome(broker)
    assert data["code"] == code
    assert data["message"] == message if message else "nginx" not in data["message"]


XAI = (
    "Your team 0f3c2a10-1b2c-4d3e-8f90-a1b2c3d4e5f6 has used its credits (request id: Ab12Cd34), "
    f"see org-AbCdEfGhIjKlMnOpQrSt, user_2abCdEfGhIjKlMnOp and {KEY}."
)


@pytest.mark.parametrize(
    "raw",
    [XAI, json.dumps({"error": XAI}), {"error": {"message": XAI}}, {"detail": XAI}, [{"message": XAI}]],
)
@pytest.mark.parametrize("inside", [False, True])
async def test_the_providers_message_has_no_ids(
    broker: Broker, upstream: ScriptedUpstream, raw: object, *, inside: bool
) -> None:
    metadata = {"provider_name": "xAI", "raw": raw}
    error = {"code": 400, "message": "Provider returned error", "metadata": metadata}
    upstream.replies = [streaming(chunk("Hi"), {"error": error}) if inside else refuse(400, error)]
    data = await outcome(broker, chunks=int(inside))
    assert data["message"].startswith(
        "xAI: Your team … has used its credits (request id: …), see …, user_… and …"
    )
    assert data["retryable"] is False


async def test_a_numeric_string_inside_the_stream_is_a_status(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    for status, retryable in (("400", False), ("422", False), ("503", True)):
        upstream.replies = [streaming(chunk("Hi"), {"error": {"code": status, "message": "x"}})]
        data = await outcome(broker, chunks=1)
        assert fields_of(data, "retryable", "upstreamStatus") == [retryable, int(status)]


# The other name of the cap


def refuse_cap(name: str, message: str, **fields: Any) -> Callable[[Call], None]:
    """Refuse this name of the cap, and answer a request with the other one."""

    def reply(call: Call) -> None:
        if name in call.body:
            call.reply(400, {"error": {"message": message, "type": "invalid_request_error", **fields}})
        else:
            plain(call)

    return reply


NEW, OLD = "max_completion_tokens", "max_tokens"


@pytest.mark.parametrize(("sent", "other"), [(OLD, NEW), (NEW, OLD)])
@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("Unsupported parameter: '{}' is not supported with this model. Use '{}' instead.", None),
        ("Not a parameter of this model.", True),
    ],
)
async def test_a_refused_cap_is_sent_under_its_other_name_from_then_on(
    valkey_url: str, upstream: ScriptedUpstream, sent: str, other: str, message: str, *, param: bool | None
) -> None:
    upstream.replies = [refuse_cap(sent, message.format(sent, other), **({"param": sent} if param else {}))]
    async with running(valkey_url, upstream, upstream_kind="openai") as broker:
        for _ in range(2):
            events = await broker.read(await broker.prepare(**{sent: 7}))
            assert events[-1].kind == "done", events[-1].data
        names = [[name for name in (OLD, NEW) if name in call.body] for call in upstream.calls]
        first = names[0][0]  # the broker may prefer one of the two
        expected = [[first]] if first == other else [[first], [other]]
        assert names == [*expected, [other]]
        assert {call.body[name[0]] for call, name in zip(upstream.calls, names, strict=True)} == {7}
        await broker.read(await broker.prepare(model="another/model", **{sent: 7}))
        assert first in upstream.calls[len(names)].body  # it is known of that model alone


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens is too large: 100000. This model supports at most 16384 completion tokens.",
        "Invalid 'max_completion_tokens': integer above maximum value.",
        "max_tokens must be at least 16",
    ],
)
@pytest.mark.parametrize("param", [None, OLD, NEW])
async def test_a_cap_of_a_wrong_size_is_refused_once(
    broker: Broker, upstream: ScriptedUpstream, message: str, param: str | None
) -> None:
    upstream.replies = [refuse(400, {"message": message, "param": param})]
    assert (await outcome(broker))["message"] == message
    assert len(upstream.calls) == 1


async def test_a_cap_refused_under_both_names_is_an_error(broker: Broker, upstream: ScriptedUpstream) -> None:
    def reply(call: Call) -> None:
        name = OLD if OLD in call.body else NEW
        call.reply(400, {"error": {"message": f"Unsupported parameter: '{name}'", "param": name}})

    upstream.replies = [reply]
    data = await outcome(broker)
    assert fields_of(data, "code", "upstreamStatus", "retryable") == ["upstream_rejected", 400, False]
    assert len(upstream.calls) == 2


# Whole answers through sockets


@pytest.mark.parametrize("recording", RECORDINGS.values(), ids=RECORDINGS)
async def test_a_recording_arrives_whole_however_it_is_cut(
    broker: Broker, upstream: ScriptedUpstream, recording: Recording
) -> None:
    # A seed of the recording's own, so that a failure comes again.
    pick = random.Random(recording.body)
    seen = []
    for ends in LINE_ENDS:
        body = with_line_ends(recording.body, ends)
        cut = pick.randrange(1, len(body))

        def reply(call: Call, body: bytes = body, cut: int = cut) -> None:
            call.open()
            call.send(body[:cut])
            # Later, so that the two are two reads.
            loop = asyncio.get_running_loop()
            loop.call_later(0.02, call.send, body[cut:])
            loop.call_later(0.03, call.end)

        upstream.replies = [reply]
        asked = RESPONSES_QUESTION if recording.dialect is RESPONSES else QUESTION
        answer = await broker.post(asked)
        events = await broker.read(answer.json["sessionId"])
        assert events[-1].json.get("code") == recording.code, (ends, cut)
        assert events[-1].json.get("finishReason") == recording.reason, (ends, cut)
        if recording.code is None:
            assert events[-1].json["usage"] == recording.usage, (ends, cut)
        seen.append([(event.kind, event.data, event.id) for event in events[:-1]])
    assert seen[0] == seen[1] == seen[2]


# Time


@pytest.mark.slow
async def test_an_answer_may_pause_for_six_seconds_behind_its_finish(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    async with broker.stream(await broker.prepare()) as connection:
        call = (await upstream.call()).open()
        call.chunk("a", finish="stop")
        await connection.take(1)
        await asyncio.sleep(6)
        call.chunk("b")
        call.chunk(finish="length")
        call.usage(cost=0.5)
        call.done()
        events = await connection.rest()
    assert [event.kind for event in events] == ["chunk", "chunk", "chunk", "done"]
    assert fields_of(events[-1].json, "finishReason", "cost", "estimated") == ["length", 0.5, False]


class ClosingServer(asyncio.Protocol):
    """A chat service that closes a connection 5 s after its last answer, as uvicorn does by default.

    It is 50 ms away: what it is sent while its close is on the way is lost.
    """

    IDLE = 5.0
    AWAY = 0.05
    together = 0
    """Requests that are answered only once all of them have come, so that each has a connection of its own."""

    def __init__(self, requests: list[ClosingServer]) -> None:
        self._requests = requests
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._closing: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        if self._closing is not None:
            self._closing.cancel()
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if not found or len(rest) < int(lengths[0].partition(b":")[2] if lengths else 0):
            return
        self._buffer = b""
        if not head.startswith(b"POST"):
            self._answer(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        self._requests.append(self)
        if len(self._requests) == self.together:
            for request in self._requests:
                request._stream()
        elif len(self._requests) > self.together:
            self._stream()

    def _stream(self) -> None:
        body = f"data: {json.dumps(chunk('Hello', finish='stop'))}\n\ndata: [DONE]\n\n".encode()
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: "
        self._answer(f"{head}{len(body)}\r\n\r\n".encode() + body)

    def _answer(self, data: bytes) -> None:
        self._transport.write(data)
        self._closing = asyncio.get_running_loop().call_later(self.IDLE, self._close)

    def _close(self) -> None:
        self._transport.pause_reading()
        asyncio.get_running_loop().call_later(self.AWAY, self._transport.close)


@pytest.mark.slow
async def test_a_server_that_closes_idle_connections_costs_no_chat(valkey_url: str) -> None:
    count = 40
    requests: list[ClosingServer] = []
    loop = asyncio.get_running_loop()

    class Server(ClosingServer):
        together = count

    server = await loop.create_server(lambda: Server(requests), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with (
        server,
        running(valkey_url, f"http://{host}:{port}/v1", upstream_kind="openai", max_retries=0) as broker,
    ):
        sessions = [await broker.prepare() for _ in range(2 * count)]
        await asyncio.gather(*map(broker.read, sessions[:count]))
        idle_since = loop.time()

        async def later(number: int) -> str:
            # from 4.9 to 5.1 s after the answers, one every 5 ms
            await asyncio.sleep(idle_since + 4.9 + number * 0.005 - loop.time())
            return (await broker.read(sessions[count + number]))[-1].kind

        assert await asyncio.gather(*map(later, range(count))) == ["done"] * count
    assert len(requests) == 2 * count
