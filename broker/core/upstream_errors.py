"""Turn the errors of upstreams into ours: HTTP errors and errors in a stream; and decide when to retry. No I/O.

OpenRouter sends the same error object in an HTTP body and in a chunk: with a number as its ``code``, with a word, or
with ``error_type`` and ``http_status`` besides the message. Other servers have other shapes: vLLM's is
``{"object": "error", "message": ...}``.
"""

from __future__ import annotations

import email.utils
import http
import re
from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any

import orjson

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
"""Seconds that a retry may wait. A longer wait is left to the page."""

_RETRYABLE = frozenset({429, 502, 503, 529})
"""Statuses that mean that the upstream did not generate. A 500 or a timeout may have been billed."""

_BY_STATUS: dict[int, type[UpstreamError]] = {
    401: UpstreamUnauthorized,
    402: UpstreamPaymentRequired,
    408: UpstreamTimeout,
    429: UpstreamRateLimited,
    504: UpstreamTimeout,
    524: UpstreamTimeout,
}
_MODERATION = frozenset(
    {"content_policy_violation", "refusal", "moderation", "content_filter", "moderation_blocked"}
    | {"data_inspection_failed", "ResponsibleAIPolicyViolation"}
    | {"image_content_policy_violation", "bio_policy", "misalignment_policy_violation"}
)
_WORDS_FOR_GOOD = frozenset(
    {"authentication", "authentication_error", "permission_denied", "permission_error", "invalid_api_key"}
    | {"invalid_request", "invalid_request_error", "invalid_prompt", "INVALID_ARGUMENT", "BadRequestError"}
    | {
        "not_found",
        "not_found_error",
        "model_not_found",
        "NotFoundError",
        "payload_too_large",
        "unprocessable",
    }
    | {"context_length_exceeded", "max_tokens_exceeded", "token_limit_exceeded", "string_too_long"}
    | {
        "invalid_image",
        "invalid_image_format",
        "invalid_base64_image",
        "invalid_image_url",
        "invalid_image_mode",
    }
    | {"image_too_large", "image_too_small", "image_file_too_large", "image_parse_error", "empty_image_file"}
    | {"unsupported_image_format", "unsupported_image_media_type", "image_not_found", "image_file_not_found"}
    | {"data_residency_mismatch"}
)
"""Words for the statuses of `PERMANENT_STATUSES`; they count where an error in a stream has no number."""

_MAX_MESSAGE = 300
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Keys and tokens: those with a known beginning, JWTs, and a text with a digit behind a word such as "key", or a long
# text behind "Bearer". Every repetition is possessive or bounded, so that the time is linear in the length of the
# text; the first digit must be within 64 characters.
_SECRET = re.compile(
    r"(?i)(?:\b|(?<=_))(?:"
    r"(?:sk|pk|rk|gsk|csk|hf|r8|fw|xai|pplx|nvapi|tgp|ghp|glpat)[-_][A-Z0-9_*-]{8,}+"
    r"|(?:org|user|key|req|proj|team|acct|wrkspc|sess)[-_][A-Z0-9]{12,}+(?![A-Z0-9_-])"
    r"|AIza[A-Z0-9_-]{10,}+"
    r"|eyJ[A-Z0-9_-]{5,}+(?:\.[A-Z0-9_-]++){1,4}+"
    r"|(?:key|token|bearer|secret|password|req|org|proj|team|sess)[-_ :=]++"
    r"(?=[A-Z._~+/=-]{0,64}+\d)[A-Z0-9._~+/=-]{6,}+"
    r"|bearer[ :=]++[A-Z0-9._~+/=-]{15,}+"
    r")"
)
_MAX_RAW = 64 * 1024
"""Characters of JSON in a text that are parsed."""

_MAX_COMPLAINTS = 10
_BESIDE = ("code", "status", "status_code", "statusCode", "http_status", "type", "error_type", "param")
_STATUS_PHRASES = frozenset(status.phrase.lower() for status in http.HTTPStatus)
_MAX_READ = 2_000
"""Characters of a message that are read; the rest would be cut anyway."""

