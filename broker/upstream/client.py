"""The client of the upstream service: what is asked, and what an answer means.

The SDK provides the headers of a request, and the small requests besides (`openai`). A request for an answer is sent on
a connection of `pool`, as bytes that are built beforehand: building each one in the SDK takes 0.4 ms of CPU, and its
layers add 20 µs to each chunk (measured). The answer is passed on as bytes: parsed chunks cost 148 µs each on this
client, and pages get the upstream's JSON unchanged anyway.

No exception of openai, httpx2, aiohttp or httptools leaves this folder: `map_errors` turns them into those of
`core.errors`.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx2
import openai
import orjson
from openai import AsyncOpenAI, DefaultAioHttpClient

from broker.core.dialect import CHAT
from broker.core.errors import (
    UpstreamError,
    UpstreamFailed,
    UpstreamInterrupted,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from broker.core.foreign import bounded_text, is_too_large_to_parse
from broker.core.upstream_errors import fault_in_body, fault_of_status, other_cap, wait_in_headers
from broker.telemetry.interface import NO_HEADERS
from broker.upstream.connection import ConnectionBroken
from broker.upstream.pool import KEEPALIVE, ConnectError, Pool, secrets_of_proxy, tls_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
    from types import TracebackType

    from broker.core.dialect import Dialect
    from broker.upstream.connection import Connection, Head, Take

MAX_ERROR_BODY = 64 * 1024
"""Bytes that are read of a refusal, or of the record of a generation. A longer one is not parsed."""

MAX_ERROR_TEXT = 4 * 1024
"""Bytes that are read of a refusal that is not JSON."""

MAX_HEAD = 4 * 1024
"""Bytes at the start of an answer in which a line must show that it is an event stream."""

MAX_CAP_NAMES = 500
"""Models whose name of the output cap is remembered."""

MAX_BLOCK = 64 * 1024
"""Bytes that are decompressed at a time."""

MAX_EXPANDED = 4 * 1024 * 1024
"""Bytes that one read may become. A few bytes can stand for a thousand times as many, which would hold the loop."""

_ENCODINGS = frozenset({"gzip", "x-gzip", "deflate"})
_CAP_NAMES = ("max_tokens", "max_completion_tokens")
_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b"error:", b":")
_BOM = b"\xef\xbb\xbf"

_NOT_CONNECTED = (
    ConnectError,
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientProxyConnectionError,
    aiohttp.ClientHttpProxyError,
)


class UpstreamClient:
    """One OpenAI-compatible service.

    Args:
        base_url: such as ``https://openrouter.ai/api/v1``.
        api_key: the broker's key; it is never passed on or logged.
        title: the application's name, for attribution.
        connect_timeout: seconds for a connection, including the wait for a free one.
        max_connections: streams at the same time, and a few for everything else.
        speaks_openrouter: returns True if the service understands OpenRouter's own headers.
        proxy: address of an HTTP proxy for all requests.
        tls: how certificates are verified; by default with the authorities of the system.

    Attributes:
        secrets: texts that no message may contain.
        statuses: how often each HTTP status answered a request; ``none`` where there was no answer.
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str,
        title: str,
        connect_timeout: float,
        max_connections: int,
        speaks_openrouter: Callable[[], bool] = lambda: True,
        proxy: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        tls = tls or tls_context(base_url, proxy)
        # A proxy may repeat what it was sent in its own error page.
        self._proxy_secrets = secrets_of_proxy(proxy) if proxy else ()
        self.secrets: tuple[str, ...] = (api_key, *self._proxy_secrets)
        self.statuses: Counter[str] = Counter()
        self._speaks_openrouter = speaks_openrouter
        self._attribution = {"X-Title": title, "X-OpenRouter-Title": title}
        self._cap_names: dict[str, str] = {}
        timeout = httpx2.Timeout(None, connect=connect_timeout, pool=connect_timeout)
        self._http = DefaultAioHttpClient(
            # A redirect would send the request a second time, to another server.
            follow_redirects=False,
            timeout=timeout,
            limits=httpx2.Limits(max_connections=max_connections, keepalive_expiry=KEEPALIVE),
            trust_env=False,
            proxy=proxy,
            verify=tls,
            event_hooks={"response": [_bound_body]},
        )
        self.openai = AsyncOpenAI(
            base_url=base_url,
            api_key=api_key,
            # Retries are decided elsewhere, where it is known what may be billed. Asking twice here may mean paying
            # twice.
            max_retries=0,
            timeout=timeout,
            http_client=self._http,
            default_headers={"Accept-Encoding": "identity"},
        )
        self._pool = Pool(
            base_url,
            proxy=proxy,
            max_connections=max_connections,
            connect_timeout=connect_timeout,
            tls=tls,
        )
        self._base = str(self.openai.base_url).rstrip("/")
        self._starts: dict[tuple[str, bool], bytes] = {}

    def use_key(self, api_key: str) -> None:
        """Use this key from now on. Messages contain neither this key nor the one before."""
        self.secrets = (api_key, self.secrets[0], *self._proxy_secrets)
        self.openai.api_key = api_key
        self._starts.clear()

    def _start(self, dialect: Dialect) -> bytes:
        """Return the start of a request: all that does not differ between two requests of this dialect."""
        openrouter = self._speaks_openrouter()
        start = self._starts.get((dialect.path, openrouter))
        if start is None:
            start = self._starts[dialect.path, openrouter] = self._make_start(dialect, openrouter=openrouter)
        return start

    def _make_start(self, dialect: Dialect, *, openrouter: bool) -> bytes:
        url = httpx2.URL(f"{self._base}/{dialect.path}")
        headers = {
            "Host": self._pool.host,
            **self.openai.default_headers,
            **self.openai.auth_headers,
            "Accept": "text/event-stream",
            **(self._attribution if openrouter else {}),
        }
        target = str(url) if self._pool.is_forwarded else url.raw_path.decode("ascii")
        if self._pool.is_forwarded and self._pool.proxy_authorization is not None:
            headers["Proxy-Authorization"] = self._pool.proxy_authorization
        lines = [f"{name}: {value}" for name, value in headers.items() if isinstance(value, str)]
        return "\r\n".join([f"POST {target} HTTP/1.1", *map(_one_line, lines), ""]).encode()

    def open_ahead(self) -> None:
        """Begin to open a connection for a request that is likely to follow at once."""
        self._pool.open_ahead()

    async def ask(
        self,
        body: bytes,
        *,
        referer: str,
        model: str = "",
        dialect: Dialect = CHAT,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> UpstreamStream:
        """Send a request, and return its answer once the status and the headers are there.

        A service that refuses the name of the output cap is asked once more with the other name: such a refusal means
        that nothing was generated.

        Args:
            body: the JSON of the request.
            referer: origin of the page, for attribution; may be empty.
            model: the requested model, to remember its name of the cap.
            dialect: the dialect of the request.
            headers: more headers of the request.

        Raises:
            UpstreamError: the service could not be reached, or refused.
        """
        known = self._cap_names.get(model) if dialect.has_two_caps else None
        if known is not None and (renamed := _rename_cap(body, known)) is not None:
            body = renamed
        stream = await self._send(dialect, body, referer, headers)
        if stream.is_success:
            return stream
        names = _caps_in(body) if dialect.has_two_caps and stream.status == 400 else ()
        fault, name = await self._refusal(stream, names)
        if name is None or (renamed := _rename_cap(body, name)) is None:
            raise fault
        stream = await self._send(dialect, renamed, referer, headers)
        if not stream.is_success:
            fault, _ = await self._refusal(stream)
            raise fault
        self._remember_cap(model, name)
        return stream

    async def _send(
        self, dialect: Dialect, body: bytes, referer: str, headers: Mapping[str, str]
    ) -> UpstreamStream:
        request = self._start(dialect)
        if referer and self._speaks_openrouter():
            headers = {**headers, "HTTP-Referer": referer}
        for name, value in headers.items():
            request += _one_line(f"{name}: {value}").encode() + b"\r\n"
        request += b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        try:
            with map_errors(self.secrets):
                connection = await self._pool.take()
                try:
                    head = await connection.ask(request)
                except BaseException:
                    self._pool.give_back(connection)
                    raise
        except UpstreamError:
            self.statuses["none"] += 1
            raise
        self.statuses[str(head.status)] += 1
        return UpstreamStream(connection, head, self._pool, dialect, self.secrets)

    async def _refusal(
        self, stream: UpstreamStream, cap_names: tuple[str, ...] = ()
    ) -> tuple[UpstreamError, str | None]:
        """Return the error of a refusal, and the name of the cap that it asks for."""
        try:
            content = await stream.read(MAX_ERROR_BODY) if stream.is_readable else b""
        finally:
            stream.close()
        wanted = other_cap(stream.status, _json(content), cap_names) if cap_names else None
        return _fault_of(stream.status, stream.headers, content, self.secrets), wanted

    def _remember_cap(self, model: str, name: str) -> None:
        self._cap_names.pop(model, None)
        self._cap_names[model] = name
        if len(self._cap_names) > MAX_CAP_NAMES:
            del self._cap_names[next(iter(self._cap_names))]

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close()
        await self.openai.close()


class UpstreamStream:
    """The bytes of one answer. It must be closed, or its connection is lost to the pool.

    Attributes:
        generation_id: the upstream's id of this generation, known before its first byte; may be None.
        whole: the complete answer, if it came as one JSON document in place of a stream.
        status: its HTTP status.
        headers: by lower-case name.
    """

    def __init__(
        self, connection: Connection, head: Head, pool: Pool, dialect: Dialect, secrets: tuple[str, ...]
    ) -> None:
        self.status, self.headers = head
        named = self.headers.get("x-generation-id")
        self.generation_id = bounded_text(named) if named else None
        self.whole: dict[str, Any] | None = None
        self._connection = connection
        self._pool = pool
        self._dialect = dialect
        self._secrets = secrets
        self._head = b""
        self._is_stream = False
        self._is_closed = False
        encoding = self.headers.get("content-encoding", "").strip().lower()
        self._decoder = None if encoding in {"", "identity"} else _Decompressor(encoding)

    @property
    def is_success(self) -> bool:
        """True for a status from 200 to 299."""
        return 200 <= self.status < 300

    @property
    def is_readable(self) -> bool:
        """True unless the answer is compressed in a way that we do not know."""
        return self._decoder is None or self._decoder.is_known

    async def relay(self, take: Take, max_body: int = MAX_ERROR_BODY) -> bool:
        """Pass the bytes of an event stream to `take` as they come, until it returns True or the stream ends.

        An error of `take` is raised. Passes nothing if the answer is one JSON document, which is in `whole` then. May
        be called again, to read on.

        Args:
            take: is called with the bytes of each read.
            max_body: bytes of the largest document.

        Returns:
            True if the answer has ended; False if `take` needs no more.

        Raises:
            UpstreamInterrupted: the connection broke.
            UpstreamError: the answer is not an event stream but an error.
        """
        with map_errors(self._secrets):
            if not self._is_stream:
                is_stream = await self._read_head()
                head = self._head
                if not (is_stream or (is_stream is None and self._is_called_event_stream())):
                    self._read_document(head + await self.read(max_body - len(head)))
                    return True
                self._is_stream, self._head = True, b""
                if head and take(head):
                    return False
                head = b""  # else this frame would keep them until the stream ends
            return await self._relay(take)

    async def _relay(self, take: Take) -> bool:
        decoder = self._decoder
        if self._is_closed:
            raise ConnectionBroken("the answer was closed")
        if decoder is None:
            return await self._connection.relay(take)
        if decoder.pass_on(b"", take):
            return False
        return await self._connection.relay(lambda data: decoder.pass_on(data, take))

    async def read(self, limit: int) -> bytes:
        """Return the rest of the answer, or of a longer one the beginning: at least ``limit`` bytes."""
        blocks: list[bytes] = []
        left = limit
        if left < 0:
            return b""

        def take(block: bytes) -> bool:
            nonlocal left
            blocks.append(block)
            left -= len(block)
            return left < 0

        with map_errors(self._secrets):
            await self._relay(take)
        return b"".join(blocks)

    def stop(self) -> None:
        """Pass nothing on from now on. A `relay` under way has to be cancelled by its task."""
        if not self._is_closed:
            self._connection.stop()

    def close(self) -> None:
        """Close the answer. The connection of an answer that was read to its end is kept for the next request.

        May be called twice. Whatever is called later does not reach the connection, which may have another answer.
        """
        if not self._is_closed:
            self._is_closed = True
            self._pool.give_back(self._connection)

    async def _read_head(self) -> bool | None:
        """Read the first bytes, and return whether they show an event stream: see `is_event_stream`."""
        is_stream = None

        def take(block: bytes) -> bool:
            nonlocal is_stream
            self._head += block  # cheap: it ends with the first block that exceeds 4 KiB in total
            is_stream = is_event_stream(self._head)
            return is_stream is True or len(self._head) >= MAX_HEAD

        await self._relay(take)
        return is_stream

    def _read_document(self, content: bytes) -> None:
        """Note an answer that came as one JSON document.

        Raises:
            UpstreamError: it is an error, or nothing of an answer.
        """
        body = _json(content)
        if isinstance(body, list) and len(body) == 1:
            body = body[0]
        if not isinstance(body, dict) or not self._dialect.is_whole(body):
            raise fault_in_body(body, secrets=self._secrets, now=time.time())
        self.whole = body

    def _is_called_event_stream(self) -> bool:
        kind = self.headers.get("content-type", "")
        return kind.partition(";")[0].strip().lower() == "text/event-stream"


def is_event_stream(head: bytes) -> bool | None:
    """Return whether the first bytes of an answer show an event stream.

    True as soon as a line starts like one of an event stream; False where a JSON document or markup starts; None where
    the first 4 KiB or the complete body show neither.
    """
    start = head[:MAX_HEAD].removeprefix(_BOM)
    if start.startswith(b"data:") or any(line.startswith(_FIELDS) for line in start.splitlines()):
        return True
    return False if start.lstrip()[:1] in {b"{", b"[", b"<"} else None


class _Decompressor:
    """Decompresses an answer that is compressed although we asked for none, in parts of limited size.

    Attributes:
        is_known: the encoding is one that can be decompressed.
    """

    def __init__(self, encoding: str) -> None:
        self.is_known = encoding in _ENCODINGS
        self._may_be_bare = encoding == "deflate"
        self._decoder: zlib._Decompress | None = None

    def pass_on(self, data: bytes, take: Take) -> bool:
        """Pass the decompressed bytes to `take`. Returns True if it needs no more.

        Raises:
            ConnectionBroken: they cannot be decompressed.
        """
        if not self.is_known:
            raise ConnectionBroken("unknown encoding")
        if self._decoder is None:
            if not data:
                return False
            self._decoder = zlib.decompressobj(self._window(data[0]))
        size = 0
        try:
            data = self._decoder.unconsumed_tail + data
            # What follows the end is ignored. The decoder would keep it.
            while not self._decoder.eof and (block := self._decoder.decompress(data, MAX_BLOCK)):
                if take(block):
                    return True
                size += len(block)
                if size > MAX_EXPANDED:
                    raise ConnectionBroken("too much in few bytes")
                data = self._decoder.unconsumed_tail
        except zlib.error as error:
            raise ConnectionBroken("cannot be decompressed") from error
        return False

    def _window(self, first: int) -> int:
        """Return the size of the window, which also tells the decoder what comes.

        Many services send `deflate` without the header of zlib. No such data begin as zlib or gzip do.
        """
        is_bare = self._may_be_bare and first & 0x0F != 8 and first != 0x1F
        return -zlib.MAX_WBITS if is_bare else zlib.MAX_WBITS | 32  # 32: find out whether it is gzip or zlib


async def _bound_body(response: httpx2.Response) -> None:
    """Limit the body of a refusal or a record, which the SDK reads completely."""
    is_read_whole = not response.is_success or response.request.url.path.endswith("/generation")
    if is_read_whole and isinstance(response.stream, httpx2.AsyncByteStream):
        response.stream = _Beginning(response.stream)


class _Beginning(httpx2.AsyncByteStream):
    """The first bytes of another stream, for what the SDK reads completely."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield await _beginning(self._stream)

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _beginning(stream: AsyncIterable[bytes], limit: int = MAX_ERROR_BODY) -> bytes:
    blocks: list[bytes] = []
    size = 0
    async for block in stream:
        blocks.append(block)
        size += len(block)
        if size > limit:
            break
    return b"".join(blocks)


def _json(body: bytes) -> Any:
    """Return the document, parsed leniently; None where it is not JSON, or has too many values."""
    if is_too_large_to_parse(body):
        return None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(body) if len(body) <= MAX_ERROR_BODY else None
    except (ValueError, RecursionError):
        return None


def _caps_in(body: bytes) -> tuple[str, ...]:
    """Return the parameters that cap the output of a request."""
    document = _json(body)
    return tuple(name for name in _CAP_NAMES if isinstance(document, dict) and name in document)


def _rename_cap(body: bytes, name: str) -> bytes | None:
    """Return the request with this name of the cap; None unless it has a cap with only the other name."""
    document = _json(body)
    other = _CAP_NAMES[1 - _CAP_NAMES.index(name)]
    if not isinstance(document, dict) or other not in document or name in document:
        return None
    document[name] = document.pop(other)
    try:
        return orjson.dumps(document)
    except orjson.JSONEncodeError:
        return None


class map_errors:  # noqa: N801 - read as a statement, like those of contextlib
    """Turns the exceptions of the libraries into ours, during a block.

    It is a class, because a generator takes ten times as long, and the first chunk waits for two such blocks.
    """

    __slots__ = ("_secrets",)

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        self._secrets = secrets

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        if isinstance(error, openai.APIStatusError):
            answer = error.response
            raise _fault_of(answer.status_code, answer.headers, answer.content, self._secrets) from error
        if isinstance(error, _BROKEN):
            raise _connection_error(error) from error
        if isinstance(error, openai.OpenAIError | httpx2.StreamError | httpx2.InvalidURL):
            raise UpstreamFailed from error


_BROKEN = (
    *(ConnectError, ConnectionBroken, openai.APIConnectionError),
    *(httpx2.HTTPError, aiohttp.ClientError, OSError),
)
"""Errors of a connection."""


def _fault_of(
    status: int, headers: Mapping[str, str], content: bytes, secrets: tuple[str, ...]
) -> UpstreamError:
    """Return the error of a refusal whose body has been read."""
    now = time.time()
    wait = wait_in_headers(headers, status, now)
    return fault_of_status(status, _json_or_text(content), retry_after=wait, secrets=secrets, now=now)


def _one_line(text: str) -> str:
    """Return a header without characters that would end it, or that no header may have."""
    return "".join(character for character in text if character.isprintable())


def _json_or_text(body: bytes) -> Any:
    """Return the document of a refusal, or the text that a server or a proxy sent; None for anything else."""
    document = _json(body)
    if document is not None or body.lstrip()[:1] in {b"{", b"["}:
        return document
    text = body[:MAX_ERROR_TEXT].decode("utf-8", "ignore")
    is_text = all(character.isprintable() or character.isspace() for character in text)
    return text if is_text else None


def _connection_error(error: BaseException) -> UpstreamError:
    """Return the error of a broken connection. It says whether a generation may have started.

    The transport reports a server that hung up as a connect timeout, so the first cause decides and not its name.
    """
    causes = [error]
    while causes[-1].__cause__ is not None and len(causes) < 10:
        causes.append(causes[-1].__cause__)
    if any(isinstance(cause, _NOT_CONNECTED) for cause in causes):
        return UpstreamUnreachable()
    if any(isinstance(cause, aiohttp.SocketTimeoutError) for cause in causes):
        return UpstreamTimeout()
    return UpstreamInterrupted()
