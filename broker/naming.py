"""Names of clients on this worker: with the operator's secret, or with one that all workers share in Redis."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

import structlog

from broker.core.errors import StoreUnavailable
from broker.core.identity import ClientNamer

if TYPE_CHECKING:
    from broker.store.names import NameStore

AGREE_EVERY: Final = 2.0
"""Seconds between two checks of the secret in Redis. They restore it after Redis came back empty."""

_SHORTEST_SECRET: Final = 16

log = structlog.get_logger(__name__)


class Naming:
    """Gives access to the names of clients.

    Args:
        store: stores the secret that the workers share.
        secret: the operator's secret, if there is one; then nothing is stored in Redis.
    """

    def __init__(self, store: NameStore, secret: str | None) -> None:
        self._store = store
        self._agreed: str | None = None
        self._names = ClientNamer(secret) if secret is not None else None
        if secret is not None and len(secret) < _SHORTEST_SECRET:
            log.warning(
                "BROKER_NAME_SECRET is short enough to be guessed", wanted=f"{_SHORTEST_SECRET} characters"
            )

    async def names(self) -> ClientNamer:
        """Return the namer of clients. Waits for Redis until it has answered once.

        Raises:
            StoreUnavailable: Redis has not answered yet.
        """
        return self._names or await self._agree()

    def use_secret(self, secret: str) -> None:
        """Name clients with this secret of the operator from now on. All clients get new names, and so new budgets."""
        self._names = ClientNamer(secret)

    async def run(self) -> NoReturn:
        """Agree on the secret with the other workers until cancelled. Not needed with an operator's secret."""
        while True:
            with suppress(StoreUnavailable):  # the loop of the lease logs it
                await self._agree()
            await asyncio.sleep(AGREE_EVERY)

    async def _agree(self) -> ClientNamer:
        agreed = await self._store.agree(self._agreed)
        if self._names is None or agreed != self._agreed:
            if self._agreed is not None:
                log.warning("clients have new names: redis had lost the secret that made them")
            self._agreed = agreed
            self._names = ClientNamer(agreed)
        return self._names
