"""Run a script on one connection. Only here a step becomes bytes, a pause, or a broken connection."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import closing

from aiohttp import web

from broker.rehearsal.steps import Pause, Reply, Reset, Script, Send

LONGEST = 3600.0
"""Seconds after which even an endless script is stopped; no caller waits that long."""

_LINGER_NOT = struct.pack("ii", 1, 0)


async def act(
    script: Script, request: web.Request, generation_id: str, pace: float, longest: float = LONGEST
) -> web.StreamResponse:
    """Run a script to its end, and return its response.

    A caller that leaves cancels this (the runner must have ``handler_cancellation``), or the next write finds it gone.
    In both cases the script is closed before the exception is raised.

    Raises:
        ConnectionError: the caller has left.
    """
    headers = {
        "Content-Type": "text/event-stream",
        "Cache-Control": "no-cache",
        "X-Generation-Id": generation_id,
    }
    response = web.StreamResponse(headers=headers)
    with closing(script):
        try:
            async with asyncio.timeout(longest):
                return await _play(script, request, response, pace)
        except TimeoutError:
            _reset(request)
            return response


async def _play(
    script: Script, request: web.Request, response: web.StreamResponse, pace: float
) -> web.StreamResponse:
    for step in script:
        match step:
            case Pause(seconds):
                await asyncio.sleep(seconds * pace)
            case Send(data):
                if not response.prepared:
                    await response.prepare(request)
                await response.write(data)
            case Reply(status, body, content_type, headers):
                return web.Response(status=status, body=body, content_type=content_type, headers=headers)
            case Reset():
                _reset(request)
                return response
    if not response.prepared:
        await response.prepare(request)
    await response.write_eof()
    return response


def _reset(request: web.Request) -> None:
    # Without lingering, closing a socket sends RST and not FIN, which is how a crash looks.
    transport = request.transport
    if transport is None:
        return
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    transport.abort()
