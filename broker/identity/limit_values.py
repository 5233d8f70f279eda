"""Read the limits of a client from a TOML table or from the claim ``broker`` of a JWT. No I/O.

Both have the same names. Values are checked by their type, for a value that is misread could let a client spend more.
"""

from __future__ import annotations

import datetime as dt
import re
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic import TypeAdapter

from broker.core.client_limits import ClientLimits
from broker.core.pricing import to_nano
from broker.setting_kinds import Money, Origins, RatePerTime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_LISTED: Final = 200
"""Models or origins of a list."""

LONGEST_MODEL: Final = 256
"""Characters of a glob."""

LONGEST_SYSTEM: Final = 64 * 1024
"""Bytes of a system message."""

MOST: Final = 10**15
"""The largest count: beyond it, Lua could not count exactly."""

_RATE: Final = TypeAdapter[Any](RatePerTime)
_MONEY: Final = TypeAdapter[Any](Money)
_ORIGINS: Final = TypeAdapter[Any](Origins)
_DECIMAL: Final = re.compile(r"\d{1,12}(\.\d{1,18})?", re.ASCII)
_SHOWN: Final = 40


class LimitsError(Exception):
    """Limits cannot be used. The text says which one and what it must be; it never shows a value."""


def read_table(values: Mapping[str, Any]) -> ClientLimits:
    """Return the limits in a table of the clients file, without its keys.

    Raises:
        LimitsError: a name is not known, or a value is wrong.
    """
    return ClientLimits(narrows=False, **_read(values, _TABLE))


def read_claim(claim: Any) -> ClientLimits:
    """Return the limits in a claim. They narrow those of the service, so a budget of 0 is not taken for "no limit".

    Raises:
        LimitsError: it is not an object, a name is not known, or a value is wrong.
    """
    if not isinstance(claim, dict):
        raise LimitsError("it must be an object")
    return ClientLimits(narrows=True, **_read(claim, _CLAIM))


class _Kind(NamedTuple):
    """How a value is read: ``read`` raises `ValueError` where it is not what ``what`` says."""

    read: Callable[[Any], Any]
    what: str


def _read(values: Mapping[str, Any], kinds: Mapping[str, _Kind]) -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        kind = kinds.get(name)
        if kind is None:
            shown = "".join(each if each.isprintable() else "?" for each in str(name)[:_SHOWN])
            raise LimitsError(f"{shown} is not the name of a limit")
        try:
            found[name] = kind.read(value)
        except ValueError:
            raise LimitsError(f"{name} must be {kind.what}") from None
    return found


def _whole(value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
        raise ValueError
    return value


def _count(value: Any) -> int:
    return _whole(value, 1)


def _count_or_none(value: Any) -> int:
    return _whole(value, 0)


def _nano(value: Any) -> int:
    is_text = isinstance(value, str) and _DECIMAL.fullmatch(value) is not None
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    nano = _parse_money(value) if is_text or is_number else None
    if nano is None:
        raise ValueError
    return nano


@lru_cache(maxsize=256)
def _parse_money(value: float | Decimal | str) -> int | None:
    return to_nano(_MONEY.validate_python(value))


def _nano_above_zero(value: Any) -> int:
    if (nano := _nano(value)) < 1:
        raise ValueError
    return nano


def _rate(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError  # noqa: TRY004 - the reader turns this one into its message
    return _parse_rate(value)


@lru_cache(maxsize=256)
def _parse_rate(value: str) -> Any:
    return _RATE.validate_python(value)


def _texts(value: Any, longest: int) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else []
    if not 1 <= len(listed) <= MAX_LISTED:
        raise ValueError
    # A text of JSON may have half a surrogate pair, which cannot be stored; it is not printable.
    if not all(isinstance(each, str) and 1 <= len(each) <= longest and each.isprintable() for each in listed):
        raise ValueError
    return tuple(listed)


def _models(value: Any) -> tuple[str, ...]:
    return _texts(value, LONGEST_MODEL)


def _origins(value: Any) -> tuple[str, ...]:
    origins: tuple[str, ...] = _ORIGINS.validate_python(_texts(value, LONGEST_MODEL))
    return origins


def _system(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    if len(value) > LONGEST_SYSTEM or len(value.encode()) > LONGEST_SYSTEM:
        raise ValueError
    return value.strip()


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError  # noqa: TRY004 - as above
    return value


def _toml_time(value: Any) -> float:
    """Return a TOML date or date-time as seconds since 1970.

    Without an offset it is in UTC, and a date is the beginning of its day.
    """
    if isinstance(value, dt.datetime):
        return (value if value.tzinfo is not None else value.replace(tzinfo=dt.UTC)).timestamp()
    if isinstance(value, dt.date):
        return dt.datetime.combine(value, dt.time(), dt.UTC).timestamp()
    raise ValueError


def _json_time(value: Any) -> float:
    """Return seconds since 1970, or a date or date-time as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 <= value <= MOST:  # NaN neither
            raise ValueError
        return float(value)
    if not isinstance(value, str):
        raise ValueError  # noqa: TRY004 - as above
    return _toml_time(dt.datetime.fromisoformat(value))


_MONEY_WHAT = 'an amount in USD such as 2.50 or "2.50", from 0 to 1000000'
_BOTH: Final = {
    "models": _Kind(_models, f"a list of 1 to {MAX_LISTED} models, in which * stands for anything"),
    "rate": _Kind(_rate, 'a rate such as "30/minute"'),
    "streams": _Kind(_count, "a whole number, 1 or more"),
    "max_output_tokens": _Kind(_count, "a whole number, 1 or more"),
    "origins": _Kind(_origins, f'a list of 1 to {MAX_LISTED} origins such as "https://example.com"'),
    "disabled": _Kind(_flag, "true or false"),
}
_TABLE: Final = {
    **_BOTH,
    "daily_tokens": _Kind(_count_or_none, "a whole number, 0 or more"),
    "daily_cost": _Kind(_nano, _MONEY_WHAT),
    "monthly_cost": _Kind(_nano, _MONEY_WHAT),
    "system": _Kind(_system, f"a text of 1 to {LONGEST_SYSTEM} bytes"),
    "expires": _Kind(_toml_time, "a date such as 2030-12-31, or a date-time in UTC, without quotes"),
}
_ABOVE_ZERO = 'an amount in USD above 0, such as 2.50 or "2.50", up to 1000000'
_CLAIM: Final = {
    **_BOTH,
    "daily_tokens": _Kind(_count, "a whole number, 1 or more"),
    "daily_cost": _Kind(_nano_above_zero, _ABOVE_ZERO),
    "monthly_cost": _Kind(_nano_above_zero, _ABOVE_ZERO),
    "expires": _Kind(_json_time, 'seconds since 1970, or a date or date-time such as "2030-12-31T12:00:00Z"'),
}
