from __future__ import annotations

import json
import time
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
    other_cap,
    parse_reset,
    parse_retry_after,
    retry_delay,
    wait_in_headers,
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
def test_a_status_has_its_error_with_any_body(status: int, kind: type[UpstreamError], body: Any) -> None:
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
def test_moderation_is_recognised_and_not_quoted(error: dict[str, Any]) -> None:
    fault = fault_of_status(403, {"error": error})
    assert type(fault) is UpstreamModerated
    assert fault.message == UpstreamModerated.default_message


def test_messages_about_our_key_are_not_passed_on() -> None:
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
def test_other_refusals_have_the_upstreams_message(status: int, body: object) -> None:
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
def test_messages_have_no_keys_and_tokens(secret: str, place: str) -> None:
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
def test_text_that_is_not_secret_stays(message: str) -> None:
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
def test_a_rejection_has_the_upstreams_message(body: dict[str, Any]) -> None:
    assert fault_of_status(404, body).message == "no such model"


def test_a_long_message_is_cut() -> None:
    assert len(rejected("x" * 1000)) == 300


def test_a_message_has_one_line() -> None:
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


def test_a_refused_key_in_a_stream_is_not_quoted() -> None:
    error = fault_in_stream({"error": {"code": 401, "message": "key of ACME Inc. is wrong"}})
    assert error is not None
    assert error.message == UpstreamFailed.default_message


def test_the_wait_of_the_header_comes_before_that_of_the_body() -> None:
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
def test_a_refusal_without_generation_may_be_retried(status: int) -> None:
    assert retry_delay(fault_of_status(status, None), 0, 0.5) == 0.5


def test_a_connection_that_was_not_made_may_be_tried_again() -> None:
    assert retry_delay(UpstreamUnreachable(), 0, 0.5) == 0.5


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 408, 500, 504, 524, 501, 505, 520])
def test_a_possible_generation_is_never_retried(status: int) -> None:
    assert retry_delay(fault_of_status(status, None), 0, 0.5) is None


@pytest.mark.parametrize("error", [UpstreamInterrupted(), UpstreamTimeout(), UpstreamFailed()])
def test_a_connection_broken_after_the_request_is_not_retried(error: UpstreamError) -> None:
    assert retry_delay(error, 0, 0.5) is None


@pytest.mark.parametrize(("wait", "delay"), [(0.0, 0.0), (20.0, 20.0), (20.5, None), (40.0, None)])
def test_a_given_wait_is_honoured_up_to_twenty_seconds(wait: float, delay: float | None) -> None:
    assert retry_delay(fault_of_status(429, None, retry_after=wait), 0, 0.5) == delay


def test_waits_double_up_to_eight_seconds() -> None:
    assert [backoff(attempt, 0.5) for attempt in range(7)] == [0.5, 1, 2, 4, 8, 8, 8]


def test_waits_vary_by_a_quarter() -> None:
    assert [backoff(1, jitter) for jitter in (0.0, 1.0)] == [0.75, 1.25]


@pytest.mark.parametrize(
    "text",
    ["key" + "-" * 24_000, "key-" * 6_000, "token=" * 4_000, "sk_" * 8_000 + "1", "key " + "a" * 24_000],
)
def test_a_hostile_long_message_is_cut(text: str) -> None:
    told = rejected(text)
    assert 0 < len(told) <= 300


@pytest.mark.parametrize("before", ["x" * 1_990, "word " * 398 + "words", "x" * 1_999, "key-abc1234 " * 166])
def test_a_secret_where_a_long_message_is_cut_is_not_cut_in_half(before: str) -> None:
    assert KEY[:8] not in rejected(f"{before} {KEY} and more of it")
    assert "abc1" not in rejected(f"{before} sk-or-v1-abc123456789 and more of it")


# Waits before a retry

NOW = 1_764_000_000.0  # 2025-11-24 16:00:00 UTC, a Monday


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("Mon, 24 Nov 2025 16:00:15 GMT", 15.0),
        ("Monday, 24-Nov-25 16:00:15 GMT", 15.0),
        ("Mon Nov 24 16:00:15 2025", 15.0),
        ("Mon, 24 Nov 2025 17:00:15 +0100", 15.0),
        ("Mon, 24 Nov 2025 15:59:00 GMT", 0.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0.0),
        ("Sun Nov  6 08:49:37 1994", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 31 * 86_400.0),
        ("Mon, 24 Foo 2025 16:00:15 GMT", None),
        ("Mon, 99 Nov 2025 16:00:15 GMT", None),
        ("soon", None),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
