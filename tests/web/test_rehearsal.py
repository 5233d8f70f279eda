"""The scripted upstream: its scripts as plain values first, then the whole service over real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from decimal import Decimal
from itertools import islice
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from openai import AsyncOpenAI
from yarl import URL

from broker.rehearsal import faults, scripts, text
from broker.rehearsal.answer import Answer, Prices
from broker.rehearsal.app import build_rehearsal, rehearsal_beside
from broker.rehearsal.ask import Ask, AskError, read_ask
from broker.rehearsal.behaviours import MODELS
from broker.rehearsal.ledger import Attempts, Generations
from broker.rehearsal.model_entries import Model, catalog_entry
from broker.rehearsal.stage import act
from broker.rehearsal.steps import DONE, PROCESSING, Pause, Reply, Reset, Script, Send, Step
from broker.rehearsal.tools import calls_for, example_of
from tests.stopwatch import Stopwatch

PACE = 0.01
ENDLESS = {"stall", "silence", "processing", "hang", "late"}
NOT_WELL = (
    "late busy rate-limited unavailable server-error timeout unauthorized no-credit moderated rejected html json "
    "json-error mid-stream-error mid-stream-error-string mid-stream-rate-limited vllm-error not-json truncated "
    "blank reset dropped stall silence processing hang no-done"
)
NAMES = [model.id.removeprefix("rehearsal/") for model in MODELS]


def answer_to(question: str = "How do streams end?", room: int = 8192, **ask: Any) -> Answer:
    messages = ask.pop("messages", [{"role": "user", "content": question}])
    asked = Ask(model="rehearsal/plain", messages=messages, stream=True, **ask)
    return Answer(asked, "rehearsal/plain", Prices("0.000001", "0.000002"), "gen-1-abcdefgh", 1, room)


def events_in(stream: bytes) -> list[str]:
    """The data of each event, read as the standard says."""
    events, data = [], []
    for line in stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").decode().split("\n"):
        name, _, value = line.partition(":")
        if name == "data":
            data.append(value.removeprefix(" "))
        elif not line and data:
            events.append("\n".join(data))
            data = []
    return events


def chunks_in(stream: bytes) -> list[Any]:
    return [orjson.loads(data) for data in events_in(stream) if data != "[DONE]"]


def sent(steps: list[Step]) -> bytes:
    return b"".join(step.data for step in steps if isinstance(step, Send))


def deltas(chunks: list[Any]) -> list[Any]:
    return [choice["delta"] for chunk in chunks for choice in chunk.get("choices", [])]


def text_in(chunks: list[Any]) -> str:
    return "".join(delta.get("content") or "" for delta in deltas(chunks))


def finish_in(chunks: list[Any]) -> list[str]:
    return [c["finish_reason"] for chunk in chunks for c in chunk.get("choices", []) if c["finish_reason"]]


def usages_in(chunks: list[Any]) -> list[Any]:
    return [chunk["usage"] for chunk in chunks if "usage" in chunk]


# The catalog


def test_the_first_model_is_plain_text_and_every_id_is_its_own() -> None:
    ids = [model.id for model in MODELS]
    assert ids[0] == "rehearsal/plain"
    assert len(ids) == len(set(ids)) >= 15


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.id)
def test_a_catalog_entry_has_all_that_is_required(model: Model) -> None:
    entry = catalog_entry(model)
    required = (
        "id canonical_slug name created description pricing context_length architecture top_provider "
        "per_request_limits supported_parameters default_parameters supported_voices links"
    )
    assert not set(required.split()) - set(entry)
    assert entry["description"].endswith(".")
    assert "max_completion_tokens" in entry["top_provider"]
    prices = [Decimal(price) for price in entry["pricing"].values()]
    assert all(isinstance(price, str) for price in entry["pricing"].values())
    assert (not any(prices)) == model.id.endswith(":free")
    assert not entry["canonical_slug"].endswith(":free")


def test_models_have_prices_no_prices_or_unknown_ones() -> None:
    assert {Decimal(model.prices.prompt).compare(0) for model in MODELS} == {1, 0, -1}


# The text


@pytest.mark.parametrize("passage", [*text.PASSAGES, text.THOUGHTS, text.WRITINGS_OF_THE_WORLD])
def test_the_tokens_of_a_text_join_to_the_text(passage: str) -> None:
    tokens = list(text.tokens_of(passage))
    assert "".join(tokens) == passage
    assert 3 < len(passage) / len(tokens) < 5


@pytest.mark.parametrize("passage", text.PASSAGES)
def test_a_passage_has_paragraphs_a_list_and_a_piece_of_code(passage: str) -> None:
    assert passage.count("\n\n") >= 4
    assert "\n- " in passage or "\n1. " in passage
    assert passage.count("```") == 2


def test_each_question_has_its_own_passage() -> None:
    questions = [f"question {n}" for n in range(50)]
    first = [text.passage_for(question) for question in questions]
    assert first == [text.passage_for(question) for question in questions]
    assert set(first) == set(text.PASSAGES)


# Requests


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "JSON object"),
        (b'{"messages": [{"role": "user"}]}', "No models"),
        (b'{"model": "m"}', "messages"),
        (b'{"model": "m", "messages": []}', "messages"),
        (b'{"model": "m", "messages": ["hi"]}', "messages"),
        (b'{"model": "m", "messages": [{}], "max_tokens": 0}', "max_tokens"),
        (b'{"model": "m", "messages": [{}], "max_completion_tokens": "5"}', "max_tokens"),
        (b'{"model": "m", "messages": [{}], "stop": 7}', "stop"),
        (b'{"model": "m", "messages": [{}], "tools": {}}', "tools"),
    ],
)
def test_a_body_that_no_model_can_use_is_refused_by_name(body: bytes, complaint: str) -> None:
    with pytest.raises(AskError, match=complaint):
        read_ask(body)


def test_the_lower_of_two_output_caps_counts() -> None:
    body = {"models": ["a", "b"], "messages": [{}], "max_tokens": 9, "max_completion_tokens": 7, "stop": "."}
    ask = read_ask(orjson.dumps(body))
    assert (ask.model, ask.max_tokens, ask.stop, ask.stream) == ("a", 7, (".",), False)


def test_prompt_tokens_count_text_and_parts_and_files() -> None:
    parts = [{"type": "text", "text": "12345678"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    ask = Ask("m", [{"role": "user", "content": "1234567"}, {"role": "user", "content": parts}])
    assert ask.prompt_tokens == (4 + 2) + (4 + 2 + 1000)
    assert ask.question == "12345678"


def test_only_tool_results_since_the_last_question_count() -> None:
    tool = {"role": "tool", "content": "old"}
    ask = Ask("m", [tool, {"role": "user", "content": "new"}])
    assert ask.tool_results == []
    assert Ask("m", [*ask.messages, tool]).tool_results == [tool]


# The scripts, without a socket


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.id)
def test_a_script_ends_or_pauses_for_ever(model: Model) -> None:
    steps = list(islice(model.script(answer_to()), 20_000))
    assert (len(steps) == 20_000) == (model.id.removeprefix("rehearsal/") in ENDLESS)
    assert any(isinstance(step, Pause) for step in steps) or len(steps) == 1


def test_plain_always_runs_at_the_speed_of_an_ordinary_model() -> None:
    steps = list(scripts.plain(answer_to()))
    assert steps == list(scripts.plain(answer_to()))
    first = next(n for n, step in enumerate(steps) if isinstance(step, Send) and step.data != PROCESSING)
    assert sum(step.seconds for step in steps[:first] if isinstance(step, Pause)) == 0.3
    beats = [step.seconds for step in steps[first:] if isinstance(step, Pause)]
    assert 25 < len(beats) / sum(beats) < 40
    assert len(set(beats)) > 4


def test_fast_never_waits_and_slow_comments_first() -> None:
    fast = list(scripts.fast(answer_to()))
    assert sum(step.seconds for step in fast if isinstance(step, Pause)) == 0
    assert len(chunks_in(sent(fast))) > 1000
    slow = list(scripts.slow(answer_to()))
    assert sent(slow).startswith(PROCESSING * 5 + b"data: ")


def test_an_output_cap_cuts_with_the_reason_length() -> None:
    answer = answer_to(room=5)
    chunks = chunks_in(sent(list(scripts.plain(answer))))
    assert text_in(chunks) == "".join(islice(text.tokens_of(text.passage_for(answer.ask.question)), 5))
    assert finish_in(chunks) == [answer.finish_reason] == ["length"]
    assert usages_in(chunks)[-1]["completion_tokens"] == 5


def test_a_text_that_fits_exactly_ends_with_the_reason_stop() -> None:
    words = len(list(text.tokens_of("just these four words")))
    assert finish_in(chunks_in(sent(list(scripts.echo(answer_to("just these four words", room=words)))))) == [
        "stop"
    ]


def test_a_stop_sequence_ends_the_text_before_it() -> None:
    chunks = chunks_in(sent(list(scripts.echo(answer_to("one, two; three", stop=(";", ","))))))
    assert (text_in(chunks), finish_in(chunks)) == ("one", ["stop"])


def test_unicode_tears_characters_apart_and_loses_none() -> None:
    steps = list(scripts.unicode(answer_to()))
    with pytest.raises(UnicodeDecodeError):
        [step.data.decode() for step in steps if isinstance(step, Send)]
    assert text_in(chunks_in(sent(steps))) == text.WRITINGS_OF_THE_WORLD


def test_framing_says_the_same_as_plain_in_other_bytes() -> None:
    odd, even = sent(list(scripts.framing(answer_to()))), sent(list(scripts.plain(answer_to())))
    assert odd.startswith(b"\xef\xbb\xbf:")
    assert b"\n" not in odd.replace(b"\r\n", b"")
    assert b"data: {" not in odd
    assert chunks_in(odd) == chunks_in(even)


def test_reasoning_comes_before_the_text_and_is_counted() -> None:
    answer = answer_to()
    chunks = chunks_in(sent(list(scripts.reasoning(answer))))
    thoughts = [delta for delta in deltas(chunks) if delta.get("reasoning")]
    assert "".join(delta["reasoning"] for delta in thoughts) == text.THOUGHTS
    assert "".join(d["reasoning_details"][0]["text"] for d in thoughts) == text.THOUGHTS
    assert text_in(chunks) == text.passage_for(answer.ask.question)
    assert usages_in(chunks)[-1]["completion_tokens_details"]["reasoning_tokens"] == len(thoughts)


def test_tool_calls_come_in_pieces_that_join_to_their_arguments() -> None:
    chunks = chunks_in(sent(list(scripts.tools(answer_to()))))
    arguments, heads = ["", ""], []
    for piece in (call for delta in deltas(chunks) for call in delta.get("tool_calls", [])):
        heads += [(piece["index"], piece["id"], piece["function"]["name"])] if "id" in piece else []
        arguments[piece["index"]] += piece["function"]["arguments"]
    assert [(index, name) for index, _, name in heads] == [(0, "get_weather"), (1, "get_local_time")]
    assert len({call_id for _, call_id, _ in heads}) == 2
    assert [orjson.loads(a) for a in arguments] == [{"city": "Lisbon", "unit": "celsius"}, {"city": "Lisbon"}]
    assert finish_in(chunks) == ["tool_calls"]


def test_tools_answers_with_text_after_results() -> None:
    results = [{"role": "user", "content": "?"}, {"role": "tool", "content": "sunny, 21 degrees"}]
    chunks = chunks_in(sent(list(scripts.tools(answer_to(messages=results)))))
    assert "sunny, 21 degrees" in text_in(chunks)
    assert finish_in(chunks) == ["stop"]
    refused = chunks_in(sent(list(scripts.tools(answer_to(tool_choice="none")))))
    assert finish_in(refused) == ["stop"]


def test_calls_have_arguments_that_fit_their_functions() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "unit": {"enum": ["km", "mi"]}}}
    tools = [{"type": "function", "function": {"name": "far", "parameters": schema}}]
    assert calls_for(Ask("m", [], tools=tools)) == [("far", '{"n":3,"unit":"km"}')]


@pytest.mark.parametrize(
    ("schema", "example"),
    [
        (None, {}),
        ({"type": "string"}, "Lisbon"),
        ({"type": "string", "default": "x"}, "x"),
        ({"type": "array", "items": {"type": "boolean"}}, [True]),
        ({"type": "array"}, []),
        ({"type": ["string", "null"]}, {}),
        (
            {"type": "object", "properties": {"a": {"properties": {"b": {"type": "number"}}}}},
            {"a": {"b": 2.5}},
        ),
    ],
)
def test_an_example_fits_its_schema(schema: Any, example: Any) -> None:
    assert example_of(schema) == example


def test_an_example_of_a_recursive_schema_ends() -> None:
    endless: dict[str, Any] = {"type": "object", "properties": {}}
    endless["properties"]["again"] = endless
    assert orjson.dumps(example_of(endless)).count(b"again") == 6


def test_annotations_cite_places_in_the_text() -> None:
    chunks = chunks_in(sent(list(scripts.cited(answer_to()))))
    (cited,) = [delta["annotations"] for delta in deltas(chunks) if "annotations" in delta]
    assert [a["type"] for a in cited] == ["url_citation", "url_citation"]
    assert cited[-1]["url_citation"]["end_index"] == len(text_in(chunks))


def test_busy_refuses_a_question_once() -> None:
    (refusal,) = list(faults.busy(answer_to()))
    assert isinstance(refusal, Reply)
    assert (refusal.status, refusal.headers["Retry-After"]) == (503, "1")
    again = answer_to()
    again.attempt = 2
    assert sent(list(faults.busy(again))).endswith(DONE)


def test_hang_sends_nothing_and_processing_only_comments() -> None:
    assert all(isinstance(step, Pause) for step in islice(faults.hang(answer_to()), 100))
    assert set(sent(list(islice(faults.processing(answer_to()), 100))).split(b"\n\n")) == {
        PROCESSING[:-2],
        b"",
    }


def test_a_caller_without_streaming_gets_one_answer() -> None:
    def become(script: Script) -> Step:
        return list(scripts.unstreamed(script, answer_to()))[-1]

    refusal, broken = become(faults.moderated(answer_to())), become(faults.dropped(answer_to()))
    assert isinstance(refusal, Reply)
    assert refusal.status == 403
    assert isinstance(broken, Reset)
    completion = become(scripts.plain(answer_to()))
    assert isinstance(completion, Reply)
    assert orjson.loads(completion.body)["object"] == "chat.completion"


# Memory


def test_a_generation_is_known_from_its_delay_on() -> None:
    generations = Generations(delay=0.5)
    generations.record({"id": "gen-0"}, now=10.0)
    assert generations.find("gen-0", now=10.4) is None
    assert generations.find("gen-0", now=10.5) == {"id": "gen-0"}
    for n in range(1, 1001):
        generations.record({"id": f"gen-{n}"}, now=10.0)
    assert len(generations) == 1000
    assert generations.find("gen-0", now=99.0) is None


def test_attempts_forget_the_question_that_came_longest_ago() -> None:
    attempts = Attempts(kept=2)
    assert [attempts.count(key) for key in (b"a", b"b", b"a", b"c", b"b", b"c")] == [1, 1, 2, 1, 1, 2]


# The service, over real sockets


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with rehearsal_beside(pace=PACE) as base:
        yield base


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as client:
        yield client


def body_for(model: str, **more: Any) -> dict[str, Any]:
    return {
        "model": f"rehearsal/{model}",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        **more,
    }


async def stream_of(session: aiohttp.ClientSession, url: str, model: str, **more: Any) -> tuple[str, bytes]:
    """The generation's id and the whole stream of an answer that is one."""
    async with session.post(f"{url}/chat/completions", json=body_for(model, **more)) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        return response.headers["X-Generation-Id"], await response.read()


