"""The keys of accounts: spread over buckets, so that a Redis Cluster can spread them over its nodes.

The keys of one client are in one bucket and share its tag: account, rates, slots, pending sessions, reservations and
rows of the usage ledger. The keys that all clients share are in a bucket of their own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

if TYPE_CHECKING:
    from broker.store.connection import Store

BUCKETS = 256
"""Buckets over which the accounts of clients are spread."""


REMEMBERED = 4096
"""Clients whose account is kept."""


class Account(NamedTuple):
    """The keys of the account of one client, or of the total.

    Attributes:
        tagged: the prefix of all keys of its bucket.
        name: the name of the account within its bucket.
    """

    tagged: str
    name: str

    def key(self, kind: str) -> str:
        """Return a key that only this account uses."""
        return f"{self.tagged}:{kind}:{self.name}"

    def shared(self, kind: str) -> str:
        """Return a key that all accounts of its bucket share."""
        return f"{self.tagged}:{kind}"

    def reservation(self, claim_id: str) -> str:
        """Return the key of a reservation's record."""
        return f"{self.tagged}:reservation:{claim_id}"

    def line_keys(self) -> dict[str, str]:
        """Return the keys of the line of sessions that wait for a slot."""
        return {"line": self.key("line"), "due": self.key("line_due")}

    def keys_of(self, claim_id: str) -> dict[str, str]:
        """Return the keys that every step of a reservation uses."""
        return {
            "reservation": self.reservation(claim_id),
            "account": self.key("account"),
            "slots": self.key("slots"),
            "open": self.shared("open"),
        }


def bucket_prefix(store: Store, bucket: int) -> str:
    """Return the prefix of all keys of a bucket."""
    return _bucket_prefix(store.prefix, bucket)


def _bucket_prefix(prefix: str, bucket: int) -> str:
    return f"{prefix}:{{a{bucket}}}"


def account_of(store: Store, client: str) -> Account:
    """Return the account of a client."""
    return _account_of(store.prefix, client)


@lru_cache(maxsize=REMEMBERED)
def _account_of(prefix: str, client: str) -> Account:
    return Account(_bucket_prefix(prefix, crc32(client.encode(errors="surrogatepass")) % BUCKETS), client)


def total_account(store: Store) -> Account:
    """Return the account of all clients together."""
    return Account(f"{store.prefix}:{{total}}", "all")
