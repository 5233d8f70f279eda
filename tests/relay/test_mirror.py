"""Mirrors of other workers' sessions: notifications while a mirror is opened are neither lost nor read again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from broker.core.accounts import WorstCase
from broker.core.replay import Batch
from broker.core.session import State
from broker.relay.mirror import Mirror, Mirrors
from broker.store.journal import Append, JournalStore
from broker.store.sessions import Prepared, SessionStore
from tests.chunks import events_of

if TYPE_CHECKING:
    from broker.store.connection import Store
    from broker.store.journal import Followed

PREPARED = Prepared(
    request=b"{}",
    model="scripted/model-1",
    prompt_tokens=10,
    referer="",
    client="key:tests",
    worst=WorstCase(110, 0),
)


def batch(first: int, last: int) -> Batch:
    return Batch(first, last, events_of([b"%d" % n for n in range(first, last + 1)], first))


class Late(JournalStore):
    """Answers `follow` only after the test sets `let`."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, worker="follower", running_ttl=500)
        self.answered = asyncio.Event()
        self.let = asyncio.Event()
        self.reads = 0

    async def follow(self, *args: Any, **options: Any) -> Followed:
        followed = await super().follow(*args, **options)
        self.reads += 1
        self.answered.set()
        await self.let.wait()
        return followed


class Afar:
    """A running session of another worker, and the mirrors of this worker."""

    def __init__(self, store: Store) -> None:
        self.id = str(uuid4())
        self.late = Late(store)
        self.owner = JournalStore(store, worker="owner", running_ttl=500)
        self.sessions = SessionStore(store, session_ttl=600, running_ttl=500, resume_ttl=300)
        self.follower = Mirrors(self.late, self._never, set())

    @staticmethod
    async def _never() -> bool:
        return False

    async def start(self, events: int) -> None:
        await self.sessions.prepare(self.id, PREPARED)
        await self.sessions.claim(self.id, "token", "owner")
        await self.append(batch(1, events))

    async def append(self, events: Batch) -> None:
        [answer] = await self.owner.append([Append(self.id, "token", events)])
        assert answer is not None
        assert answer.last == events.last


@pytest.mark.parametrize("viewers", [1, 3, 60])
@pytest.mark.parametrize("after", [0, 2])
async def test_notifications_while_a_mirror_is_opened_are_in_it(
    store: Store, viewers: int, after: int
) -> None:
    afar = Afar(store)
    await afar.start(2)
    opening = [asyncio.create_task(afar.follower.open(afar.id, after)) for _ in range(viewers)]
    await afar.late.answered.wait()
    for added in (batch(3, 3), batch(4, 6)):
        await afar.append(added)
        afar.follower.on_notification(afar.id, added)
    afar.late.let.set()
    mirrors = await asyncio.gather(*opening)
    assert len(set(mirrors)) == 1
    mirror = mirrors[0]
    assert isinstance(mirror, Mirror)
    assert mirror.feed.last == 6
    assert mirror.feed.after(max(after, mirror.feed.first - 1), 1 << 20).events.endswith(batch(4, 6).events)
    assert afar.late.reads == viewers
    assert not afar.follower._opening


async def test_a_viewer_that_leaves_an_opening_mirror_leaves_nothing(store: Store) -> None:
    afar = Afar(store)
    await afar.start(1)
    leaving = asyncio.create_task(afar.follower.open(afar.id, 0))
    staying = asyncio.create_task(afar.follower.open(afar.id, 0))
    await afar.late.answered.wait()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await afar.append(batch(2, 2))
    afar.follower.on_notification(afar.id, batch(2, 2))
    afar.late.let.set()
    mirror = await staying
    assert isinstance(mirror, Mirror)
    assert mirror.feed.last == 2
    assert not afar.follower._opening


async def test_a_missing_session_gets_no_mirror(store: Store) -> None:
    afar = Afar(store)
    afar.late.let.set()
    assert await afar.follower.open(afar.id, 0) is State.GONE
    assert afar.follower.get(afar.id) is None
