"""The scripted upstream in the Responses dialect: every model, first as plain values and then through a broker."""

from __future__ import annotations

from itertools import islice
from typing import Any

import orjson
import pytest

from broker.core.errors import UpstreamError
from broker.core.responses_answer import ResponsesAnswer as Reading
from broker.core.responses_said import said_in_event
from broker.core.said import Said
from broker.core.sse import Decoder
from broker.rehearsal import scripts, text
from broker.rehearsal.answer import Prices
from broker.rehearsal.app import rehearsal_beside
from broker.rehearsal.ask import AskError, read_responses_ask
from broker.rehearsal.behaviours import MODELS
from broker.rehearsal.responses import ResponsesAnswer
from broker.rehearsal.steps import Reply, Script, Send
from tests.broker import Broker, running
from tests.events import Event
from tests.web.test_rehearsal import NOT_WELL, PACE

SCRIPTS = {model.id.removeprefix("rehearsal/"): model.script for model in MODELS}
WELL = [name for name in SCRIPTS if name not in NOT_WELL.split()]
REASONS = {"tools": "tool_calls", "length": "length", "content-filter": "content_filter"}
UNCOUNTED = {"no-usage"}
NO_TEXT = {"tools", "empty"}
QUESTION = {"model": "rehearsal/plain", "input": "How do streams end?"}


def answer_to(**fields: Any) -> ResponsesAnswer:
    asked = read_responses_ask(orjson.dumps({**QUESTION, "stream": True, **fields}))
    return ResponsesAnswer(
        asked, "rehearsal/plain", Prices("0.000001", "0.000002"), "gen-1-abcdefgh", 1, 8192
    )


def events_of(script: Script) -> list[dict[str, Any]]:
    """The events of a script, in which each must have its own name and the next number."""
    decoder = Decoder(1 << 20)
    found = []
    for step in islice(script, 20_000):
        for frame in decoder.feed(step.data) if isinstance(step, Send) else ():
            if frame.data != b"[DONE]":
                found.append(orjson.loads(frame.data))
                assert frame.event == found[-1]["type"]
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return found


def read(script: Script) -> None:
    """Read a script as the broker does."""
    reading, decoder = Reading(), Decoder(1 << 20)
    for step in script:
        for frame in decoder.feed(step.data) if isinstance(step, Send) else ():
            reading.read(frame.data, frame.event)


def said(events: list[dict[str, Any]]) -> Said:
    words = [said_in_event(each) for each in events]
    calls = tuple(call for each in words for call in each.calls)
    return Said("".join(each.text for each in words), "".join(each.reasoning for each in words), calls)


@pytest.mark.parametrize("name", WELL)
def test_a_script_that_ends_well_does_so_in_events(name: str) -> None:
    answer, reading = answer_to(), Reading()
    events = events_of(SCRIPTS[name](answer))
    for each in events:
        reading.read(orjson.dumps(each))
    assert reading.end()
    assert reading.finish_reason == REASONS.get(name, "stop")
    assert (reading.usage is None) == (name in UNCOUNTED)
    if reading.usage is not None:
        assert reading.usage["output_tokens"] == answer.completion_tokens
    assert bool(said(events).text) == (name not in NO_TEXT)
    [end] = [each for each in events if each["type"] in ("response.completed", "response.incomplete")]
    assert [said_in_event({**end, "sequence_number": 0}).text] == [said(events).text]


def test_reasoning_comes_before_the_text() -> None:
    answer = answer_to()
    events = events_of(scripts.reasoning(answer))
    assert said(events).reasoning == text.THOUGHTS
    assert said(events).text == text.passage_for(answer.ask.question)
    items = [each["item"]["type"] for each in events if each["type"] == "response.output_item.done"]
    assert items == ["reasoning", "message"]


def test_calls_come_whole_when_they_are_done() -> None:
    calls = said(events_of(scripts.tools(answer_to()))).calls
    assert [call["name"] for call in calls] == ["get_weather", "get_local_time"]
    assert [orjson.loads(call["arguments"]) for call in calls] == [
        {"city": "Lisbon", "unit": "celsius"},
        {"city": "Lisbon"},
    ]


