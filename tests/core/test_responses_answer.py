"""The meaning of the events of a response: each kind, in every order, with any end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.errors import BrokerError, UpstreamError, UpstreamFailed, UpstreamInvalid
from broker.core.pricing import cost_of
from broker.core.responses_answer import ResponsesAnswer, in_chat_names
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
)

INCOMPLETE = incomplete("max_output_tokens")


def read(*events: Any) -> ResponsesAnswer:
    answer = ResponsesAnswer()
    for each in events:
        answer.read(json.dumps(each).encode())
    return answer


def failure(*events: Any, name: str = "message") -> tuple[UpstreamError, ResponsesAnswer]:
    answer = read(*events[:-1])
    with pytest.raises(UpstreamError) as caught:
        answer.read(json.dumps(events[-1]).encode(), name)
    return caught.value, answer


# Relaying


@pytest.mark.parametrize(
    "each", [CREATED, delta("Hello"), item_done(MESSAGE), completed(), INCOMPLETE, event("response.new")]
)
def test_an_event_is_relayed_as_it_is(each: dict[str, Any]) -> None:
    data = json.dumps(each, indent=1).encode()
    assert ResponsesAnswer().read(data) == data


@pytest.mark.parametrize("data", [b"", b"null", b" [DONE]"])
def test_data_that_says_nothing_is_not_relayed(data: bytes) -> None:
    answer = ResponsesAnswer()
    assert answer.read(data) is None
    assert not answer.end()


def test_data_that_is_not_an_object_is_invalid() -> None:
    with pytest.raises(UpstreamInvalid):
        ResponsesAnswer().read(b'{"type')


# Ends


@pytest.mark.parametrize(
    ("end", "reason", "native"),
    [
        (completed(), "stop", "completed"),
        (completed(output=[MESSAGE]), "stop", "completed"),
        (completed(output=[MESSAGE, CALL]), "tool_calls", "completed"),
        (INCOMPLETE, "length", "max_output_tokens"),
        (
            event("response.incomplete", response=response(incomplete_details={"reason": "content_filter"})),
            "content_filter",
            "content_filter",
        ),
        (event("response.incomplete", response=response(incomplete_details=None)), "length", "incomplete"),
        (event("response.incomplete"), "length", "incomplete"),
        (event("response.done", response=response(status="completed")), "stop", "completed"),
        (event("response.done", response=response(status="incomplete")), "length", "incomplete"),
        (event("response.done"), "stop", "completed"),
        (
            completed(status="incomplete", incomplete_details={"reason": "max_output_tokens"}),
            "length",
            "max_output_tokens",
        ),
        (completed(status="odd"), "stop", "odd"),
    ],
)
def test_an_end_has_its_reason(end: dict[str, Any], reason: str, native: str) -> None:
    answer = read(CREATED, delta("Hello"), end)
    assert answer.finished
    assert answer.end()
    assert (answer.finish_reason, answer.native_finish_reason) == (reason, native)


@pytest.mark.parametrize("kind", ["response.output_item.added", "response.output_item.done"])
def test_a_call_is_remembered_until_the_end(kind: str) -> None:
    assert read(event(kind, item=CALL), completed()).finish_reason == "tool_calls"


def test_nothing_counts_behind_the_end() -> None:
    answer = read(completed())
    assert answer.read(b'{"type":"error"}', "error") is None
    assert answer.read(b"no json") is None


@pytest.mark.parametrize("events", [[], [CREATED], [CREATED, delta("Hello"), item_done(MESSAGE)]])
def test_an_answer_without_an_end_is_not_whole(events: list[dict[str, Any]]) -> None:
    answer = read(*events)
    answer.read(b"[DONE]")
    assert not answer.finished
    assert not answer.end()


def test_the_first_names_are_kept() -> None:
    answer = read(CREATED, completed(model="other", id="other"))
    assert (answer.model, answer.generation_id, answer.provider) == ("scripted/model-1", "gen-response", None)


# Failures


@pytest.mark.parametrize(
    ("told", "code", "retryable"),
    [
        (failed({"code": "server_error", "message": "It broke."}), "upstream_error", True),
        (failed({"code": "rate_limit_exceeded", "message": "It broke."}), "upstream_rate_limited", True),
        (failed({"code": "invalid_prompt", "message": "It broke."}), "upstream_error", False),
        (failed({"code": "invalid_image_url", "message": "It broke."}), "upstream_error", False),
        (
            failed({"code": "image_content_policy_violation", "message": "It broke."}),
            "upstream_moderated",
            False,
        ),
        (failed({"code": "402", "message": "It broke."}), "upstream_payment_required", False),
        (failed(None), "upstream_error", True),
        (event("response.failed"), "upstream_error", True),
        (event("response.cancelled", response=response(status="cancelled")), "upstream_error", True),
        (event("response.done", response=response(status="failed")), "upstream_error", True),
        (completed(status="failed"), "upstream_error", True),
        (event("error", code="server_error", message="It broke.", param=None), "upstream_error", True),
        (event("error", code=None, message="It broke."), "upstream_error", True),
        (
            event("error", error={"type": "invalid_request_error", "message": "It broke."}),
            "upstream_error",
            False,
        ),
        (event("error", error={"code": 429, "message": "It broke."}), "upstream_rate_limited", True),
        ({"error": {"code": 502, "message": "It broke."}}, "upstream_error", True),
        ({"object": "error", "message": "It broke.", "code": 500}, "upstream_error", True),
    ],
)
def test_a_failure_is_an_error_of_the_broker(told: dict[str, Any], code: str, retryable: bool) -> None:
    error, answer = failure(CREATED, delta("Hello"), told)
    assert (error.code, error.retryable) == (code, retryable)
    if "It broke." in json.dumps(told) and code != "upstream_moderated":
        assert error.message == "It broke."
    assert answer.over
    assert not answer.end()


def test_an_event_named_error_is_an_error() -> None:
    for data in ({"message": "It broke."}, {"code": "x"}):
        error, _ = failure(data, name="error")
        assert error.code == "upstream_error"
    with pytest.raises(UpstreamFailed):
        ResponsesAnswer().read(b"It broke.", "error")


def test_an_error_that_is_null_is_not_one() -> None:
    assert read(
        event("response.created", error=None, response=response(error=None)), completed(error=None)
    ).end()


def test_a_failure_has_its_usage_at_once_or_later() -> None:
    _, answer = failure(delta("Hello"), failed({"code": "server_error"}, usage=USAGE))
    assert answer.usage == USAGE
    _, answer = failure(delta("Hello"), event("error", message="It broke."))
    assert answer.usage is None
    assert answer.read(json.dumps(failed(None, usage=USAGE)).encode()) is None
    assert answer.usage == USAGE


# Usage


def test_only_the_usage_of_the_end_is_final() -> None:
    early = event("response.in_progress", response=response(usage={"input_tokens": 10, "output_tokens": 0}))
    answer = read(early)
    assert answer.usage is None
    assert answer.interim_counts == {"prompt_tokens": 10, "completion_tokens": 0}
    answer = read(early, completed())
    assert answer.usage == USAGE
    assert answer.counts == {
        "prompt_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens": 5,
        "completion_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 15,
    }
    assert cost_of({**answer.counts, "cost": 0.25}, None) == 250_000_000


def test_an_incomplete_response_has_its_usage_too() -> None:
    assert read(INCOMPLETE).usage == USAGE


def test_names_of_a_chat_count_where_a_usage_has_both() -> None:
    assert in_chat_names({"prompt_tokens": 1, "input_tokens": 2, "output_tokens": 3}) == {
        "prompt_tokens": 1,
        "completion_tokens": 3,
    }


# Counting


@pytest.mark.parametrize(
    ("events", "size"),
    [
        ([delta("é" * 5)], 10),
        ([delta("Hm", "reasoning_text"), delta("Hm", "reasoning_summary_text"), delta("No", "refusal")], 6),
        ([delta('{"a', "function_call_arguments")], 3),
        ([delta("Hi", "content_part")], 2),
        ([delta("Hi", "audio.transcript")], 2),
        ([delta({"text": "Hi"}, "new")], 2),
        ([delta(None), delta(3)], 0),
        (
            [event("response.output_text.delta", delta="Hi", obfuscation="xxxx", logprobs=[{"token": "Hi"}])],
            2,
        ),
        ([event("response.output_text.done", output_index=0, text="Hello")], 0),
        # an item counts by its deltas or by its whole, whichever is more
        ([delta("Hel"), delta("lo"), item_done(MESSAGE)], 5),
        ([item_done(MESSAGE)], 5),
        ([delta("Hello, you"), item_done(MESSAGE)], 10),
        ([item_done(CALL)], 4 + 7),
        (
            [
                delta("Hello"),
                delta('{"a":1}', "function_call_arguments", 1),
                item_done(MESSAGE),
                item_done(CALL, 1),
            ],
            5 + 4 + 7,
        ),
        ([delta("Hel"), item_done(MESSAGE), delta("more", place=1)], 9),
        # encrypted reasoning counts beside what is shown of it
        (
            [
                delta("Hm", "reasoning_summary_text"),
                item_done({"type": "reasoning", "summary": [{"text": "Hm"}], "encrypted_content": "x" * 20}),
            ],
            22,
        ),
        ([item_done({"type": "reasoning", "summary": [{"text": "Hm"}], "content": [{"text": "Hm, hm"}]})], 6),
        (
            [
                event(
                    "response.output_text.annotation.added",
                    output_index=0,
                    annotation={"type": "url_citation", "url": "http://a", "title": "A"},
                )
            ],
            9,
        ),
        ([item_done({"type": "image_generation_call", "result": "AAAA"})], 0),
        ([event("response.output_item.done", item="odd"), event("response.output_item.done")], 0),
    ],
)
def test_all_that_a_model_wrote_counts_once(events: list[dict[str, Any]], size: int) -> None:
    assert read(*events).text_bytes == size


def test_pictures_and_sounds_count_as_media() -> None:
    assert read(item_done({"type": "image_generation_call", "result": "AAAA"})).media == 1
    assert read(delta("AAAA", "audio"), delta("AAAA", "audio")).media == 1


def test_an_end_without_usage_counts_its_output() -> None:
    assert read(completed(usage=None, output=[MESSAGE, CALL])).text_bytes == 5 + 11
    assert read(delta("Hello, you and me"), completed(usage=None, output=[MESSAGE])).text_bytes == 17


# A whole response in place of a stream


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [("completed", "completed", "stop"), ("incomplete", "incomplete", "length"), (None, "completed", "stop")],
)
def test_a_complete_response_is_relayed_as_its_end(status: str | None, kind: str, reason: str) -> None:
    document = response(status=status, output=[MESSAGE], usage=USAGE)
    answer = ResponsesAnswer()
    chunk = answer.read_whole(document)
    assert chunk is not None
    assert json.loads(chunk) == {"type": f"response.{kind}", "sequence_number": 0, "response": document}
    assert answer.end()
    assert (answer.finish_reason, answer.usage) == (reason, USAGE)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"output": "x"},
        response(status="queued"),
        response(status="in_progress"),
        {"choices": [], "output": None},
    ],
)
def test_an_unfinished_response_is_not_complete(document: dict[str, Any]) -> None:
    answer = ResponsesAnswer()
    assert answer.read_whole(document) is None
    assert not answer.end()


def test_a_whole_response_that_failed_is_an_error() -> None:
    with pytest.raises(UpstreamFailed, match="It broke"):
        ResponsesAnswer().read_whole(
            response(status="failed", error={"code": "server_error", "message": "It broke."})
        )


# Any order


EVENTS = st.sampled_from(
    [
        CREATED,
        delta("Hello"),
        delta("{}", "function_call_arguments", 1),
        item_done(MESSAGE),
        item_done(CALL, 1),
    ]
)


@given(st.lists(EVENTS, max_size=10), st.lists(EVENTS, max_size=5))
def test_only_an_end_makes_an_answer_whole_wherever_it_stands(before: list[Any], behind: list[Any]) -> None:
    assert not read(*before).end()
    answer = read(*before, completed(), *behind)
    assert answer.end()
    assert answer.usage == USAGE
    assert answer.text_bytes == read(*before).text_bytes
    called = item_done(CALL, 1) in before
    assert answer.finish_reason == ("tool_calls" if called else "stop")


@given(
    st.permutations(
        [
            delta("Hel", place=0),
            delta("lo", place=0),
            delta('{"a"', "function_call_arguments", 1),
            delta(":1}", "function_call_arguments", 1),
        ]
    )
)
def test_items_may_be_written_at_the_same_time(deltas: list[Any]) -> None:
    assert read(*deltas).text_bytes == 12
    assert read(*deltas, item_done(CALL, 1), item_done(MESSAGE)).text_bytes == 5 + 11


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "output",
                    "usage",
                    "item",
                    "text",
                    "error",
                    "status",
                    "id",
                    "incomplete_details",
                    "reason",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)
KINDS = st.sampled_from(
    [
        CREATED["type"],
        "response.completed",
        "response.incomplete",
        "response.failed",
        "response.done",
        "response.output_text.delta",
        "response.output_item.done",
        "error",
        "",
    ]
)


@given(
    st.lists(
        st.tuples(
            KINDS,
            st.dictionaries(
                st.sampled_from(["response", "item", "delta", "usage", "error", "output_index", "item_id"]),
                VALUES,
            ),
        ),
        max_size=5,
    )
)
def test_any_event_raises_only_errors_of_the_broker(events: list[tuple[str, dict[str, Any]]]) -> None:
    answer = ResponsesAnswer()
    for kind, fields in events:
        try:
            answer.read(json.dumps({"type": kind, **fields}).encode())
        except BrokerError:
            assert answer.over
    assert answer.text_bytes >= 0
    answer.end()
