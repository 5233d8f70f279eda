"""The usage ledger as operators read it from a real Redis. What settling writes into it: `test_accounts.py`."""

from __future__ import annotations

import pytest

from broker.core.errors import StoreRefused
from broker.store.buckets import account_of
from broker.store.connection import Store
from broker.store.running import RunningStore
from broker.store.usage_ledger import UsageLedger


async def test_a_ledger_that_redis_refuses_is_a_clear_error(store: Store) -> None:
    ledger = UsageLedger(store)
    key = ledger.key_in(account_of(store, "key:ann").tagged, await ledger.today())
    await store.redis.set(key, "not a hash")
    with pytest.raises(StoreRefused, match="Redis refuses to be read: WRONGTYPE"):
        await ledger.rows(None)


async def test_a_list_that_redis_refuses_is_a_clear_error(store: Store) -> None:
    await store.redis.set(account_of(store, "key:ann").key("pending"), "not a sorted set")
    with pytest.raises(StoreRefused, match="Redis refuses to be read: WRONGTYPE"):
        await RunningStore(store).pending("key:ann")