_GENERIC = frozenset(
    {"", "provider returned error", "provider returned an error", "upstream error", "error", "bad request"}
)
_IDS = re.compile(
    r"(?i)\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"
    r"|\b(?=[a-f]{0,64}[0-9])[0-9a-f]{16,128}\b"
    r"|(?:(?<=\bteam)|(?<=\bkey)|(?<=\borganization)|(?<=\borg)|(?<=\bproject)|(?<=\baccount)|(?<=\buser)"
    r"|(?<=\btenant)|(?<=\bworkspace)|(?<=\b(?:request|account|project|session)[ _-]id)|(?<=\brequestid)"
    r"|(?<=\btrace[ _-]id)|(?<=\b(?:team|user)[ _-]id)|(?<=\b(?:key|org)[ _-]id)|(?<=\borganization[ _-]id)"
    r"|(?<=\bkey provided)|(?<=\bapi key))[\s:=_\"'`(#-]{1,4}"
    r"(?=[a-z_-]{0,64}[0-9])[a-z0-9_-]{4,128}"
)
_FILTERED = ("safety_check", "content violates usage guidelines")
_MARKUP = ("<!doctype", "<html", "<head", "<body", "<?xml")
_CAP_IS_MISSIZED = (
    *(
        "too large",
        "too high",
        "too big",
        "too many",
        "too small",
        "at most",
        "at least",
        "maximum",
        "minimum",
    ),
    *("exceed", "greater", "larger", "less than", "must be", "between", "range"),
)
"""Phrases of complaints about a cap's value, not about its name."""

_NOT_TOLD = frozenset({"error", "stop", "unknown"})
_LONGEST_WAIT = 31 * 86_400.0


def fault_of_status(
    status: int,
    body: object,
    *,
    retry_after: float | None = None,
    secrets: tuple[str, ...] = (),
    now: float | None = None,
) -> UpstreamError:
    """Return the error for an HTTP answer with a status other than 2xx.

    Args:
        status: the HTTP status.
        body: its body as JSON, or its text.
        retry_after: seconds to wait, from its headers.
        secrets: texts that no message may contain.
        now: seconds since 1970, for a time in the body.
    """
    body = _unwrapped(body)
    error = _error_object(body)
    if error is None:
        error = body if isinstance(body, Mapping) else {"message": body} if isinstance(body, str) else None
    wait = retry_after if retry_after is not None else _retry_after(error, status, now)
    if _is_moderation(status, error):
        return UpstreamModerated(upstream_status=status, retry_after=wait)
    kind = _BY_STATUS.get(status) or (UpstreamUnavailable if status >= 500 else UpstreamRejected)
    # The message of a 401 may contain our key.
    message = _message(error, secrets) if kind is not UpstreamUnauthorized else ""
    return kind(message, upstream_status=status, retry_after=wait)


def fault_in_stream(
    chunk: Mapping[str, Any],
    *,
    secrets: tuple[str, ...] = (),
    now: float | None = None,
    native_reason: object = None,
) -> UpstreamError | None:
    """Return the error in a chunk, a choice or a JSON body with status 200; None where there is none.

    Args:
        chunk: the object.
        secrets: texts that no message may contain.
        now: seconds since 1970, for a time in the object.
        native_reason: the provider's own finish reason of the choice that failed.
    """
    error = _error_object(chunk)
    native = _clean(native_reason, secrets) if isinstance(native_reason, str) else ""
    if native.lower() in _NOT_TOLD:
        native = ""
    if error is None:
        if chunk.get("finish_reason") != "error":
            return None
        return UpstreamFailed(f"The model service reported an error: {native}." if native else "")
    status = _status(error)
    kind: type[UpstreamError] = UpstreamFailed
    if status == 402 or "payment_required" in _words(error):
        kind = UpstreamPaymentRequired
    elif status == 429 or "rate_limit_exceeded" in _words(error):
        kind = UpstreamRateLimited
    elif _is_moderation(status, error):
        kind = UpstreamModerated
    # The message of a 401 may contain our key.
    message = _message(error, secrets) if status != 401 and kind is not UpstreamModerated else ""
    if native and kind is UpstreamFailed and native not in message:
        message = (
            _cut(message or UpstreamFailed.default_message, _MAX_MESSAGE - len(native) - 3) + f" ({native})"
        )
    fault = kind(message, upstream_status=status, retry_after=_retry_after(error, status, now))
    if status is None and kind is UpstreamFailed and not _WORDS_FOR_GOOD.isdisjoint(_words(error)):
        fault.retryable = False
    return fault


