"""The client of the upstream service: one OpenAI client for the process, and answers as raw bytes.

The SDK provides the address, the headers and the connections. A request for an answer is a copy of one that is built at
the start, because building each one again takes the SDK 0.4 ms of CPU, half of the cost of a request (measured). The
answer is read as bytes: parsed chunks cost 148 µs each on this client and raw bytes 5 to 7 µs (measured), and pages get
the upstream's JSON unchanged anyway.

No exception of openai, httpx2 or aiohttp leaves this folder: `map_errors` turns them into those of `core.errors`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx2
import openai
import orjson
from openai import AsyncOpenAI, DefaultAioHttpClient

from broker.core.dialect import CHAT, DIALECTS
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

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator, Mapping

    from broker.core.dialect import Dialect

KEEPALIVE = 4.0
"""Seconds that an idle connection is kept. Servers close theirs at some time, many after 5 s. A request that is sent at
that moment is lost, because it must not be sent twice."""

MAX_ERROR_BODY = 64 * 1024
"""Bytes that are read of a refusal, or of the record of a generation. A longer one is not parsed."""

MAX_ERROR_TEXT = 4 * 1024
"""Bytes that are read of a refusal that is not JSON."""

MAX_HEAD = 4 * 1024
"""Bytes at the start of an answer in which a line must show that it is an event stream."""

MAX_CAP_NAMES = 500
"""Models whose name of the output cap is remembered."""

_CAP_NAMES = ("max_tokens", "max_completion_tokens")
_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b"error:", b":")
_BOM = b"\xef\xbb\xbf"

_NOT_CONNECTED = (
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
    ) -> None:
        self.secrets: tuple[str, ...] = (api_key,)
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
        base = str(self.openai.base_url).rstrip("/")
        self._urls = {dialect.path: httpx2.URL(f"{base}/{dialect.path}") for dialect in DIALECTS.values()}
        self._headers = self._make_headers()

    def use_key(self, api_key: str) -> None:
        """Use this key from now on. Messages contain neither this key nor the one before."""
        self.secrets = (api_key, self.secrets[0])
        self.openai.api_key = api_key
        self._headers = self._make_headers()

    def _make_headers(self) -> httpx2.Headers:
        headers = {**self.openai.default_headers, **self.openai.auth_headers, "Accept": "text/event-stream"}
        return httpx2.Headers({k: v for k, v in headers.items() if isinstance(v, str)})

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
        response = await self._send(dialect, body, referer, headers)
        if response.is_success:
            return UpstreamStream(response, dialect, self.secrets)
        names = _caps_in(body) if dialect.has_two_caps and response.status_code == 400 else ()
        with map_errors(self.secrets):
            fault, name = await self._refusal(response, names)
        if name is None or (renamed := _rename_cap(body, name)) is None:
            raise fault
        response = await self._send(dialect, renamed, referer, headers)
        if not response.is_success:
            with map_errors(self.secrets):
                fault, _ = await self._refusal(response)
            raise fault
        self._remember_cap(model, name)
        return UpstreamStream(response, dialect, self.secrets)

    async def _send(
        self, dialect: Dialect, body: bytes, referer: str, headers: Mapping[str, str]
    ) -> httpx2.Response:
        request = httpx2.Request("POST", self._urls[dialect.path], headers=self._headers, content=body)
        if self._speaks_openrouter():
            request.headers.update(self._attribution)
            if referer:
                request.headers["HTTP-Referer"] = referer
        if headers:
            request.headers.update(headers)
        try:
            with map_errors(self.secrets):
                response = await self._http.send(request, stream=True)
        except UpstreamError:
            self.statuses["none"] += 1
            raise
        self.statuses[str(response.status_code)] += 1
        return response

    async def _refusal(
        self, response: httpx2.Response, cap_names: tuple[str, ...] = ()
    ) -> tuple[UpstreamError, str | None]:
        """Return the error of a refusal, and the name of the cap that it asks for."""
        try:
            await response.aread()
        finally:
            await response.aclose()
        wanted = other_cap(response.status_code, _json(response.content), cap_names) if cap_names else None
        return _fault_of(response, self.secrets), wanted

    def _remember_cap(self, model: str, name: str) -> None:
        self._cap_names.pop(model, None)
        self._cap_names[model] = name
        if len(self._cap_names) > MAX_CAP_NAMES:
            del self._cap_names[next(iter(self._cap_names))]

    async def close(self) -> None:
        """Close all connections."""
        await self.openai.close()


class UpstreamStream:
    """The bytes of one answer. It must be closed, or its connection is lost to the pool.

    Attributes:
        generation_id: the upstream's id of this generation, known before its first byte; may be None.
        whole: the complete answer, if it came as one JSON document in place of a stream.
        status: its HTTP status.
    """

    def __init__(self, response: httpx2.Response, dialect: Dialect, secrets: tuple[str, ...]) -> None:
        named: str | None = response.headers.get("x-generation-id")
        self.generation_id = bounded_text(named) if named else None
        self.whole: dict[str, Any] | None = None
        self.status: int = response.status_code
        self._response = response
        self._dialect = dialect
        self._secrets = secrets

    async def blocks(self, max_body: int = MAX_ERROR_BODY) -> AsyncGenerator[bytes]:
        """Yield the bytes as they come. Yields none if the answer is one JSON document, which is in `whole` then.

        Args:
            max_body: bytes of the largest document.

        Raises:
            UpstreamInterrupted: the connection broke.
            UpstreamError: the answer is not an event stream but an error.
        """
        # This is the transport's own stream: httpx2's iterators around it add a third to the cost of a read, and only
        # add decompression.
        encoded = "content-encoding" in self._response.headers
        source: Any = self._response.aiter_bytes() if encoded else self._response.stream
        blocks = aiter(source)
        with map_errors(self._secrets):
            head, is_stream = await _head(blocks)
            if is_stream or (is_stream is None and self._is_called_event_stream()):
                yield head
                async for block in blocks:
                    yield block
                return
            body = _json(head + await _beginning(blocks, max_body - len(head)))
            if isinstance(body, list) and len(body) == 1:
                body = body[0]
            if not isinstance(body, dict) or not self._dialect.is_whole(body):
                raise fault_in_body(body, secrets=self._secrets, now=time.time())
            self.whole = body

    def _is_called_event_stream(self) -> bool:
        kind: str = self._response.headers.get("content-type", "")
        return kind.partition(";")[0].strip().lower() == "text/event-stream"

    async def aclose(self) -> None:
        """Close the answer. The connection of an answer that was read to its end is kept for the next request."""
        with map_errors(self._secrets):
            await self._response.aclose()


async def _bound_body(response: httpx2.Response) -> None:
    """Limit the body of a refusal or a record, which the SDK reads completely."""
    is_read_whole = not response.is_success or response.request.url.path.endswith("/generation")
    if is_read_whole and isinstance(response.stream, httpx2.AsyncByteStream):
        response.stream = _Beginning(response.stream)


class _Beginning(httpx2.AsyncByteStream):
    """The first bytes of another stream."""

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


async def _head(blocks: AsyncIterator[bytes]) -> tuple[bytes, bool | None]:
    """Return the first bytes, and whether they show an event stream.

    True as soon as a line starts like one of an event stream; False where a JSON document or markup starts; None where
    the first 4 KiB or the complete body show neither.
    """
    head = b""
    async for block in blocks:
        head += block  # cheap: it ends with the first block that exceeds 4 KiB in total
        start = head[:MAX_HEAD].removeprefix(_BOM)
        if any(line.startswith(_FIELDS) for line in start.splitlines()):
            return head, True
        if len(head) >= MAX_HEAD:
            break
    return head, False if head.removeprefix(_BOM).lstrip()[:1] in {b"{", b"[", b"<"} else None


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


@contextmanager
def map_errors(secrets: tuple[str, ...] = ()) -> Iterator[None]:
    """Turn the exceptions of the libraries into ours."""
    try:
        yield
    except openai.APIStatusError as error:
        raise _fault_of(error.response, secrets) from error
    except (openai.APIConnectionError, httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
        raise _connection_error(error) from error
    except (openai.OpenAIError, httpx2.StreamError, httpx2.InvalidURL) as error:
        raise UpstreamFailed from error


def _fault_of(response: httpx2.Response, secrets: tuple[str, ...]) -> UpstreamError:
    """Return the error of a refusal whose body has been read."""
    now = time.time()
    wait = wait_in_headers(response.headers, response.status_code, now)
    return fault_of_status(
        response.status_code, _json_or_text(response.content), retry_after=wait, secrets=secrets, now=now
    )


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
