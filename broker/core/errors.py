"""All errors of the broker, with their codes, their HTTP statuses and the side that caused them.

    BrokerError
    ├── RequestError        the caller must change something        4xx
    ├── LimitError          too much for now                        429
    ├── ServiceError        a bug, or something we need is away     5xx
    └── SessionError        a generation ended without `done`       an `error` event
        └── UpstreamError   the upstream failed

Pages and monitors switch on codes and statuses. A message is a plain sentence for a person. It never holds a key, a
prompt or an answer. The code that catches the cause writes the details to the log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from broker.core.rates import RateStatus

_SHOWN_FIELD_CHARACTERS = 120


PERMANENT_STATUSES = frozenset({400, 401, 403, 404, 413, 422})
"""Statuses that the same request will get again, whether in an HTTP answer or inside a stream."""


class BrokerError(Exception):
    """An error with a code for programs and a message for people.

    Attributes:
        code: the word that programs test.
        status: the HTTP status, for callers that can read one.
        retryable: a new /prepare may succeed.
        message: one sentence for a person.
        details: what exactly is wrong, ready for JSON; for 422 a list of ``{"field", "message"}``.
        retry_after: seconds to wait, where known.
        rate: how the client stands, where the request was counted against its rate.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: bool = False
    default_message: ClassVar[str] = "Something went wrong on our side."

    def __init__(self, message: str = "", *, details: Any = None, retry_after: float | None = None) -> None:
        self.message = message or self.default_message
        self.details = details
        self.retry_after = retry_after
        self.rate: RateStatus | None = None
        super().__init__(self.message)


class RequestError(BrokerError):
    """The caller must change something."""

    status = 400


class InvalidJson(RequestError):
    code = "invalid_json"
    default_message = "The body is not valid JSON."


class MalformedRequest(RequestError):
    code = "invalid_request"
    default_message = "This is not a valid HTTP request."


class ExpectationFailed(RequestError):
    code, status = "invalid_request", 417
    default_message = "The header Expect supports only 100-continue; leave it out."


class RequestTooSlow(RequestError):
    code, status = "invalid_request", 408
    default_message = "The request did not arrive in time."


class InvalidCursor(RequestError):
    code = "invalid_cursor"
    default_message = "The cursor is malformed."


class Unauthorized(RequestError):
    code, status = "unauthorized", 401
    default_message = "This needs an API key or a token."


class Forbidden(RequestError):
    code, status = "forbidden", 403
    default_message = "This is not allowed to you."


class OriginNotAllowed(RequestError):
    code, status = "origin_not_allowed", 403
    default_message = "Pages of this origin may not use this broker."


class HostNotAllowed(RequestError):
    code, status = "host_not_allowed", 403
    default_message = "This broker does not answer to that Host."


class ModelNotAllowed(RequestError):
    code, status = "model_not_allowed", 403
    default_message = "This model may not be used here."


class SessionNotFound(RequestError):
    code, status, retryable = "session_not_found", 404, True
    default_message = "There is no such session, or it was not started in time."


class SessionExpired(RequestError):
    code, status, retryable = "session_expired", 404, True
    default_message = "This session is over and can no longer be read."


class NotFound(RequestError):
    code, status = "not_found", 404
    default_message = "There is nothing at this address."


class MethodNotAllowed(RequestError):
    code, status = "method_not_allowed", 405
    default_message = "This address does not take that method."


class AlreadyClaimed(RequestError):
    code, status = "already_claimed", 409
    default_message = "This session was streamed already."


class IdempotencyConflict(RequestError):
    code, status = "idempotency_conflict", 409
    default_message = "This Idempotency-Key was used with another body."


class ReplayGap(RequestError):
    """Ends the connection of one viewer: the events after its cursor are missing. A gap is never left out silently."""

    code, status, retryable = "replay_gap", 409, True
    default_message = "A part of this answer is no longer stored, so it cannot be continued."


class BodyTooLarge(RequestError):
    code, status = "body_too_large", 413
    default_message = "The body is too large."


class UnsupportedMediaType(RequestError):
    code, status = "unsupported_media_type", 415
    default_message = "The body must be JSON: send the header Content-Type: application/json."


class InvalidRequest(RequestError):
    code, status = "invalid_request", 422
    default_message = "The request is not valid."

    def __init__(self, message: str = "", *, details: Any = None, retry_after: float | None = None) -> None:
        super().__init__(message or _first_fault(details), details=details, retry_after=retry_after)


def _first_fault(details: Any) -> str:
    """Return the first wrong field and what is wrong with it, for clients that show only the message."""
    if not isinstance(details, list) or not details:
        return ""
    field = "".join(character if character.isprintable() else "?" for character in details[0]["field"])
    return f"{field[:_SHOWN_FIELD_CHARACTERS]}: {details[0]['message']}"


class PromptTooLong(RequestError):
    code, status = "prompt_too_long", 422
    default_message = "The conversation is too long for this model, even after trimming."


class LimitError(BrokerError):
    """The request is fine, but too much at this time."""

    status, retryable = 429, True