async def generation_of(session: aiohttp.ClientSession, url: str, generation_id: str) -> Any:
    for _ in range(2000):
        async with session.get(f"{url}/generation", params={"id": generation_id}) as response:
            if response.status == 200:
                return (await response.json())["data"]
            assert (await response.json())["error"]["code"] == response.status == 404
    pytest.fail("the generation was never booked")


@asynccontextmanager
async def raw_answer(url: str, model: str) -> AsyncIterator[asyncio.StreamReader]:
    """The bytes of an answer as they come off the wire, headers and all."""
    payload = orjson.dumps(body_for(model))
    reader, writer = await asyncio.open_connection("127.0.0.1", URL(url).port)
    head = (
        f"POST /api/v1/chat/completions HTTP/1.1\r\nHost: rehearsal\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    writer.write(head.encode() + payload)
    try:
        yield reader
    finally:
        writer.close()
        with suppress(ConnectionResetError):
            await writer.wait_closed()


async def test_models_lists_the_whole_table_in_its_order(session: aiohttp.ClientSession, url: str) -> None:
    async with session.get(f"{url}/models") as response:
        listed = await response.json()
    assert [entry["id"] for entry in listed["data"]] == [model.id for model in MODELS]
    assert (listed["total_count"], listed["links"]) == (len(MODELS), {"next": None})


@pytest.mark.parametrize("model", [n for n in NAMES if n not in NOT_WELL.split() and n != "long"])
async def test_an_answer_that_ends_well_says_so(session: aiohttp.ClientSession, url: str, model: str) -> None:
    generation_id, stream = await stream_of(session, url, model)
    chunks = chunks_in(stream)
    assert events_in(stream)[-1] == "[DONE]"
    assert {chunk["id"] for chunk in chunks} == {generation_id}
    assert len(finish_in(chunks)) == 1
    assert ("usage" in chunks[-1]) == (model != "no-usage")
    assert bool(text_in(chunks)) == (model not in {"empty", "tools", "refusal"})


@pytest.mark.parametrize("model", ["plain", "reasoning", "plain:free", "auto"])
async def test_the_cost_is_the_tokens_at_the_listed_prices(
    session: aiohttp.ClientSession, url: str, model: str
) -> None:
    generation_id, stream = await stream_of(session, url, model)
    usage = chunks_in(stream)[-1]["usage"]
    served = next(m for m in MODELS if m.id == chunks_in(stream)[-1]["model"])
    prices = served.prices
    cost = (
        Decimal(prices.prompt) * usage["prompt_tokens"]
        + Decimal(prices.completion) * usage["completion_tokens"]
    )
    assert usage["cost"] == pytest.approx(float(cost))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 100
    details = usage["cost_details"]
    parts = details["upstream_inference_prompt_cost"] + details["upstream_inference_completions_cost"]
    assert parts == pytest.approx(usage["cost"])
    booked = await generation_of(session, url, generation_id)
    assert (booked["total_cost"], booked["cancelled"]) == (usage["cost"], False)
    assert booked["tokens_completion"] == usage["completion_tokens"]


async def test_the_router_answers_under_the_name_of_another_model(
    session: aiohttp.ClientSession, url: str
) -> None:
    _, stream = await stream_of(session, url, "auto")
    assert {chunk["model"] for chunk in chunks_in(stream)} == {"rehearsal/plain"}


async def test_the_last_usage_is_the_right_one_wherever_it_comes(
    session: aiohttp.ClientSession, url: str
) -> None:
    _, first = await stream_of(session, url, "usage-first")
    begun, ended = usages_in(chunks_in(first))
    assert begun["completion_tokens"] == 0 < ended["completion_tokens"]
    _, beside = await stream_of(session, url, "usage-with-choices")
    assert chunks_in(beside)[-1]["choices"][0]["finish_reason"] == "stop"


async def test_length_honours_a_cap_below_its_own(session: aiohttp.ClientSession, url: str) -> None:
    for more, tokens in (({}, 60), ({"max_tokens": 7}, 7), ({"max_completion_tokens": 900}, 60)):
        chunks = chunks_in((await stream_of(session, url, "length", **more))[1])
        assert (finish_in(chunks), usages_in(chunks)[0]["completion_tokens"]) == (["length"], tokens)


async def test_echo_and_small_show_the_request(session: aiohttp.ClientSession, url: str) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße,\n wie geht's?"},
    ]
    _, stream = await stream_of(session, url, "echo", messages=messages)
    assert text_in(chunks_in(stream)) == "Grüße,\n wie geht's?"
    _, stream = await stream_of(session, url, "small", messages=messages)
    assert "messages: 2, tokens: about 17" in text_in(chunks_in(stream))


