"""The spans of a session: one trace from the page to the upstream, with all that is known and no word of a prompt."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from broker.core.session import State
from broker.core.session_report import SessionReport
from broker.relay.reports import report_of_lost
from broker.store.sessions import SessionRecord
from broker.web import keys
from tests import broker as brokers
from tests.broker import KEY, QUESTION, Broker, running
from tests.relay.fakes import PREPARED, RESERVATION, SESSION
from tests.replies import plain, refuse
from tests.scripted import PATIENCE, Call, ScriptedUpstream
from tests.telemetry.recorder import Recorder, attributes
from tests.web.test_session_line import end_of

TRACE = "0af7651916cd43dd8448eb211c80319c"
PAGE = f"00-{TRACE}-b7ad6b7169203331-01"
NOT_SAMPLED = f"00-{TRACE}-b7ad6b7169203331-00"


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """A recorder for a test at whose end all spans must have ended."""
    recorder = Recorder()
    yield recorder
    assert recorder.unended == []


async def ended(recorder: Recorder, number: int = 3) -> None:
    """Wait for so many spans."""
    await happened(lambda: len(recorder.spans) >= number)


async def happened(condition: Callable[[], bool]) -> None:
    """Wait for something that tells nobody."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def ids(span: ReadableSpan) -> tuple[str, str]:
    """Return the ids of the trace and of the span."""
    context = span.get_span_context()
    assert context is not None
    return format_trace_id(context.trace_id), format_span_id(context.span_id)


def parent(span: ReadableSpan) -> str | None:
    return format_span_id(span.parent.span_id) if span.parent is not None else None


async def prepare(broker: Broker, **headers: str) -> str:
    answer = await broker.post(headers=headers)
    assert answer.status == 201, answer.text
    return str(answer.json["sessionId"])


