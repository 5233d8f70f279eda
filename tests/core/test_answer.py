from __future__ import annotations

import json
from typing import Any

import pytest

from broker.core.answer import Answer
from broker.core.errors import (
    UpstreamError,
    UpstreamFailed,
    UpstreamInvalid,
    UpstreamModerated,
    UpstreamPaymentRequired,
    UpstreamRateLimited,
)


def read(*chunks: Any) -> Answer:
    answer = Answer()
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
    assert Answer().read(data) == data


def test_bytes_that_are_no_utf8_pass_as_the_event_stream_format_decodes_them() -> None:
    assert Answer().read(b'{"a": "\xff"}') == '{"a": "\ufffd"}'.encode()


@pytest.mark.parametrize("data", [b"", b" ", b"\n", b"[DONE]", b"[DONE] "])
def test_what_is_no_chunk_is_not_relayed(data: bytes) -> None:
    assert Answer().read(data) is None


@pytest.mark.parametrize(
    "data",
    [b"[]", b"1", b'"x"', b"null", b"{", b"{}x", b'{"a": NaN}', b'{"a": Infinity}', b"[DONE", b"<html>"],
)
def test_what_is_no_json_object_is_invalid(data: bytes) -> None:
    with pytest.raises(UpstreamInvalid):
        Answer().read(data)


def test_json_nested_without_end_is_invalid() -> None:
    with pytest.raises(UpstreamInvalid):
        Answer().read(b'{"a":' * 200_000)


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


def test_the_first_reason_and_names_stay() -> None:
    answer = read(
        {
            "id": "gen-1",
            "model": "m1",
            "provider": "P1",
            "choices": [choice("length", native_finish_reason="x")],
        },
        {"id": "gen-2", "model": "m2", "provider": "P2", "choices": [choice("stop")]},
    )
    assert (answer.model, answer.provider, answer.generation_id) == ("m1", "P1", "gen-1")
    assert answer.finish_reason == "length"


def test_names_may_come_late_and_one_by_one() -> None:
    answer = read({"model": ""}, {"model": "m"}, {"provider": "P"}, {"id": "gen-1"})
    assert (answer.model, answer.provider, answer.generation_id) == ("m", "P", "gen-1")


@pytest.mark.parametrize(
    "chunks",
    [
        [{"choices": [], "usage": {"total_tokens": 3}}],
        [{"choices": [choice("stop")], "usage": {"total_tokens": 3}}],
        [{"usage": {"total_tokens": 3}}],
        [
            {"usage": {"total_tokens": 1}},
            {"choices": [choice()], "usage": None},
            {"usage": {"total_tokens": 3}},
        ],
        [{"usage": {"total_tokens": 3}}, {"choices": [choice("stop")], "usage": None}],
    ],
)
def test_usage_is_found_wherever_it_is(chunks: list[Any]) -> None:
    assert read(*chunks).usage == {"total_tokens": 3}


def test_usage_beside_an_error_is_kept() -> None:
    answer = Answer()
    with pytest.raises(UpstreamFailed):
        answer.read(b'{"error": {"message": "x"}, "usage": {"cost": 0.1}}')
    assert answer.usage == {"cost": 0.1}


def test_what_a_model_writes_is_counted_in_bytes_of_utf8() -> None:
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


@pytest.mark.parametrize(
    ("chunk", "kind", "status"),
    [
        ({"error": {"code": 502, "message": "Provider disconnected"}}, UpstreamFailed, 502),
        ({"error": {"code": "server_error", "message": "x"}}, UpstreamFailed, None),
        ({"error": {"message": "x"}}, UpstreamFailed, None),
        ({"error": {}}, UpstreamFailed, None),
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


@pytest.mark.parametrize("error", [None, "", False, 0])
def test_an_empty_error_is_none(error: object) -> None:
    assert Answer().read(json.dumps({"error": error, "choices": []}).encode()) is not None


def test_an_error_of_half_characters_and_absurd_numbers_can_still_be_told() -> None:
    error = fault(
        b'{"error": {"message": "cut \\ud83d", "code": 123456789012345678901234567890,'
        b' "availability": {"retry_after": 1%b}}}' % (b"0" * 400)
    )
    assert error.message.encode()
    assert error.upstream_status is None
    assert error.retry_after is None


def test_a_chunk_of_half_characters_is_known_by_names_that_can_be_written() -> None:
    answer = read(b'{"model": "a\\ud83d", "usage": {"\\ud83d": 123456789012345678901234567890}}')
    assert answer.model == "a?"
    assert json.dumps(answer.usage).encode()