async def test_long_has_thousands_of_chunks(session: aiohttp.ClientSession, url: str) -> None:
    _, stream = await stream_of(session, url, "long", max_tokens=4096)
    assert len(chunks_in(stream)) > 3000
    assert finish_in(chunks_in(stream)) == ["stop"]


@pytest.mark.parametrize(
    ("model", "status", "retry_after"),
    [
        ("rate-limited", 429, "40"),
        ("busy", 503, "1"),
        ("server-error", 500, None),
        ("timeout", 504, None),
        ("unauthorized", 401, None),
        ("no-credit", 402, None),
        ("moderated", 403, None),
        ("rejected", 400, None),
    ],
)
async def test_a_refusal_has_its_status_and_an_error_body(
    session: aiohttp.ClientSession, url: str, model: str, status: int, retry_after: str | None
) -> None:
    async with session.post(f"{url}/chat/completions", json=body_for(model)) as response:
        assert (response.status, response.headers.get("Retry-After")) == (status, retry_after)
        error = (await response.json())["error"]
        assert error["code"] == status
        assert error["message"]


async def test_busy_works_when_the_same_question_comes_again(
    session: aiohttp.ClientSession, url: str
) -> None:
    for user, status in (("anna", 503), ("bert", 503), ("anna", 200), ("bert", 200), ("anna", 200)):
        async with session.post(f"{url}/chat/completions", json=body_for("busy", user=user)) as response:
            assert response.status == status
            await response.read()


