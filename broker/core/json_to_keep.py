"""Write JSON that stays in memory for longer than a moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable


def json_to_keep(value: Any, *, default: Callable[[Any], Any] | None = None) -> bytes:
    """Return a value as JSON, in as much memory as its length.

    orjson returns bytes in the memory in which it wrote them: 4 KiB at least, and several times the length of a long
    text (orjson 3.13, measured). So each model, and each connection for its last answer, would take 4 KiB or more.

    Args:
        value: what is written.
        default: writes values of other types, as orjson calls it.

    Raises:
        orjson.JSONEncodeError: the value is not JSON.
    """
    written = orjson.dumps(value, default)
    return bytes(memoryview(written))  # of bytes themselves, `bytes` returns the same object
