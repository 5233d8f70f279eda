"""Identify clients by a function of the application that the service is a part of."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from aiohttp import web

from broker.core.errors import Overloaded
from broker.core.identity import Client
from broker.web.identity import ClientResolver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from broker.core.client_limits import ClientLimits
    from broker.identity.known_clients import KnownClients
    from broker.settings import Settings
    from broker.web.identity import Naming

Identify = Callable[[web.Request], "Client | Awaitable[Client]"]
"""Returns the client of a request, or raises; a `web.HTTPException` is answered in our form of errors."""

TIMEOUT: Final = 10.0
"""Seconds that the application's function may take."""


class ApplicationClients(ClientResolver):
    """Asks the application. API keys, tokens and addresses do not distinguish clients here.

    Args:
        settings: the trusted proxies, to count the streams of an address.
        naming: names clients for the upstream.
        known: clients that have keys; there are none here.
        app: the application.
        identify: its function.
    """

    def __init__(
        self,
        settings: Settings,
        naming: Naming,
        known: KnownClients,
        *,
        app: web.Application,
        identify: Identify,
    ) -> None:
        super().__init__(settings, naming, known)
        self._app = app
        self._identify = identify

    async def identify(self, request: web.Request) -> Client:
        """Return the client of a request.

        Raises:
            web.HTTPException: the application refuses the request.
            Overloaded: it did not answer in time.
            StoreUnavailable: Redis has not answered yet, so that clients have no name for the upstream.
            TypeError: it did not return a client. Any other exception of the application is raised as well.
        """
        client = await self._ask(request)
        if client.user:
            return client
        return replace(client, user=(await self._naming.names()).user_of(client.name))

    async def check(self, request: web.Request) -> ClientLimits | None:
        """Raise what `identify` raises for a request that is refused, else return the client's own limits."""
        return (await self._ask(request)).limits

    async def _ask(self, request: web.Request) -> Client:
        with _seen_by(self._app, request):
            client = self._identify(request)
            if inspect.isawaitable(client):
                client = await _in_time(client)
        if not isinstance(client, Client):
            raise TypeError(f"identify must return a broker.Client, not {type(client).__name__}")
        return client


@contextmanager
def _seen_by(app: web.Application, request: web.Request) -> Iterator[None]:
    """Set `request.app` to the application during the block, so that its function finds its own values there."""
    match = request.match_info
    ours = match.current_app
    match.current_app = app
    try:
        yield
    finally:
        match.current_app = ours


async def _in_time(client: Awaitable[Client]) -> Client:
    try:
        async with asyncio.timeout(TIMEOUT) as timeout:
            return await client
    except TimeoutError:
        if not timeout.expired():  # a timeout of the application's own
            raise
        raise Overloaded("It took too long to find out who you are; try again in a moment.") from None
