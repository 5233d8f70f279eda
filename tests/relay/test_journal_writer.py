"""The limit of the events that wait for Redis in a worker's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from broker.core.replay import Batch
from broker.relay.feed import Feed
from broker.relay.journal_writer import JournalWriter

if TYPE_CHECKING:
    from broker.relay.generation import Generation
    from broker.store.journal import JournalStore

KIB = 1024


class Holder:
    """What the journal writer sees of a generation."""

    session_id = "0123456789"

    def __init__(self, feed: Feed) -> None:
        self.feed = feed


def holding(size: int) -> Generation:
    """A generation whose events, of so many bytes, are not in Redis."""
    feed = Feed()
    for n in range(1, 5):
        feed.add(Batch(n, n, b"x" * (size // 4)), 0.0)
    return cast("Generation", Holder(feed))


@pytest.fixture
async def writer(monkeypatch: pytest.MonkeyPatch) -> JournalWriter:
    monkeypatch.setattr("broker.relay.journal_writer.MAX_PENDING_BYTES", 100 * KIB)
    return JournalWriter(cast("JournalStore", None), interval=0.5)


async def test_running_and_ended_generations_share_one_bound(writer: JournalWriter) -> None:
    running, ended = holding(60 * KIB), holding(60 * KIB)
    writer.add(running)
    writer.keep_pending(ended)
    assert running.feed.size + ended.feed.size <= 100 * KIB


async def test_the_largest_gives_way_first(writer: JournalWriter) -> None:
    small, large = holding(20 * KIB), holding(90 * KIB)
    writer.keep_pending(small)
    writer.keep_pending(large)
    assert (small.feed.size, large.feed.size) == (20 * KIB, 0)


async def test_many_ended_generations_stay_within_the_bound(writer: JournalWriter) -> None:
    ended = [holding(8 * KIB) for _ in range(50)]
    for generation in ended:
        writer.keep_pending(generation)
    assert sum(generation.feed.size for generation in ended) <= 100 * KIB


async def test_an_end_that_was_written_counts_no_more(writer: JournalWriter) -> None:
    first, second = holding(90 * KIB), holding(90 * KIB)
    writer.keep_pending(first)
    writer.release_pending(first)
    writer.keep_pending(second)
    assert (first.feed.size, second.feed.size) == (90 * KIB, 90 * KIB)