def fault_in_body(body: object, *, secrets: tuple[str, ...] = (), now: float | None = None) -> UpstreamError:
    """Return the error of a JSON document that came with status 200 in place of a stream; it may be in a choice."""
    body = _unwrapped(body)
    choices = body.get("choices") if isinstance(body, Mapping) else None
    for place in (body, *(choices if isinstance(choices, list) else ())):
        if isinstance(place, Mapping):
            native = place.get("native_finish_reason")
            fault = fault_in_stream(place, secrets=secrets, now=now, native_reason=native)
            if fault is not None:
                return fault
    if isinstance(body, Mapping) and body.get("detail") and (message := _message(body, secrets)):
        return UpstreamFailed(message, upstream_status=_status(body))
    return UpstreamInvalid()


def other_cap(status: int, body: object, names: Sequence[str]) -> str | None:
    """Return the name of the output cap that a refusal asks for in place of the one that was sent; None for any other.

    Args:
        status: the status of the refusal.
        body: its body as JSON.
        names: the names that were sent, of ``max_tokens`` and ``max_completion_tokens``.
    """
    if status != 400 or len(names) != 1:
        return None
    error = _error_object(_unwrapped(body)) or (body if isinstance(body, Mapping) else {})
    sent = names[0]
    other = "max_completion_tokens" if sent == "max_tokens" else "max_tokens"
    inner = _inner_error(error)
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    message = " ".join(_sentence(said, 0)[:_MAX_READ] for said in (error, raw)).lower()
    # The longer name does not contain the shorter one; they are separated all the same, to make that plain.
    names_sent, names_other = sent in message.replace(other, ""), other in message.replace(sent, "")
    if names_other and "instead" in message:
        return other if names_sent else None
    if any(word in message for word in _CAP_IS_MISSIZED):
        return None
    if sent in {error.get("param"), inner.get("param")}:
        return other
    complaints = ("not supported", "unsupported", "unrecognized", "unknown", "instead", "not permitted")
    return other if names_sent and any(word in message for word in complaints) else None


def retry_delay(error: UpstreamError, attempt: int, jitter: float) -> float | None:
    """Return the seconds to wait before a retry; None where a retry is not allowed.

    It is allowed only where the upstream certainly did not generate. ``attempt`` counts from 0, ``jitter`` is from 0
    to 1.
    """
    if not isinstance(error, UpstreamUnreachable) and error.upstream_status not in _RETRYABLE:
        return None
    if error.retry_after is not None:
        return error.retry_after if error.retry_after <= MAX_RETRY_AFTER else None
    return backoff(attempt, jitter)


def may_have_generated(error: UpstreamError) -> bool:
    """Return True if something may be billed after this error."""
    status = error.upstream_status
    if isinstance(error, UpstreamUnreachable) or status in _RETRYABLE:
        return False
    return status is None or status not in range(400, 500) or status == 408


def backoff(attempt: int, jitter: float) -> float:
    """Return seconds: 0.5, 1, 2, ... up to 8, each multiplied by 0.75 to 1.25."""
    return float(min(0.5 * 2**attempt, 8.0) * (0.75 + jitter / 2))


def parse_retry_after(value: str | None, now: float | None = None) -> float | None:
    """Return the seconds of a ``Retry-After`` header, which may be a date. `now` is in seconds since 1970."""
    if value is None:
        return None
    value = value.strip()[:100]
    if value.replace(".", "", 1).isdecimal():
        return _plausible_wait(float(value))
    try:
        at = email.utils.parsedate_to_datetime(value)
        # The form of asctime has no time zone. It is UTC like the others, and not the zone of this machine.
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    except (ValueError, TypeError, OverflowError):
        return None
    return None if now is None else _plausible_wait(max(0.0, round(at.timestamp() - now, 1)))


