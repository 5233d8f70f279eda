"""The secret from which the names of clients are made, in Redis. The first worker makes it for all workers."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.store.connection import Store


class NameStore:
    """Stores the secret. It has no TTL: a new secret would give every client a new name and a new budget.

    Args:
        store: the connection.
    """

    def __init__(self, store: Store) -> None:
        self._agree = store.script("agree_secret")
        self._key = f"{store.prefix}:{{workers}}:name-secret"

    async def agree(self, known: str | None) -> str:
        """Return the secret that counts for all workers, and write it if Redis has lost it.

        Args:
            known: the secret that this worker knows, or None.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        agreed: bytes = await self._agree(
            secret=self._key, known=known or "", random_word=secrets.token_hex(32)
        )
        return agreed.decode()
