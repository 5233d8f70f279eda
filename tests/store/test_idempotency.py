from __future__ import annotations

import asyncio
from typing import Any

import pytest_asyncio

from broker.store.connection import SCHEMA, Store
from broker.store.idempotency import IdempotencyStore


def answer(session: str) -> dict[str, Any]:
    return {"sessionId": session, "expiresIn": 600, "model": "€"}


@pytest_asyncio.fixture
async def keys(store: Store) -> IdempotencyStore:
    return IdempotencyStore(store, ttl=1500)


async def bind(keys: IdempotencyStore, session: str, **options: Any) -> str:
    """Bind the one key of these tests; the session that it stands for now."""
    call = {
        "client": "u_1",
        "key": "k",
        "digest": "d1",
        "answer": answer(session),
        "instead_of": None,
        **options,
    }
    return (await keys.bind(**call)).session_id


async def test_an_unused_key_is_bound_to_nothing(keys: IdempotencyStore) -> None:
    assert await keys.find("u_1", "k") is None


async def test_a_bound_key_leads_to_the_answer_that_was_given(keys: IdempotencyStore) -> None:
    assert await bind(keys, "s1") == "s1"
    found = await keys.find("u_1", "k")
    assert found is not None
    assert (found.session_id, found.answer) == ("s1", answer("s1"))


async def test_the_first_binding_holds(keys: IdempotencyStore) -> None:
    assert [await bind(keys, session) for session in ("s1", "s2", "s3")] == ["s1"] * 3


async def test_one_of_many_bindings_at_once_counts(keys: IdempotencyStore) -> None:
    assert len(set(await asyncio.gather(*(bind(keys, f"s{n}") for n in range(30))))) == 1


async def test_a_key_of_another_body_cannot_be_bound(keys: IdempotencyStore) -> None:
    await bind(keys, "s1")
    assert await bind(keys, "s2", digest="d2") == "s1"
    found = await keys.find("u_1", "k")
    assert found is not None
    assert found.digest == "d1"


async def test_a_key_belongs_to_its_client(keys: IdempotencyStore) -> None:
    assert await bind(keys, "s1", client="u_1") == "s1"
    assert await bind(keys, "s2", client="u_2") == "s2"
    assert await bind(keys, "s3", client="u_1", key="K") == "s3"


async def test_a_binding_of_a_gone_session_is_replaced_once(keys: IdempotencyStore) -> None:
    await bind(keys, "s1")
    gone = await keys.find("u_1", "k")
    assert await bind(keys, "s2", instead_of=gone) == "s2"
    assert await bind(keys, "s3", instead_of=gone) == "s2"


async def test_a_binding_has_its_time_and_tells_nothing_by_its_name(
    store: Store, keys: IdempotencyStore
) -> None:
    await bind(keys, "s1", client="u_client", key="my-secret-key")
    names: Any = await store.redis.keys("*")
    [name] = names
    assert await store.redis.ttl(name) == 1500
    assert name.startswith(f"test:{SCHEMA}:idempotency:".encode())
    assert b"client" not in name
    assert b"secret" not in name