def parse_reset(value: object, now: float | None) -> float | None:
    """Return the seconds until ``X-RateLimit-Reset``: 13 digits are ms, 10 are seconds since 1970, fewer are a wait."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = str(value).strip()[:40]
    try:
        number = float(text)
    except ValueError:
        return None
    digits = len(text.partition(".")[0])
    if digits < 10 or number < 0:
        return _plausible_wait(number)
    if now is None:
        return None
    at = number / 1000 if digits >= 13 else number
    return _plausible_wait(max(0.0, round(at - now, 1)))


def wait_in_headers(headers: Mapping[str, Any], status: int | None, now: float | None) -> float | None:
    """Return the seconds to wait: ``Retry-After``, else ``X-RateLimit-Reset`` where a retry may help."""
    lower = {str(name).lower(): value for name, value in headers.items()}
    said = lower.get("retry-after")
    wait = parse_retry_after(str(said)[:100], now) if isinstance(said, str | int | float) else None
    if wait is None and status in _RETRYABLE:
        wait = parse_reset(lower.get("x-ratelimit-reset"), now)
    return wait


def _plausible_wait(seconds: float) -> float | None:
    """Return a wait of at most a month; None for any other number."""
    return min(seconds, _LONGEST_WAIT) if seconds >= 0 else None


def _unwrapped(body: object) -> object:
    """Return the error in a list of one, as Gemini's own endpoint sends it."""
    return body[0] if isinstance(body, list) and len(body) == 1 else body


def _more_telling(error: str, beside: str) -> str:
    """Return the text that says more: some services send a word or a status as ``error`` and a sentence beside it."""
    word = error.strip().lower()
    is_a_word = " " not in word or word in _GENERIC or word in _STATUS_PHRASES
    return beside if beside and is_a_word else error


