"""Finished sessions stay for their time, within bounds in bytes and in number."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from broker.core.session import Cursor, State, Terminal
from broker.relay import finished_cache
from broker.relay.finished_cache import FinishedCache

if TYPE_CHECKING:
    from broker.relay.finished import FinishedSession

SECONDS = 300.0
STOPPED = Terminal(State.CANCELLED, "done", Cursor(1, 5, end=True), b"{}")
LOST = Terminal(State.LOST, "error", Cursor(2, 4, end=True), b"{}")


class Finished:
    """What the cache sees of a session."""

    def __init__(self, session_id: str, size: int = 10) -> None:
        self.session_id = session_id
        self.size = size
        self.end: Terminal | None = None

    def replace_end(self, end: Terminal) -> None:
        self.end = end
        self.size += len(end.data)


def finished(session_id: str, size: int = 10) -> FinishedSession:
    return cast("FinishedSession", Finished(session_id, size))


@pytest.fixture
def cache() -> FinishedCache:
    return FinishedCache(SECONDS)


def ids(cache: FinishedCache) -> list[str]:
    return [session.session_id for session in cache.values()]


def test_a_finished_session_is_found_by_its_id(cache: FinishedCache) -> None:
    session = finished("a")
    cache.add(session, now=0.0)
    assert cache.get("a") is session
    assert cache.get("b") is None


def test_a_session_expires_after_its_time(cache: FinishedCache) -> None:
    cache.add(finished("a"), now=0.0)
    cache.add(finished("b"), now=10.0)
    cache.expire(SECONDS - 0.1)
    assert ids(cache) == ["a", "b"]
    cache.expire(SECONDS)
    assert ids(cache) == ["b"]
    cache.expire(SECONDS + 10.0)
    assert ids(cache) == []


def test_a_session_gets_another_end_of_this_worker(cache: FinishedCache) -> None:
    session = finished("a")
    cache.add(session, now=0.0)
    cache.replace_end("a", STOPPED)
    assert session.end is STOPPED
    assert ids(cache) == ["a"]


def test_the_size_of_another_end_counts(cache: FinishedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished_cache, "MAX_BYTES", 30 + len(STOPPED.data))
    cache.add(finished("a"), now=0.0)
    cache.replace_end("a", STOPPED)
    cache.add(finished("b", 20), now=0.0)
    assert ids(cache) == ["a", "b"]
    cache.drop("a")
    cache.add(finished("c", 10 + len(STOPPED.data)), now=0.0)
    assert ids(cache) == ["b", "c"]
    cache.add(finished("d", 1), now=0.0)
    assert ids(cache) == ["c", "d"]


def test_a_session_with_an_end_of_another_worker_is_dropped(cache: FinishedCache) -> None:
    cache.add(finished("a"), now=0.0)
    cache.replace_end("a", LOST)
    assert ids(cache) == []


def test_the_end_of_an_unknown_session_is_ignored(cache: FinishedCache) -> None:
    cache.replace_end("a", STOPPED)
    assert ids(cache) == []


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_cache_without_time_keeps_nothing(seconds: float) -> None:
    cache = FinishedCache(seconds)
    cache.add(finished("a"), now=0.0)
    assert ids(cache) == []


def test_a_dropped_session_is_gone_and_may_be_dropped_again(cache: FinishedCache) -> None:
    cache.add(finished("a"), now=0.0)
    cache.drop("a")
    cache.drop("a")
    assert cache.get("a") is None


def test_the_oldest_go_when_there_are_too_many_bytes(
    cache: FinishedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished_cache, "MAX_BYTES", 100)
    for name in ("a", "b", "c"):
        cache.add(finished(name, size=40), now=0.0)
    assert ids(cache) == ["b", "c"]
    cache.add(finished("large", size=101), now=0.0)
    assert ids(cache) == []


def test_the_oldest_go_when_there_are_too_many_sessions(
    cache: FinishedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished_cache, "MAX_SESSIONS", 2)
    for name in ("a", "b", "c"):
        cache.add(finished(name), now=0.0)
    assert ids(cache) == ["b", "c"]


def test_a_session_added_twice_counts_once(cache: FinishedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished_cache, "MAX_BYTES", 100)
    again = finished("a", size=60)
    cache.add(finished("a", size=60), now=0.0)
    cache.add(again, now=1.0)
    assert cache.values() == [again]
    cache.add(finished("b", size=40), now=2.0)
    assert ids(cache) == ["a", "b"]
