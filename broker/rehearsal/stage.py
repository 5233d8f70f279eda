"""Acts a script out on one connection: the only place where a step becomes bytes, time, or a broken line."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import closing

from aiohttp import web

from broker.rehearsal.steps import Pause, Reply, Reset, Script, Send

LONGEST = 3600.0
"""Seconds after which even a script without an end is broken off: no caller waits that long."""

_LINGER_NOT = struct.pack("ii", 1, 0)


async def act(
    script: Script, request: web.Request, generation_id: str, pace: float, longest: float = LONGEST
) -> web.StreamResponse:
    """Plays a script to its end and returns the response that it became.

    The caller that leaves cancels this (the runner must have ``handler_cancellation``), or is found gone by the next
    write; either way the script is closed before the exception goes on.

    Raises:
        ConnectionError: the caller is gone.
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
    # Without lingering, closing a socket sends RST rather than FIN: the difference between a crash and a goodbye.
    transport = request.transport
    if transport is None:
        return
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    transport.abort()
