"""GET /openapi.json: what this service answers, made from the models with which it checks requests.

Rules that JSON Schema cannot say, such as which models an operator allows, are left to the 422 that names the field.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from broker import __version__
from broker.core import errors
from broker.core.json_to_keep import json_to_keep
from broker.core.parameters import PARAMETERS
from broker.core.responses_parameters import PARAMETERS as RESPONSES_PARAMETERS
from broker.core.session import CURSOR, SESSION_ID
from broker.web.files import answering

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from aiohttp import web
    from pydantic import TypeAdapter

    from broker.core.errors import BrokerError


HEADERS = {"Cache-Control": "no-cache", "Content-Type": "application/json"}

_REFS = "#/components/schemas/"
_ANYWHERE: tuple[type[BrokerError], ...] = (
    errors.HostNotAllowed,
    errors.OriginNotAllowed,
    errors.InternalError,
)
"""Errors that every address may answer."""

_WITH_IDENTITY = (errors.Unauthorized, errors.StoreUnavailable)
_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}


class OpenApi:
    """Answers with the document. It is made at the first request, since few ask for it.

    Args:
        prefix: the path under which the service is found.
        page: whether it serves the chat page.
    """

    def __init__(self, prefix: str, *, page: bool) -> None:
        self._prefix = prefix
        self._page = page
        self._answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer with the document, or with 304 to a caller that has it."""
        if self._answer is None:
            # It takes a tenth of a second, in which streams must go on.
            self._answer = answering(await asyncio.to_thread(self._make), HEADERS)
        return await self._answer(request)

    def _make(self) -> bytes:
        return json_to_keep(document(self._prefix, page=self._page))


def document(prefix: str = "", *, page: bool = True) -> dict[str, Any]:
    """Return the document, as OpenAPI 3.1 has it.

    Args:
        prefix: the path under which the service is found.
        page: whether it serves the chat page.
    """
    schemas: dict[str, Any] = {}
    chat = _schema_of(PARAMETERS, "ChatRequest", schemas)
    responses = _schema_of(RESPONSES_PARAMETERS, "ResponsesRequest", schemas)
    schemas |= _answers()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Session Broker",
            "version": __version__,
            "description": "Prepares a chat, then streams its answer to a plain EventSource. Where keys or tokens"
            " are configured, /prepare, /models and /usage need one.",
        },
        "servers": [{"url": prefix or "/"}],
        "paths": {
            "/prepare": {"post": _prepare(chat, responses)},
            "/stream/{session_id}": _stream(),
            "/stream/{session_id}/cancel": {"parameters": [_session()], "post": _cancel("cancelByPost")},
            "/models": {"get": _models()},
            "/usage": {"get": _usage()},
            "/health/live": {"get": _operation("live", "Whether the process runs", _json("Health", 200))},
            "/health/ready": {"get": _ready()},
            "/metrics": {"get": _metrics()},
            "/openapi.json": {
                "get": _file("openApi", "This document", "application/json", {"type": "object"})
            },
            "/client.js": {"get": _file("client", "The browser client, an ES module", "text/javascript")},
            "/client.d.ts": {"get": _file("clientTypes", "Its types", "application/typescript")},
            **({"/": {"get": _file("page", "The chat page", "text/html")}} if page else {}),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "client": {"type": "http", "scheme": "bearer", "description": "An API key or a JWT."},
                "metrics": {"type": "http", "scheme": "bearer", "description": "BROKER_METRICS_TOKEN."},
            },
        },
    }


def _schema_of(types: TypeAdapter[Any], name: str, schemas: dict[str, Any]) -> dict[str, str]:
    """Add the schema of a request to ``schemas``, and return a reference to it.

    Definitions get the name of their request in front: both dialects have a `FunctionTool`.
    """
    made = types.json_schema(ref_template=f"{_REFS}{name}{{model}}")
    definitions = made.pop("$defs", {})
    made["properties"] = {
        key: value if key in made["required"] else _nullable(value)
        for key, value in made["properties"].items()
    }
    schemas[name] = _tidied(made)
    for key, value in definitions.items():
        if not _is_unknown(key):
            schemas[_plain(f"{name}{key}")] = _tidied(value)
    return {"$ref": f"{_REFS}{name}"}


def _plain(name: str) -> str:
    """Return a name without the module that stands before it where two models have the same one."""
    return name.replace("broker__core__items__", "Item").replace("broker__core__parameters__", "")


def _nullable(schema: Any) -> dict[str, Any]:
    """Return the schema of a parameter that may be null, which counts as absent."""
    return {"anyOf": [schema, {"type": "null"}]}


def _tidied(schema: Any) -> Any:
    """Return a schema without what only serves our messages.

    A value of an unknown type is checked by a schema named `Unknown…`, so that the error names its type. And of several
    schemas one is chosen by a key, which `anyOf` says as well: `oneOf` would require that no other fits.
    """
    if isinstance(schema, list):
        return [_tidied(each) for each in schema if not _refers_to_unknown(each)]
    if isinstance(schema, str):
        return _plain(schema) if schema.startswith(_REFS) else schema
    if not isinstance(schema, dict):
        return schema
    return {
        "anyOf" if key == "oneOf" else key: _tidied(value)
        for key, value in schema.items()
        if key != "title" or not isinstance(value, str)  # a property may have that name
    }


