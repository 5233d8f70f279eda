"""One HTTP/1.1 connection to the upstream. The bytes of an answer are passed on as they are read, without a task.

This is the fast path of a relay. A stream reader wakes a task for each chunk, which costs as much as all the rest that
is done with it. Here the event loop calls `data_received`, which parses and calls the taker of the answer; a task waits
only for the head of the answer and for its end.

A connection knows nothing of models or errors of ours: `pool` opens it, `client` says what is asked and what an answer
means.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

import httptools

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_HEAD = 64 * 1024
"""Bytes of the status line and the headers of an answer, those of interim answers included. Behind the head, bytes that
come without any of the body: extensions of chunks, and trailers."""

MAX_UNREAD = 256 * 1024
"""Bytes of an answer that wait here while nobody takes them. With more, nothing is read from the socket."""

Take = Callable[[bytes], bool]
"""Takes the bytes of one read. Returns True if it needs no more of them."""


class ConnectionBroken(Exception):  # noqa: N818 - says what happened, as the tree of errors does
    """The connection was lost, or what came is not HTTP. What was asked may have been done."""


class Head(NamedTuple):
    """The head of an answer.

    Attributes:
        status: the HTTP status.
        headers: by lower-case name; of a name that comes twice, the last one.
    """

    status: int
    headers: Mapping[str, str]


class Connection(asyncio.Protocol):
    """A connection, which carries one request and its answer at a time.

    The order of calls is `ask`, `relay` until it returns True, then `ask` again if `is_reusable`.
    """

    __slots__ = (
        "_ends_with_connection",
        "_fault",
        "_head",
        "_headers",
        "_is_idle",
        "_keeps_alive",
        "_lost",
        "_parser",
        "_paused",
        "_pieces",
        "_size_without_body",
        "_take",
        "_transport",
        "_unread",
        "_waiter",
        "is_complete",
    )

    def __init__(self) -> None:
        self.is_complete = self._is_idle = True
        self._transport: asyncio.Transport | None = None
        self._lost = False
        self._paused = False
        self._pieces: list[bytes] = []
        self._take: Take | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._fault: str | None = None
        self._begin()
        self._keeps_alive = True  # until an answer says otherwise

    def _begin(self) -> None:
        """Expect a new answer."""
        self._head: Head | None = None
        self._size_without_body = 0
        self._unread = 0
        self._headers: dict[str, str] = {}
        self._ends_with_connection = False
        self._keeps_alive = False
        self._parser = httptools.HttpResponseParser(_Callbacks(self, self._pieces))
        # What widely used clients accept too.
        self._parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )

    # For the client

    async def ask(self, request: bytes) -> Head:
        """Send a request, and return the head of its answer.

        Raises:
            ConnectionBroken: the connection was lost, or what came is not HTTP.
        """
        if self._transport is None or self._lost or not self.is_complete:
            raise ConnectionBroken("the connection cannot be used")
        self._begin()
        self.is_complete = self._is_idle = False
        self._transport.write(request)
        while self._head is None:
            await self._wait()
        return self._head

    async def relay(self, take: Take) -> bool:
        """Pass the bytes of the answer to `take` as they come, the unread ones first. An error of `take` is raised.

        After a cancellation and after the return, nothing is passed on.

        Returns:
            True if the answer has ended; False if `take` needs no more.

        Raises:
            ConnectionBroken: the answer broke off.
        """
        self._take = take
        try:
            while self._take is not None and not self._pass_on():
                self._resume()
                if self.is_complete:
                    return True
                await self._wait()  # also until `data_received` has called a taker that needs no more
            return False
        finally:
            self._take = None

    def stop(self) -> None:
        """Pass nothing on from now on. A `relay` under way has to be cancelled by its task."""
        self._take = None

    @property
    def is_reusable(self) -> bool:
        """True if another request may be sent."""
        return (
            self.is_complete
            and self._keeps_alive
            and self._transport is not None
            and not (self._lost or self._pieces or self._paused)
            # A service may answer before it has read the request, and never read the rest.
            and self._transport.get_write_buffer_size() == 0
        )

    @property
    def is_open(self) -> bool:
        """True if the connection was made and not lost."""
        return self._transport is not None and not self._lost

    def abort(self) -> None:
        """Close the connection at once. A request that was not sent completely is given up."""
        self._lost = True
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        """Wait for the next thing to happen: a head, an end, or a fault, which is raised."""
        if self._fault is None and self._lost:
            self._fault = "the connection was lost"
        if self._fault is not None:
            raise ConnectionBroken(self._fault)
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        try:
            await waiter
        finally:
            # An error that is raised here refers to this frame, and the waiter to the error: a circle that would keep
            # all frames above, and the prompt in them, until the next garbage collection.
            self._waiter = None
            del waiter

    def _wake(self, fault: BaseException | None = None) -> None:
        """Wake the task that waits; with a fault, raise it there."""
        if self._waiter is not None and not self._waiter.done():
            if fault is not None:
                self._waiter.set_exception(fault)
            else:
                self._waiter.set_result(None)

    def _break(self, why: str) -> None:
        """Raise `ConnectionBroken` now and at each later use."""
        self._fault = self._fault or why
        self._wake()
        self.abort()

    def _pass_on(self) -> bool:
        """Pass on what is unread. Returns True if the taker needs no more."""
        pieces = self._pieces
        if not pieces or self._take is None:
            return False
        block = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._unread = 0
        return self._take(block)

    def _resume(self) -> None:
        if self._paused and self._transport is not None and not self._lost:
            self._paused = False
            self._transport.resume_reading()

    # For the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Parse what was read, and pass the part of an answer's body on."""
        if self._is_idle:  # nothing was asked
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self.is_complete:
                self._pass_on_the_last()
                self._break("the answer is not HTTP")
                return
            self.abort()  # the answer is complete; what follows it is not taken
        take = self._take
        if take is None:
            self._keep(len(data))
            return
        # As `_pass_on`, written out: this runs for every chunk of every stream.
        pieces = self._pieces
        if pieces:
            self._size_without_body = 0
            block = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            try:
                enough = take(block)
            except BaseException as error:  # noqa: BLE001 - raised by `relay`, in the task of the reader
                self._take = None
                self._wake(error)
                return
            if enough:
                self._take = None
                self._wake()
                return
        else:
            self._count_without_body(len(data))
        if self.is_complete:
            self._wake()

    def _pass_on_the_last(self) -> None:
        """Pass on what came before a fault, so that it does not depend on how many reads there were."""
        try:
            if self._pass_on():
                self._take = None
                self._wake()
        except BaseException as error:  # noqa: BLE001 - raised by `relay`, in the task of the reader
            self._take = None
            self._wake(error)

    def _count_without_body(self, size: int) -> None:
        """Count bytes that are no body, and give up where there are too many: nothing else bounds them."""
        self._size_without_body += size
        if self._size_without_body > MAX_HEAD and not self.is_complete:
            self._break("the head or the trailers of the answer are too large")

    def _keep(self, size: int) -> None:
        """Keep what nobody takes yet, and stop reading where that is too much."""
        if self._head is None:
            self._count_without_body(size)
            return
        self._unread += size
        if self._unread > MAX_UNREAD and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """End an answer that has no other end than that of its connection; break any other."""
        was_aborted, self._lost = self._lost, True
        if self.is_complete:
            return
        if self._ends_with_connection and exc is None and not was_aborted:
            self.is_complete = True
            self._wake()
        else:
            self._break("the connection was lost")

    # For the parser

    def on_message_begin(self) -> None:
        """Refuse a second answer."""
        if self.is_complete:
            raise ValueError("a second answer, which was not asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header. Trailers are dropped: no field that matters here may be one."""
        if self._head is None:
            self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Note the end of the head, unless it is that of an interim answer such as 103."""
        status, headers = self._parser.get_status_code(), self._headers
        if status < 200:
            self._headers = {}
            return
        is_chunked = headers.get("transfer-encoding", "").rpartition(",")[2].strip().lower() == "chunked"
        self._ends_with_connection = not is_chunked and "content-length" not in headers
        self._head = Head(status, headers)
        self._size_without_body = 0
        self._wake()

    def on_message_complete(self) -> None:
        """Note the end of the answer."""
        if self._head is not None:
            self.is_complete = self._is_idle = True
            self._keeps_alive = self._parser.should_keep_alive()


class _Callbacks:
    """What the parser calls. The pieces of a body go straight into a list, without a call in Python."""

    __slots__ = ("on_body", "on_header", "on_headers_complete", "on_message_begin", "on_message_complete")

    def __init__(self, connection: Connection, pieces: list[bytes]) -> None:
        self.on_message_begin = connection.on_message_begin
        self.on_header = connection.on_header
        self.on_headers_complete = connection.on_headers_complete
        self.on_message_complete = connection.on_message_complete
        self.on_body = pieces.append
