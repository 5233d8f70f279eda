"""Fetch the list of models with one GET, as bytes. `core/model_entry.py` parses them.

The OpenAI client is used for its address, key and errors, but not for parsing, which would drop all fields that
OpenAI's own list does not have.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

import aiohttp
import httpx2
import structlog
from openai import APIStatusError, AsyncOpenAI, OpenAIError

from broker.core.errors import ModelsUnavailable
from broker.core.model_entry import MAX_LIST_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

FETCH_TIMEOUT = 10.0
"""Seconds for the complete request, including the connection."""

log = structlog.get_logger(__name__)


async def fetch_models(client: AsyncOpenAI, *, timeout: float = FETCH_TIMEOUT) -> bytes:
    """Fetch the list from the upstream once, and return the body of the answer.

    Raises:
        ModelsUnavailable: the upstream cannot be reached, refuses, takes longer than `timeout` seconds or sends too
            much.
    """
    body = bytearray()
    with _errors_as_unavailable():
        async with (
            asyncio.timeout(timeout),
            client.models.with_streaming_response.list(timeout=timeout) as response,
        ):
            async for piece in response.iter_bytes():
                body += piece
                if len(body) > MAX_LIST_BYTES:
                    log.warning("model list too large", limit=MAX_LIST_BYTES)
                    raise ModelsUnavailable
    return bytes(body)


@contextmanager
def _errors_as_unavailable() -> Iterator[None]:
    """Turn the exceptions of the client, its transport and timeouts into `ModelsUnavailable`.

    The log has the reason. The cause is dropped: aiohttp's errors hold the request with our key.
    """
    try:
        yield
    except APIStatusError as error:
        log.warning("model list refused", status=error.status_code)
        raise ModelsUnavailable from None
    # The aiohttp transport maps most of its errors to httpx2's, but not all.
    except (OpenAIError, httpx2.HTTPError, aiohttp.ClientError, OSError, TimeoutError) as error:
        log.warning("model list not fetched", error=type(_origin(error)).__name__)
        raise ModelsUnavailable from None


def _origin(error: BaseException) -> BaseException:
    """Return the first cause of an error: the SDK reports a refused connection as a timeout."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
