"""`broker usage`: the usage ledger of a day, for the operator, straight from Redis."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from typing import TYPE_CHECKING, Any

from rich.table import Table

from broker.cli.output import require_output, write
from broker.cli.tables import cell, show
from broker.cli.words import BAD_USE, complain
from broker.core.errors import StoreUnavailable
from broker.core.pricing import to_usd
from broker.logs import configure_logs
from broker.settings import SettingsError, load_settings, require_served_store
from broker.store.connection import Store
from broker.store.usage_ledger import METRICS, UsageLedger, UsageRow

if TYPE_CHECKING:
    from collections.abc import Sequence

_HEADINGS = (
    *("requests", "prompt", "completion", "cached", "reasoning"),
    *("USD", "estimated", "cancelled", "failed"),
)


def usage(day: str | None, *, by: str, as_json: bool) -> int:
    """Print the ledger of a day, summed by client or by model, and return the exit status.

    Args:
        day: ``YYYY-MM-DD``, UTC; None is today.
        by: ``client`` or ``model``.
        as_json: print JSON for programs.

    Raises:
        OutputError: standard output is closed.
    """
    require_output()
    try:
        settings = load_settings()
        require_served_store(settings)
        wanted = dt.date.fromisoformat(day) if day is not None else None
    except SettingsError as error:
        return complain(error, BAD_USE)
    except ValueError:
        return complain(f"--day must be a date such as 2026-11-20, not {day!r}", BAD_USE)
    if settings.redis_url is None:
        return complain("REDIS_URL must be set: the usage ledger of an embedded Valkey ends with it", BAD_USE)
    configure_logs(settings.log_level, settings.log_format, secrets=settings.secrets)
    try:
        found, ledger = asyncio.run(_read(settings.redis_url, settings.key_prefix, wanted))
    except StoreUnavailable as error:
        return complain(error)
    rows = summed(ledger, by)
    if as_json:
        write(json.dumps({"day": found.isoformat(), "by": by, "rows": rows}) + "\n")
    else:
        show(_table(found, by, rows))
    return 0


async def _read(redis_url: str, key_prefix: str, day: dt.date | None) -> tuple[dt.date, list[UsageRow]]:
    store = Store(redis_url, key_prefix)
    try:
        return await UsageLedger(store).rows(day)
    finally:
        await store.close()


def summed(ledger: Sequence[UsageRow], by: str) -> list[dict[str, Any]]:
    """Return one row for each client or model, the highest cost first, with sums of `METRICS` and the cost in USD."""
    sums: dict[str, dict[str, int]] = {}
    for entry in ledger:
        row = sums.setdefault(entry.client if by == "client" else entry.model, dict.fromkeys(METRICS, 0))
        for name in METRICS:
            row[name] += entry.counts[name]
    ordered = sorted(sums.items(), key=lambda item: (-item[1]["cost"], -item[1]["requests"], item[0]))
    return [{by: name, **row, "cost": to_usd(row["cost"])} for name, row in ordered]


def _table(day: dt.date, by: str, rows: Sequence[dict[str, Any]]) -> Table:
    title = f"Usage on {day.isoformat()} (UTC)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column(by, no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        counts = (row[name] for name in ("requests", "prompt", "completion", "cached", "reasoning"))
        share = f"{row['estimated'] / row['requests']:.0%}" if row["requests"] else "-"
        price = f"{row['cost']:.6f}" + ("+?" if row["unpriced"] else "")
        table.add_row(
            cell(row[by]),
            *(f"{count:,}" for count in counts),
            price,
            share,
            str(row["cancelled"]),
            str(row["failed"]),
        )
    return table
