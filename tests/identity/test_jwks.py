"""Published keys: when they are fetched, how long they stay, and what is not a key."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from broker.core.errors import Overloaded
from broker.identity.jwks import (
    MAX_KEYS,
    MAX_SIZE,
    OLD_AFTER,
    PAUSE,
    PAUSE_WITHOUT_KEYS,
    RENEW_AFTER,
    KeySetError,
    PublishedKeys,
    parse_keys,
)
from tests.clock import PATIENCE, Clock
from tests.identity.issuer import KeyServer, key_server, key_set, member, private_key, serving

OLD, NEW = member("RSA", kid="old"), member("RSA other", kid="new")
LATER = "The keys that tokens are checked with cannot be fetched right now."


@asynccontextmanager
async def keys_of(server: KeyServer, clock: Clock, timeout: float = 5.0) -> AsyncIterator[PublishedKeys]:
    async with PublishedKeys(server.url, timeout=timeout, clock=clock) as keys:
        yield keys


async def has(keys: PublishedKeys, kid: str | None = "old") -> bool:
    return await keys.find("RS256", kid) is not None


async def fetched(keys: PublishedKeys) -> None:
    """Wait until no fetch runs."""
    while keys._fetch is not None:
        await asyncio.wait({keys._fetch})


# When they are fetched


async def test_keys_are_fetched_once_at_the_start(clock: Clock) -> None:
    async with key_server(OLD) as server, keys_of(server, clock) as keys:
        await server.asked(1)
        for _ in range(3):
            assert await has(keys)
        clock.now += RENEW_AFTER - 0.1
        assert await has(keys)
        await fetched(keys)
        assert server.fetches == 1


async def test_a_new_key_is_found_by_one_more_fetch(clock: Clock) -> None:
    async with key_server(OLD) as server, keys_of(server, clock) as keys:
        assert await has(keys, "old")
        server.body = key_set(OLD, NEW)
        clock.now += PAUSE
        assert await has(keys, "new")
        assert await has(keys, "old")
        assert server.fetches == 2


async def test_a_key_that_is_withdrawn_is_good_no_more(clock: Clock) -> None:
    async with key_server(OLD) as server, keys_of(server, clock) as keys:
        assert await has(keys, "old")
        server.body = key_set(NEW)
        clock.now += PAUSE
        assert await has(keys, "new")
        assert not await has(keys, "old")


async def test_unknown_keys_cause_a_fetch_only_from_time_to_time(clock: Clock) -> None:
    async with key_server(OLD) as server, keys_of(server, clock) as keys:
        for number in range(5):
            assert not await has(keys, f"unknown-{number}")
        assert server.fetches == 1
        clock.now += PAUSE - 0.1
        assert not await has(keys, "unknown")
        assert server.fetches == 1
        clock.now += 0.1
        for number in range(5):
            assert not await has(keys, f"unknown-{number}")
        assert server.fetches == 2


async def test_all_waiting_callers_share_one_fetch(clock: Clock) -> None:
    async with key_server(OLD) as server, keys_of(server, clock) as keys:
        assert await has(keys)
        clock.now += PAUSE
        server.body = key_set(NEW)
        server.hold.clear()
        waiting = [asyncio.create_task(has(keys, "new")) for _ in range(20)]
        await server.asked(2)
        server.hold.set()
        assert all(await asyncio.gather(*waiting))
        assert server.fetches == 2


async def test_a_caller_that_leaves_does_not_stop_the_fetch(clock: Clock) -> None:
    async with key_server(OLD) as server, keys_of(server, clock) as keys:
        assert await has(keys)
        clock.now += PAUSE
        server.body = key_set(NEW)
        server.hold.clear()
        leaving, staying = (asyncio.create_task(has(keys, "new")) for _ in range(2))
        await server.asked(2)
        leaving.cancel()
        await asyncio.wait({leaving})
        server.hold.set()
        assert await staying
        assert leaving.cancelled()
        assert server.fetches == 2


async def test_keys_are_renewed_beside_the_request_that_uses_them(clock: Clock) -> None:
    async with key_server(OLD) as server, keys_of(server, clock) as keys:
        assert await has(keys)
        server.hold.clear()
        clock.now += RENEW_AFTER
        assert await has(keys)  # although the server says nothing
        await server.asked(2)
        server.body = key_set(NEW)
        server.hold.set()
        await fetched(keys)
        assert await has(keys, "new")
        assert server.fetches == 2


async def test_old_keys_are_not_used_before_a_newer_set_was_asked_for(clock: Clock) -> None:
    async with key_server(OLD) as server, keys_of(server, clock) as keys:
        assert await has(keys)
        server.body = key_set(NEW)
        clock.now += OLD_AFTER
        assert not await has(keys, "old")
        assert server.fetches == 2


# When they cannot be had


async def test_the_first_tokens_wait_for_the_first_keys(clock: Clock) -> None:
    async with key_server(OLD) as server:
        server.hold.clear()
        async with keys_of(server, clock) as keys:
            waiting = asyncio.create_task(has(keys))
            await server.asked(1)
            server.hold.set()
            assert await waiting


async def test_without_any_keys_tokens_cannot_be_checked_for_a_moment(clock: Clock) -> None:
    async with key_server() as server:
        server.status = 500
        async with keys_of(server, clock) as keys:
            for _ in range(3):
                with pytest.raises(Overloaded, match=LATER) as error:
                    await has(keys)
                assert error.value.retry_after == PAUSE_WITHOUT_KEYS
            assert server.fetches == 1
            server.status, server.body = 200, key_set(OLD)
            clock.now += PAUSE_WITHOUT_KEYS
            assert await has(keys)


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 500},
        {"status": 404},
        {"status": 204, "body": b""},
        {"status": 302, "headers": {"Location": "/keys"}},
        {"body": b"not json"},
        {"body": b"[]"},
        {"body": b"{}"},
        {"body": b'{"keys": {}}'},
        {"body": b'{"keys": []}'},
        {"body": b'{"keys": [{"kty": "oct", "k": "AAAA"}]}'},
        {"body": key_set(NEW, "x" * MAX_SIZE)},
    ],
)
async def test_keys_stay_while_answers_are_unusable(answer: dict[str, Any], clock: Clock) -> None:
    async with key_server(OLD) as server, keys_of(server, clock) as keys:
        assert await has(keys)
        for name, value in answer.items():
            setattr(server, name, value)
        clock.now += OLD_AFTER
        assert await has(keys, "old")
        with pytest.raises(Overloaded, match=LATER):
            await has(keys, "new")
        assert server.fetches == 2


async def test_an_unknown_key_is_undecided_until_a_fetch_succeeds(clock: Clock) -> None:
    async with key_server(OLD) as server, keys_of(server, clock) as keys:
        assert not await has(keys, "new")
        server.status = 500
        clock.now += PAUSE
        for passed in (0.0, 10.0):
            clock.now += passed
            with pytest.raises(Overloaded) as error:
                await has(keys, "new")
            assert error.value.retry_after == PAUSE - passed
        server.status = 200
        clock.now += PAUSE
        assert not await has(keys, "new")


async def test_an_answer_of_the_largest_size_is_accepted(clock: Clock) -> None:
    body = key_set(OLD)
    async with key_server() as server:
        server.body = body + b" " * (MAX_SIZE - len(body))
        async with keys_of(server, clock) as keys:
            assert await has(keys)


async def test_keys_stay_while_the_server_is_gone(clock: Clock) -> None:
    async with key_server(OLD) as server:
        keys = PublishedKeys(server.url, clock=clock)
        await keys.__aenter__()
        assert await has(keys)
    clock.now += OLD_AFTER
    assert await has(keys)
    await keys.__aexit__(None, None, None)


async def test_a_server_that_does_not_answer_is_given_up(clock: Clock) -> None:
    async with key_server(OLD) as server:
        server.hold.clear()
        async with keys_of(server, clock, timeout=0.05) as keys:
            with pytest.raises(Overloaded, match=LATER):
                await has(keys)
            server.hold.set()
            assert keys._http is not None
            keys._http._timeout = aiohttp.ClientTimeout(
                PATIENCE
            )  # on a loaded machine, an answer takes its time
            clock.now += PAUSE_WITHOUT_KEYS
            assert await has(keys)


async def test_a_server_that_drips_is_given_up(clock: Clock) -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.01)

    async with serving(drip) as url, PublishedKeys(url, timeout=0.1, clock=clock) as keys:
        with pytest.raises(Overloaded, match=LATER):
            await has(keys)


async def test_the_end_does_not_wait_for_a_fetch(clock: Clock) -> None:
    async with key_server(OLD) as server:
        server.hold.clear()
        async with asyncio.timeout(20), keys_of(server, clock, timeout=60) as keys:
            waiting = asyncio.create_task(has(keys))
            await server.asked(1)
        with pytest.raises(Overloaded):
            await waiting
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "token keys"]


async def test_failures_are_logged_once_without_the_url(clock: Clock, log: io.StringIO) -> None:
    async with key_server(OLD) as server, PublishedKeys(f"{server.url}?code=s3cret", clock=clock) as keys:
        assert await has(keys)
        for status in (500, 500, 503, 200):
            server.status = status
            clock.now += PAUSE
            with suppress(Overloaded):
                await has(keys, "unknown")
    told = [json.loads(line) for line in log.getvalue().splitlines() if '"broker.' in line]
    assert [(line["event"], line.get("reason")) for line in told] == [
        ("token keys cannot be fetched", "status 500"),
        ("token keys cannot be fetched", "status 503"),
        ("token keys fetched again", None),
    ]
    assert "s3cret" not in json.dumps(told)


# Usable keys


def kids(*members: object) -> list[str | None]:
    return [key.key_id for key in parse_keys(key_set(*members))]


def test_keys_for_other_uses_are_left_out() -> None:
    others = [
        member("RSA other", kid="encrypts", use="enc"),
        member("RSA other", kid="other hash", alg="RS512"),
        member("RSA other", kid="other padding", alg="PS256"),
        member("P-384", kid="other curve"),
        member("RSA-1024", kid="weak"),
        {"kty": "oct", "k": "AAAA", "kid": "shared"},
        {"kty": "OKP", "crv": "X25519", "x": "AAAA", "kid": "exchange"},
        {"kty": "RSA", "kid": "empty"},
    ]
    assert kids(*others, OLD) == ["old"]
    assert kids({**OLD, "use": "sig", "alg": "RS256", "key_ops": ["verify"]}) == ["old"]


def test_a_published_private_key_is_left_out() -> None:
    private = jwt.get_algorithm_by_name("RS256").to_jwk(private_key("RSA other"), as_dict=True)
    assert kids({**private, "kid": "private"}, OLD) == ["old"]


def test_the_first_of_very_many_keys_count() -> None:
    assert len(kids(*[OLD] * (MAX_KEYS + 10))) == MAX_KEYS


@pytest.mark.parametrize(
    "noise", [None, 5, "key", [], {}, {"kty": []}, {"kty": {}, "crv": 1}, {"kty": "RSA", "n": 5, "e": []}]
)
def test_members_that_make_no_sense_are_left_out(noise: object) -> None:
    assert kids(noise, OLD) == ["old"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("AQAB"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@given(
    whole=st.sampled_from([OLD, member("P-256", kid="old"), member("Ed25519", kid="old")]),
    name=st.sampled_from(["kty", "crv", "n", "e", "x", "y", "kid", "use", "alg", "key_ops"]),
    value=JSON,
)
def test_a_damaged_key_is_a_key_or_none_and_never_a_fault(
    whole: dict[str, Any], name: str, value: object
) -> None:
    with suppress(KeySetError):
        assert len(parse_keys(key_set({**whole, name: value}))) == 1