@pytest.mark.parametrize(
    ("model", "head", "says"),
    [
        ("unavailable", (502, "text/html"), b"Bad Gateway"),
        ("html", (200, "text/html"), b"sign in"),
        ("json", (200, "application/json"), b'"chat.completion"'),
        ("json-error", (200, "application/json"), b'{"error":{"code":502'),
    ],
)
async def test_an_answer_that_is_not_a_stream_has_its_type(
    session: aiohttp.ClientSession, url: str, model: str, head: tuple[int, str], says: bytes
) -> None:
    async with session.post(f"{url}/chat/completions", json=body_for(model)) as response:
        assert (response.status, response.content_type) == head
        assert says in await response.read()


@pytest.mark.parametrize(
    ("model", "code", "done"),
    [
        ("mid-stream-error", 502, False),
        ("mid-stream-error-string", "server_error", True),
        ("mid-stream-rate-limited", 429, False),
    ],
)
async def test_an_error_inside_the_stream_follows_some_text(
    session: aiohttp.ClientSession, url: str, model: str, code: int | str, done: bool
) -> None:
    _, stream = await stream_of(session, url, model)
    *begun, last = chunks_in(stream)
    assert text_in(begun)
    assert (last["error"]["code"], last["choices"][0]["finish_reason"]) == (code, "error")
    assert (events_in(stream)[-1] == "[DONE]") == done


