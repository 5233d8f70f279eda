"""`broker usage`: the usage ledger of a day or a month, for the operator, straight from Redis.

For programs as JSON or CSV, for people as a table, on a terminal with bars.
"""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table
from rich.text import Text

from broker.cli import amounts
from broker.cli.operator import operator_settings, redis_problem, with_store
from broker.cli.output import require_output, write
from broker.cli.tables import cell, measure, show, terminal_width
from broker.cli.words import BAD_USE, complain, print_note, printable
from broker.core.errors import StoreUnavailable
from broker.core.pricing import NANO, to_usd
from broker.settings import SettingsError
from broker.store.usage_ledger import LEDGER_S, METRICS, UsageLedger, UsageRow

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from broker.store.connection import Store

_COLUMNS = (
    "requests",
    "prompt",
    "completion",
    "cached",
    "reasoning",
    "USD",
    "estimated",
    "cancelled",
    "failed",
)
_FEW_COLUMNS = ("requests", "prompt", "completion", "USD", "failed")
"""The columns of the table, and those of a narrow terminal, which has room for bars then."""

_NARROWEST_BAR, _WIDEST_BAR = 8, 40
_FORMULA = ("=", "+", "-", "@", "\t")
_DAYS_STORED = LEDGER_S // 86_400
_MONTH = re.compile(r"(\d{4})-(\d{2})", re.ASCII)


class BadPeriodError(Exception):
    """What was given is no period; the text is a sentence for a person."""


class Period(NamedTuple):
    """What is summed.

    Attributes:
        name: `day` or `month`.
        first: its first day; None for today, or for the first of this month.
    """

    name: str
    first: dt.date | None

    def days(self, today: dt.date) -> list[dt.date]:
        """Return its days, those in the future left out where it has others."""
        first = self.first or (today if self.name == "day" else today.replace(day=1))
        if self.name == "day":
            return [first]
        days = [first + dt.timedelta(days=n) for n in range(31)]
        return [day for day in days if day.month == first.month and (day <= today or day == first)]

    def label(self, days: Sequence[dt.date]) -> str:
        """Return it as text, such as `2026-11-20` or `2026-11`."""
        return days[0].isoformat() if self.name == "day" else f"{days[0]:%Y-%m}"


class Found(NamedTuple):
    """The usage ledger of a period.

    Attributes:
        label: the period as text.
        days: its rows by day.
        complete: False if some of its days are not stored any more.
    """

    label: str
    days: dict[dt.date, list[UsageRow]]
    complete: bool


def usage(day: str | None, month: str | None, *, by: str, as_json: bool = False, as_csv: bool = False) -> int:
    """Print the ledger of a day or a month, summed by client, model or day, and return the exit status.

    Args:
        day: ``YYYY-MM-DD``, UTC.
        month: ``YYYY-MM``. Without both it is today, or this month where it is summed by day.
        by: ``client``, ``model`` or ``day``.
        as_json: print JSON for programs.
        as_csv: print CSV for programs.

    Raises:
        OutputError: standard output is closed.
    """
    require_output()
    if as_json and as_csv:
        return complain("choose one of --json and --csv", BAD_USE)
    try:
        period = parse_period(day, month, by)
        settings, redis_url = operator_settings()
        found = with_store(settings, redis_url, lambda store: _read(store, period))
    except (SettingsError, BadPeriodError) as error:
        return complain(error, BAD_USE)
    except StoreUnavailable as error:
        return complain(redis_problem(error))
    rows = summed(found.days, by)
    if as_json:
        told = [{**row, "cost": to_usd(row["cost"])} for row in rows]
        write(json.dumps({period.name: found.label, "by": by, "rows": told}) + "\n")
    elif as_csv:
        write(to_csv(rows, by))
    else:
        show_table(f"Usage {'on' if period.name == 'day' else 'in'} {found.label} (UTC)", by, rows)
    if not found.complete:
        print_note(f"Days are stored for {_DAYS_STORED} days; older ones are missing here.")
    return 0


def parse_period(day: str | None, month: str | None, by: str) -> Period:
    """Return the period that the arguments name.

    Raises:
        BadPeriodError: they name none.
    """
    if day is not None and month is not None:
        raise BadPeriodError("choose one of --day and --month")
    if month is not None:
        parts = _MONTH.fullmatch(month)
        try:
            return Period("month", dt.date(int(parts[1]), int(parts[2]), 1)) if parts else _no_month(month)
        except ValueError:
            return _no_month(month)
    if day is None:
        return Period("month" if by == "day" else "day", None)
    try:
        return Period("day", dt.date.fromisoformat(day))
    except ValueError:
        raise BadPeriodError(f"--day must be a date such as 2026-11-20, not {day!r}") from None


