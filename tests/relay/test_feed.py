from __future__ import annotations

from broker.core.replay import Batch
from broker.core.session import Cursor, State, Terminal
from broker.relay.feed import WINDOW, Feed
from tests.chunks import events_of

END = Terminal(State.DONE, "done", Cursor(1, 4, end=True), b"{}")
ALL = 1 << 40


def batch(first: int, last: int, size: int = 2) -> Batch:
    data = b'"' + b"x" * (size - 2) + b'"'
    return Batch(first, last, events_of([data] * (last + 1 - first), first))


class Watcher:
    """A live viewer that notes what is pushed."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def push(self, batch: tuple[int, int, bytes], now: float) -> None:
        first, last, _ = batch
        self.told.append((first, last, now))

    def wake(self) -> None:
        self.told.append("woken")


def filled(*batches: Batch) -> Feed:
    feed = Feed()
    for each in batches:
        feed.add(each, 0.0)
    return feed


def test_a_new_feed_is_empty() -> None:
    feed = Feed()
    assert (feed.first, feed.last, feed.shown, feed.size, feed.end) == (1, 0, 0, 0, None)
    assert feed.after(0, ALL) == Batch(1, 0, b"")


def test_a_feed_may_begin_in_the_middle() -> None:
    feed = Feed(7)
    assert (feed.first, feed.last, feed.shown) == (8, 7, 7)
    feed.add(batch(8, 9), 0.0)
    assert feed.after(7, ALL) == batch(8, 9)


def test_events_are_given_from_any_number_on() -> None:
    feed = filled(batch(1, 2), batch(3, 5), batch(6, 6))
    for n in range(6):
        assert feed.after(n, ALL) == batch(n + 1, 6)
    assert feed.after(6, ALL) == Batch(7, 6, b"")


def test_events_are_given_in_parts_that_join_without_a_hole() -> None:
    feed = filled(*(batch(n, n, 100) for n in range(1, 50)))
    joined, n = b"", 0
    while n < feed.last:
        part = feed.after(n, 300)
        assert part.first == n + 1
        assert len(part.events) < 600
        joined, n = joined + part.events, part.last
    assert joined == batch(1, 49, 100).events


def test_an_event_larger_than_a_part_is_given_whole() -> None:
    feed = filled(batch(1, 1, 5000), batch(2, 2))
    assert feed.after(0, 10) == batch(1, 1, 5000)


def test_a_live_viewer_is_given_each_batch_once() -> None:
    feed, watcher = filled(batch(1, 2)), Watcher()
    feed.go_live(watcher)
    feed.add(batch(3, 3), 1.5)
    feed.add(batch(4, 6), 2.5)
    feed.leave(watcher)
    feed.add(batch(7, 7), 3.5)
    assert watcher.told == [(3, 3, 1.5), (4, 6, 2.5)]


def test_a_viewer_that_was_never_live_may_leave() -> None:
    Feed().leave(Watcher())


def test_a_viewer_may_leave_during_a_push() -> None:
    class Leaver(Watcher):
        def push(self, batch: tuple[int, int, bytes], now: float) -> None:
            super().push(batch, now)
            feed.leave(self)

    feed = Feed()
    watchers = [Leaver(), Leaver(), Watcher()]
    for watcher in watchers:
        feed.go_live(watcher)
    feed.add(batch(1, 1), 0.0)
    feed.add(batch(2, 2), 0.0)
    assert [len(watcher.told) for watcher in watchers] == [1, 1, 2]


def test_the_end_wakes_all_viewers() -> None:
    feed, watcher = filled(batch(1, 3)), Watcher()
    feed.go_live(watcher)
    feed.finish(END)
    assert feed.end is END
    assert watcher.told == ["woken"]


def test_while_hidden_nothing_new_is_shown() -> None:
    feed, watcher = filled(batch(1, 1)), Watcher()
    feed.go_live(watcher)
    feed.hide()
    feed.add(batch(2, 3), 0.0)
    assert watcher.told == []
    assert (feed.last, feed.shown) == (3, 1)
    assert feed.after(0, ALL) == batch(1, 1)
    assert feed.unsaved(0, ALL) == batch(1, 3)
    feed.show()
    assert watcher.told == ["woken"]
    assert feed.after(1, ALL) == batch(2, 3)


def test_hiding_twice_is_hiding_once() -> None:
    feed = filled(batch(1, 1))
    feed.hide()
    feed.hide()
    feed.add(batch(2, 3), 0.0)
    feed.show()
    assert feed.shown == 3


def test_an_end_after_hidden_events_shows_them() -> None:
    feed = filled(batch(1, 1))
    feed.hide()
    feed.add(batch(2, 3), 0.0)
    feed.finish(END)
    assert (feed.last, feed.shown) == (3, 3)


def test_hidden_events_beyond_the_end_are_dropped() -> None:
    feed = filled(batch(1, 1))
    feed.hide()
    feed.add(batch(2, 3), 0.0)
    feed.finish(Terminal(State.ABANDONED, "error", Cursor(1, 2, end=True), b"{}"))
    assert (feed.last, feed.shown, feed.size) == (1, 1, len(batch(1, 1).events))
    assert feed.unsaved(0, ALL) == batch(1, 1)


def test_show_without_hidden_events_wakes_nobody() -> None:
    feed, watcher = Feed(), Watcher()
    feed.go_live(watcher)
    feed.show()
    assert watcher.told == []


def test_saved_events_leave_memory_except_a_window() -> None:
    feed = filled(*(batch(n, n, 10_000) for n in range(1, 101)))
    feed.trim(0)
    assert feed.first == 1
    feed.trim(100)
    assert feed.size <= WINDOW
    assert feed.size + len(batch(1, 1, 10_000).events) > WINDOW
    assert feed.first > 1
    assert feed.after(feed.first - 1, ALL) == batch(feed.first, 100, 10_000)


def test_unsaved_events_stay_in_memory() -> None:
    feed = filled(*(batch(n, n, 10_000) for n in range(1, 101)))
    feed.trim(40)
    assert feed.first == 41
    assert feed.unsaved(40, ALL) == batch(41, 100, 10_000)


def test_a_feed_can_be_emptied_and_goes_on_after_a_number() -> None:
    feed, watcher = filled(batch(1, 3)), Watcher()
    feed.go_live(watcher)
    feed.skip_to(9)
    assert (feed.first, feed.last, feed.shown, feed.size) == (10, 9, 9, 0)
    assert watcher.told == ["woken"]
    feed.add(batch(10, 10), 0.0)
    assert feed.after(9, ALL) == batch(10, 10)
