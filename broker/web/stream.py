"""GET /stream/<id>, and two ways to cancel a session."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

import structlog
from aiohttp import hdrs, web

from broker.core.errors import (
    BrokerError,
    BudgetExceeded,
    Draining,
    InternalError,
    InvalidRequest,
    LimitError,
    Queued,
    SessionExpired,
    SessionNotFound,
)
from broker.core.events import queued_event, refusal_event
from broker.core.session import Cursor, is_session_id, parse_cursor, short
from broker.relay.mirror import Mirror
from broker.relay.token_viewer import TokenViewer
from broker.relay.viewer import Viewer
from broker.store.accounts import BUDGET_RETRY, STREAMS_RETRY
from broker.web.errors import json_response, may_come_again
from broker.web.eventstream import EventStream, jitter
from broker.web.keys import (
    HUB,
    LOGGED,
    METRICS,
    OCCUPANCY,
    REQUEST_ID,
    RESOLVER,
    SETTINGS,
    TURNS,
    WAITING,
    WORKER,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.relay.source import Source

log = structlog.get_logger(__name__)

FORMS: Mapping[str, type[Viewer]] = {"": Viewer, "chunk": Viewer, "token": TokenViewer}
"""The values of ``events``: the forms of a session, and their viewers."""

COME_AGAIN_MS = 3000
"""Milliseconds after which a page should reconnect to a session that cannot be served now."""

COME_TO_ANOTHER_MS = 200
"""The same where this worker is replaced: a new connection reaches another one."""


async def stream(request: web.Request) -> web.StreamResponse:
    """Claim or follow a session, as an event stream.

    A browser's EventSource can read neither the status nor the body of anything but a 200, and never tries again after
    one. So callers that accept event streams get errors as an event, and all others get a status and JSON.
    """
    if _is_prefetch(request):
        return _nothing(hdrs.CACHE_CONTROL)
    response = EventStream(send_timeout=request.app[SETTINGS].send_timeout)
    try:
        return await _stream(request, response)
    except (BrokerError, ConnectionError):
        raise
    except Exception:
        if not response.prepared or response.is_open:
            raise
        # No other response can be sent: the headers of this one have decided how a body is encoded.
        log.exception("internal error", request_id=request[REQUEST_ID])
        return await _refuse(request, response, InternalError(), None)


async def _stream(request: web.Request, response: EventStream) -> web.StreamResponse:
    cursor: Cursor | None = None
    app = request.app
    metrics = app[METRICS]
    wants_events = _wants_events(request)
    prepare = partial(response.prepare, request) if wants_events else None
    with app[OCCUPANCY].place() as place:
        try:
            cursor = _cursor(request)
            if cursor is not None and cursor.end:
                metrics.resumed("ended")
                return _nothing()
            session_id = request.match_info["session_id"]
            if not is_session_id(session_id):
                raise SessionNotFound
            form = _form(request)
            address = app[RESOLVER].network(request)
            place.take(session_id, address)
            await app[TURNS].wait()
            request[LOGGED] = {"session": short(session_id)}
            found = await app[HUB].find(session_id, cursor, may_wait=wants_events, meanwhile=prepare)
            app[WAITING].left(session_id)
        except BrokerError as error:
            if cursor is not None:
                metrics.resumed("expired" if isinstance(error, SessionExpired) else "refused")
            if not wants_events:
                raise
            return await _refuse(request, response, error, cursor)
        if cursor is not None:
            metrics.resumed("elsewhere" if isinstance(found, Mirror) else "here")
        return await _show(request, response, session_id, found, cursor, form)


async def cancel(request: web.Request) -> web.Response:
    """Cancel a session. Its id is all that is needed, so that a page can use `sendBeacon` while it unloads."""
    session_id = request.match_info["session_id"]
    if not is_session_id(session_id):
        raise SessionNotFound
    began = time.monotonic()
    before = await request.app[HUB].cancel(session_id)
    request.app[WAITING].left(session_id)
    request.app[METRICS].cancelled(time.monotonic() - began, accepted=before.accepted)
    return json_response({"state": before.state}, status=202 if before.accepted else 200)


async def _show(
    request: web.Request,
    response: EventStream,
    session_id: str,
    source: Source,
    cursor: Cursor | None,
    form: type[Viewer],
) -> web.StreamResponse:
    """Send a viewer the events of a session up to its end."""
    app = request.app
    settings, hub = app[SETTINGS], app[HUB]
    read_journal = partial(hub.read_journal, session_id)
    viewer = form(source.feed, read_journal, response, cursor, asyncio.get_running_loop().time())
    if source.prepared_by:
        request[LOGGED]["prepared_by"] = source.prepared_by
    hub.add_viewer(source, viewer, resumed=cursor is not None)
    try:
        await response.open(request, jitter(settings.retry_ms))
        await viewer.follow()
    finally:
        hub.remove_viewer(source, viewer)
        app[METRICS].stream_closed(response.written)
    return response


async def _refuse(
    request: web.Request, response: EventStream, error: BrokerError, cursor: Cursor | None
) -> web.StreamResponse:
    session_id = request.match_info["session_id"]
    say = partial(_say, request, response)
    if isinstance(error, Queued):
        request.app[WAITING].note_waiting(session_id, error.retry_ms)
    else:
        request.app[METRICS].refused(error.code)
        if not may_come_again(error):  # else it keeps its place
            request.app[WAITING].left(session_id)
    if may_come_again(error):
        replaced = isinstance(error, Draining) and request.app[WORKER].replaced
        return await say(b"", jitter(COME_TO_ANOTHER_MS if replaced else COME_AGAIN_MS))
    if isinstance(error, Queued):
        return await say(queued_event(error.position, error.of), error.retry_ms)
    if isinstance(error, LimitError) and not (isinstance(error, BudgetExceeded) and error.final):
        # The event has no id and is not final: a page that leaves its EventSource open reconnects.
        wait = BUDGET_RETRY if isinstance(error, BudgetExceeded) else STREAMS_RETRY
        return await say(refusal_event(error, None, final=False), round(wait * 1000))
    return await say(refusal_event(error, cursor), jitter(request.app[SETTINGS].retry_ms))


async def _say(
    request: web.Request, response: EventStream, event: bytes, retry_ms: int
) -> web.StreamResponse:
    """Send a stream of one event, or of none."""
    await response.open(request, retry_ms)
    if event:
        response.write_now(event)
    return response


def _cursor(request: web.Request) -> Cursor | None:
    """Return the cursor of the header, else of the query: the query is as old as the page, the header is newer."""
    return parse_cursor(request.headers.get("Last-Event-ID") or request.query.get("lastEventId", ""))


def _form(request: web.Request) -> type[Viewer]:
    form = FORMS.get(request.query.get("events", ""))
    if form is None:
        raise InvalidRequest(details=[{"field": "events", "message": "Must be chunk or token, or left out."}])
    return form


def _wants_events(request: web.Request) -> bool:
    return "text/event-stream" in request.headers.get(hdrs.ACCEPT, "").lower()


def _is_prefetch(request: web.Request) -> bool:
    return request.method == hdrs.METH_HEAD or "prefetch" in request.headers.get("Sec-Purpose", "").lower()


def _nothing(*no_store: str) -> web.Response:
    return web.Response(status=204, headers=dict.fromkeys(no_store, "no-store"))
