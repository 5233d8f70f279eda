"""The keys of accounts: spread over buckets, so that a Redis Cluster can spread them over its nodes.

What belongs to one client is in one bucket and shares its tag: its account, slots, pending sessions, reservations and
rows of the usage ledger. What all clients share is in a bucket of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

if TYPE_CHECKING:
    from broker.store.connection import Store

BUCKETS = 256
"""Buckets over which the accounts of clients are spread."""


class Account(NamedTuple):
    """The keys of one account: a client's, or the total's.

    Attributes:
        tagged: what all keys of its bucket begin with.
        name: of the account within its bucket.
    """

    tagged: str
    name: str

    def key(self, kind: str) -> str:
        """Return a key of this account alone."""
        return f"{self.tagged}:{kind}:{self.name}"

    def shared(self, kind: str) -> str:
        """Return a key of its bucket."""
        return f"{self.tagged}:{kind}"

    def reservation(self, claim_id: str) -> str:
        """Return the key of a reservation's record."""
        return f"{self.tagged}:reservation:{claim_id}"

    def line_keys(self) -> dict[str, str]:
        """Return the keys of the line of sessions that wait for a slot."""
        return {"line": self.key("line"), "due": self.key("line_due")}

    def keys_of(self, claim_id: str) -> dict[str, str]:
        """Return the keys that every step of a reservation takes."""
        return {
            "reservation": self.reservation(claim_id),
            "account": self.key("account"),
            "slots": self.key("slots"),
            "open": self.shared("open"),
        }


def bucket_prefix(store: Store, bucket: int) -> str:
    """Return what all keys of a bucket begin with."""
    return f"{store.prefix}:{{a{bucket}}}"


def account_of(store: Store, client: str) -> Account:
    """Return the account of a client."""
    return Account(bucket_prefix(store, crc32(client.encode(errors="surrogatepass")) % BUCKETS), client)


def total_account(store: Store) -> Account:
    """Return the account of all clients together."""
    return Account(f"{store.prefix}:{{total}}", "all")