def test_results_of_calls_are_used() -> None:
    call = said(events_of(scripts.tools(answer_to()))).calls[0]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny, 21 degrees"}
    answer = answer_to(input=[{"role": "user", "content": "?"}, call, output])
    assert "sunny, 21 degrees" in said(events_of(scripts.tools(answer))).text


def test_framing_says_the_same_in_other_bytes() -> None:
    assert events_of(scripts.framing(answer_to())) == events_of(scripts.plain(answer_to()))


@pytest.mark.parametrize(
    "name", ["mid-stream-error", "mid-stream-error-string", "mid-stream-rate-limited", "vllm-error"]
)
def test_an_error_within_the_stream_fails_the_response(name: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        read(SCRIPTS[name](answer_to()))
    assert caught.value.code == ("upstream_rate_limited" if "rate" in name else "upstream_error")


def test_json_is_a_whole_response() -> None:
    (step,) = SCRIPTS["json"](answer_to())
    assert isinstance(step, Reply)
    reading = Reading()
    assert reading.read_whole(orjson.loads(step.body)) is not None
    assert reading.finish_reason == "stop"


def test_instructions_and_tools_count_in_the_prompt() -> None:
    tool = {"type": "function", "name": "far", "parameters": {"type": "object"}}
    asked = answer_to(instructions="Be terse.", tools=[tool], max_output_tokens=5).ask
    assert [message["role"] for message in asked.messages] == ["system", "user"]
    assert asked.max_tokens == 5
    assert asked.prompt_tokens > answer_to().ask.prompt_tokens + 20


@pytest.mark.parametrize(
    "body", [b"{", b"{}", b'{"model": "m"}', b'{"model": "m", "input": []}', b'{"model": "m", "input": [3]}']
)
def test_an_unusable_request_is_refused(body: bytes) -> None:
    with pytest.raises(AskError):
        read_responses_ask(body)


# Through a broker


ENDS = {
    **{name: REASONS.get(name, "stop") for name in WELL if name not in ("slow", "fast", "long")},
    "json": "stop",
    "no-done": "stop",
    "mid-stream-error": "upstream_error",
    "mid-stream-error-string": "upstream_error",
    "mid-stream-rate-limited": "upstream_rate_limited",
    "vllm-error": "upstream_error",
    "json-error": "upstream_error",
    "not-json": "upstream_invalid",
    "html": "upstream_invalid",
    "truncated": "upstream_interrupted",
    "blank": "upstream_interrupted",
    "reset": "upstream_interrupted",
    "dropped": "upstream_interrupted",
    "rate-limited": "upstream_rate_limited",
    "unauthorized": "upstream_unauthorized",
    "no-credit": "upstream_payment_required",
    "moderated": "upstream_moderated",
    "rejected": "upstream_rejected",
    "server-error": "upstream_unavailable",
}


async def streamed(broker: Broker, name: str) -> list[Event]:
    answer = await broker.post({**QUESTION, "model": f"rehearsal/{name}"})
    assert answer.status == 201, answer.text
    return await broker.read(answer.json["sessionId"])


async def test_every_model_ends_as_it_says(valkey_url: str) -> None:
    async with (
        rehearsal_beside(pace=PACE) as url,
        running(valkey_url, url, max_retries=0, first_data_timeout=20, idle_timeout=20) as broker,
    ):
        found = {}
        for name in ENDS:
            *_, end = await streamed(broker, name)
            found[name] = end.json["finishReason"] if end.kind == "done" else end.json["code"]
        assert found == ENDS


async def test_a_page_sees_the_events_and_the_cost(valkey_url: str) -> None:
    async with rehearsal_beside(pace=PACE) as url, running(valkey_url, url) as broker:
        *chunks, done = await streamed(broker, "plain")
        events = [chunk.json for chunk in chunks]
        assert said(events).text == text.passage_for("How do streams end?")
        assert done.json["usage"] == events[-1]["response"]["usage"]
        assert done.json["cost"] == pytest.approx(done.json["usage"]["cost"])
        assert done.json["provider"] == "Rehearsal"
        assert done.json["estimated"] is False
