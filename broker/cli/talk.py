"""HTTP from the client commands to a broker, with sentences for failures."""

from __future__ import annotations

import re
import ssl
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import orjson
from aiohttp.hdrs import RETRY_AFTER

from broker.cli.words import CREDENTIAL, after, one_line, reason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

NO_BROKER = "What answers there is not a session broker."
CONNECT_TIMEOUT = 5.0
ANSWER_TIMEOUT = 30.0
LONGEST_ANSWER = 64 * 1024 * 1024


class TalkError(Exception):
    """The broker could not be reached or refused; the text is a sentence for a person.

    Attributes:
        document: the broker's JSON answer, if there was one.
    """

    def __init__(self, sentence: str, document: Mapping[str, Any] | None = None) -> None:
        super().__init__(sentence)
        self.document = document or {}


class Broker:
    """A broker at a base URL. Every failure of the connection is a `TalkError`.

    Args:
        session: sends the token, if there is one.
        url: without a slash at the end.
        anonymous: True if there is no token.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, *, anonymous: bool) -> None:
        self._session = session
        self._url = url
        self._anonymous = anonymous

    async def ask(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        query: Mapping[str, str] | None = None,
        longest: int = LONGEST_ANSWER,
    ) -> bytes:
        """Send a request and return the body of a successful answer, which may have ``longest`` bytes.

        Raises:
            TalkError: no answer, or one that is not successful.
        """
        data = None if body is None else orjson.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        async with self.open(
            method, path, data=data, headers=headers, params=query, wait=ANSWER_TIMEOUT
        ) as answer:
            content = await whole(answer, longest)
            if answer.ok:
                return content
            error = refusal(answer.status, content, answer.headers.get(RETRY_AFTER))
            if answer.status == HTTPStatus.UNAUTHORIZED and self._anonymous:
                raise TalkError(f"{error} Put it into the environment as {CREDENTIAL}.", error.document)
            raise error

    @asynccontextmanager
    async def open(
        self, method: str, path: str, *, wait: float, **request: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Open an answer of any status, which may be silent for `wait` seconds.

        Raises:
            TalkError: no connection, or it broke during the block.
        """
        patience = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=wait)
        try:
            async with self._session.request(method, self._url + path, timeout=patience, **request) as answer:
                yield answer
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TalkError(f"The broker at {self._url} cannot be reached ({_why(error)}).") from error


@asynccontextmanager
async def broker_at(url: str, token: str | None = None) -> AsyncIterator[Broker]:
    """Connect to the broker at this base URL during the block, with this token.

    Raises:
        TalkError: it is not the URL of a web service, or not a token.
    """
    base = _base(url)
    headers = {"Authorization": f"Bearer {_token(token)}"} if token else {}
    async with aiohttp.ClientSession(headers=headers) as session:
        yield Broker(session, base, anonymous=not token)


async def whole(answer: aiohttp.ClientResponse, longest: int = LONGEST_ANSWER) -> bytes:
    """Read the complete body of an answer.

    Raises:
        TalkError: it is longer than ``longest`` bytes.
    """
    content = bytearray()
    async for part in answer.content.iter_any():
        content += part
        if len(content) > longest:
            raise TalkError(f"The broker's answer is longer than {longest} bytes.")
    return bytes(content)


def refusal(status: int, content: bytes, retry_after: str | None = None) -> TalkError:
    """Return the error for an answer that is not successful.

    Args:
        status: its status.
        content: its body.
        retry_after: its header of this name.
    """
    wait = int(retry_after) if retry_after and re.fullmatch("[0-9]{1,9}", retry_after) else None
    try:
        document = orjson.loads(content)
        error = document["error"]
        sentence = one_line(error["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return TalkError(after(f"The broker answered with status {status} and no explanation.", wait))
    details = error.get("details")
    if isinstance(details, list):
        fields = [
            one_line(f"{at['field']}: {at['message']}")
            for at in details
            if isinstance(at, dict) and {"field", "message"} <= set(at)
        ]
        # The message names the first field already.
        sentence = "\n  ".join((sentence, *(field for field in fields if field not in sentence)))
    return TalkError(after(sentence, wait), error)


def _base(url: str) -> str:
    try:
        parts = urlsplit(url)
        # An invalid port is found when it is read.
        plain = parts.hostname and parts.port != 0 and not parts.query and not parts.fragment
    except ValueError:
        plain = False
    if not plain or parts.scheme not in {"http", "https"} or " " in url or not url.isprintable():
        raise TalkError(f"{url} is not the URL of a broker; one looks like http://127.0.0.1:3000.")
    if "@" in parts.netloc:
        raise TalkError(f"The URL of a broker has no credentials; {CREDENTIAL} is for them.")
    return url.rstrip("/")


def _token(token: str) -> str:
    if re.fullmatch(r"[!-~]+", token) is None:
        raise TalkError(f"{CREDENTIAL} must be visible ASCII characters, no spaces.")
    return token


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not trusted"
    if isinstance(error, ssl.SSLError):
        return "it does not speak TLS"
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else None
    return "the connection broke" if cause is None else reason(cause)
