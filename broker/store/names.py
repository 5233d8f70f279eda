"""The secret that clients are named with, in Redis: one for all workers, made by whoever comes first."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.store.connection import Store


class NameStore:
    """Keeps the secret. It has no TTL: with a new one every client would have a new name, and a fresh budget.

    Args:
        store: the connection.
    """

    def __init__(self, store: Store) -> None:
        self._agree = store.script("agree_secret")
        self._key = f"{store.prefix}:{{workers}}:name-secret"

    async def agree(self, known: str | None) -> str:
        """Return the secret that counts for all workers, and write it where Redis has lost it.

        Args:
            known: what this worker has been told before, if anything.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        agreed: bytes = await self._agree(
            secret=self._key, known=known or "", random_word=secrets.token_hex(32)
        )
        return agreed.decode()
