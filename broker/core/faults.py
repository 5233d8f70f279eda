"""The upstream's ways to say no, in one place: HTTP errors, errors inside a stream, and when to try again.

OpenRouter puts the same object in an HTTP body and in a chunk: with a number as its ``code``, with a word, or with
``error_type`` and ``http_status`` beside the message. Other servers have shapes of their own: vLLM's is
``{"object": "error", "message": ...}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from broker.core.errors import (
    UpstreamError,
    UpstreamFailed,
    UpstreamInvalid,
    UpstreamModerated,
    UpstreamPaymentRequired,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnauthorized,
    UpstreamUnavailable,
    UpstreamUnreachable,
)

MAX_RETRY_AFTER = 20.0
"""Seconds that a retry may be told to wait; a longer wait is the page's business."""

_RETRYABLE = frozenset({429, 502, 503, 529})
"""Statuses that say that the upstream did not generate. A 500 or a timeout may have been billed."""

_BY_STATUS: dict[int, type[UpstreamError]] = {
    401: UpstreamUnauthorized,
    402: UpstreamPaymentRequired,
    408: UpstreamTimeout,
    429: UpstreamRateLimited,
    504: UpstreamTimeout,
    524: UpstreamTimeout,
}
_MODERATION = frozenset({"content_policy_violation", "refusal", "moderation", "content_filter"})
_MAX_MESSAGE = 300
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Whatever looks like a key, with the word before it that says so. Every repetition is possessive or bounded, so that it
# never looks at a character more often than a fixed number of times; the first digit stands within 64 characters.
_SECRET = re.compile(
    r"(?i)(?:\b|(?<=_))(?:sk|pk|key|bearer|token)[-_ :=]++(?=[A-Z._~+/=-]{0,64}+\d)[A-Z0-9._~+/=-]{6,}+"
)
_MAX_READ = 2_000
"""Characters of a message that are looked at; the rest would not be told anyway."""


def fault_of_status(
    status: int, body: object, *, retry_after: float | None = None, secrets: tuple[str, ...] = ()
) -> UpstreamError:
    """The error for an HTTP answer that is none of 2xx.

    Args:
        status: the HTTP status.
        body: its body as JSON, or whatever text came instead.
        retry_after: seconds of its ``Retry-After`` header.
        secrets: words that no message may carry.
    """
    error = _error_object(body) or (body if isinstance(body, Mapping) else None)
    wait = retry_after if retry_after is not None else _retry_after(error)
    if _is_moderation(status, error):
        return UpstreamModerated(upstream_status=status, retry_after=wait)
    kind = _BY_STATUS.get(status) or (UpstreamUnavailable if status >= 500 else UpstreamRejected)
    message = _told(error, secrets) if kind is UpstreamRejected else ""
    return kind(message, upstream_status=status, retry_after=wait)


def fault_in_stream(chunk: Mapping[str, Any], *, secrets: tuple[str, ...] = ()) -> UpstreamError | None:
    """The error that a chunk, a choice or a JSON body with status 200 tells of, or None where it tells of none."""
    error = _error_object(chunk)
    if error is None:
        return UpstreamFailed() if chunk.get("finish_reason") == "error" else None
    status = _status(error)
    kind: type[UpstreamError] = UpstreamFailed
    if status == 402 or _word(error) == "payment_required":
        kind = UpstreamPaymentRequired
    elif status == 429 or _word(error) == "rate_limit_exceeded":
        kind = UpstreamRateLimited
    elif _is_moderation(status, error):
        kind = UpstreamModerated
    # What is said beside a 401 may speak of our key.
    message = _told(error, secrets) if kind is UpstreamFailed and status != 401 else ""
    return kind(message, upstream_status=status, retry_after=_retry_after(error))


def fault_in_body(body: object, *, secrets: tuple[str, ...] = ()) -> UpstreamError:
    """The error of a whole JSON document that came with status 200 instead of a stream; it may be in a choice."""
    choices = body.get("choices") if isinstance(body, Mapping) else None
    for place in (body, *(choices if isinstance(choices, list) else ())):
        if isinstance(place, Mapping) and (fault := fault_in_stream(place, secrets=secrets)) is not None:
            return fault
    return UpstreamInvalid()


