"""Chunks as a session has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.core.events import chunk_events
from broker.core.sse import encode_data

if TYPE_CHECKING:
    from collections.abc import Iterable


def events_of(chunks: Iterable[bytes], first: int) -> bytes:
    """Return the events of these chunks (JSON), numbered from ``first``."""
    return chunk_events([encode_data(data) for data in chunks], first)
