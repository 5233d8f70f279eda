"""Amounts as text for people: bytes, durations, money and bars. No I/O."""

from __future__ import annotations

from broker.core.pricing import to_usd

_UNITS = ("B", "kB", "MB", "GB", "TB")
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
_LEAST_SHOWN = 0.0001
_EIGHTHS = " ▏▎▍▌▋▊▉"


def size(count: float) -> str:
    """Return a number of bytes in at most 6 characters, such as `812 B` or `1.4 MB`."""
    at = 0
    while round(count) >= 1000 and at < len(_UNITS) - 1:
        count /= 1000
        at += 1
    return f"{count:.1f} {_UNITS[at]}" if at and round(count, 1) < 10 else f"{count:.0f} {_UNITS[at]}"


def duration(seconds: float) -> str:
    """Return a duration in at most 6 characters, such as `48s`, `3m05s`, `2h10m` or `4d03h`."""
    whole = max(0, round(seconds))
    for unit, letter, smaller, part in ((_DAY, "d", _HOUR, "h"), (_HOUR, "h", _MINUTE, "m")):
        if whole >= unit:
            return f"{whole // unit}{letter}{whole % unit // smaller:02}{part}"
    return f"{whole // _MINUTE}m{whole % _MINUTE:02}s" if whole >= _MINUTE else f"{whole}s"


def wait(seconds: float) -> str:
    """Return a short time, such as `320ms` or `4.1s`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    return f"{seconds:.1f}s" if round(seconds, 1) < 10 else duration(seconds)


def usd(nano: int) -> str:
    """Return nano-USD as USD: with 4 decimals below a dollar, where most answers are, and 2 from there on."""
    amount = to_usd(nano)
    if 0 < amount < _LEAST_SHOWN:
        return f"<{_LEAST_SHOWN}"
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.4f}"


def count(number: int, noun: str) -> str:
    """Return a number of things, such as `1 session` or `2,000 sessions`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def bar(share: float, width: int) -> str:
    """Return a bar of this share of the width, in eighths of a character; something is shown of all above zero."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    if share > 0:
        eighths = max(1, eighths)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()