async def test_a_vllm_error_has_no_choices_and_no_error_member(
    session: aiohttp.ClientSession, url: str
) -> None:
    *begun, last = chunks_in((await stream_of(session, url, "vllm-error"))[1])
    assert text_in(begun)
    assert last["object"] == "error"
    assert not {"error", "choices"} & set(last)


async def test_not_json_is_one_broken_chunk_on_a_good_stream(
    session: aiohttp.ClientSession, url: str
) -> None:
    *_, finish, bill, done = events = events_in((await stream_of(session, url, "not-json"))[1])
    broken = [data for data in events[:-1] if not data.endswith("}")]
    assert len(broken) == 1
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(broken[0])
    assert (done, finish_in([orjson.loads(finish)])) == ("[DONE]", ["stop"])
    assert orjson.loads(bill)["usage"]["completion_tokens"] > scripts.SOME_TEXT


async def test_truncated_closes_cleanly_without_an_end(session: aiohttp.ClientSession, url: str) -> None:
    _, stream = await stream_of(session, url, "truncated")
    assert text_in(chunks_in(stream))
    assert finish_in(chunks_in(stream)) == []
    assert not stream.endswith(DONE)


async def test_blank_has_headers_and_not_one_byte(session: aiohttp.ClientSession, url: str) -> None:
    assert (await stream_of(session, url, "blank"))[1] == b""


