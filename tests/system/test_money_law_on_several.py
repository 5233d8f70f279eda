"""The law of money on several servers: it holds also where primaries die and stand still, and replicas take over.

A claim waits for a replica here (`BROKER_REDIS_WAIT`), as the README advises where a failover may come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.system.test_money_law import check_the_law
from tests.valkey_cluster import DOWN_AFTER_MS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.parametrize("servers", ["sentinel", "cluster"])
async def test_no_account_exceeds_its_limit_where_primaries_are_lost(servers: str, tmp_path: Path) -> None:
    await check_the_law(tmp_path, seconds=20.0, servers=servers, down_after_ms=DOWN_AFTER_MS, redis_wait=1)
