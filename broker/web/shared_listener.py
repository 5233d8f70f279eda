"""Take connections from sockets on which several workers listen.

The library's listener takes all connections that wait. Of 200 that come at the same time, one of two workers then got
157, and has those streams for minutes. Here each worker takes one connection in a turn of its event loop, so a worker
that has less to do takes more.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp import web

log = structlog.get_logger(__name__)

PAUSE = 1.0
"""Seconds without new connections after the system had no room for one."""


class SharedListener:
    """Takes connections for a server until it is closed.

    Args:
        server: gets the connections.
        sockets: listening; closed with this listener.
    """

    def __init__(self, server: web.Server, sockets: Sequence[socket.socket]) -> None:
        self._server = server
        self._sockets = sockets
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self) -> None:
        """Begin to take connections."""
        for each in self._sockets:
            each.setblocking(False)
            self._listen(each)

    def close(self) -> None:
        """Take no more connections. What was taken stays open."""
        if self._closed:
            return
        self._closed = True
        for each in self._sockets:
            self._loop.remove_reader(each)
            each.close()

    def _listen(self, listening: socket.socket) -> None:
        if not self._closed:
            self._loop.add_reader(listening, self._take, listening)

    def _take(self, listening: socket.socket) -> None:
        try:
            connection, _ = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another worker has taken it, or the client has left
        except OSError as error:
            log.warning("connections cannot be taken", why=str(error))
            self._loop.remove_reader(listening)
            self._loop.call_later(PAUSE, self._listen, listening)
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        with suppress(OSError):  # it has been closed by its client
            await self._loop.connect_accepted_socket(self._server, connection)
