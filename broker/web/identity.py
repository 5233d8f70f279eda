"""Who a request is from: what it shows is checked in `broker/identity`, and the client gets a name."""

from __future__ import annotations

import socket
import time
from contextlib import AsyncExitStack
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Self

import structlog
from aiohttp import hdrs

from broker.core.errors import Unauthorized
from broker.core.identity import REMEMBERED, Client, Names, Proxies, bearer
from broker.identity.api_keys import ApiKeys
from broker.identity.jwks import PublishedKeys
from broker.identity.tokens import INVALID, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from types import TracebackType

    from aiohttp import web

    from broker.setting_kinds import ApiKey
    from broker.settings import Settings

_SHORTEST_SECRET: Final = 32  # RFC 7518, section 3.2: a key of HS256 has at least as many bytes as its hash
_THIS_MACHINE: Final = "127.0.0.1"

log = structlog.get_logger(__name__)


class Identifier:
    """Tells clients apart: by API key, else by token, else by address. An async context manager.

    Where keys or tokens are set up, every caller must show one. Where neither is, ``Authorization`` means nothing.

    Args:
        settings: what is set up.
        secret: known to every worker of the service and to nobody else; names are made with it.
        clock: seconds that only go forward.
    """

    def __init__(
        self, settings: Settings, secret: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shown_is_needed = settings.needs_identity
        self._names = Names(secret)
        self._proxies = Proxies(settings.trusted_proxies)
        self._api_keys = ApiKeys(settings.api_keys, settings.api_keys_file, clock=clock)
        jwks_url = settings.jwks_url
        self._published = PublishedKeys(jwks_url, clock=clock) if jwks_url is not None else None
        self._tokens = _build_tokens(settings, self._published) if settings.takes_tokens else None
        self._at_address = lru_cache(maxsize=REMEMBERED)(self._names.of_address)
        self._with_key = lru_cache(maxsize=REMEMBERED)(self._names.of_key)
        self._running = AsyncExitStack()

    async def __aenter__(self) -> Self:
        if self._published is not None:
            await self._running.enter_async_context(self._published)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._running.aclose()

    async def identify(self, request: web.Request) -> Client:
        """Who a request is from.

        Waits only for the published keys of tokens, and seldom.

        Raises:
            Unauthorized: it shows no key or token where one is needed, or one that is not good.
            Overloaded: the keys that a token is checked with cannot be fetched now.
        """
        if not self._shown_is_needed:
            forwarded = request.headers.getall(hdrs.X_FORWARDED_FOR, ())
            return self._at_address(self._proxies.caller(_peer(request), forwarded))
        shown = bearer(request.headers.getall(hdrs.AUTHORIZATION, ()))
        if shown is None:
            raise Unauthorized
        owner = self._api_keys.owner_of(shown)
        if owner is not None:
            return self._with_key(owner)
        if self._tokens is None:
            raise Unauthorized(INVALID)
        return self._names.of_subject(*await self._tokens.subject_of(shown))

    def use_api_keys(self, keys: Iterable[ApiKey], path: Path | None) -> bool:
        """Take these API keys in place of those there are. Returns True if they differ."""
        return self._api_keys.replace(keys, path)

    def use_jwt_secret(self, secret: str) -> None:
        """Check tokens with this secret from now on, where tokens are taken."""
        if self._tokens is not None:
            self._tokens.replace_secret(secret)


def _build_tokens(settings: Settings, published: PublishedKeys | None) -> Tokens:
    secret = settings.jwt_secret.get_secret_value() if settings.jwt_secret is not None else None
    if secret is not None and len(secret.encode()) < _SHORTEST_SECRET:
        log.warning("BROKER_JWT_SECRET is short enough to be guessed", wanted=f"{_SHORTEST_SECRET} bytes")
    if published is not None and settings.jwt_audience is None:
        log.warning("without BROKER_JWT_AUDIENCE, tokens that were issued for others are taken too")
    return Tokens(
        secret=secret, published=published, audience=settings.jwt_audience, issuer=settings.jwt_issuer
    )


def _peer(request: web.Request) -> str:
    """The address that a connection is from, that of this machine for a unix socket; empty if it is unknown."""
    connection = request.get_extra_info("socket")
    if connection is not None and connection.family == socket.AF_UNIX:
        return _THIS_MACHINE
    return request.remote or ""
