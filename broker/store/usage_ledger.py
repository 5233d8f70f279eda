"""The usage ledger in Redis: the usage of each client, model and day, for the operator.

`settle.lua` writes the rows in the bucket of the client's account, in the same step that settles. The numbers of
clients and models of a day are bounded, because clients change and pages may send any name of a model.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, NamedTuple

from broker.store.buckets import BUCKETS, bucket_prefix

if TYPE_CHECKING:
    from broker.store.connection import Store

LEDGER_S = 35 * 86_400
"""Seconds that a day is stored."""

MAX_CLIENTS = 10_000
MAX_MODELS = 500
"""Maximum numbers of names in the usage ledger of a day. All others are counted as `OTHER`."""

MAX_KNOWN = 10_000
"""Maximum number of row names that a worker remembers."""

OTHER = "other"
"""The name in the usage ledger for all clients or models beyond the maximum."""

SEPARATOR = "\x1f"
"""The separator between client, model and metric in the name of a field."""

METRICS = (
    *("requests", "prompt", "completion", "cached", "reasoning"),
    *("cost", "estimated", "unpriced", "cancelled", "failed"),
)
"""The metrics of each client, model and day. ``cost`` is in nano-USD; the others are tokens or requests."""


class UsageRow(NamedTuple):
    """The usage of one client and model on one day; ``counts`` has `METRICS`."""

    client: str
    model: str
    counts: dict[str, int]


class UsageLedger:
    """Names and reads rows. Every method raises `StoreUnavailable` if Redis cannot be reached.

    Args:
        store: the connection.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._name = store.script(
            "name_row", {"MAX_CLIENTS": MAX_CLIENTS, "MAX_MODELS": MAX_MODELS, "LEDGER_S": LEDGER_S}
        )
        self._known: dict[tuple[dt.date, str, str], str] = {}

    @staticmethod
    def key_in(tagged: str, day: dt.date) -> str:
        """Return the key of a day's rows in a bucket.

        Args:
            tagged: the prefix of the keys of the bucket.
            day: the day, UTC.
        """
        return f"{tagged}:ledger:{day.isoformat()}"

    async def row_name(self, day: dt.date, client: str, model: str) -> str:
        """Return ``<client><SEPARATOR><model>`` with the names that the ledger of a day uses.

        The names of a day do not change, so they are remembered.
        """
        known = self._known.get((day, client, model))
        if known is not None:
            return known
        keys = {
            kind: f"{self._store.prefix}:{{ledger}}:{kind}:{day.isoformat()}"
            for kind in ("clients", "models")
        }
        names = await self._name(**keys, client=client, model=model)
        row = SEPARATOR.join(name.decode() for name in names)
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[day, client, model] = row
        return row

    async def today(self) -> dt.date:
        """Return the day of now (UTC), by the clock of Redis."""
        return dt.datetime.fromtimestamp(await self._store.now_ms() // 1000, tz=dt.UTC).date()

    async def rows(self, day: dt.date | None) -> tuple[dt.date, list[UsageRow]]:
        """Return a day and its rows. Without a day, it is today by the clock of Redis."""
        day = day or await self.today()
        found = await self._store.read(
            [("HGETALL", self.key_in(bucket_prefix(self._store, bucket), day)) for bucket in range(BUCKETS)]
        )
        rows: dict[tuple[str, str], dict[str, int]] = {}
        for fields in found:
            for name, value in zip(fields[::2], fields[1::2], strict=True):
                client, model, metric = name.decode().split(SEPARATOR)
                counts = rows.setdefault((client, model), dict.fromkeys(METRICS, 0))
                counts[metric] += int(value)
        return day, [UsageRow(client, model, counts) for (client, model), counts in sorted(rows.items())]
