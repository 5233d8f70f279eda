"""`broker models`: the models of a running broker, as a table for a person."""

from __future__ import annotations

import asyncio
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import orjson
from rich.table import Table

from broker.cli.output import require_output
from broker.cli.tables import cell, show
from broker.cli.talk import NO_BROKER, TalkError, broker_at
from broker.cli.words import complain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_REHEARSAL = "rehearsal/"
_MILLION = 1_000_000
_DEAREST = Decimal(1_000)  # USD per token; more is not a price


def models(query: str, *, free: bool, url: str, token: str | None = None) -> int:
    """Print the table and return the exit status.

    Raises:
        OutputError: standard output is closed.
    """
    require_output()
    try:
        entries = asyncio.run(_fetch(query, free=free, url=url, token=token))
    except TalkError as error:
        return complain(error)
    if not entries:
        return complain("no model matches.")
    show(table(entries))
    return 0


async def _fetch(query: str, *, free: bool, url: str, token: str | None) -> list[Mapping[str, Any]]:
    wanted = {**({"q": query} if query else {}), **({"free": "true"} if free else {})}
    async with broker_at(url, token) as broker:
        body = await broker.ask("GET", "/models", query=wanted)
    try:
        return [entry for entry in orjson.loads(body)["data"] if isinstance(entry, dict)]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise TalkError(NO_BROKER) from None


def table(entries: Iterable[Mapping[str, Any]]) -> Table:
    """Return a table of entries of GET /models; prices are USD per million tokens."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("id", no_wrap=True)  # half an id would be useless
    shown.add_column("name", overflow="fold", min_width=20)
    for heading in ("context", "prompt $/M", "completion $/M"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for entry in entries:
        prices = entry.get("pricing")
        known = prices if isinstance(prices, dict) else {}
        shown.add_row(
            cell(entry.get("id")),
            cell(_name(entry)),
            context(entry.get("context_length")),
            per_million(known.get("prompt")),
            per_million(known.get("completion")),
        )
    return shown


def _name(entry: Mapping[str, Any]) -> object:
    """Return the name of a model; for one of the rehearsal, whose name is like its id, its description."""
    does = entry.get("description")
    return does if does and str(entry.get("id")).startswith(_REHEARSAL) else entry.get("name")


def context(tokens: object) -> str:
    """Return a context length as text; empty where it is not known."""
    return f"{tokens:,}" if isinstance(tokens, int) and tokens > 0 else ""


def per_million(price: object) -> str:
    """Return a price in USD per million tokens as text, from USD per token; empty where it is not known."""
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