def retry_delay(error: UpstreamError, attempt: int, jitter: float) -> float | None:
    """Seconds to wait before asking again, or None where asking again is not allowed.

    Only where the upstream certainly did not generate. ``attempt`` counts from 0, ``jitter`` is from 0 to 1.
    """
    if not isinstance(error, UpstreamUnreachable) and error.upstream_status not in _RETRYABLE:
        return None
    if error.retry_after is not None:
        return error.retry_after if error.retry_after <= MAX_RETRY_AFTER else None
    return backoff(attempt, jitter)


def may_have_generated(error: UpstreamError) -> bool:
    """Whether an error leaves it open that something will be billed."""
    status = error.upstream_status
    if isinstance(error, UpstreamUnreachable) or status in _RETRYABLE:
        return False
    return status is None or status not in range(400, 500) or status == 408


def backoff(attempt: int, jitter: float) -> float:
    """Seconds: 0.5, 1, 2, ... up to 8, each between three and five quarters of that."""
    return float(min(0.5 * 2**attempt, 8.0) * (0.75 + jitter / 2))


def parse_retry_after(value: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header. A date is not read: no model service is known to send one."""
    if value is None:
        return None
    try:
        return _plausible_wait(float(value))
    except ValueError:
        return None


def _plausible_wait(seconds: float) -> float | None:
    return seconds if 0 <= seconds < 86_400 else None


def _error_object(body: object) -> Mapping[str, Any] | None:
    if not isinstance(body, Mapping):
        return None
    error = body.get("error")
    if isinstance(error, Mapping) and any(error.values()):
        return error
    if error and not isinstance(error, Mapping):
        return {"message": error}
    message = body.get("error_message")
    if isinstance(message, str) and message:
        return {**body, "message": message}
    status = body.get("base_resp")
    if isinstance(status, Mapping) and status.get("status_code"):
        return {"message": status.get("status_msg"), "code": status["status_code"]}
    return body if body.get("object") == "error" else None


def _status(error: Mapping[str, Any]) -> int | None:
    for value in (error.get("code"), error.get("http_status"), error.get("status")):
        if isinstance(value, bool):
            continue
        if isinstance(value, str) and value.isdecimal() and len(value) == 3:
            return int(value)
        # providers have numbers of their own
        if isinstance(value, int) and 100 <= value <= 599:
            return value
    return None


def _word(error: Mapping[str, Any]) -> str | None:
    metadata = error.get("metadata")
    nested = metadata.get("error_type") if isinstance(metadata, Mapping) else None
    for value in (nested, error.get("error_type"), error.get("type"), error.get("code")):
        if isinstance(value, str):
            return value
    return None


def _retry_after(error: Mapping[str, Any] | None) -> float | None:
    availability = error.get("availability") if error else None
    value = availability.get("retry_after") if isinstance(availability, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return _plausible_wait(value)


def _is_moderation(status: int | None, error: Mapping[str, Any] | None) -> bool:
    if error is None:
        return False
    metadata = error.get("metadata")
    if isinstance(metadata, Mapping) and (
        "reasons" in metadata or "flagged_input" in metadata or "patterns" in metadata
    ):
        return status in (None, 403)
    return _word(error) in _MODERATION


def _told(error: Mapping[str, Any] | None, secrets: tuple[str, ...]) -> str:
    """The upstream's own message, cut and without secrets; empty for our sentence."""
    message = (error.get("message") or error.get("detail")) if error else None
    if not isinstance(message, str):
        return ""
    for secret in filter(None, secrets):  # of the whole text, or the cut might leave half of one
        message = message.replace(secret, "…")
    if len(message) > _MAX_READ:
        # A page controls this text wherever an upstream repeats its input. The last word may be half a secret.
        message = message[:_MAX_READ]
        message = message.rpartition(" ")[0] or message
    message = _CONTROL.sub(" ", message.encode("utf-8", "replace").decode())
    message = " ".join(_SECRET.sub("…", message).split())
    return message if len(message) <= _MAX_MESSAGE else message[: _MAX_MESSAGE - 1] + "…"