def test_a_retry_after_may_be_a_date_of_any_form(
    value: str, seconds: float | None, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert parse_retry_after(value, NOW) == seconds
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("1764000015000", 15.0),
        (1764000015000, 15.0),
        (1764000015000.0, 15.0),
        ("1764000015", 15.0),
        (1764000015, 15.0),
        ("1764000015.5", 15.5),
        ("15", 15.0),
        (15, 15.0),
        ("0.5", 0.5),
        ("999999999", 31 * 86_400.0),
        ("1763999000", 0.0),
        ("1763999000000", 0.0),
        ("9999999999", 31 * 86_400.0),
        ("9" * 39, 31 * 86_400.0),
        ("-15", None),
        ("-1764000015", None),
        ("nan", None),
        ("later", None),
        ("", None),
        (True, None),
        (None, None),
        ([15], None),
    ],
)
def test_a_reset_is_read_in_three_units(value: object, seconds: float | None) -> None:
    assert parse_reset(value, NOW) == seconds
    for status in (429, 502, 503, 529):
        assert wait_in_headers({"x-ratelimit-reset": value}, status, NOW) == seconds
    assert wait_in_headers({"X-RateLimit-Reset": value}, 400, NOW) is None


@pytest.mark.parametrize("name", ["X-RateLimit-Reset", "x-ratelimit-reset"])
@pytest.mark.parametrize("value", ["1764000040000", "1764000040", "40", 40])
def test_a_reset_inside_the_body_is_read_too(name: str, value: object) -> None:
    error = {"code": 429, "message": "Rate limit", "metadata": {"headers": {name: value}}}
    assert fault_of_status(429, {"error": error}, now=NOW).retry_after == 40
    fault = fault_in_stream({"error": error, "choices": []}, now=NOW)
    assert fault is not None
    assert fault.retry_after == 40
    first = {**error, "metadata": {"headers": {name: value, "Retry-After": "7"}}}
    assert fault_of_status(429, {"error": first}, now=NOW).retry_after == 7


def test_a_retry_after_comes_before_a_reset() -> None:
    headers = {"Retry-After": "7", "X-RateLimit-Reset": "1764000040"}
    assert wait_in_headers(headers, 429, NOW) == 7
    assert wait_in_headers({**headers, "Retry-After": "soon"}, 429, NOW) == 40


# Messages

SAID = "Unsupported file type: image/avif"


def wrapped(raw: object, *, message: str = "Provider returned error", **metadata: object) -> dict[str, Any]:
    return {"error": {"code": 400, "message": message, "metadata": {"raw": raw, **metadata}}}


