"""Generations and mirrors are both what a viewer watches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from broker.core.replay import Batch
from broker.relay.mirror import Mirror
from tests.relay.fakes import watched
from tests.relay.test_generation import Running

if TYPE_CHECKING:
    from broker.relay.source import Source


def of_this_worker() -> Source:
    return Running().generation


def of_another_worker() -> Source:
    return Mirror("session", "worker", 0, lambda _: None)


@pytest.mark.parametrize("make", [of_this_worker, of_another_worker])
async def test_a_source_has_a_feed_and_counts_viewers(make: type[Source]) -> None:
    source = make()
    source.feed.add(Batch(1, 1, b"event"), 0.0)
    assert source.feed.after(0, 100).events == b"event"
    with watched(source), watched(source):
        pass


def test_a_mirror_is_dropped_when_its_last_viewer_leaves() -> None:
    dropped: list[Mirror] = []
    mirror = Mirror("session", "worker", 0, dropped.append)
    with watched(mirror):
        with watched(mirror):
            pass
        assert dropped == []
    assert dropped == [mirror]
