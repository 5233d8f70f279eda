"""Idempotency keys in Redis: the session that each key of a client has made, and the hash of its body."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

if TYPE_CHECKING:
    from broker.store.connection import Store


class Binding(NamedTuple):
    """The answer that a key was given, the hash of its body, and the binding as Redis stores it."""

    answer: dict[str, Any]
    digest: str
    raw: bytes

    @property
    def session_id(self) -> str:
        """Return the session that the key has made."""
        return str(self.answer["sessionId"])


class IdempotencyStore:
    """Stores the bindings of keys to sessions.

    Args:
        store: the connection.
        ttl: seconds that a binding is stored: as long as a session can live.
    """

    def __init__(self, store: Store, *, ttl: int) -> None:
        self._store = store
        self._bind = store.script("bind_key", {"KEY_S": ttl})

    async def find(self, client: str, key: str) -> Binding | None:
        """Return the binding of a key, or None. Its session may be gone.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        raw = await self._store.command("GET", self._key(client, key))
        return _read(raw) if raw is not None else None

    async def bind(
        self, client: str, key: str, digest: str, answer: dict[str, Any], *, instead_of: Binding | None
    ) -> Binding:
        """Bind a key, unless another request has just done so. Returns the binding that counts.

        Args:
            client: the client that sent the key.
            key: the key.
            digest: the hash of the body.
            answer: the answer of /prepare.
            instead_of: a binding whose session is gone, to be replaced.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        mine = orjson.dumps({"body": digest, "answer": answer})
        replaced = instead_of.raw if instead_of is not None else b""
        return _read(await self._bind(key=self._key(client, key), binding=mine, replaced=replaced))

    def _key(self, client: str, key: str) -> str:
        name = hashlib.sha256(f"{client}\0{key}".encode()).hexdigest()[:32]
        return f"{self._store.prefix}:idempotency:{name}"


def _read(raw: bytes) -> Binding:
    stored = orjson.loads(raw)
    return Binding(stored["answer"], stored["body"], raw)