async def test_no_done_finishes_and_closes(session: aiohttp.ClientSession, url: str) -> None:
    _, stream = await stream_of(session, url, "no-done")
    assert finish_in(chunks_in(stream)) == ["stop"]
    assert not stream.endswith(DONE)


async def test_reset_breaks_the_connection_after_some_text(url: str) -> None:
    async with raw_answer(url, "reset") as reader:
        await reader.readuntil(b'"content":')
        with pytest.raises(ConnectionResetError):
            await reader.read()


async def test_dropped_breaks_the_connection_before_any_byte(url: str) -> None:
    async with raw_answer(url, "dropped") as reader:
        with pytest.raises(ConnectionResetError):
            await reader.read(1)


async def test_hang_sends_nothing_at_all(url: str) -> None:
    async with raw_answer(url, "hang") as reader:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await reader.read(1)


async def test_stall_goes_on_with_comments_alone(url: str) -> None:
    async with raw_answer(url, "stall") as reader:
        await reader.readuntil(b'"content":')
        for _ in range(3):
            await reader.readuntil(PROCESSING)


async def test_silence_keeps_the_connection_open(url: str) -> None:
    async with raw_answer(url, "silence") as reader:
        for _ in range(scripts.SOME_TEXT):
            await reader.readuntil(b"data: ")
        await reader.readuntil(b"\n\n\r\n")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await reader.read(1)


