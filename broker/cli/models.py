"""`broker models`: the models of a running broker, as a table for a person."""

from __future__ import annotations

import asyncio
import sys
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import orjson
from rich.console import Console
from rich.table import Table

from broker.cli.talk import TalkError, broker_at
from broker.cli.words import complain, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Away from a terminal no line is folded, so that grep finds whole ones.
_ENDLESS = 10_000
_MILLION = 1_000_000
_DEAREST = Decimal(1_000)  # USD a token; more is no price


def models(query: str, *, free: bool, url: str) -> int:
    """Print the table and return the exit status."""
    try:
        entries = asyncio.run(_fetch(query, free=free, url=url))
    except TalkError as error:
        return complain(error)
    if not entries:
        return complain("no model matches.")
    Console(width=None if sys.stdout.isatty() else _ENDLESS).print(table(entries))
    return 0


async def _fetch(query: str, *, free: bool, url: str) -> list[Mapping[str, Any]]:
    wanted = {**({"q": query} if query else {}), **({"free": "true"} if free else {})}
    async with broker_at(url) as broker:
        body = await broker.ask("GET", "/models", query=wanted)
    try:
        return [entry for entry in orjson.loads(body)["data"] if isinstance(entry, dict)]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise TalkError("What answers there is not a session broker.") from None


def table(entries: Iterable[Mapping[str, Any]]) -> Table:
    """Lay out entries of GET /models; prices are USD per million tokens."""
    shown = Table("id", "name", box=None, pad_edge=False, header_style="bold")
    for heading in ("context", "prompt $/M", "completion $/M"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for entry in entries:
        prices = entry.get("pricing")
        known = prices if isinstance(prices, dict) else {}
        shown.add_row(
            _text(entry.get("id")),
            _text(entry.get("name")),
            context(entry.get("context_length")),
            per_million(known.get("prompt")),
            per_million(known.get("completion")),
        )
    return shown


def context(tokens: object) -> str:
    """A context length for a person; empty where it is not known."""
    return f"{tokens:,}" if isinstance(tokens, int) and tokens > 0 else ""


def per_million(price: object) -> str:
    """A price in USD per million tokens, from USD a token; empty where it is not known."""
    try:
        a_token = Decimal(str(price))
    except InvalidOperation:
        return ""
    if not a_token.is_finite() or a_token > _DEAREST:
        return ""
    if a_token == 0:
        return "free"
    if a_token < 0:
        return "varies"
    return f"{(a_token * _MILLION).quantize(Decimal('0.0001')):f}".rstrip("0").rstrip(".")


def _text(value: object) -> str:
    # Brackets would be read as markup.
    return printable(str(value or "")).replace("[", r"\[")