async def test_a_session_is_one_trace_from_page_to_upstream(
    valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    upstream.replies = [plain]
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        session = await prepare(broker, traceparent=PAGE, tracestate="shop=anna")
        await broker.read(session)
        await ended(recorder)
    prepared, whole, call = (recorder.span(name) for name in ("POST /prepare", "session", "chat"))
    assert {ids(span)[0] for span in (prepared, whole, call)} == {TRACE}
    assert parent(prepared) == "b7ad6b7169203331"
    assert parent(whole) == ids(prepared)[1]
    assert parent(call) == ids(whole)[1]
    assert upstream.calls[0].headers["traceparent"] == f"00-{TRACE}-{ids(call)[1]}-01"
    assert upstream.calls[0].headers["tracestate"] == "shop=anna"
    assert (prepared.kind, whole.kind, call.kind) == (SpanKind.SERVER, SpanKind.INTERNAL, SpanKind.CLIENT)
    assert [span.status.status_code for span in (prepared, whole, call)] == [StatusCode.UNSET] * 3
    assert whole.start_time is not None
    assert call.end_time is not None
    assert whole.end_time is not None
    assert whole.start_time <= call.end_time <= whole.end_time


async def test_another_worker_goes_on_with_that_trace(
    valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    upstream.replies = [plain]
    other = Recorder()
    async with (
        running(valkey_url, upstream, telemetry=recorder.telemetry) as one,
        running(valkey_url, upstream, telemetry=other.telemetry) as two,
    ):
        await two.read(await prepare(one, traceparent=PAGE))
        await ended(other, 2)
    assert parent(other.span("session")) == ids(recorder.span("POST /prepare"))[1]
    assert ids(other.span("chat"))[0] == TRACE


async def test_spans_have_the_names_of_the_conventions(
    valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    upstream.replies = [refuse(503, headers={"Retry-After": "0"}), plain]
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        answer = await broker.post(
            {**QUESTION, "model": "scripted/asked"}, headers={"X-Request-Id": "request-1"}
        )
        session = answer.json["sessionId"]
        await broker.read(session)
        await ended(recorder)
    assert attributes(recorder.span("POST /prepare")) == {
        "http.request.method": "POST",
        "http.route": "/prepare",
        "url.path": "/prepare",
        "url.scheme": "http",
        "http.response.status_code": 201,
        "gen_ai.request.model": "scripted/asked",
        "gen_ai.request.max_tokens": answer.json["maxOutputTokens"],
        "broker.session": session[:8],
        "broker.request_id": "request-1",
    }
    call = recorder.span("chat")
    assert call.name == "chat scripted/asked"
    told = attributes(call)
    assert 0 <= told.pop("gen_ai.response.time_to_first_chunk") < PATIENCE
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openrouter",
        "gen_ai.request.model": "scripted/asked",
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "scripted/model-1",
        "gen_ai.response.id": "gen-chunk",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 5,
        "http.response.status_code": 200,
        "http.request.resend_count": 1,
        "server.address": "models.example",
        "server.port": 443,
        "broker.upstream.provider": "Scripted",
    }
    told = attributes(recorder.span("session"))
    assert told.pop("broker.bytes") > 400
    assert told == {
        "broker.session": session[:8],
        "broker.state": "done",
        "broker.cost_usd": 0.00123,
        "broker.chunks": 4,
        "broker.viewers": 1,
    }


async def test_the_page_is_named_as_it_was_asked_for(
    valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "PREFIX", "/ai")
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        await prepare(broker, **{"X-Forwarded-Proto": "https"})
    told = attributes(recorder.span("POST /ai/prepare"))
    assert (told["url.path"], told["http.route"], told["url.scheme"]) == (
        "/ai/prepare",
        "/ai/prepare",
        "https",
    )


async def test_a_scheme_that_a_page_made_up_does_not_count(
    broker_with: Callable[[], Awaitable[Broker]], recorder: Recorder
) -> None:
    await prepare(await broker_with(), **{"X-Forwarded-Proto": "gopher"})
    assert attributes(recorder.span("POST /prepare"))["url.scheme"] == "http"


def fail_in_stream(call: Call) -> None:
    call.open()
    call.event(b'{"error": {"code": 402, "message": "No credits."}}')
    call.end()


@pytest.mark.parametrize(
    ("reply", "status"), [(fail_in_stream, 200), (Call.close, None)], ids=["200 with an error", "no answer"]
)
async def test_the_status_of_a_call_is_the_one_of_its_answer(
    reply: Any, status: int | None, valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    upstream.replies = [reply]
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        await broker.read(await broker.prepare())
        await ended(recorder)
    told = attributes(recorder.span("chat"))
    assert told["error.type"].startswith("upstream_")
    assert told.get("http.response.status_code") == status


def known_names() -> set[str]:
    constants = vars(gen_ai_attributes).items()
    return {value for name, value in constants if name.startswith("GEN_AI_") and isinstance(value, str)}


async def test_every_genai_name_is_one_of_the_conventions(
    valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    upstream.replies = [plain]
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        await broker.read(await broker.prepare())
        await ended(recorder)
    used = {name for span in recorder.spans for name in attributes(span) if name.startswith("gen_ai.")}
    assert len(used) > 5
    assert used <= known_names()


async def test_a_failed_session_is_an_error_in_its_trace(
    valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    upstream.replies = [refuse(400)]
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        await broker.read(await broker.prepare())
        await ended(recorder)
    for name in ("session", "chat"):
        span = recorder.span(name)
        assert span.status.status_code is StatusCode.ERROR
        assert attributes(span)["error.type"] == "upstream_rejected"
    assert attributes(recorder.span("chat"))["http.response.status_code"] == 400


async def test_a_cancelled_session_is_no_error(
    valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        session = await broker.prepare()
        async with broker.stream(session) as viewer:
            (await upstream.call()).open().chunk("Hello")
            await viewer.take(1)
            await broker.cancel(session)
            await viewer.rest()
        await ended(recorder)
    assert recorder.span("session").status.status_code is StatusCode.UNSET
    assert attributes(recorder.span("session"))["broker.state"] == "cancelled"
    assert attributes(recorder.span("chat"))["gen_ai.response.finish_reasons"] == ("cancelled",)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [({"messages": []}, 422, "invalid_request"), (b"{", 400, "invalid_json")],
    ids=["invalid", "not JSON"],
)
async def test_a_refused_prepare_has_its_code(
    body: object, status: int, code: str, broker_with: Callable[[], Awaitable[Broker]], recorder: Recorder
) -> None:
    broker = await broker_with()
    assert (await broker.post(body)).status == status
    span = recorder.span("POST /prepare")
    assert attributes(span)["http.response.status_code"] == status
    assert attributes(span)["broker.error_code"] == code
    assert "error.type" not in attributes(span)  # the caller's fault
    assert span.status.status_code is StatusCode.UNSET
    assert not span.events


async def test_a_page_that_leaves_while_it_prepares_ends_the_span(
    broker_with: Callable[[], Awaitable[Broker]], recorder: Recorder
) -> None:
    broker = await broker_with()
    url = urlsplit(broker.url)
    _, writer = await asyncio.open_connection(url.hostname, url.port)
    head = f"POST /prepare HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    await happened(lambda: recorder.unended == ["POST /prepare"])
    writer.close()
    await ended(recorder, 1)
    told = attributes(recorder.span("POST /prepare"))
    assert told["error.type"] == "cancelled"
    assert "http.response.status_code" not in told


async def test_an_internal_error_is_one_in_its_trace(
    broker_with: Callable[[], Awaitable[Broker]], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = await broker_with()

    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug that knows What is a broker?")

    monkeypatch.setattr(broker.app[keys.ADMISSION], "admit", broken)
    assert (await broker.post()).status == 500
    span = recorder.span("POST /prepare")
    assert span.status.status_code is StatusCode.ERROR
    assert (attributes(span)["error.type"], span.status.description) == ("internal_error", None)
    assert not span.events  # a traceback may have the prompt


@pytest.fixture
async def broker_with(valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder) -> Any:
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:

        async def give() -> Broker:
            return broker

        yield give


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "ff" * 500])
async def test_a_bad_traceparent_begins_a_new_trace(
    header: str, valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    upstream.replies = [plain]
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        await broker.read(await prepare(broker, traceparent=header))
        await ended(recorder)
    assert parent(recorder.span("POST /prepare")) is None
    assert ids(recorder.span("session"))[0] == ids(recorder.span("POST /prepare"))[0]


@pytest.mark.parametrize(
    "state",
    [
        "shop=Quetzalcoatl",
        "shop=Quetzalcoatl,,a@b=c d, x=1",
        f"a={'v' * 255},b={'v' * 252}",
        ",".join(f"k{n}=Quetzalcoatl"[:12] for n in range(32)),
    ],
    ids=["one", "several", "512 characters", "32 members"],
)
async def test_a_tracestate_is_carried_on(
    state: str, broker_with: Callable[[], Awaitable[Broker]], upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    upstream.replies = [plain]
    broker = await broker_with()
    await broker.read(await prepare(broker, traceparent=PAGE, tracestate=state))
    assert upstream.calls[0].headers["tracestate"] == state.replace(",,", ",").replace(", ", ",")


@pytest.mark.parametrize(
    "state",
    [
        ",".join(f"k{n}={'Quetzalcoatl' * 10}" for n in range(10)),
        "Quetzalcoatl",
        "a=1,Quetzal coatl=2",
        "a=Quetzal=coatl",
        ",".join(f"k{n}=Quetzal"[:10] for n in range(33)),
        "a=Quetzalcoatl,a=2",
    ],
    ids=["too long", "no pair", "a bad key", "a bad value", "too many", "twice the same"],
)
async def test_a_bad_tracestate_is_neither_carried_on_nor_logged(
    state: str,
    broker_with: Callable[[], Awaitable[Broker]],
    upstream: ScriptedUpstream,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    upstream.replies = [plain]
    broker = await broker_with()
    await broker.read(await prepare(broker, traceparent=PAGE, tracestate=state))
    assert upstream.calls[0].headers["traceparent"].startswith(f"00-{TRACE}-")
    assert "tracestate" not in upstream.calls[0].headers
    assert [record for record in caplog.records if record.name.startswith("opentelemetry")] == []


async def test_a_page_that_is_not_sampled_makes_no_spans(
    valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    upstream.replies = [plain]
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        await broker.read(await prepare(broker, traceparent=NOT_SAMPLED))
        await broker.read(await prepare(broker))
        await ended(recorder)
    assert len(recorder.spans) == 3
    assert upstream.calls[0].headers["traceparent"].startswith(f"00-{TRACE}-")
    assert upstream.calls[0].headers["traceparent"].endswith("-00")
    [(_, count)] = recorder.points("gen_ai.client.operation.duration")
    assert count.count == 2  # metrics count every session


async def test_without_telemetry_nothing_goes_to_the_upstream(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    await broker.read(await prepare(broker, traceparent=PAGE))
    assert not {"traceparent", "tracestate"} & upstream.calls[0].headers.keys()


async def test_a_page_elsewhere_may_send_its_trace(
    valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    asked = {"Origin": "http://localhost:5173", "Access-Control-Request-Method": "POST"}
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        answer = await broker.ask("OPTIONS", "/prepare", headers=asked)
    assert answer.headers["Access-Control-Allow-Headers"].endswith(", traceparent, tracestate")


async def test_a_session_line_has_the_id_of_its_trace(
    log: io.StringIO, valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    upstream.replies = [plain]
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        session = await prepare(broker, traceparent=PAGE)
        await broker.read(session)
        assert (await end_of(log, session))["trace_id"] == TRACE


SECRET_WORDS = ("Quetzalcoatl", "Huitzilopochtli")


def talkative(call: Call) -> None:
    call.open()
    call.chunk(SECRET_WORDS[1], finish="stop")
    call.done()


@pytest.mark.parametrize("reply", [talkative, refuse(400, {"message": f"{SECRET_WORDS[0]} {KEY}"})])
async def test_no_span_has_a_prompt_an_answer_or_an_id(
    reply: Any, valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    upstream.replies = [reply]
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        session = await broker.prepare(messages=[{"role": "user", "content": SECRET_WORDS[0]}])
        await broker.read(session)
        await ended(recorder)
    told = "".join(span.to_json() for span in recorder.spans)
    assert session[:8] in told
    for secret in (*SECRET_WORDS, KEY, session):
        assert secret not in told


def lost(state: State = State.LOST) -> SessionReport:
    return report_of_lost(SESSION, SessionRecord(State.RUNNING, "claim", "worker", PREPARED.spec), state)


def test_a_session_of_a_dead_worker_is_in_its_trace(recorder: Recorder) -> None:
    recorder.telemetry.lost(lost(), {"traceparent": PAGE})
    span = recorder.span("session")
    assert (ids(span)[0], parent(span)) == (TRACE, "b7ad6b7169203331")
    assert (attributes(span)["broker.state"], attributes(span)["error.type"]) == ("lost", "worker_lost")
    assert span.status.status_code is StatusCode.ERROR


def test_spans_end_once_and_also_without_a_report(recorder: Recorder) -> None:
    trace = recorder.telemetry.session(SESSION, "a/b", None)
    trace.end(None)
    trace.end(lost())
    assert [span.name for span in recorder.spans] == ["chat a/b", "session"]
    assert "broker.state" not in attributes(recorder.span("session"))


@pytest.mark.parametrize("method", ["end", "lost"])
def test_spans_end_after_a_report_that_cannot_be_read(method: str, recorder: Recorder) -> None:
    broken: Any = object()
    if method == "end":
        recorder.telemetry.session(SESSION, "a/b", None).end(broken)
        assert [span.name for span in recorder.spans] == ["chat a/b", "session"]
    else:
        recorder.telemetry.lost(replace(lost(), state=broken), None)
        assert [span.name for span in recorder.spans] == ["session"]


async def test_a_worker_that_shuts_down_ends_its_spans(
    valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        async with broker.stream(await broker.prepare()) as viewer:
            (await upstream.call()).open().chunk("Hello")
            await viewer.take(1)
    for name in ("session", "chat"):
        assert attributes(recorder.span(name))["error.type"] == "server_shutdown"


async def test_a_worker_that_is_closed_ends_its_spans(
    valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        async with broker.stream(await broker.prepare()) as viewer:
            (await upstream.call()).open().chunk("Hello")
            await viewer.take(1)
            await broker.app[keys.WORKER].close()
            assert [span.name.split()[0] for span in recorder.spans] == ["POST", "chat", "session"]


async def test_a_session_that_cannot_start_ends_its_spans(
    valkey_url: str, upstream: ScriptedUpstream, recorder: Recorder
) -> None:
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        odd: Any = "unheard of"
        with pytest.raises(KeyError):
            broker.app[keys.WORKER].start_generation(SESSION, RESERVATION, replace(PREPARED, dialect=odd))
        assert [span.name for span in recorder.spans] == ["chat a/b", "session"]