RAW = {
    "text": SAID,
    "openai": {"error": {"message": SAID, "type": "invalid_request_error", "param": None, "code": None}},
    "anthropic": {"type": "error", "error": {"type": "invalid_request_error", "message": SAID}},
    "google": [{"error": {"code": 400, "message": SAID, "status": "INVALID_ARGUMENT"}}],
    "vllm": {"object": "error", "message": SAID, "type": "BadRequestError", "code": 400},
    "xai": {"code": "Client specified an invalid argument", "error": SAID},
    "cohere": {"message": SAID},
    "nest": {"statusCode": 400, "error": "Bad Request", "message": [SAID]},
    "cloudflare": {"success": False, "errors": [{"code": 5006, "message": SAID}]},
    "detail": {"detail": SAID},
    "a word beside": {"error": "invalid_request", "message": SAID},
    "list of one": [{"message": SAID}],
    "json inside": {"error": {"message": json.dumps({"error": {"message": SAID}})}},
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
@pytest.mark.parametrize("form", [lambda raw: raw, json.dumps, lambda raw: json.dumps(raw, indent=2)])
@pytest.mark.parametrize("message", ["Provider returned error", "Provider returned error.", "", None])
def test_the_providers_sentence_comes_with_its_name(raw: object, form: Any, message: Any) -> None:
    body = wrapped(form(raw), message=message, provider_name="DeepInfra")
    assert fault_of_status(400, body).message == f"DeepInfra: {SAID}"
    assert fault_of_status(400, wrapped(form(raw), message=message)).message == SAID
    fault = fault_in_stream(body)
    assert fault is not None
    assert fault.message == f"DeepInfra: {SAID}"


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_a_provider_without_openrouter_has_the_same_message(raw: object) -> None:
    assert fault_of_status(400, raw).message == SAID


def test_a_message_of_its_own_comes_before_the_raw_text() -> None:
    body = wrapped("something else", message="acme/fake is not a valid model ID")
    assert fault_of_status(400, body).message == "acme/fake is not a valid model ID"


def test_an_empty_raw_text_leaves_the_phrase() -> None:
    nothing: list[object] = ["", {}, [], None, 7, {"error": {}}, {"message": ""}]
    for raw in nothing:
        assert fault_of_status(400, wrapped(raw)).message == "Provider returned error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {
                "detail": [
                    {"type": "missing", "loc": ["body", "messages", 0, "role"], "msg": "Field required"}
                ]
            },
            "body.messages.0.role: Field required",
        ),
        (
            {
                "object": "error",
                "message": {
                    "detail": [
                        {"type": "extra_forbidden", "loc": ["body", "user"], "msg": "Extra inputs"},
                        {"type": "extra_forbidden", "loc": ["body", "plugins"], "msg": "Extra inputs"},
                    ]
                },
                "type": "invalid_request_error",
                "code": None,
            },
            "body.user: Extra inputs",
        ),
        ({"detail": [{}, {"msg": "no place"}]}, "no place"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"detail": {"message": "no such thing"}}, "no such thing"),
        ({"detail": {"error": {"message": "no such thing"}}}, "no such thing"),
        ({"errors": [{"field": "top_k", "message": "too small"}]}, "top_k: too small"),
        ({"error": {"issues": [{"path": ["stop", 4], "message": "too many"}]}}, "stop.4: too many"),
        ({"error": {"message": [{"loc": "seed", "msg": "no integer"}]}}, "seed: no integer"),
        ([{"error": {"code": 400, "message": "in a list"}}], "in a list"),
        ([{"detail": [{"loc": ["body", "n"], "msg": "in a list"}]}], "body.n: in a list"),
        ("upstream connect error or disconnect", "upstream connect error or disconnect"),
        ("  spaced \r\n out ", "spaced out"),
    ],
)
def test_the_first_complaint_comes_with_its_place(body: object, message: str) -> None:
    assert fault_of_status(422, body).message == message


@pytest.mark.parametrize(
    "page",
    [
        "<html><h1>502</h1></html>",
        "<!DOCTYPE html>\n<html><title>502</title>",
        "\ufeff\n <HTML>502",
        "<h1>502</h1>",
        "<?xml version='1.0'?><Error>502</Error>",
        "<center>502</center>",
        "<!-- 502 --><html>",
    ],
)
def test_an_html_page_is_not_quoted(page: str) -> None:
    bodies: list[object] = [page, {"error": page}, {"error": {"message": page}}, {"detail": page}]
    for body in bodies:
        fault = fault_of_status(502, body)
        assert fault.message == fault.default_message
    assert fault_of_status(502, wrapped(page, provider_name="X")).message == "Provider returned error"
    assert fault_of_status(502, {"message": "Bad gateway: <html>502</html>"}).message == "Bad gateway"


TEAM = "0f3c2a10-1b2c-4d3e-8f90-a1b2c3d4e5f6"


@pytest.mark.parametrize(
    "identifier",
    [
        TEAM,
        TEAM.upper(),
        "org-AbCdEfGhIjKlMnOpQrStUvWx",
        "org-a1B2c3D4e5F6g7H8",
        "user_2abCdEfGhIjKlMnOpQrStUvWxYz",
        "user-AbCdEfGhIjKlMnOp",
        "key_01J9ZABCDEFGHJKMNP",
        "proj_AbCdEfGhIjKlMnOpQrStUvWx",
        "req_011CSxyz0123456789abcdef",
        "sk-proj-********************AbCd",
        "sk-or-v1-0123456789abcdef0123456789abcdef",
        "sk-ant-api03-AbCdEfGh_IjKlMn-OpQrSt",
        "xai-AbCdEfGhIjKlMnOp",
        "pplx-0123456789abcdefAbCd",
        "nvapi-AbCdEfGhIjKlMnOp",
        "fw_3ZAbCdEfGhIjKl",
        "csk-0123abcd4567efgh",
        "0123456789abcdef0123456789abcdef",
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        "Your team {} has used all of its credits.",
        "Rate limit reached for gpt-5 in {} on requests",
        "API key ID: {}",
        "quota of ({}), see the console",
        "id={},",
        '"{}"',
        "{}",
    ],
)
def test_messages_have_no_ids(identifier: str, place: str) -> None:
    raw = place.format(identifier)
    for body in (wrapped(raw), wrapped({"error": raw}), wrapped(json.dumps({"error": {"message": raw}}))):
        told = fault_of_status(400, body).message
        assert told
        assert identifier not in told
        assert identifier[-4:] not in told