def _refers_to_unknown(schema: Any) -> bool:
    return isinstance(schema, dict) and _is_unknown(str(schema.get("$ref", "")))


def _is_unknown(name: str) -> bool:
    return "Unknown" in name


def _answers() -> dict[str, Any]:
    """Return the schemas of answers."""
    money = {"type": ["number", "null"]}
    limit = _object({"limit": {"type": ["integer", "null"]}, "left": {"type": ["integer", "null"]}})
    money_limit = _object({"limit": money, "left": money})
    totals = {
        "requests": _COUNT,
        "promptTokens": _COUNT,
        "completionTokens": _COUNT,
        "totalTokens": _COUNT,
        "cost": {"type": "number", "minimum": 0},
        "estimatedRequests": _COUNT,
    }
    return {
        "Prepared": _object(
            {
                "sessionId": {"type": "string", "pattern": f"^{SESSION_ID}$"},
                "expiresIn": _COUNT,
                "model": _TEXT,
                "promptTokens": _COUNT,
                "maxOutputTokens": _COUNT,
                "droppedMessages": _COUNT,
            }
        ),
        "State": _object({"state": _TEXT}),
        "Models": _object({"data": {"type": "array", "items": {"type": "object"}}}),
        "Usage": _object(
            {
                "day": {"type": "string", "format": "date"},
                **totals,
                "limits": _object({"tokens": limit, "cost": money_limit}),
                "month": _object(
                    {
                        "month": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"},
                        **totals,
                        "limits": _object({"cost": money_limit}),
                    }
                ),
            }
        ),
        "Health": _object({"status": {"enum": ["ok", "degraded"]}}, reason=_TEXT),
        "Error": _object(
            {"error": _object({"code": {"enum": _codes()}, "message": _TEXT}, details={})},
            status=_TEXT,
            reason=_TEXT,
        ),
        "Event": {
            "description": "A server-sent event. Exactly one `done` or final `error` ends a session; `queued` and"
            " `error` with `final: false` ask to stay connected; a stream without an event asks to come again.",
            "anyOf": [_event(name, data) for name, data in _events().items()],
        },
    }


def _events() -> dict[str, dict[str, Any]]:
    """Return the schemas of the data of events by their names."""
    text, number = {"type": ["string", "null"]}, {"type": ["number", "null"]}
    said = {"text": _TEXT, "reasoning": _TEXT, "toolCalls": {"type": "array"}}
    done = {
        **dict.fromkeys(("finishReason", "nativeFinishReason", "model", "provider", "generationId"), text),
        "usage": {"type": ["object", "null"]},
        "cost": number,
        "estimated": {"type": "boolean"},
        **dict.fromkeys(("ttftMs", "totalMs"), number),
    }
    error = {"code": _TEXT, "message": _TEXT, "final": {"type": "boolean"}, "retryable": {"type": "boolean"}}
    return {
        "chunk": {"type": "object", "description": "A chunk as the upstream sent it."},
        "start": _object({}),
        "token": _object({}, **said),
        "queued": _object({"position": _COUNT, "of": _COUNT}),
        "ping": _object({}),
        "done": _object(done),
        "error": _object(error, retryAfter=number, upstreamStatus={"type": "integer"}),
    }


