"""The model side: one OpenAI client for the process, and chat streams as raw bytes.

The SDK knows the address, the headers and the connections; a chat's request is a copy of one that was made of them
at the start, because to build each anew takes the SDK 0.4 ms of CPU, half of what it costs to ask (measured). The
answer is read as bytes: parsed chunks cost 148 µs each on this client, raw bytes 5 to 7 (measured), and a page wants
the upstream's JSON untouched anyway.

Nothing of openai, httpx2 or aiohttp leaves this folder: `map_errors` turns all of it into `core.errors`.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx2
import openai
from openai import AsyncOpenAI, DefaultAioHttpClient

from broker.core.errors import (
    UpstreamError,
    UpstreamFailed,
    UpstreamInterrupted,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from broker.core.faults import fault_in_body, fault_of_status, parse_retry_after

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator

KEEPALIVE = 15.0
"""Seconds that an idle connection is kept. Servers close theirs at some time, and a request that meets that moment is
lost for good, for it must not be sent twice."""

MAX_ERROR_BODY = 64 * 1024
"""Bytes read of an answer that is not a stream; what is longer is not understood."""

_NOT_CONNECTED = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientProxyConnectionError,
)


class UpstreamClient:
    """One OpenAI-compatible service.

    Args:
        base_url: such as ``https://openrouter.ai/api/v1``.
        api_key: ours; never passed on, logged or told.
        title: the application's name, for attribution.
        connect_timeout: seconds for a connection, the wait for a free one included.
        max_connections: streams at once and a few for everything else.

    Attributes:
        secrets: words that no message may carry.
    """

    def __init__(
        self, *, base_url: str, api_key: str, title: str, connect_timeout: float, max_connections: int
    ) -> None:
        self.secrets: tuple[str, ...] = (api_key,)
        timeout = httpx2.Timeout(None, connect=connect_timeout, pool=connect_timeout)
        self._http = DefaultAioHttpClient(
            # A redirect would send the request a second time, to somebody else.
            follow_redirects=False,
            timeout=timeout,
            limits=httpx2.Limits(max_connections=max_connections, keepalive_expiry=KEEPALIVE),
            trust_env=False,
            event_hooks={"response": [_bound_error_body]},
        )
        self.openai = AsyncOpenAI(
            base_url=base_url,
            api_key=api_key,
            # Retries are decided where it is known what may be billed; here, asking twice may be paying twice.
            max_retries=0,
            timeout=timeout,
            http_client=self._http,
            default_headers={
                "X-Title": title,
                "X-OpenRouter-Title": title,
                "Accept-Encoding": "identity",
            },
        )
        self._chat_url = httpx2.URL(f"{str(self.openai.base_url).rstrip('/')}/chat/completions")
        self._chat_headers = self._make_chat_headers()

    def use_key(self, api_key: str) -> None:
        """Ask with this key from now on. Messages still carry neither it nor the one before."""
        self.secrets = (api_key, self.secrets[0])
        self.openai.api_key = api_key
        self._chat_headers = self._make_chat_headers()

    def _make_chat_headers(self) -> httpx2.Headers:
        headers = {**self.openai.default_headers, **self.openai.auth_headers, "Accept": "text/event-stream"}
        return httpx2.Headers({k: v for k, v in headers.items() if isinstance(v, str)})

    async def open_chat(self, body: bytes, *, referer: str) -> UpstreamStream:
        """Ask for a chat completion and return its answer once the status and the headers are there.

        Args:
            body: the JSON of the request.
            referer: origin of the page, for attribution; may be empty.

        Raises:
            UpstreamError: it could not be reached, or refused.
        """
        request = httpx2.Request("POST", self._chat_url, headers=self._chat_headers, content=body)
        if referer:
            request.headers["HTTP-Referer"] = referer
        with map_errors(self.secrets):
            response = await self._http.send(request, stream=True)
            if not response.is_success:
                raise await self._refusal(response)
        return UpstreamStream(response, self.secrets)

    async def _refusal(self, response: httpx2.Response) -> UpstreamError:
        try:
            await response.aread()
        finally:
            await response.aclose()
        return _fault_of(response, self.secrets)

    async def close(self) -> None:
        """Close every connection."""
        await self.openai.close()


class UpstreamStream:
    """The bytes of one answer. Close it, or its connection is lost to the pool.

    Attributes:
        generation_id: the upstream's name for this generation, known before the first byte of it; may be None.
    """

    def __init__(self, response: httpx2.Response, secrets: tuple[str, ...]) -> None:
        self.generation_id: str | None = response.headers.get("x-generation-id")
        self._response = response
        self._secrets = secrets

    async def blocks(self) -> AsyncGenerator[bytes]:
        """The bytes as they come.

        Raises:
            UpstreamInterrupted: the line broke.
            UpstreamError: this is no event stream; what it says instead.
        """
        # The transport's own stream: httpx2's iterators around it add a third to the cost of a read, and what they
        # add to its function is decompression.
        encoded = "content-encoding" in self._response.headers
        source: Any = self._response.aiter_bytes() if encoded else self._response.stream
        with map_errors(self._secrets):
            if not self._is_event_stream():
                raise fault_in_body(_json(await _beginning(source)), secrets=self._secrets)
            async for block in source:
                yield block

    def _is_event_stream(self) -> bool:
        kind: str = self._response.headers.get("content-type", "")
        return kind.partition(";")[0].strip().lower() == "text/event-stream"

    async def aclose(self) -> None:
        """Let the connection go. One whose answer was read to its end is kept for the next request."""
        with map_errors(self._secrets):
            await self._response.aclose()


async def _bound_error_body(response: httpx2.Response) -> None:
    """The SDK reads the whole body of a refusal; see to it that there is an end to it."""
    if not response.is_success and isinstance(response.stream, httpx2.AsyncByteStream):
        response.stream = _Beginning(response.stream)


class _Beginning(httpx2.AsyncByteStream):
    """The first bytes of another stream."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield await _beginning(self._stream)

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _beginning(stream: AsyncIterable[bytes]) -> bytes:
    body = b""
    async for block in stream:
        body += block
        if len(body) > MAX_ERROR_BODY:
            break
    return body


def _json(body: bytes) -> Any:
    """The document, as leniently as it can be read; None for what is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


@contextmanager
def map_errors(secrets: tuple[str, ...] = ()) -> Iterator[None]:
    """Turn the libraries' exceptions into ours."""
    try:
        yield
    except openai.APIStatusError as error:
        raise _fault_of(error.response, secrets) from error
    except (openai.APIConnectionError, httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
        raise _connection_error(error) from error
    except (openai.OpenAIError, httpx2.StreamError, httpx2.InvalidURL) as error:
        raise UpstreamFailed from error


def _fault_of(response: httpx2.Response, secrets: tuple[str, ...]) -> UpstreamError:
    """What a refusal means; its body has been read."""
    wait = parse_retry_after(response.headers.get("retry-after"))
    return fault_of_status(response.status_code, _json(response.content), retry_after=wait, secrets=secrets)


def _connection_error(error: BaseException) -> UpstreamError:
    """What a broken connection means for the money: nothing sent, or perhaps a generation.

    The transport calls a server that hung up a connect timeout, so the first cause decides and not its names.
    """
    causes = [error]
    while causes[-1].__cause__ is not None and len(causes) < 10:
        causes.append(causes[-1].__cause__)
    if any(isinstance(cause, _NOT_CONNECTED) for cause in causes):
        return UpstreamUnreachable()
    if any(isinstance(cause, aiohttp.SocketTimeoutError) for cause in causes):
        return UpstreamTimeout()
    return UpstreamInterrupted()