@pytest.mark.parametrize(
    "name", ["request id", "Request ID", "request_id", "requestId", "x-request-id", "trace_id"]
)
@pytest.mark.parametrize("between", [": ", "=", ' "', ": '", " "])
@pytest.mark.parametrize("value", ["20251126Abc4567", "b7c9-12fe-9981", "R01xyz"])
def test_messages_have_no_request_ids(name: str, between: str, value: str) -> None:
    told = rejected(f"Overloaded ({name}{between}{value})")
    assert value not in told
    assert told.startswith("Overloaded (")


@pytest.mark.parametrize(
    "message",
    [
        "The model claude-3-5-sonnet-20241022 does not exist.",
        "Unsupported parameter: 'max_tokens' is not supported with this model.",
        "This model's maximum context length is 131072 tokens, you asked for 140211.",
        "tool_call_id call_abc123 has no answer",
        "Your organization must be verified: https://platform.openai.com/settings/organization/general",
        "messages.3.content.0.image_url: Invalid user content",
        "The key 'messages' is missing; user-provided keys are read first",
    ],
)
def test_helpful_messages_stay_whole(message: str) -> None:
    assert rejected(message) == message


def test_our_key_is_never_quoted_in_any_shape() -> None:
    for text in (f"Key {KEY} is used up", f"{KEY}", f'{{"key": "{KEY}"}}', "x" * 280 + KEY, f"\x00{KEY}\x1b"):
        for body in (
            text,
            {"error": text},
            {"detail": text},
            wrapped(text, provider_name=KEY),
            wrapped({"message": text}),
        ):
            assert "0123" not in fault_of_status(400, body, secrets=(KEY,)).message
            fault = fault_in_stream(
                {"error": {"message": text}, "choices": []}, secrets=(KEY,), native_reason=KEY
            )
            assert fault is not None
            assert "0123" not in fault.message


def test_a_message_has_300_characters_and_one_line_at_most() -> None:
    for raw in ("a\n\tb\x1b[31m  c\x00\x85" * 200, "word " * 200):
        told = fault_of_status(400, wrapped(raw, provider_name="P" * 500)).message
        assert len(told) <= 300
        assert told.isprintable()


# Moderation

XAI = (
    "Content violates usage guidelines. Team: 0f3c2a10-1b2c-4d3e-8f90-a1b2c3d4e5f6, Model: grok-4. "
    "Failed check: SAFETY_CHECK_TYPE_CSAM"
)


@pytest.mark.parametrize(
    "body",
    [
        wrapped(XAI, provider_name="xAI"),
        wrapped({"code": "The caller does not have permission", "error": XAI}),
        wrapped(json.dumps({"error": XAI})),
        {"code": "The caller does not have permission", "error": XAI},
        {"error": {"message": XAI}},
        {"error": {"message": "content violates usage guidelines."}},
        [{"error": {"code": 403, "message": "Failed check: SAFETY_CHECK_TYPE_BIO"}}],
        XAI,
        {
            "error": {
                "message": "Input flagged",
                "metadata": {"reasons": ["violence"], "flagged_input": "how"},
            }
        },
        {"error": {"message": "x", "metadata": {"patterns": ["card"]}}},
        {"error": {"message": "x", "metadata": {"error_type": "content_policy_violation"}}},
        {"error": {"message": "x", "code": "content_filter"}},
        wrapped({"error": {"message": "x", "code": "content_filter"}}),
        wrapped(json.dumps({"error": {"message": "x", "code": "moderation_blocked"}})),
    ],
)
def test_moderation_of_any_provider_is_recognised(body: Any) -> None:
    fault = fault_of_status(403, body)
    assert type(fault) is UpstreamModerated
    assert (fault.retryable, fault.upstream_status) == (False, 403)
    if isinstance(body, dict) and isinstance(body["error"], dict):
        told = fault_in_stream({"error": {**body["error"], "code": body["error"].get("code", 403)}})
        assert type(told) is UpstreamModerated


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_an_error_about_guidelines_is_not_moderation(status: int) -> None:
    assert type(fault_of_status(status, {"error": {"message": XAI}})) is not UpstreamModerated


# Retryable errors


