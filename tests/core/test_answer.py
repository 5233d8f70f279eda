from __future__ import annotations

import json
import time
from typing import Any

import orjson
import pytest

from broker.core.chat_answer import ChatAnswer
from broker.core.errors import (
    UpstreamError,
    UpstreamFailed,
    UpstreamInvalid,
    UpstreamModerated,
    UpstreamPaymentRequired,
    UpstreamRateLimited,
)
from broker.core.foreign import MAX_VALUES

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "cost": 0.5}


def read(*chunks: Any) -> ChatAnswer:
    answer = ChatAnswer()
    for chunk in chunks:
        answer.read(chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode())
    return answer


def fault(chunk: Any) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        read(chunk)
    return caught.value


def choice(reason: str | None = None, index: int = 0, **delta: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": reason}


@pytest.mark.parametrize(
    "data",
    [
        b'{"choices":[]}',
        b' { "a" : 1.0 , "b": 1e2 } ',
        b'{\n"a": 1\n}',
        '{"a": "€ 😀 \u2028 \\u20ac"}'.encode(),
        b'{"a": "half \\ud83d"}',
        b'{"a": 123456789012345678901234567890}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b'{"error": null, "choices": []}',
        b'{"choices": null}',
        b'{"choices": [null, 1, {"delta": null}, {"delta": {"content": [1], "tool_calls": "x", "y": 1}}]}',
        b'{"choices": [{"delta": {"tool_calls": [null, {"function": null}, {"function": {"name": 1}}], "x": 1}}]}',
        b'{"usage": "none", "model": 1, "provider": [], "id": {}}',
    ],
)
def test_a_chunk_passes_as_it_came(data: bytes) -> None:
    assert ChatAnswer().read(data) == data


def test_invalid_utf8_is_decoded_as_event_streams_decode_it() -> None:
    assert ChatAnswer().read(b'{"a": "\xff"}') == '{"a": "\ufffd"}'.encode()


@pytest.mark.parametrize("data", [b"", b" ", b"\n", b"null", b" null ", b"[DONE]", b"[DONE] ", b'"[DONE]"'])
def test_data_that_is_not_a_chunk_is_not_relayed(data: bytes) -> None:
    assert ChatAnswer().read(data) is None


@pytest.mark.parametrize(
    "data",
    [b"[]", b"1", b'"x"', b"{", b"{}x", b'{"a": NaN}', b'{"a": Infinity}', b"[DONE", b"<html>"],
)
def test_data_that_is_not_a_json_object_is_invalid(data: bytes) -> None:
    with pytest.raises(UpstreamInvalid):
        ChatAnswer().read(data)


def test_json_nested_without_end_is_invalid() -> None:
    with pytest.raises(UpstreamInvalid):
        ChatAnswer().read(b'{"a":' * 200_000)


def test_an_answer_is_finished_by_done_or_by_a_reason() -> None:
    assert not read({"choices": [choice(content="x")]}).finished
    assert read(b"[DONE]").finished
    assert read({"choices": [choice("stop")]}).finished
    assert not read({"choices": [choice("stop")]}).complete


def test_nothing_after_done_is_relayed_or_believed() -> None:
    answer = read(b"[DONE]")
    assert answer.read(b'{"choices": [{"delta": {"content": "more"}}], "usage": {"cost": 1}}') is None
    assert answer.read(b'{"error": {"code": 500, "message": "late"}}') is None
    assert answer.usage is None


def test_the_first_names_and_the_last_reason_count() -> None:
    answer = read(
        {
            "id": "gen-1",
            "model": "m1",
            "provider": "P1",
            "choices": [choice("length") | {"native_finish_reason": "max"}],
        },
        {
            "id": "gen-2",
            "model": "m2",
            "provider": "P2",
            "choices": [choice("stop") | {"native_finish_reason": "x"}],
        },
        {"choices": [choice("stop")]},
    )
    assert (answer.model, answer.provider, answer.generation_id) == ("m1", "P1", "gen-1")
    assert (answer.finish_reason, answer.native_finish_reason) == ("stop", "x")


def test_an_empty_reason_counts_as_none() -> None:
    answer = read(
        {"choices": [choice("", content="a")]}, {"choices": [choice("length")]}, {"choices": [choice("")]}
    )
    assert answer.finish_reason == "length"
    assert not read({"choices": [choice("", content="a")]}).finished


def test_names_may_come_late_and_one_by_one() -> None:
    answer = read({"model": ""}, {"model": "m"}, {"provider": "P"}, {"id": "gen-1"})
    assert (answer.model, answer.provider, answer.generation_id) == ("m", "P", "gen-1")


USED = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
ZERO = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
TEXT = {"choices": [choice(content="abc")]}
STOP = {"choices": [choice("stop")]}


@pytest.mark.parametrize(
    "chunks",
    [
        [STOP, {"choices": [], "usage": USED}],
        [STOP | {"usage": USED}],
        [{"usage": ZERO} | TEXT, STOP, {"usage": USED}],
        [STOP | {"usage": ZERO}, STOP | {"usage": USED}, STOP | {"usage": None}],
        [STOP, {"x_groq": {"id": "req_1", "usage": USED}}],
        [STOP, {"x_groq": {"usage": ZERO}, "usage": USED}],
        [STOP, TEXT, STOP | {"usage": USED}],
        [TEXT, {"choices": [], "usage": USED}, b"[DONE]"],
        [STOP, TEXT, {"choices": [], "usage": USED}, b'"[DONE]"'],
    ],
)
def test_usage_is_final_with_or_after_the_end(chunks: list[Any]) -> None:
    answer = read({"choices": [choice(content="")]}, *chunks)
    assert answer.usage == USED


@pytest.mark.parametrize(
    "chunks",
    [
        [{"usage": USED}],
        [{"usage": ZERO}, TEXT | {"usage": USED}, TEXT],
        [{"usage": USED}, TEXT, STOP],
        [STOP | {"usage": USED}, TEXT],
        [STOP, {"usage": USED}, TEXT, STOP],
        [TEXT | {"usage": USED}, b"[DONE]"],
    ],
)
def test_usage_is_interim_before_the_end_and_before_more_content(chunks: list[Any]) -> None:
    answer = read(*chunks)
    assert (answer.usage, answer.interim_usage) == (None, USED)


def test_zeros_after_the_end_are_the_truth() -> None:
    assert read(TEXT, STOP, {"choices": [], "usage": ZERO}).usage == ZERO


@pytest.mark.parametrize(
    "more",
    [
        {"content": "x"},
        {"content": [{"type": "text", "text": "x"}]},
        {"reasoning": "x"},
        {"tool_calls": [{"function": {"arguments": "{"}}]},
        {"refusal": "no"},
        {"images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]},
    ],
)
def test_content_takes_a_finish_reason_back(more: dict[str, Any]) -> None:
    answer = read(STOP, {"choices": [choice(**more)]})
    assert not answer.finished
    assert answer.finish_reason == "stop"
    assert answer.end()


@pytest.mark.parametrize(
    "more", [{}, {"content": ""}, {"role": "assistant", "content": None}, {"annotations": ["x"]}]
)
def test_a_chunk_without_content_keeps_the_finish_reason(more: dict[str, Any]) -> None:
    assert read(STOP, {"choices": [choice(**more)]}).finished


def test_a_body_that_ends_without_any_reason_is_not_whole() -> None:
    assert not read(TEXT).end()
    assert not ChatAnswer().end()


@pytest.mark.parametrize(
    "late",
    [
        b'{"error": {"code": 502, "message": "Token limit reached"}}',
        b'{"error": {"message": "x"}, "choices": [{"delta": {"content": ""}, "finish_reason": "error"}]}',
        b'{"choices": [{"delta": {}, "finish_reason": "error"}]}',
        b'{"broken',
        b"<html>",
        b"[]",
    ],
)
def test_a_failure_after_the_finish_is_ignored(late: bytes) -> None:
    answer = read(TEXT, {"choices": [choice("length")]}, {"choices": [choice("length")]})
    assert answer.read(late) is None
    assert (answer.finished, answer.over, answer.finish_reason) == (True, True, "length")
    assert answer.read(json.dumps({"choices": [choice(content="x")], "usage": USED}).encode()) is None
    assert answer.usage == USED


def test_a_failure_after_the_reason_was_taken_back_is_one() -> None:
    with pytest.raises(UpstreamFailed):
        read(STOP, TEXT, {"error": {"message": "x"}})


def test_an_error_on_the_finish_chunk_is_one() -> None:
    answer = ChatAnswer()
    with pytest.raises(UpstreamFailed):
        answer.read(json.dumps(STOP | {"error": {"code": 502, "message": "x"}}).encode())
    assert answer.read(json.dumps({"usage": USED}).encode()) is None
    assert answer.usage == USED


@pytest.mark.parametrize("data", [b'{"message": "no"}', b'{"error": {"message": "no"}}', b"no", b'"no"'])
def test_an_event_named_error_is_one(data: bytes) -> None:
    with pytest.raises(UpstreamFailed) as caught:
        ChatAnswer().read(data, "error")
    assert caught.value.message == "no"


def test_a_completion_is_relayed_as_one_chunk() -> None:
    message = {"role": "assistant", "content": "abc", "tool_calls": []}
    answer = ChatAnswer()
    told = answer.read_whole(
        {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": message}], "usage": USED}
    )
    assert told is not None
    chunk = json.loads(told)
    assert chunk["choices"] == [{"index": 0, "delta": message}]
    assert (answer.usage, answer.text_bytes, answer.complete) == (USED, 3, True)


def test_usage_that_is_nested_without_end_loses_its_depths() -> None:
    deep = b'{"a":' * 200 + b"1" + b"}" * 200
    answer = ChatAnswer()
    answer.read(b'{"choices": [{"finish_reason": "stop"}], "usage": {"total_tokens": 3, "x": ' + deep + b"}}")
    assert answer.usage == {"total_tokens": 3}


def test_usage_beside_an_error_counts() -> None:
    answer = ChatAnswer()
    with pytest.raises(UpstreamFailed):
        answer.read(b'{"error": {"message": "x"}, "usage": {"cost": 0.1}}')
    assert answer.usage == {"cost": 0.1}


def test_text_is_counted_in_bytes_of_utf8() -> None:
    call = {"index": 0, "id": "call_1", "function": {"name": "abc", "arguments": '{"a":1}'}}
    answer = read(
        {"choices": [choice(role="assistant", content="abc")]},
        {"choices": [choice(content="€")]},
        {"choices": [choice(role="assistant", content="", reasoning="hm €")]},
        {"choices": [choice(role="assistant", content=None, tool_calls=[call])]},
        {"choices": [choice(role="assistant", content=None, refusal="no")]},
        b'{"choices": [{"delta": {"content": "\\ud83d"}}]}',
    )
    assert answer.text_bytes == 3 + 3 + 6 + 3 + 7 + 2 + 1


@pytest.mark.parametrize(
    "delta",
    [{"reasoning": "four"}, {"content": "four"}, {"tool_calls": [{"function": {"arguments": "four"}}]}],
)
def test_text_is_counted_in_a_delta_without_a_role(delta: dict[str, Any]) -> None:
    assert read({"choices": [choice(**delta)]}).text_bytes == 4


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "hmm"}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    ("delta", "size", "media"),
    [
        ({"content": ["ab", THINKING, {"type": "text", "text": "cd"}]}, 7, 0),
        ({"content": "a", "reasoning": "hmm"}, 4, 0),
        ({"reasoning": "hmm", "reasoning_details": [{"type": "reasoning.text", "text": "hmm"}]}, 3, 0),
        ({"reasoning_content": "hmm", "reasoning": "hmm"}, 3, 0),
        ({"reasoning_details": [{"type": "reasoning.summary", "summary": "hmm", "format": "x"}]}, 3, 0),
        ({"reasoning": None, "reasoning_details": [{"type": "reasoning.encrypted", "data": "A" * 9}]}, 9, 0),
        (
            {
                "reasoning": "hm",
                "reasoning_details": [
                    {"type": "reasoning.text", "text": "hm"},
                    {"type": "reasoning.encrypted", "data": "AAAA"},
                ],
            },
            6,
            0,
        ),
        (
            {
                "tool_calls": [
                    {"id": "call_1", "type": "function", "function": {"name": "ab", "arguments": "{}"}}
                ]
            },
            4,
            0,
        ),
        ({"function_call": {"name": "ab", "arguments": "{}"}}, 4, 0),
        ({"content": "", "annotations": [{"type": "url_citation", "url_citation": {"title": "ab"}}]}, 2, 0),
        ({"content": "", "images": [IMAGE, IMAGE]}, 0, 2),
        ({"content": [IMAGE, {"type": "text", "text": "ab"}]}, 2, 1),
        ({"audio": {"id": "a", "data": "AAAA", "transcript": "ab"}}, 2, 1),
    ],
)
@pytest.mark.parametrize("key", ["delta", "message"])
def test_every_string_that_a_model_writes_counts_once(delta: Any, size: int, media: int, key: str) -> None:
    answer = read({"choices": [{"index": 0, key: {"role": "assistant", **delta}}]})
    assert (answer.text_bytes, answer.media) == (size, media)


def test_a_message_beside_deltas_is_not_counted_again() -> None:
    answer = read(
        {"choices": [choice(content="ab") | {"message": {"content": "ab"}}]},
        {"choices": [choice(content="cd") | {"message": {"content": "abcd"}}]},
        {"choices": [choice("stop") | {"message": {"content": "abcd"}}]},
    )
    assert (answer.text_bytes, answer.finished) == (4, True)


def test_a_sound_in_pieces_is_one_sound() -> None:
    piece = {"choices": [choice(audio={"data": "AAAA"})]}
    assert read(piece, piece, piece).media == 1


@pytest.mark.parametrize(
    ("chunk", "kind", "status"),
    [
        ({"error": {"code": 502, "message": "Provider disconnected"}}, UpstreamFailed, 502),
        ({"error": {"code": "server_error", "message": "x"}}, UpstreamFailed, None),
        ({"error": {"message": "x"}}, UpstreamFailed, None),
        ({"error_type": "x", "error_message": "no"}, UpstreamFailed, None),
        ({"base_resp": {"status_code": 1013, "status_msg": "no"}}, UpstreamFailed, None),
        ({"error": "text"}, UpstreamFailed, None),
        ({"error": ["odd"]}, UpstreamFailed, None),
        ({"object": "error", "message": "CUDA", "code": 500}, UpstreamFailed, 500),
        ({"choices": [choice("error")]}, UpstreamFailed, None),
        ({"choices": [choice("error") | {"error": {"code": 503, "message": "x"}}]}, UpstreamFailed, 503),
        ({"choices": [choice() | {"error": {"code": 503, "message": "x"}}]}, UpstreamFailed, 503),
        ({"error": {"code": 429, "message": "x"}, "choices": [choice("error")]}, UpstreamRateLimited, 429),
        ({"error": {"code": "429", "message": "x"}}, UpstreamRateLimited, 429),
        ({"error": {"code": "rate_limit_exceeded", "message": "x"}}, UpstreamRateLimited, None),
        (
            {"error": {"message": "x", "error_type": "rate_limit_exceeded", "http_status": 429}},
            UpstreamRateLimited,
            429,
        ),
        ({"error": {"code": 402, "message": "x"}}, UpstreamPaymentRequired, 402),
        ({"error": {"message": "x", "error_type": "payment_required"}}, UpstreamPaymentRequired, None),
        (
            {"error": {"code": 403, "message": "x", "metadata": {"reasons": ["violence"]}}},
            UpstreamModerated,
            403,
        ),
        (
            {"error": {"code": 400, "message": "x", "metadata": {"error_type": "refusal"}}},
            UpstreamModerated,
            400,
        ),
    ],
)
def test_an_error_chunk_of_any_shape_is_an_error(
    chunk: Any, kind: type[UpstreamError], status: int | None
) -> None:
    error = fault(chunk)
    assert type(error) is kind
    assert error.upstream_status == status


@pytest.mark.parametrize("error", [None, "", False, 0, {}, [], {"message": "", "code": None}])
def test_an_empty_error_counts_as_none(error: object) -> None:
    for chunk in ({"error": error}, {"error_message": error}, {"choices": [choice() | {"error": error}]}):
        assert ChatAnswer().read(json.dumps(chunk).encode()) is not None


def test_a_base_resp_of_zero_is_not_an_error() -> None:
    assert ChatAnswer().read(b'{"base_resp": {"status_code": 0, "status_msg": "ok"}}') is not None


def test_an_error_with_odd_text_and_numbers_can_be_written() -> None:
    error = fault(
        b'{"error": {"message": "cut \\ud83d", "code": 123456789012345678901234567890,'
        b' "availability": {"retry_after": 1%b}}}' % (b"0" * 400)
    )
    assert error.message.encode()
    assert error.upstream_status is None
    assert error.retry_after is None


def test_names_with_half_characters_can_be_written() -> None:
    answer = read(b'{"model": "a\\ud83d", "usage": {"\\ud83d": 123456789012345678901234567890}}')
    assert answer.model == "a?"
    assert json.dumps(answer.usage).encode()


MANY = MAX_VALUES + 1


@pytest.mark.parametrize(
    "data",
    [
        b'{"choices":[{"delta":{"content":[' + b'"",' * MANY + b'""]}}]}',
        b'{"x":[' + b"{}," * MANY + b"{}]}",
        b"[" + b"[]," * (4 * MANY) + b"[]]",
        b'{"x":"\\ud800","y":[' + b"1.5e3," * MANY + b"0]}",
    ],
    ids=["parts", "objects", "lists", "lenient"],
)
def test_a_chunk_of_too_many_values_is_refused_at_once(data: bytes) -> None:
    started = time.process_time()
    with pytest.raises(UpstreamInvalid):
        ChatAnswer().read(data)
    assert time.process_time() - started < 0.05


def test_a_large_text_in_one_chunk_is_read() -> None:
    data = orjson.dumps({"choices": [{"delta": {"content": "x" * 4_000_000}}]})
    answer = ChatAnswer()
    assert answer.read(data) == data
    assert answer.text_bytes == 4_000_000


@pytest.mark.parametrize("before", [10, 20_000])
def test_a_usage_that_is_too_large_keeps_its_counts(before: int) -> None:
    usage = {f"k{n}": "x" * 100 for n in range(before)} | {"huge": "y" * 70_000, **USAGE}
    answer = ChatAnswer()
    answer.read(orjson.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage}))
    assert answer.usage is not None
    assert {name: answer.usage[name] for name in USAGE} == USAGE
    assert len(orjson.dumps(answer.usage)) < 70_000


def test_an_error_in_a_list_of_one_is_read() -> None:
    with pytest.raises(UpstreamError) as told:
        ChatAnswer().read(b'[{"error":{"code":503,"message":"The model is overloaded."}}]')
    assert told.value.message == "The model is overloaded."


@pytest.mark.parametrize("data", [b"[]", b"[{}]", b'[{"choices":[]}]', b'[{"error":{"code":1}},{}]'])
def test_any_other_list_is_not_a_chunk(data: bytes) -> None:
    with pytest.raises(UpstreamInvalid):
        ChatAnswer().read(data)


def test_a_completion_is_relayed_without_an_unwritable_usage() -> None:
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"a": deep}
    answer = ChatAnswer()
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "extra": deep}
    choices = [{"message": {"content": "Hello"}, "finish_reason": "stop"}]
    relayed = answer.read_whole({"choices": choices, "usage": usage})
    assert relayed is not None
    assert json.loads(relayed)["usage"] == {"prompt_tokens": 5, "completion_tokens": 7}
    assert answer.usage == {"prompt_tokens": 5, "completion_tokens": 7}
