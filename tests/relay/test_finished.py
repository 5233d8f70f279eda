"""What is left of a generation replays like the generation itself, and knows how much memory it takes."""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from broker.core.errors import StoreUnavailable
from broker.core.replay import Batch
from broker.core.session import Cursor, State, Terminal
from broker.relay.feed import Feed
from broker.relay.finished import FinishedSession
from broker.relay.finishing import ALL, Bill
from tests.chunks import events_of
from tests.relay.fakes import PREPARED, RESERVATION, FakeSettlement

EVENTS = 5


def end_at(n: int) -> Terminal:
    return Terminal(State.DONE, "done", Cursor(1, n, end=True), b'{"finishReason":"stop"}')


def finished(feed: Feed, settlement: Any = None, *, is_counted: bool = True) -> FinishedSession:
    """What is left of a generation with these events."""
    end = end_at(feed.last + 1)
    feed.finish(end)
    bill = Bill(RESERVATION, settlement)
    bill.is_counted = is_counted
    generation = SimpleNamespace(
        session_id="session",
        claim_id="claim",
        reservation=RESERVATION,
        prepared=PREPARED,
        saved=0,
        feed=feed,
        finishing=SimpleNamespace(bill=bill),
    )
    return FinishedSession(cast("Any", generation), end)


def feed_of(events: int = EVENTS, *, size: int = 10) -> Feed:
    feed = Feed()
    for n in range(1, events + 1):
        feed.add(Batch(n, n, events_of([b"x" * size], n)), 0.0)
    return feed


@pytest.mark.parametrize("after", range(EVENTS + 1))
def test_events_are_replayed_from_every_cursor(after: int) -> None:
    original = feed_of()
    feed = finished(original).feed
    assert feed.after(after, ALL) == original.after(after, ALL)
    assert feed.end == original.end


def test_events_that_had_left_memory_stay_in_the_journal() -> None:
    original = feed_of()
    original.trim(3, keep=0)
    feed = finished(original).feed
    assert (feed.first, feed.last, feed.shown) == (4, EVENTS, EVENTS)
    assert feed.after(3, ALL) == original.after(3, ALL)


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_session_without_events_in_memory_has_its_end(trimmed: bool) -> None:
    original = feed_of() if trimmed else Feed()
    original.trim(EVENTS, keep=0)
    feed = finished(original).feed
    assert (feed.first, feed.last, feed.size) == (original.last + 1, original.last, 0)
    assert feed.end == original.end


async def test_cancelling_comes_too_late() -> None:
    session = finished(feed_of())
    assert session.cancel() is False
    assert await session.ended() is State.DONE


async def test_its_usage_can_be_booked_again() -> None:
    settlement = FakeSettlement()
    session = finished(feed_of(), settlement)
    await session.settle()
    await session.settle()
    assert [state for _, state, _ in settlement.settled] == [State.DONE] * 2


async def test_a_usage_that_is_not_counted_is_not_booked_as_nothing() -> None:
    settlement = FakeSettlement()
    with pytest.raises(StoreUnavailable):
        await finished(feed_of(), settlement, is_counted=False).settle()
    assert settlement.settled == []


@pytest.mark.parametrize("events", [0, 3, 200])
def test_it_takes_no_more_memory_than_it_says(events: int) -> None:
    session = finished(feed_of(events, size=300))
    mine = [session, *(value for name in FinishedSession.__slots__ if (value := getattr(session, name)))]
    kept = session._events
    assert sum(map(sys.getsizeof, [*mine, kept.events, session.end.data])) <= session.size
    assert not any(isinstance(each, Feed) for each in gc.get_referents(session))