@pytest.mark.parametrize(
    ("status", "retryable"),
    [
        *((status, False) for status in (400, 401, 403, 404, 413, 422)),
        *((status, True) for status in (408, 429, 500, 502, 503, 504, 524, 529)),
    ],
)
def test_retryable_is_the_same_in_every_shape(status: int, *, retryable: bool) -> None:
    assert fault_of_status(status, {"error": {"message": "x"}}).retryable is retryable
    chunks: list[dict[str, Any]] = [
        {"error": {"code": status, "message": "x"}},
        {"error": {"code": str(status), "message": "x"}},
        {"error": {"code": "some_word", "http_status": status, "message": "x"}},
        {"error": {"message": "x", "status_code": status}},
        {"error": {"message": "x", "status": str(status)}},
        {"error": "x", "code": status},
        {"error": "x", "status_code": str(status)},
        {"object": "error", "message": "x", "code": status},
        {"error_message": "x", "code": status},
        {"error": True, "message": "x", "status": status},
    ]
    for chunk in chunks:
        fault = fault_in_stream(chunk)
        assert fault is not None
        assert (fault.retryable, fault.upstream_status) == (retryable, status), chunk


@pytest.mark.parametrize(
    ("word", "retryable"),
    [
        ("context_length_exceeded", False),
        ("invalid_request_error", False),
        ("model_not_found", False),
        ("server_error", True),
        ("overloaded_error", True),
        ("provider_unavailable", True),
    ],
)
@pytest.mark.parametrize("key", ["code", "type", "error_type"])
def test_a_word_counts_in_place_of_a_status(word: str, key: str, *, retryable: bool) -> None:
    fault = fault_in_stream({"error": {key: word, "message": "x"}})
    assert fault is not None
    assert fault.retryable is retryable


def test_a_number_decides_before_a_word() -> None:
    fault = fault_in_stream({"error": {"code": 502, "type": "invalid_request_error", "message": "x"}})
    assert fault is not None
    assert fault.retryable


# The other name of the cap

KNOWN = "Unsupported parameter: '{}' is not supported with this model. Use '{}' instead."
NAMES = ("max_tokens", "max_completion_tokens")


@pytest.mark.parametrize(("sent", "other"), [NAMES, NAMES[::-1]])
@pytest.mark.parametrize(
    "shape",
    [
        lambda message: {"error": {"message": message, "type": "invalid_request_error"}},
        lambda message: {"error": message},
        lambda message: {"object": "error", "message": message, "code": 400},
        lambda message: {"message": message},
        lambda message: {"detail": message},
        lambda message: [{"error": {"code": 400, "message": message}}],
        wrapped,
        lambda message: wrapped(json.dumps({"error": {"message": message}})),
        lambda message: wrapped({"error": {"message": message}}),
    ],
)
def test_a_refused_cap_has_another_name(sent: str, other: str, shape: Any) -> None:
    assert other_cap(400, shape(KNOWN.format(sent, other)), [sent]) == other
    assert other_cap(400, shape(KNOWN.format(sent, other)), list(NAMES)) is None
    assert other_cap(422, shape(KNOWN.format(sent, other)), [sent]) is None
    assert other_cap(400, shape(f"{sent} is too large: 100000. It must be at most 8192"), [sent]) is None
    assert other_cap(400, shape("Invalid value for 'temperature'"), [sent]) is None


@pytest.mark.parametrize(("sent", "other"), [NAMES, NAMES[::-1]])
@pytest.mark.parametrize("said", ["Not a parameter of this model", "", "nope"])
def test_a_parameter_that_is_named_has_another_name(sent: str, other: str, said: str) -> None:
    error = {"message": said, "param": sent, "code": "unsupported_parameter"}
    assert other_cap(400, {"error": error}, [sent]) == other
    assert other_cap(400, wrapped(json.dumps({"error": error})), [sent]) == other
    assert other_cap(400, {"error": {**error, "param": "temperature"}}, [sent]) is None


@pytest.mark.parametrize("sent", NAMES)
@pytest.mark.parametrize(
    "said",
    [
        "{} is too large: 100000. This model supports at most 16384 completion tokens",
        "Invalid '{}': integer above maximum value. Expected a value <= 8192",
        "{} must be greater than 0",
        "'max_tokens' or 'max_completion_tokens' is too large: 100000. The maximum context length is 8192 tokens",
        "{} exceeds what is supported by this model; larger values are not supported",
    ],
)
@pytest.mark.parametrize("param", [True, False])
def test_a_cap_with_a_wrong_value_is_not_retried(sent: str, said: str, *, param: bool) -> None:
    error = {"message": said.format(sent), "code": "invalid_value", "param": sent if param else None}
    assert other_cap(400, {"error": error}, [sent]) is None
