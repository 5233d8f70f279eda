from __future__ import annotations

from typing import Any

import pytest

from broker.core.errors import (
    UpstreamError,
    UpstreamFailed,
    UpstreamInterrupted,
    UpstreamModerated,
    UpstreamPaymentRequired,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnauthorized,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from broker.core.upstream_errors import (
    backoff,
    fault_in_stream,
    fault_of_status,
    parse_retry_after,
    retry_delay,
)

KEY = "sk-or-v1-0123456789abcdef"


def rejected(message: str) -> str:
    return fault_of_status(400, {"error": {"message": message}}, secrets=(KEY,)).message


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, UpstreamRejected),
        (401, UpstreamUnauthorized),
        (402, UpstreamPaymentRequired),
        (403, UpstreamRejected),
        (404, UpstreamRejected),
        (408, UpstreamTimeout),
        (413, UpstreamRejected),
        (422, UpstreamRejected),
        (429, UpstreamRateLimited),
        (500, UpstreamUnavailable),
        (502, UpstreamUnavailable),
        (503, UpstreamUnavailable),
        (504, UpstreamTimeout),
        (524, UpstreamTimeout),
        (529, UpstreamUnavailable),
    ],
)
@pytest.mark.parametrize("body", [None, "<html>", [], {}, {"error": {"message": "x"}}, {"error": "x"}])
def test_a_status_has_its_error_whatever_the_body(status: int, kind: type[UpstreamError], body: Any) -> None:
    error = fault_of_status(status, body)
    assert type(error) is kind
    assert error.upstream_status == status


@pytest.mark.parametrize(
    "error",
    [
        {
            "code": 403,
            "message": "Input flagged",
            "metadata": {"reasons": ["violence"], "flagged_input": "how"},
        },
        {"code": 403, "message": "x", "metadata": {"patterns": ["a"]}},
        {"message": "x", "error_type": "content_policy_violation", "http_status": 403},
        {"message": "x", "code": "content_filter"},
    ],
)
def test_moderation_is_told_apart_and_does_not_quote(error: dict[str, Any]) -> None:
    fault = fault_of_status(403, {"error": error})
    assert type(fault) is UpstreamModerated
    assert fault.message == UpstreamModerated.default_message


def test_what_is_said_of_our_key_is_not_passed_on() -> None:
    error = fault_of_status(401, {"error": {"message": "something about the key"}})
    assert error.message == error.default_message


@pytest.mark.parametrize("status", [400, 402, 404, 408, 413, 422, 429, 500, 502, 503, 504, 524, 529])
@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "the disk is full"}},
        {"error": {"message": "Provider returned error", "metadata": {"raw": "the disk is full"}}},
        {"error": True, "message": "the disk is full"},
        [{"error": {"message": "the disk is full"}}],
        "the disk is full",
    ],
    ids=str,
)
def test_every_other_refusal_is_told_in_the_upstreams_words(status: int, body: object) -> None:
    assert fault_of_status(status, body).message == "the disk is full"


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-abcdefghijklmnopqrstuvwx",
        "sk-zzzzzzzzzzzzzzzzzzzz",
        "sk-or-v1-0123456789abcdef0123456789abcdef",
        "gsk_Ab12Cd34Ef56Gh78Ij90",
        "AIzaSyA1234567890abcdefghijk",
        "hf_AbCdEfGhIjKlMnOpQrSt",
        "r8_AbCdEfGhIjKl",
        "xai-AbCdEfGhIjKl",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl",
        "req_0123456789abcdef",
        "org-A1b2C3d4E5f6",
    ],
)
@pytest.mark.parametrize("place", ["Bad thing with {} here", "Bearer {}", "key={}", '"{}"'])
def test_no_key_and_no_token_is_told(secret: str, place: str) -> None:
    for body in (
        {"error": {"message": place.format(secret)}},
        {"error": {"message": "Provider returned error", "metadata": {"raw": place.format(secret)}}},
    ):
        message = fault_of_status(400, body).message
        assert secret not in message
        assert secret[:12] not in message


@pytest.mark.parametrize(
    "message",
    [
        "The model claude-3-5-sonnet-20241022 does not exist.",
        "Bearer authentication required.",
        "max_tokens must be at most 8192, got 100000.",
        "user_message_is_too_long: keep it under 4096 tokens",
    ],
)
def test_what_is_no_secret_is_told_whole(message: str) -> None:
    assert fault_of_status(400, {"error": {"message": message}}).message == message


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "no such model", "code": 404}},
        {"error": "no such model"},
        {"object": "error", "message": "no such model", "code": 404},
        {"error": {"message": "no such model", "error_type": "not_found", "http_status": 404}},
        {"message": "no such model"},
        {"detail": "no such model"},
    ],
)
def test_a_rejection_is_told_in_the_upstreams_words(body: dict[str, Any]) -> None:
    assert fault_of_status(404, body).message == "no such model"