async def test_a_leaving_client_ends_the_script_at_once(session: aiohttp.ClientSession) -> None:
    closed = asyncio.Event()

    def endless(answer: Answer) -> Script:
        try:
            yield answer.content("Hello")
            yield Pause(3600)
        finally:
            closed.set()

    models = (Model("rehearsal/endless", "Endless", "Never ends.", endless),)
    async with rehearsal_beside(models=models) as url:
        async with session.post(f"{url}/chat/completions", json=body_for("endless")) as response:
            await response.content.readline()
            assert not closed.is_set()
            response.close()
        async with asyncio.timeout(20):
            await closed.wait()


async def test_a_generation_whose_client_left_is_booked_as_cancelled(
    session: aiohttp.ClientSession, url: str
) -> None:
    async with session.post(f"{url}/chat/completions", json=body_for("silence", user="u-1")) as response:
        for _ in range(2 * scripts.SOME_TEXT):
            await response.content.readline()
        generation_id = response.headers["X-Generation-Id"]
        response.close()
    booked = await generation_of(session, url, generation_id)
    assert (booked["cancelled"], booked["finish_reason"], booked["external_user"]) == (True, None, "u-1")
    assert booked["tokens_prompt"] > 0
    assert 0 < booked["tokens_completion"] <= scripts.SOME_TEXT
    assert booked["total_cost"] > 0


