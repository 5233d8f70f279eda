"""Identify the client of a request: check its credentials with `broker/identity`, and name it."""

from __future__ import annotations

import socket
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol, Self

import structlog
from aiohttp import hdrs

from broker.core.errors import Unauthorized
from broker.core.identity import Client, ClientNamer, Proxies, bearer
from broker.identity.jwks import PublishedKeys
from broker.identity.known_clients import Known, KnownClients
from broker.identity.tokens import INVALID, Subject, Tokens
from broker.setting_kinds import SHORTEST_SECRET

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from aiohttp import web

    from broker.core.client_limits import ClientLimits
    from broker.core.identity import Address
    from broker.settings import Settings

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
        known: the clients that have keys; None takes those of the settings.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        settings: Settings,
        naming: Naming,
        known: KnownClients | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._known = known if known is not None else KnownClients.of_settings(settings, clock=clock)
        self._shown_is_needed = settings.needs_identity
        self._naming = naming
        self._proxies = Proxies(settings.trusted_proxies)
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
            Unauthorized: the request has no key or token where one is needed, or an invalid one, or its client may
                not ask any more.
            Overloaded: the keys to check a token cannot be fetched now.
            StoreUnavailable: Redis has not answered yet, so that clients have no names.
        """
        if not self._shown_is_needed:
            address = self._address(request)
            return (await self._naming.names()).of_address(address)
        shown = await self._shown(request)
        names = await self._naming.names()
        client = (
            names.of_key(shown.name)
            if isinstance(shown, Known)
            else names.of_subject(shown.issuer, shown.subject)
        )
        return client if shown.limits is None else replace(client, limits=shown.limits)

    async def check(self, request: web.Request) -> ClientLimits | None:
        """Raise what `identify` raises for a request that is refused, else return the client's own limits.

        Needs no names, so Redis may be away.
        """
        return (await self._shown(request)).limits if self._shown_is_needed else None

    def network(self, request: web.Request) -> str:
        """Return one word for the network of a request: its address, or the /64 of an IPv6 one."""
        return self._proxies.network(*self._hops(request))

    async def _shown(self, request: web.Request) -> Known | Subject:
        """Return the owner of the API key of a request, or the subject of its token."""
        shown = bearer(request.headers.getall(hdrs.AUTHORIZATION, ()))
        if shown is None:
            raise Unauthorized
        owner = self._known.owner_of(shown)
        if owner is not None:
            return owner
        if self._tokens is None:
            raise Unauthorized(INVALID)
        subject = await self._tokens.subject_of(shown)
        self._known.check(subject.limits)
        return subject

    def _address(self, request: web.Request) -> Address | None:
        return self._proxies.caller(*self._hops(request))

    def _hops(self, request: web.Request) -> tuple[str, Sequence[str]]:
        """Return the address of the connection, and the lines of `X-Forwarded-For`."""
        forwarded = request.headers.getall(hdrs.X_FORWARDED_FOR, ())
        peer = _peer(request)
        if forwarded and not self._told_of_forwarded and not self._proxies.trusts(peer):
            self._told_of_forwarded = True
            log.warning(
                "X-Forwarded-For of a peer that is not trusted does not count: all who come through it are one client"
                " unless BROKER_TRUSTED_PROXIES names it",
                peer=peer,
            )
        return peer, forwarded

    def use_jwt_secrets(self, secrets: Sequence[str]) -> None:
        """Check tokens with these secrets from now on, if tokens are accepted."""
        if self._tokens is not None:
            self._tokens.replace_secrets(secrets)


def _build_tokens(settings: Settings, published: PublishedKeys | None) -> Tokens:
    secrets = [secret.get_secret_value() for secret in settings.jwt_secret]
    if any(len(secret.encode()) < SHORTEST_SECRET for secret in secrets):
        log.warning("BROKER_JWT_SECRET is short enough to be guessed", wanted=f"{SHORTEST_SECRET} bytes")
    if published is not None and settings.jwt_audience is None:
        log.warning("without BROKER_JWT_AUDIENCE, tokens that were issued for others are accepted too")
    return Tokens(
        secrets=secrets, published=published, audience=settings.jwt_audience, issuer=settings.jwt_issuer
    )


def _peer(request: web.Request) -> str:
    """Return the address of a connection; that of this machine for a unix socket; empty if it is unknown."""
    name = request.get_extra_info("peername")
    if isinstance(name, tuple):  # of TCP
        return str(name[0])
    connection = request.get_extra_info("socket")
    if connection is not None and connection.family == socket.AF_UNIX:
        return _THIS_MACHINE
    return request.remote or ""