def _inner_error(error: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the provider's own error object inside OpenRouter's; empty where there is none."""
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    if isinstance(raw, str) and raw.lstrip()[:1] in {"{", "["} and len(raw) <= _MAX_RAW:
        try:
            raw = orjson.loads(raw)
        except orjson.JSONDecodeError:
            return {}
    raw = _unwrapped(raw)
    return _error_object(raw) or (raw if isinstance(raw, Mapping) else {})


def _error_object(body: object) -> Mapping[str, Any] | None:
    if not isinstance(body, Mapping):
        return None
    error = body.get("error")
    if isinstance(error, Mapping) and any(error.values()):
        return error
    if error and not isinstance(error, Mapping):
        # Some objects only say that they are an error; the message is beside it.
        if isinstance(error, list):
            return {"message": error}
        if not isinstance(error, str):
            return {**body, "error": None}
        # The text beside a bare word says more, and the status is there in any case.
        beside = {key: body[key] for key in _BESIDE if body.get(key)}
        return {**beside, "message": _more_telling(error, _sentence({**body, "error": None}, 1))}
    message = body.get("error_message")
    if isinstance(message, str) and message:
        return {**body, "message": message}
    status = body.get("base_resp")
    if isinstance(status, Mapping) and status.get("status_code"):
        return {"message": status.get("status_msg"), "code": status["status_code"]}
    return body if body.get("object") == "error" else None


def _status(error: Mapping[str, Any]) -> int | None:
    for key in ("code", "http_status", "status", "status_code", "statusCode"):
        value = error.get(key)
        if isinstance(value, bool):
            continue
        if isinstance(value, str) and value.isdecimal() and len(value) == 3:
            return int(value)
        # other numbers are the provider's own
        if isinstance(value, int) and 100 <= value <= 599:
            return value
    return None


def _words(error: Mapping[str, Any]) -> set[str]:
    metadata = error.get("metadata")
    nested = metadata.get("error_type") if isinstance(metadata, Mapping) else None
    values = (nested, error.get("error_type"), error.get("type"), error.get("code"))
    return {value for value in values if isinstance(value, str)}


def _retry_after(error: Mapping[str, Any] | None, status: int | None, now: float | None) -> float | None:
    if error is None:
        return None
    availability = error.get("availability")
    value = availability.get("retry_after") if isinstance(availability, Mapping) else None
    if not isinstance(value, bool) and isinstance(value, int | float):
        return _plausible_wait(value)
    metadata = error.get("metadata")
    headers = metadata.get("headers") if isinstance(metadata, Mapping) else None
    if not isinstance(headers, Mapping) or len(headers) > 100:
        return None
    return wait_in_headers(headers, status or (429 if "rate_limit_exceeded" in _words(error) else None), now)


def _is_moderation(status: int | None, error: Mapping[str, Any] | None) -> bool:
    if error is None:
        return False
    metadata = error.get("metadata")
    if isinstance(metadata, Mapping) and (
        "reasons" in metadata or "flagged_input" in metadata or "patterns" in metadata
    ):
        return status in (None, 403)
    if not _MODERATION.isdisjoint(_words(error) | _words(_inner_error(error))):
        return True
    if status not in (None, 400, 403):
        return False
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    said = (_sentence(raw, 0) + " " + _sentence(error, 0))[: 2 * _MAX_READ].lower()
    return any(sign in said for sign in _FILTERED)


def _message(error: Mapping[str, Any] | None, secrets: tuple[str, ...]) -> str:
    """Return the most specific sentence of the upstream, cut and without secrets; empty to use our own sentence."""
    if error is None:
        return ""
    message = _sentence(error, 0)
    metadata = error.get("metadata")
    raw = _sentence(metadata.get("raw"), 0) if isinstance(metadata, Mapping) else ""
    if raw and isinstance(metadata, Mapping) and message[:100].strip(" .:!").lower() in _GENERIC:
        provider = metadata.get("provider_name")
        message = f"{provider[:60]}: {raw}" if isinstance(provider, str) and provider else raw
    return _clean(message, secrets)


def _sentence(value: object, depth: int) -> str:
    """Return the sentence in a value of an upstream: a text, JSON in a text, or an object of a known shape."""
    if depth > 6:
        return ""
    if isinstance(value, str):
        return _sentence_of_text(value.strip(), depth)
    if isinstance(value, list):
        return next(filter(None, (_sentence(item, depth + 1) for item in value[:_MAX_COMPLAINTS])), "")
    if not isinstance(value, Mapping):
        return ""
    if complaint := _complaint(value):
        return complaint
    for key in ("error", "message", "detail", "error_message", "errors", "issues"):
        if said := _sentence(value.get(key), depth + 1):
            if key == "error" and isinstance(value[key], str):
                return _more_telling(said, _sentence({**value, "error": None}, depth + 1))
            return said
    return ""


def _sentence_of_text(text: str, depth: int) -> str:
    if text[:1] in {"{", "[", '"'} and len(text) <= _MAX_RAW:
        try:
            inner = orjson.loads(text)
        except orjson.JSONDecodeError:
            return text
        return _sentence(inner, depth + 1) or text
    return _without_markup(text)


def _complaint(value: Mapping[str, Any]) -> str:
    """Return one complaint of a list with its place, in the form of FastAPI and others; empty for any other value."""
    message = value.get("msg")
    place = value.get("loc")
    if not isinstance(message, str):
        message = value.get("message")
        steps = value.get("path")
        place = place or (steps if isinstance(steps, list) else value.get("field"))
        if not place:
            return ""
    return _placed(place, message) if isinstance(message, str) else ""


def _without_markup(text: str) -> str:
    """Return a text up to the HTML page of a proxy or a server in it."""
    text = text.lstrip("\ufeff \t\r\n")
    if text.startswith("<"):
        return ""
    low = text[:_MAX_READ].lower()
    begins = min((at for tag in _MARKUP if (at := low.find(tag)) >= 0), default=len(text))
    return text[:begins].rstrip("\ufeff \t\r\n-:") if begins < len(text) else text


def _placed(place: object, message: str) -> str:
    """Return FastAPI's complaint with its place, such as ``body.messages.0.role: Field required``."""
    steps = place[:10] if isinstance(place, list) else [place]
    path = ".".join(str(step)[:60] for step in steps if isinstance(step, str | int) and step != "")
    return f"{path}: {message}" if path else message


def _clean(message: str, secrets: tuple[str, ...]) -> str:
    """Return a message of limited length, on one line, without secrets and ids."""
    for secret in filter(None, secrets):  # in the whole text, because a cut might leave half of a secret
        message = message.replace(secret, "…")
    if len(message) > _MAX_READ:
        # Pages control this text where an upstream repeats their input. The last word may be half of a secret.
        message = message[:_MAX_READ]
        message = message.rpartition(" ")[0] or message
    message = _CONTROL.sub(" ", message.encode("utf-8", "replace").decode())
    message = " ".join(_SECRET.sub("…", _IDS.sub(_without_id, message)).split())
    return _cut(message, _MAX_MESSAGE)


def _without_id(found: re.Match[str]) -> str:
    # A word and a separator may stand before the id; they stay.
    text = found.group()
    return text[: len(text) - len(text.lstrip(" \t\r\n:=_\"'`(#-"))] + "…"


def _cut(message: str, size: int) -> str:
    return message if len(message) <= size else message[: max(0, size - 1)] + "…"