async def test_a_client_that_leaves_is_recorded_as_cancelled(
    session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[asyncio.Transport] = []

    @web.middleware
    async def remember(request: web.Request, handler: Handler) -> web.StreamResponse:
        assert request.transport is not None
        lines.append(request.transport)
        return await handler(request)

    def left(answer: Answer) -> Script:
        yield answer.content("Hello")
        lines[-1].abort()
        yield answer.content("Nobody")

    app = build_rehearsal(PACE, (Model("rehearsal/left", "Left", "Breaks its own line.", left),))
    app.middlewares.append(remember)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"{site.name}/api/v1"
        async with session.post(f"{url}/chat/completions", json=body_for("left")) as response:
            generation_id = response.headers["X-Generation-Id"]
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        booked = await generation_of(session, url, generation_id)
    finally:
        await runner.cleanup()
    assert booked["cancelled"] is True
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_generation_is_not_known_right_after_its_end(session: aiohttp.ClientSession) -> None:
    async with rehearsal_beside() as url:
        generation_id, _ = await stream_of(session, url, "fast", max_tokens=1)
        async with session.get(f"{url}/generation", params={"id": generation_id}) as response:
            assert response.status == 404
            assert generation_id in (await response.json())["error"]["message"]


async def test_a_refusal_names_no_generation(session: aiohttp.ClientSession, url: str) -> None:
    async with session.post(f"{url}/chat/completions", json=body_for("no-credit")) as response:
        assert "X-Generation-Id" not in response.headers


async def test_two_services_are_independent(session: aiohttp.ClientSession) -> None:
    async with rehearsal_beside(pace=PACE) as one, rehearsal_beside(pace=PACE) as other:
        for url in (one, other):
            async with session.post(f"{url}/chat/completions", json=body_for("busy")) as response:
                assert response.status == 503


async def test_the_service_stops_in_a_moment_while_scripts_play() -> None:
    before = asyncio.all_tasks()
    async with AsyncExitStack() as viewer:
        async with rehearsal_beside() as url:
            reader = await viewer.enter_async_context(raw_answer(url, "processing"))
            await reader.readuntil(PROCESSING)
            stopwatch = Stopwatch()
        assert stopwatch.seconds < 2
    assert asyncio.all_tasks() == before


async def test_an_endless_script_is_stopped() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await act(faults.processing(answer_to()), request, "gen-1", PACE, longest=0.2)

    app = web.Application()
    app.router.add_post("/api/v1/chat/completions", handler)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with raw_answer(site.name, "processing") as reader:
            with pytest.raises(ConnectionResetError):
                await reader.read()
    finally:
        await runner.cleanup()


async def test_unknown_models_and_bad_bodies_are_400(session: aiohttp.ClientSession, url: str) -> None:
    for payload, complaint in (
        (orjson.dumps(body_for("nonesuch")), "rehearsal/nonesuch is not a valid model ID"),
        (b"{", "The body is not valid JSON"),
        (orjson.dumps(body_for("plain", messages=[])), "messages must have at least 1"),
    ):
        async with session.post(f"{url}/chat/completions", data=payload) as response:
            assert response.status == 400
            assert await response.json() == {"error": {"code": 400, "message": complaint}}


async def test_without_stream_the_answer_is_one_completion(session: aiohttp.ClientSession, url: str) -> None:
    body = body_for("plain", stream=False)
    async with session.post(f"{url}/chat/completions", json=body) as response:
        completion = await response.json()
        generation_id = response.headers["X-Generation-Id"]
    assert completion["choices"][0]["message"]["content"] == text.passage_for("Hi")
    assert completion["choices"][0]["finish_reason"] == "stop"
    booked = await generation_of(session, url, generation_id)
    assert (booked["streamed"], booked["total_cost"]) == (False, completion["usage"]["cost"])


@pytest.mark.parametrize("model", ["plain", "framing", "unicode", "tools", "no-done"])
async def test_the_openai_client_reads_it(url: str, model: str) -> None:
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=f"rehearsal/{model}", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason in {"stop", "tool_calls"}


async def test_a_port_in_use_is_reported_and_leaves_nothing_open() -> None:
    before = asyncio.all_tasks()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        beside = rehearsal_beside(port=taken.getsockname()[1])
        with pytest.raises(OSError, match="address already in use"):
            await beside.__aenter__()
    assert asyncio.all_tasks() == before
