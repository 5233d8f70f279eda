"""What a viewer gets next, and how the journal is read: properties, checked against known events."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.replay import Batch, JournalGap, Next, read_on, what_next
from broker.core.session import Cursor, State, Terminal
from tests.chunks import events_of

TEXTS = (b'{"text":"plain"}', b"{}", b'{\n"of":"several lines",\n\n"and":"an empty one"\n}', b"x" * 200)
"""Data as it may come; an empty line within it is the hard case, for events end at empty lines."""


def data_of(n: int) -> bytes:
    return b"%d %b" % (n, TEXTS[n % len(TEXTS)])


def events(first: int, last: int) -> bytes:
    return events_of([data_of(n) for n in range(first, last + 1)], first) if last >= first else b""


def batch(first: int, last: int) -> Batch:
    return Batch(first, last, events(first, last))


def end(n: int, epoch: int = 1) -> Terminal:
    return Terminal(State.DONE, "done", Cursor(epoch, n, end=True), b"{}")


@st.composite
def overlapping(draw: st.DrawFn) -> list[Batch]:
    """A journal as it may be after replies were lost: batches that repeat, overlap and begin anywhere, no hole."""
    batches = [batch(1, draw(st.integers(1, 5)))]
    for _ in range(draw(st.integers(0, 5))):
        known = max(entry.last for entry in batches)
        first = draw(st.integers(1, known + 1))
        batches.append(batch(first, draw(st.integers(first, known + 4))))
    return batches


@given(overlapping(), st.data())
def test_reading_from_any_event_gives_exactly_the_rest(journal: list[Batch], data: st.DataObject) -> None:
    newest = max(entry.last for entry in journal)
    after = data.draw(st.integers(0, newest + 2))
    assert read_on(journal, after) == (events(after + 1, newest), max(after, newest))


@given(overlapping(), st.data())
def test_it_can_be_read_in_parts(journal: list[Batch], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(journal)))
    first, middle = read_on(journal[:at], 0)
    second, last = read_on(journal[at:], middle)
    assert first + second == events(1, last)


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 5))
def test_a_hole_is_never_read_over(before: int, missing: int, behind: int) -> None:
    first = before + missing + 1
    journal = [batch(1, before), batch(first, first + behind - 1)]
    with pytest.raises(JournalGap):
        read_on(journal, 0)
    with pytest.raises(JournalGap):
        read_on(journal, first - 2)
    assert read_on(journal, first - 1) == (events(first, first + behind - 1), first + behind - 1)


def test_an_empty_journal_gives_nothing() -> None:
    assert read_on([], 7) == (b"", 7)


def test_a_batch_is_cut_between_events_with_empty_lines() -> None:
    whole = batch(1, 9)
    for after in range(9):
        assert read_on([whole], after) == (events(after + 1, 9), 9)


@given(st.data())
def test_following_the_decisions_gives_every_event_once(data: st.DataObject) -> None:
    """Memory has the newest events, and the journal all but the very newest; the viewer comes with any cursor."""
    last = data.draw(st.integers(0, 12), label="last")
    first = data.draw(st.integers(1, last + 1), label="first in memory")
    journaled = data.draw(st.integers(first - 1, last), label="journaled")
    cuts = sorted(data.draw(st.sets(st.integers(1, journaled))) | {journaled}) if journaled else []
    journal = [batch(before + 1, cut) for before, cut in pairwise([0, *cuts])]
    at = start = data.draw(st.integers(0, last), label="cursor")
    got = b""
    while (step := what_next(Cursor(1, at), first, last, end(last + 1))) is not Next.END:
        source = {Next.MEMORY: [batch(first, last)], Next.JOURNAL: journal}[step]
        piece, further = read_on([entry for entry in source if entry.last > at][:1], at)
        assert further > at, "it goes on"
        got, at = got + piece, further
    assert got == events(start + 1, last)


@pytest.mark.parametrize("n", [5, 6, 1000])
def test_a_cursor_at_or_ahead_of_a_running_session_waits(n: int) -> None:
    assert what_next(Cursor(1, n), 1, 5, None) is Next.WAIT


def test_before_the_first_event_one_waits() -> None:
    assert what_next(Cursor(1, 0), 1, 0, None) is Next.WAIT


def test_with_all_events_one_is_at_the_end() -> None:
    assert what_next(Cursor(1, 5), 1, 5, end(6)) is Next.END
    assert what_next(Cursor(1, 0), 1, 0, end(1)) is Next.END


@pytest.mark.parametrize("n", [6, 1000])
def test_beyond_the_end_there_is_a_gap(n: int) -> None:
    assert what_next(Cursor(1, n), 1, 5, end(6)) is Next.GAP


def test_a_cursor_beyond_a_dead_workers_journal_is_at_the_end() -> None:
    assert what_next(Cursor(1, 9), 6, 5, end(6, epoch=2)) is Next.END


@pytest.mark.parametrize("ended", [None, end(6), end(6, epoch=2)])
def test_a_cursor_that_nobody_was_given_is_a_gap(ended: Terminal | None) -> None:
    assert what_next(Cursor(2, 3), 1, 5, ended) is Next.GAP


def test_events_that_left_memory_are_in_the_journal() -> None:
    assert what_next(Cursor(1, 2), 4, 9, None) is Next.JOURNAL
    assert what_next(Cursor(1, 3), 4, 9, None) is Next.MEMORY
    assert what_next(Cursor(1, 3), 10, 9, end(10)) is Next.JOURNAL