def test_a_long_message_is_cut() -> None:
    assert len(rejected("x" * 1000)) == 300


def test_a_message_is_one_line() -> None:
    assert rejected("a\n\tb\x1b[31m  c\x00") == "a b [31m c"


@pytest.mark.parametrize(
    "message",
    [
        f"bad key {KEY}",
        f"bad key {KEY}.",
        "bad key sk-abcdef0123456789",
        "bad key sk-proj-abcdef_0123-456789",
        "Authorization: Bearer abcdef0123456789",
        "api_key=abcdef0123456789",
        "OPENAI_KEY abcdef0123456789",
        "token: abcdef0123456789",
    ],
)
def test_a_message_carries_no_secret(message: str) -> None:
    told = rejected(message)
    assert "0123" not in told
    assert told


def test_a_secret_at_the_cut_is_not_cut_in_half() -> None:
    assert KEY[:8] not in rejected("x" * 290 + f" {KEY}")


def test_a_message_of_half_characters_can_be_written() -> None:
    assert rejected("cut \ud83d") == "cut ?"


def test_words_that_only_look_like_secrets_may_stay() -> None:
    message = (
        "max_tokens must be at most 4096 tokens; the key provided has no token sequence, that monkey business"
    )
    assert rejected(message) == message


def test_a_refused_key_inside_a_stream_is_not_told() -> None:
    error = fault_in_stream({"error": {"code": 401, "message": "key of ACME Inc. is wrong"}})
    assert error is not None
    assert error.message == UpstreamFailed.default_message


def test_the_wait_is_read_from_the_header_first_and_then_from_the_body() -> None:
    body = {"error": {"message": "x", "availability": {"retryable": True, "retry_after": 40}}}
    assert fault_of_status(429, body).retry_after == 40
    assert fault_of_status(429, body, retry_after=7.0).retry_after == 7


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),
        (" 3 ", 3.0),
        (None, None),
        ("", None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("1e9", None),
        ("9" * 400, 31 * 86_400.0),
        ("99999999", 31 * 86_400.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
    ],
)
def test_a_retry_after_is_a_number_of_seconds(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value) == seconds


@pytest.mark.parametrize("status", [429, 502, 503, 529])
def test_what_did_not_generate_may_be_asked_again(status: int) -> None:
    assert retry_delay(fault_of_status(status, None), 0, 0.5) == 0.5


def test_a_connection_that_was_not_made_may_be_tried_again() -> None:
    assert retry_delay(UpstreamUnreachable(), 0, 0.5) == 0.5


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 408, 500, 504, 524, 501, 505, 520])
def test_what_may_have_generated_or_will_not_is_never_asked_again(status: int) -> None:
    assert retry_delay(fault_of_status(status, None), 0, 0.5) is None


@pytest.mark.parametrize("error", [UpstreamInterrupted(), UpstreamTimeout(), UpstreamFailed()])
def test_a_line_that_broke_after_the_request_is_never_asked_again(error: UpstreamError) -> None:
    assert retry_delay(error, 0, 0.5) is None


@pytest.mark.parametrize(("wait", "delay"), [(0.0, 0.0), (20.0, 20.0), (20.5, None), (40.0, None)])
def test_a_told_wait_is_kept_up_to_twenty_seconds(wait: float, delay: float | None) -> None:
    assert retry_delay(fault_of_status(429, None, retry_after=wait), 0, 0.5) == delay


def test_waits_double_up_to_eight_seconds() -> None:
    assert [backoff(attempt, 0.5) for attempt in range(7)] == [0.5, 1, 2, 4, 8, 8, 8]


def test_waits_vary_by_a_quarter() -> None:
    assert [backoff(1, jitter) for jitter in (0.0, 1.0)] == [0.75, 1.25]


@pytest.mark.parametrize(
    "text",
    ["key" + "-" * 24_000, "key-" * 6_000, "token=" * 4_000, "sk_" * 8_000 + "1", "key " + "a" * 24_000],
)
def test_a_long_message_made_to_slow_us_down_is_told_cut(text: str) -> None:
    told = rejected(text)
    assert 0 < len(told) <= 300


@pytest.mark.parametrize("before", ["x" * 1_990, "word " * 398 + "words", "x" * 1_999, "key-abc1234 " * 166])
def test_a_secret_where_a_long_message_is_cut_is_not_cut_in_half(before: str) -> None:
    assert KEY[:8] not in rejected(f"{before} {KEY} and more of it")
    assert "abc1" not in rejected(f"{before} sk-or-v1-abc123456789 and more of it")
