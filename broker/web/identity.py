"""Identify the client of a request: check its credentials with `broker/identity`, and name it."""

from __future__ import annotations

import socket
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final, Protocol, Self

import structlog
from aiohttp import hdrs

from broker.core.errors import Unauthorized
from broker.core.identity import Client, ClientNamer, Proxies, bearer, network_of
from broker.identity.api_keys import ApiKeys
from broker.identity.jwks import PublishedKeys
from broker.identity.tokens import INVALID, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from types import TracebackType

    from aiohttp import web

    from broker.core.identity import Address
    from broker.setting_kinds import ApiKey
    from broker.settings import Settings

_SHORTEST_SECRET: Final = 32  # RFC 7518, section 3.2: at least as many bytes as the hash of HS256
_THIS_MACHINE: Final = "127.0.0.1"

log = structlog.get_logger(__name__)


class Naming(Protocol):
    """Gives access to the namer of clients."""

    async def names(self) -> ClientNamer:
        """Return the namer; raises `StoreUnavailable`."""


class ClientResolver:
    """Identifies clients by API key, else by token, else by address. An async context manager.

    Where keys or tokens are configured, every caller must send one. Where neither is, ``Authorization`` is ignored.

    Args:
        settings: the configured keys, tokens and proxies.
        naming: names clients.
        clock: seconds that only go forward.
    """

    def __init__(
        self, settings: Settings, naming: Naming, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shown_is_needed = settings.needs_identity
        self._naming = naming
        self._proxies = Proxies(settings.trusted_proxies)
        self._api_keys = ApiKeys(settings.api_keys, settings.api_keys_file, clock=clock)
        jwks_url = settings.jwks_url
        self._published = (
            PublishedKeys(jwks_url, proxy=settings.proxy_for(jwks_url), clock=clock)
            if jwks_url is not None
            else None
        )
        self._tokens = _build_tokens(settings, self._published) if settings.takes_tokens else None
        self._told_of_forwarded = False
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
        """Return the client of a request.

        Waits only for the published keys of tokens, which is rare, and for Redis, until it has answered once.

        Raises:
            Unauthorized: the request has no key or token where one is needed, or an invalid one.
            Overloaded: the keys to check a token cannot be fetched now.
            StoreUnavailable: Redis has not answered yet, so that clients have no names.
        """
        if not self._shown_is_needed:
            address = self._address(request)
            return (await self._naming.names()).of_address(address)
        owner, subject = await self._shown(request)
        names = await self._naming.names()
        return names.of_key(owner) if owner is not None else names.of_subject(*subject)

    async def check(self, request: web.Request) -> None:
        """Raise what `identify` raises for a request that is refused. Needs no names, so Redis may be away."""
        if self._shown_is_needed:
            await self._shown(request)

    def network(self, request: web.Request) -> str:
        """Return one word for the network of a request: its address, or the /64 of an IPv6 one."""
        return network_of(self._address(request))

    async def _shown(self, request: web.Request) -> tuple[str | None, tuple[str, str]]:
        """Return the name of the API key of a request, or the issuer and subject of its token."""
        shown = bearer(request.headers.getall(hdrs.AUTHORIZATION, ()))
        if shown is None:
            raise Unauthorized
        owner = self._api_keys.owner_of(shown)
        if owner is not None:
            return owner, ("", "")
        if self._tokens is None:
            raise Unauthorized(INVALID)
        return None, await self._tokens.subject_of(shown)

    def _address(self, request: web.Request) -> Address | None:
        forwarded = request.headers.getall(hdrs.X_FORWARDED_FOR, ())
        peer = _peer(request)
        if forwarded and not self._told_of_forwarded and not self._proxies.trusts(peer):
            self._told_of_forwarded = True
            log.warning(
                "X-Forwarded-For of a peer that is not trusted does not count: all who come through it are one client"
                " unless BROKER_TRUSTED_PROXIES names it",
                peer=peer,
            )
        return self._proxies.caller(peer, forwarded)

    def use_api_keys(self, keys: Iterable[ApiKey], path: Path | None) -> bool:
        """Replace the API keys. Returns True if they differ from those before."""
        return self._api_keys.replace(keys, path)

    def use_jwt_secret(self, secret: str) -> None:
        """Check tokens with this secret from now on, if tokens are accepted."""
        if self._tokens is not None:
            self._tokens.replace_secret(secret)


def _build_tokens(settings: Settings, published: PublishedKeys | None) -> Tokens:
    secret = settings.jwt_secret.get_secret_value() if settings.jwt_secret is not None else None
    if secret is not None and len(secret.encode()) < _SHORTEST_SECRET:
        log.warning("BROKER_JWT_SECRET is short enough to be guessed", wanted=f"{_SHORTEST_SECRET} bytes")
    if published is not None and settings.jwt_audience is None:
        log.warning("without BROKER_JWT_AUDIENCE, tokens that were issued for others are accepted too")
    return Tokens(
        secret=secret, published=published, audience=settings.jwt_audience, issuer=settings.jwt_issuer
    )


def _peer(request: web.Request) -> str:
    """Return the address of a connection; that of this machine for a unix socket; empty if it is unknown."""
    connection = request.get_extra_info("socket")
    if connection is not None and connection.family == socket.AF_UNIX:
        return _THIS_MACHINE
    return request.remote or ""
