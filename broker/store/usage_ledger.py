"""The usage ledger in Redis: what each client used of each model on each day, for the operator.

Rows are written by `settle.lua`, in the bucket of the client's account, in the same step that settles. A day names a
bounded number of clients and models: clients come and go, and pages invent names of models.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, NamedTuple

from broker.store.buckets import BUCKETS, bucket_prefix
from broker.store.connection import bounded_call

if TYPE_CHECKING:
    from broker.store.connection import Store

LEDGER_S = 35 * 86_400
"""Seconds that a day is kept."""

MAX_CLIENTS = 10_000
MAX_MODELS = 500
"""Names in the usage ledger of a day; the rest is `OTHER`."""

MAX_KNOWN = 10_000
"""Rows whose names a worker remembers."""

OTHER = "other"
"""What the usage ledger calls clients and models that it does not name."""

SEPARATOR = "\x1f"
"""Stands between client, model and metric in the name of a field."""

METRICS = (
    *("requests", "prompt", "completion", "cached", "reasoning"),
    *("cost", "estimated", "unpriced", "cancelled", "failed"),
)
"""What is counted of each client, model and day; ``cost`` is nano-USD, all else tokens or requests."""


class UsageRow(NamedTuple):
    """A client's use of a model on a day; ``counts`` has `METRICS`."""

    client: str
    model: str
    counts: dict[str, int]


class UsageLedger:
    """Names and reads rows. Every method raises `StoreUnavailable` where Redis cannot be reached.

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
            tagged: what the keys of the bucket begin with.
            day: the day, UTC.
        """
        return f"{tagged}:ledger:{day.isoformat()}"

    async def row_name(self, day: dt.date, client: str, model: str) -> str:
        """Return ``<client><SEPARATOR><model>`` as the ledger of a day names them.

        A name stays what it is, so it is asked for once.
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

    async def rows(self, day: dt.date | None) -> tuple[dt.date, list[UsageRow]]:
        """Return a day and its rows; today by Redis's clock, where no day is given."""
        if day is None:
            async with bounded_call():
                now, _ = await self._store.redis.time()
            day = dt.datetime.fromtimestamp(int(now), tz=dt.UTC).date()
        found = await self._store.commands(
            [("HGETALL", self.key_in(bucket_prefix(self._store, bucket), day)) for bucket in range(BUCKETS)]
        )
        rows: dict[tuple[str, str], dict[str, int]] = {}
        for fields in found:
            if isinstance(fields, Exception):
                raise fields
            for name, value in zip(fields[::2], fields[1::2], strict=True):
                client, model, metric = name.decode().split(SEPARATOR)
                counts = rows.setdefault((client, model), dict.fromkeys(METRICS, 0))
                counts[metric] += int(value)
        return day, [UsageRow(client, model, counts) for (client, model), counts in sorted(rows.items())]