def _no_month(month: str) -> Period:
    raise BadPeriodError(f"--month must be a month such as 2026-11, not {month!r}") from None


async def _read(store: Store, period: Period) -> Found:
    ledger = UsageLedger(store)
    today = await ledger.today()
    days = period.days(today)
    found = dict([await ledger.rows(each) for each in days])  # one day a round trip: a month may be large
    oldest = today - dt.timedelta(days=_DAYS_STORED - 1)
    return Found(period.label(days), found, complete=days[0] >= oldest)


def summed(days: Mapping[dt.date, Iterable[UsageRow]], by: str) -> list[dict[str, Any]]:
    """Return one row for each client, model or day, with sums of `METRICS`; the cost is in nano-USD.

    Days are in order, and those without use have zeros. Clients and models are ordered by cost, then by requests.
    """
    sums: dict[str, dict[str, int]] = {}
    for day, rows in days.items():
        if by == "day":
            sums[day.isoformat()] = dict.fromkeys(METRICS, 0)
        for row in rows:
            name = {"client": row.client, "model": row.model, "day": day.isoformat()}[by]
            total = sums.setdefault(name, dict.fromkeys(METRICS, 0))
            for metric in METRICS:
                total[metric] += row.counts[metric]
    named = list(sums.items())
    if by != "day":
        named.sort(key=lambda item: (-item[1]["cost"], -item[1]["requests"], item[0]))
    return [{by: name, **total} for name, total in named]


def to_csv(rows: Iterable[Mapping[str, Any]], by: str) -> str:
    """Return the rows as CSV with the names of the JSON in its header. The cost is a decimal in USD.

    A page can send any name of a model, so a name that a spreadsheet would take for a formula gets an apostrophe before
    it: https://owasp.org/www-community/attacks/CSV_Injection
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, [by, *METRICS], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        name = printable(row[by])
        safe = f"'{name}" if name.startswith(_FORMULA) else name
        writer.writerow({**row, by: safe, "cost": f"{Decimal(row['cost']) / NANO:f}"})
    return out.getvalue()


def show_table(title: str, by: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a table, on a terminal with bars where it is wide enough for them.

    Raises:
        OutputError: standard output is closed.
    """
    width = terminal_width()
    if width is None:
        show(table(title, by, rows, _COLUMNS))
        return
    show(fitted(title, by, rows, width))


def fitted(title: str, by: str, rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    """Return the table for a terminal of this width: with all columns and bars, or with fewer columns.

    The sums stand behind the title.
    """
    requests, cost = (sum(row[metric] for row in rows) for metric in ("requests", "cost"))
    title += f": {amounts.count(requests, 'request')}, {amounts.usd(cost)} USD"
    for columns in (_COLUMNS, _FEW_COLUMNS):
        room = width - measure(table("", by, rows, columns)) - 1
        if rows and room >= _NARROWEST_BAR:
            return table(title, by, rows, columns, bar_width=min(room, _WIDEST_BAR))
    return table(title, by, rows, _FEW_COLUMNS)


def table(
    title: str, by: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, bar_width: int = 0
) -> Table:
    """Return a table of the rows. The bar shows the cost, or the requests where nothing has cost anything."""
    shown = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    shown.add_column(by, no_wrap=True)
    if bar_width:
        shown.add_column("", no_wrap=True, width=bar_width)
    for heading in columns:
        shown.add_column(heading, justify="right", no_wrap=True)
    measured = "cost" if any(row["cost"] for row in rows) else "requests"
    most = max((row[measured] for row in rows), default=0) or 1
    for row in rows:
        bar = [Text(amounts.bar(row[measured] / most, bar_width), style="cyan")] if bar_width else []
        shown.add_row(cell(row[by]), *bar, *(_figure(row, column) for column in columns))
    return shown


def _figure(row: Mapping[str, Any], column: str) -> str:
    if column == "USD":
        return f"{to_usd(row['cost']):.6f}" + ("+?" if row["unpriced"] else "")
    if column == "estimated":
        return f"{row['estimated'] / row['requests']:.0%}" if row["requests"] else "-"
    return f"{row[column]:,}"
