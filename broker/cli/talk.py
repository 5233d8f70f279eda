"""How the client commands talk to a broker over HTTP, and what they say when that fails."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import orjson

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

CONNECT_TIMEOUT = 5.0
ANSWER_TIMEOUT = 30.0
LONGEST_ANSWER = 64 * 1024 * 1024


class TalkError(Exception):
    """The broker could not be asked or said no; the text is a sentence for a person.

    Attributes:
        document: the broker's own words, where it answered in JSON.
    """

    def __init__(self, sentence: str, document: Mapping[str, Any] | None = None) -> None:
        super().__init__(sentence)
        self.document = document or {}


class Broker:
    """A broker at a base URL. Every failure of the line is a `TalkError`."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def ask(
        self, method: str, path: str, *, body: object = None, query: Mapping[str, str] | None = None
    ) -> bytes:
        """Ask for something and return the body of a good answer.

        Raises:
            TalkError: no answer, or not a good one.
        """
        data = None if body is None else orjson.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        async with self.open(
            method, path, data=data, headers=headers, params=query, wait=ANSWER_TIMEOUT
        ) as answer:
            content = await answer.content.read(LONGEST_ANSWER)
            if answer.ok:
                return content
            raise refusal(answer.status, content)

    @asynccontextmanager
    async def open(
        self, method: str, path: str, *, wait: float, **request: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Open an answer, of any status, whose silence may last `wait` seconds.

        Raises:
            TalkError: no connection, or it broke while the block read from it.
        """
        patience = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=wait)
        try:
            async with self._session.request(method, self._url + path, timeout=patience, **request) as answer:
                yield answer
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TalkError(f"The broker at {self._url} cannot be reached ({_why(error)}).") from error


@asynccontextmanager
async def broker_at(url: str) -> AsyncIterator[Broker]:
    """Talk to the broker at this base URL for the length of the block.

    Raises:
        TalkError: it is no URL of a web service.
    """
    async with aiohttp.ClientSession() as session:
        yield Broker(session, _base(url))


def refusal(status: int, content: bytes) -> TalkError:
    """Put an answer that is not good into words."""
    try:
        document = orjson.loads(content)
        error = document["error"]
        sentence = str(error["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return TalkError(f"The broker answered with status {status} and no explanation.")
    details = error.get("details")
    if isinstance(details, list):
        fields = [f"{at['field']}: {at['message']}" for at in details if {"field", "message"} <= set(at)]
        sentence = "\n  ".join((sentence, *fields))
    return TalkError(sentence, error)


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise TalkError(f"{url} is not the URL of a broker; one looks like http://127.0.0.1:3000.")
    return url.rstrip("/")


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else None
    if cause is None:
        return "the connection broke"
    # A failed look-up of a name has numbers and words of its own.
    return (os.strerror(cause.errno) if cause.errno and cause.errno > 0 else str(cause.strerror)).lower()