def _event(name: str, data: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an event, whose data is JSON."""
    return {
        "type": "object",
        "required": ["event", "data"],
        "properties": {
            "event": {"const": name},
            "id": {"type": "string", "pattern": f"^{CURSOR}$"},
            "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
        },
    }


def _codes() -> list[str]:
    """Return the codes that a body may have. Those of sessions that end come as events."""
    return sorted(
        {each.code for each in _kinds(errors.BrokerError) if not issubclass(each, errors.SessionError)}
    )


def _kinds(error: type[BrokerError]) -> Iterable[type[BrokerError]]:
    yield error
    for each in error.__subclasses__():
        yield from _kinds(each)


def _object(needed: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(needed),
        "properties": {**needed, **others},
        "additionalProperties": False,
    }


def _json(schema: str, *statuses: int, description: str = "") -> dict[str, Any]:
    """Return the answers of these statuses with a body of this schema."""
    content = {"application/json": {"schema": {"$ref": f"{_REFS}{schema}"}}}
    return {str(status): {"description": description or schema, "content": content} for status in statuses}


def _errors(*kinds: type[BrokerError]) -> dict[str, Any]:
    """Return the answers to these errors, and to those of every address."""
    codes: dict[int, list[str]] = {}
    for kind in (*kinds, *_ANYWHERE):
        codes.setdefault(kind.status, []).append(kind.code)
    answers: dict[str, Any] = {}
    for status, of_status in sorted(codes.items()):
        answers |= _json("Error", status, description=", ".join(dict.fromkeys(of_status)))
        if status in {429, 503}:
            answers[str(status)]["headers"] = {"Retry-After": {"schema": _COUNT, "required": True}}
    return answers


def _operation(
    name: str, summary: str, answers: Mapping[str, Any], *kinds: type[BrokerError], **more: Any
) -> dict[str, Any]:
    return {"operationId": name, "summary": summary, "responses": {**answers, **_errors(*kinds)}, **more}


def _prepare(chat: dict[str, str], responses: dict[str, str]) -> dict[str, Any]:
    answers = _json("Prepared", 200, description="The session of an Idempotency-Key that is known")
    answers |= _json("Prepared", 201, description="A new session")
    links = {
        operation: {"operationId": operation, "parameters": {"session_id": "$response.body#/sessionId"}}
        for operation in ("stream", "cancel", "cancelByPost")
    }
    for answer in answers.values():
        answer["headers"] = {"Location": {"schema": _TEXT, "required": True}}
        answer["links"] = links
    return _operation(
        "prepare",
        "Check a chat or Responses request, and store it for the stream that starts it",
        answers,
        errors.InvalidJson,
        errors.Unauthorized,
        errors.ModelNotAllowed,
        errors.IdempotencyConflict,
        errors.BodyTooLarge,
        errors.UnsupportedMediaType,
        errors.InvalidRequest,
        errors.PromptTooLong,
        errors.RateLimited,
        errors.BudgetExceeded,
        errors.TooManyStreams,
        errors.StoreUnavailable,
        errors.Draining,
        errors.Overloaded,
        security=[{}, {"client": []}],
        parameters=[
            {
                "name": "Idempotency-Key",
                "in": "header",
                "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
            }
        ],
        requestBody={
            "required": True,
            "content": {"application/json": {"schema": {"anyOf": [chat, responses]}}},
        },
    )


def _session() -> dict[str, Any]:
    return {
        "name": "session_id",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": f"^{SESSION_ID}$"},
    }


def _stream() -> dict[str, Any]:
    cursor = {"type": "string", "pattern": f"^({CURSOR})?$"}
    events = {"text/event-stream": {"schema": {"$ref": f"{_REFS}Event"}}}
    answers = {
        "200": {
            "description": "The events of the session. A caller that accepts text/event-stream gets every error as"
            " an event.",
            "content": events,
        },
        "204": {"description": "The session is over, and its end was seen; or nothing was asked for."},
    }
    get = _operation(
        "stream",
        "Start a prepared session, or follow one that runs or has ended",
        answers,
        errors.InvalidCursor,
        errors.Unauthorized,
        errors.SessionNotFound,
        errors.SessionExpired,
        errors.AlreadyClaimed,
        errors.ReplayGap,
        errors.InvalidRequest,
        errors.TooManyStreams,
        errors.BudgetExceeded,
        errors.StoreUnavailable,
        errors.Draining,
        errors.Overloaded,
        parameters=[
            {"name": "Last-Event-ID", "in": "header", "schema": cursor},
            {"name": "lastEventId", "in": "query", "schema": cursor},
            {"name": "events", "in": "query", "schema": {"enum": ["chunk", "token"]}},
        ],
    )
    return {"parameters": [_session()], "get": get, "delete": _cancel("cancel")}


def _cancel(name: str) -> dict[str, Any]:
    answers = _json("State", 200, description="It had ended before")
    answers |= _json("State", 202, description="It is certain to end as cancelled")
    return _operation(
        name, "Stop a session, on any worker", answers, errors.SessionNotFound, errors.StoreUnavailable
    )


def _models() -> dict[str, Any]:
    answers = _json("Models", 200, description="The upstream's list, of the models that are allowed here")
    answers["200"]["headers"] = {"ETag": {"schema": _TEXT, "required": True}}
    return _operation(
        "models",
        "The models",
        {**answers, "304": {"description": "The list that the caller has"}},
        errors.InvalidRequest,
        errors.ModelsUnavailable,
        *_WITH_IDENTITY,
        security=[{}, {"client": []}],
        parameters=[
            {"name": "q", "in": "query", "schema": _TEXT, "description": "Part of an id or name."},
            {"name": "free", "in": "query", "schema": {"enum": ["true", "false"]}},
        ],
    )


def _usage() -> dict[str, Any]:
    answers = _json("Usage", 200, description="What the caller has used today and in this month (UTC)")
    return _operation("usage", "The caller's usage", answers, *_WITH_IDENTITY, security=[{}, {"client": []}])


def _ready() -> dict[str, Any]:
    return _operation(
        "ready",
        "Whether requests should be sent to this worker",
        _json("Health", 200),
        errors.StoreUnavailable,
        errors.Draining,
    )


def _metrics() -> dict[str, Any]:
    text = {"text/plain": {"schema": _TEXT}}
    return _operation(
        "metrics",
        "Metrics for Prometheus",
        {"200": {"description": "In Prometheus' text format", "content": text}},
        errors.Unauthorized,
        errors.NotFound,
        security=[{}, {"metrics": []}],
    )


def _file(name: str, summary: str, kind: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {kind: {"schema": schema or _TEXT}}
    tag = {"ETag": {"schema": _TEXT, "required": True}}
    answers = {
        "200": {"description": summary, "headers": tag, "content": content},
        "304": {"description": "The copy is current"},
    }
    return _operation(name, summary, answers)