class RateLimited(LimitError):
    code = "rate_limited"
    default_message = "Too many requests; wait a little."


class BudgetExceeded(LimitError):
    """The budget does not cover a request.

    Attributes:
        final: even without the reservations of others there would be no room, so waiting does not help.
    """

    code = "budget_exceeded"
    default_message = "The budget for today does not cover this."

    def __init__(
        self, message: str = "", *, details: Any = None, retry_after: float | None = None, final: bool = False
    ) -> None:
        super().__init__(message, details=details, retry_after=retry_after)
        self.final = final


class TooManyStreams(LimitError):
    code = "too_many_streams"
    default_message = "Too many answers are being written for you at once; wait for one to end."


class Queued(TooManyStreams):
    """A session waits in line for a slot of its client.

    Attributes:
        position: its place in the line, from 1.
        of: the number of waiting sessions of the client.
        retry_ms: milliseconds after which its page should reconnect to keep the place.
    """

    def __init__(self, position: int, of: int, retry_ms: int) -> None:
        self.position, self.of, self.retry_ms = position, of, retry_ms
        super().__init__(retry_after=retry_ms / 1000)


class ServiceError(BrokerError):
    """The caller did nothing wrong and may try again."""

    status, retryable = 503, True


class InternalError(ServiceError):
    code, status = "internal_error", 500


class ModelsUnavailable(ServiceError):
    code, status = "upstream_unavailable", 502
    default_message = "The list of models is not available right now."


class StoreUnavailable(ServiceError):
    code = "store_unavailable"
    default_message = "The session store cannot be reached right now."


class StoreRefused(StoreUnavailable):
    """Redis answered and refused this one call. The next call may succeed."""


class Draining(ServiceError):
    code = "draining"
    default_message = "This worker is shutting down; another will answer."


class Overloaded(ServiceError):
    code = "overloaded"
    default_message = "This worker has no room for another stream."


class NotYetClaimed(Overloaded):
    """A page wants to continue a session that has not started: its claim may still be on the way."""

    default_message = "This session has not begun yet."


class BeingClaimed(Overloaded):
    """Another worker is claiming the session, and it is not known yet whether it wins."""

    default_message = "This session is just being started."


class SessionError(BrokerError):
    """Ends a session with an ``error`` event for all its viewers.

    Attributes:
        upstream_status: the HTTP status of the upstream, or the code in its stream, if there was one.
    """

    status, retryable = 502, True

    def __init__(
        self,
        message: str = "",
        *,
        details: Any = None,
        retry_after: float | None = None,
        upstream_status: int | None = None,
    ) -> None:
        super().__init__(message, details=details, retry_after=retry_after)
        self.upstream_status = upstream_status
        if upstream_status in PERMANENT_STATUSES:
            self.retryable = False


class ResponseTooLarge(SessionError):
    code, retryable = "response_too_large", False
    default_message = "The answer grew larger than this broker relays."


class DeadlineExceeded(SessionError):
    code = "deadline_exceeded"
    default_message = "The answer took longer than this broker allows."


class Abandoned(SessionError):
    code = "abandoned"
    default_message = "Nobody was watching any more, so the answer was stopped."


class WorkerLost(SessionError):
    code = "worker_lost"
    default_message = "The server that was writing this answer was lost."


class ServerShutdown(SessionError):
    code = "server_shutdown"
    default_message = "The server was shut down before the answer was complete."


class GenerationFailed(SessionError):
    """A bug of the broker during a generation. The log has the details."""

    code = "internal_error"


class UpstreamError(SessionError):
    """The upstream refused, broke off, or sent something that is not valid."""


class UpstreamUnauthorized(UpstreamError):
    code, retryable = "upstream_unauthorized", False
    default_message = "The model service refused this broker's credentials."


class UpstreamPaymentRequired(UpstreamError):
    code, retryable = "upstream_payment_required", False
    default_message = "The model service's account has no credit left."


class UpstreamRateLimited(UpstreamError):
    code = "upstream_rate_limited"
    default_message = "The model service is asked too often right now."


class UpstreamModerated(UpstreamError):
    code, retryable = "upstream_moderated", False
    default_message = "The model service's moderation refused this conversation."


class UpstreamRejected(UpstreamError):
    code, retryable = "upstream_rejected", False
    default_message = "The model service refused this request."


class UpstreamUnavailable(UpstreamError):
    code = "upstream_unavailable"
    default_message = "The model service cannot be reached right now."


class UpstreamUnreachable(UpstreamUnavailable):
    """No connection was made, so nothing was sent."""


class UpstreamTimeout(UpstreamError):
    code = "upstream_timeout"
    default_message = "The model service took too long to answer."


class UpstreamInterrupted(UpstreamError):
    code = "upstream_interrupted"
    default_message = "The model service broke off before the answer was complete."


class UpstreamFailed(UpstreamError):
    code = "upstream_error"
    default_message = "The model service reported an error."


class UpstreamInvalid(UpstreamError):
    code = "upstream_invalid"
    default_message = "The model service answered with something that is not a stream of chunks."
