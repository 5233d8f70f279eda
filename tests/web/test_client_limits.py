"""Clients with limits of their own: at /prepare, at the claim, in /models and /usage."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

import jwt
import pytest

from broker.store.connection import Store
from broker.store.shared_connection import SharedConnection
from broker.web import keys
from tests.broker import QUESTION, running
from tests.money import MODEL, price_list, until
from tests.replies import plain

if TYPE_CHECKING:
    from pathlib import Path

    from tests.broker import Answer, Broker
    from tests.scripted import Call, ScriptedUpstream

ACME = {"Authorization": "Bearer one"}
BETA = {"Authorization": "Bearer two"}
SECRET = "the signing secret of the site is long enough"
CURL = {"Accept": "*/*"}


def table(name: str, key: str, more: str = "") -> str:
    return f'[{name}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n{more}\n'


BOTH = table("beta", "two")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clients.toml"


def write(path: Path, content: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(content)
    fresh.rename(path)


async def changed(path: Path, content: str, *brokers: Broker) -> None:
    """Replace the clients file, and wait until all of these brokers have read it."""
    files = [file for broker in brokers if (file := broker.app[keys.KNOWN_CLIENTS].file) is not None]
    assert len(files) == len(brokers)
    before = [file._tables for file in files]
    write(path, content)

    async def is_read() -> bool:
        return all(file._tables is not old for file, old in zip(files, before, strict=True))

    await until(is_read)


def token(claim: Any = None, **claims: Any) -> dict[str, str]:
    body = {"sub": "a page", "exp": time.time() + 600, **claims}
    if claim is not None:
        body["broker"] = claim
    return {"Authorization": f"Bearer {jwt.encode(body, SECRET, algorithm='HS256')}"}


async def prepared(broker: Broker, headers: dict[str, str], **fields: Any) -> str:
    answer = await broker.post({**QUESTION, **fields}, headers)
    assert answer.status == 201, answer.text
    return str(answer.json["sessionId"])


def check(answer: Answer, status: int, code: str) -> str:
    assert (answer.status, answer.code) == (status, code), answer.text
    return str(answer.json["error"]["message"])


# At /prepare


async def test_a_key_of_the_clients_file_is_needed(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    write(path, table("acme", "one") + BOTH)
    upstream.replies = [plain]
    async with running(valkey_url, upstream, clients_file=path) as broker:
        for headers in ({}, {"Authorization": "Bearer three"}):
            check(await broker.post(headers=headers), 401, "unauthorized")
        events = await broker.read(await prepared(broker, ACME))
        assert events[-1].kind == "done"
        assert (await broker.ask("GET", "/usage", headers=ACME)).json["requests"] == 1
        assert (await broker.ask("GET", "/usage", headers=BETA)).json["requests"] == 0


@pytest.mark.parametrize("more", ["disabled = true", "expires = 2001-01-01T00:00:00Z"])
async def test_a_client_that_may_not_ask_gets_a_401(
    valkey_url: str, upstream: ScriptedUpstream, path: Path, more: str
) -> None:
    write(path, table("acme", "one", more) + BOTH)
    async with running(valkey_url, upstream, clients_file=path) as broker:
        message = check(await broker.post(headers=ACME), 401, "unauthorized")
        assert ("disabled" in message) == ("disabled" in more)
        for path_of in ("/models", "/usage"):
            check(await broker.ask("GET", path_of, headers=ACME), 401, "unauthorized")
        await prepared(broker, BETA)


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The scripts of each round trip to Redis that a /prepare or a claim makes."""
    made: list[tuple[str, ...]] = []
    plain_run, plain_each = Store.run, Store.run_each
    ours = {"hit", "admit", "prepare", "reserve", "claim"}

    async def run(self: Store, calls: Any, **options: Any) -> Any:
        if names := tuple(call.name for call in calls if call.name in ours):
            made.append(names)
        return await plain_run(self, calls, **options)

    async def run_each(self: Store, calls: Any, **options: Any) -> Any:
        if names := tuple(call.name for call in calls if call.name in ours):
            made.append(names)
        return await plain_each(self, calls, **options)

    monkeypatch.setattr(Store, "run", run)
    monkeypatch.setattr(Store, "run_each", run_each)
    return made


async def test_limits_of_a_client_cost_no_round_trip(
    valkey_url: str,
    upstream: ScriptedUpstream,
    path: Path,
    trips: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SharedConnection, "is_prompt", True)  # however slow this machine is
    write(path, table("acme", "one", 'rate = "1000/minute"\nstreams = 3\nmonthly_cost = 9') + BOTH)
    upstream.models = price_list()
    ways: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({}, {}),
        ({"clients_file": path}, ACME),
        ({"clients_file": path}, BETA),
        ({"jwt_secret": SECRET}, token({"streams": 2, "monthly_cost": 3})),
    ]
    seen = []
    for settings, headers in ways:
        upstream.replies = [plain]
        async with running(valkey_url, upstream, **settings) as broker:
            await broker.ask("GET", "/models", headers=headers)
            await broker.until_clock_is_known()
            trips.clear()
            await broker.read(await prepared(broker, headers, max_tokens=20))
            seen.append(list(trips))
    assert seen == [[("admit", "admit", "hit", "prepare"), ("reserve", "claim")]] * len(ways)


async def test_models_of_a_client_narrow_those_of_the_service(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    write(path, table("acme", "one", 'models = ["scripted/*", "other/b"]') + BOTH)
    upstream.models = price_list(**{"other/a": None, "other/b": None, "third/c": None})
    settings: dict[str, Any] = {"clients_file": path, "jwt_secret": SECRET}
    async with running(valkey_url, upstream, allowed_models="scripted/*,other/*", **settings) as broker:
        await prepared(broker, ACME, model="other/b")
        for body in ({"model": "other/a"}, {"models": ["other/b", "other/a"]}, {"model": "third/c"}):
            check(await broker.post({**QUESTION, **body}, ACME), 403, "model_not_allowed")
        await prepared(broker, BETA, model="other/a")
        narrow = token({"models": ["*/b"]})
        await prepared(broker, narrow, model="other/b")
        check(await broker.post({**QUESTION, "model": "third/b"}, narrow), 403, "model_not_allowed")
        seen = {}
        for name, headers in (("acme", ACME), ("beta", BETA), ("page", narrow)):
            listed = (await broker.ask("GET", "/models", headers=headers)).json["data"]
            seen[name] = {entry["id"] for entry in listed}
        assert seen == {
            "acme": {MODEL, "other/b"},
            "beta": {MODEL, "other/a", "other/b"},
            "page": {"other/b"},
        }


async def test_origins_of_a_client_narrow_prepare(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    mine, other = "https://mine.example", "https://other.example"
    write(path, table("acme", "one", f'origins = ["{mine}", "https://unlisted.example"]') + BOTH)
    async with running(valkey_url, upstream, clients_file=path, cors_origins=(mine, other)) as broker:
        assert (await broker.post(headers={**ACME, "Origin": mine})).status == 201
        assert (await broker.post(headers=ACME)).status == 201  # not from a page
        assert (await broker.post(headers={**BETA, "Origin": other})).status == 201
        refused = await broker.post(headers={**ACME, "Origin": other})
        check(refused, 403, "origin_not_allowed")
        assert refused.headers["Access-Control-Allow-Origin"] == other  # so that the page can read why
        unlisted = await broker.post(headers={**ACME, "Origin": "https://unlisted.example"})
        check(unlisted, 403, "origin_not_allowed")
        own = broker.url.removesuffix("/ai")
        check(await broker.post(headers={**ACME, "Origin": own}), 403, "origin_not_allowed")


async def test_the_rate_of_a_client_is_its_own(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    write(path, table("acme", "one", 'rate = "3/hour"') + BOTH)
    async with running(valkey_url, upstream, clients_file=path, rate_limit="1/minute") as broker:
        answers = [await broker.post(headers=ACME) for _ in range(4)]
        assert [answer.status for answer in answers] == [201, 201, 201, 429]
        assert answers[3].headers["RateLimit-Policy"] == '"prepare";q=3;w=3600'
        assert [(await broker.post(headers=BETA)).status for _ in range(2)] == [201, 429]
        await changed(path, table("acme", "one", 'rate = "9/hour"'), broker)
        assert (await broker.post(headers=ACME)).status == 201  # a higher one counts at once


async def test_a_token_is_held_to_its_rate_and_the_services(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, jwt_secret=SECRET, rate_limit="3/minute") as broker:
        slow, many = token({"rate": "2/minute"}, sub="slow"), token({"rate": "100/day"}, sub="many")
        assert [(await broker.post(headers=slow)).status for _ in range(3)] == [201, 201, 429]
        answers = [await broker.post(headers=many) for _ in range(4)]
        assert [answer.status for answer in answers] == [201, 201, 201, 429]
        assert answers[0].headers["RateLimit-Policy"] == '"prepare";q=3;w=60'
        day = token({"rate": "2/day"}, sub="day")
        answers = [await broker.post(headers=day) for _ in range(3)]
        assert answers[2].headers["RateLimit-Policy"] == '"prepare";q=2;w=86400'


async def test_the_output_cap_of_a_client_is_sent_upstream(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    write(path, table("acme", "one", "max_output_tokens = 5000") + BOTH)
    settings: dict[str, Any] = {"clients_file": path, "jwt_secret": SECRET, "max_output_tokens": 300}
    async with running(valkey_url, upstream, **settings) as broker:
        for headers, most in (
            (ACME, 5000),
            (BETA, 300),
            (token({"max_output_tokens": 20}), 20),
            (token({"max_output_tokens": 5000}), 300),
        ):
            upstream.replies = [plain]
            answer = await broker.post({**QUESTION, "max_tokens": 100_000}, headers)
            assert answer.json["maxOutputTokens"] == most
            await broker.read(answer.json["sessionId"])
            assert upstream.calls[-1].body["max_tokens"] == most


async def test_budgets_of_a_client_are_its_own(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    write(path, table("acme", "one", 'daily_cost = 5\nmonthly_cost = "0.5"') + BOTH)
    upstream.models = price_list(**{"free/x": None})
    settings: dict[str, Any] = {"clients_file": path, "daily_tokens": 5000}
    async with running(valkey_url, upstream, **settings) as broker:
        usage = (await broker.ask("GET", "/usage", headers=ACME)).json
        assert usage["limits"]["tokens"]["limit"] == 5000
        assert usage["limits"]["cost"] == {"limit": 5, "left": 5}
        assert usage["month"]["limits"]["cost"] == {"limit": 0.5, "left": 0.5}
        assert (await broker.ask("GET", "/usage", headers=BETA)).json["limits"]["cost"]["limit"] is None
        # A budget in money needs prices, for its client alone.
        check(await broker.post({**QUESTION, "model": "free/x"}, ACME), 403, "model_not_allowed")
        await prepared(broker, BETA, model="free/x", max_tokens=20)
        upstream.replies = [plain]
        await broker.read(await prepared(broker, ACME, max_tokens=20))
        assert "max_price" in upstream.calls[-1].body["provider"]


async def test_a_worst_case_above_an_own_budget_is_a_422(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    write(path, table("acme", "one", "monthly_cost = 0.0005") + BOTH)
    upstream.models = price_list()
    async with running(valkey_url, upstream, clients_file=path) as broker:
        refused = await broker.post({**QUESTION, "max_tokens": 1000}, ACME)
        check(refused, 422, "invalid_request")
        [detail] = refused.json["error"]["details"]
        assert detail["worstCase"] > detail["limit"] == 0.0005
        assert "of a month" in detail["message"]
        await prepared(broker, BETA, max_tokens=1000)


async def test_system_messages_of_service_client_and_page_are_in_order(
    valkey_url: str, upstream: ScriptedUpstream, path: Path, tmp_path: Path
) -> None:
    write(path, table("acme", "one", 'system = "Of the client."') + BOTH)
    write(tmp_path / "system.txt", "Of the service.")
    page = [{"role": "system", "content": "Of the page."}, *QUESTION["messages"]]
    settings: dict[str, Any] = {"clients_file": path, "system_file": tmp_path / "system.txt"}
    async with running(valkey_url, upstream, **settings) as broker:

        async def sent(headers: dict[str, str], **fields: Any) -> Any:
            upstream.replies = [plain]
            answer = await broker.post({"model": MODEL, **fields}, headers)
            await broker.read(answer.json["sessionId"])
            return upstream.calls[-1].body

        texts = [each["content"] for each in (await sent(ACME, messages=page))["messages"]]
        assert texts[:3] == ["Of the service.", "Of the client.", "Of the page."]
        texts = [each["content"] for each in (await sent(BETA, messages=page))["messages"]]
        assert texts[:2] == ["Of the service.", "Of the page."]
        body = await sent(ACME, input="Hello", instructions="Of the page.")
        assert body["instructions"] == "Of the service.\n\nOf the client.\n\nOf the page."
        body = await sent(ACME, input="Hello")
        assert body["instructions"] == "Of the service.\n\nOf the client."


# Tokens


async def test_a_wrong_claim_is_a_401_that_says_why(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, jwt_secret=SECRET) as broker:
        message = check(await broker.post(headers=token({"streams": "2"})), 401, "unauthorized")
        assert message == (
            "The claim broker of this token is not valid: streams must be a whole number, 1 or more."
        )
        check(await broker.ask("GET", "/models", headers=token({"system": "x"})), 401, "unauthorized")
        for claim in ({"disabled": True}, {"expires": 1}, {"models": ["\ud800"]}):
            check(await broker.post(headers=token(claim)), 401, "unauthorized")


async def test_the_limits_of_a_token_count_at_the_claim(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, jwt_secret=SECRET) as broker:
        one = token({"streams": 1})
        first, second = await prepared(broker, one), await prepared(broker, one)
        async with broker.stream(first) as connection:
            call = await upstream.call()
            [event] = await broker.read(second)
            assert (event.kind, event.json["position"]) == ("queued", 1)
            plain(call)
            await connection.rest()
        await prepared(broker, token())


async def test_a_month_that_others_have_reserved_waits_at_the_claim(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.models = price_list()
    async with running(valkey_url, upstream, jwt_secret=SECRET) as broker:
        narrow = token({"monthly_cost": "0.0002"})
        first, second = [await prepared(broker, narrow, max_tokens=100) for _ in range(2)]
        async with broker.stream(first) as connection:
            call = await upstream.call()
            [event] = await broker.read(second)
            assert (event.kind, event.json["code"]) == ("error", "budget_exceeded")
            assert event.json["final"] is False
            assert "month" in event.json["message"]
            plain(call)
            await connection.rest()


# A client that is revoked


REVOKED = {
    "removed": BOTH,
    "disabled": table("acme", "one", "disabled = true") + BOTH,
    "expired": table("acme", "one", "expires = 2001-01-01") + BOTH,
}


@pytest.mark.parametrize("how", REVOKED)
async def test_sessions_of_a_revoked_client_are_refused(
    valkey_url: str, upstream: ScriptedUpstream, path: Path, how: str
) -> None:
    write(path, table("acme", "one") + BOTH)
    settings: dict[str, Any] = {"clients_file": path}
    async with (
        running(valkey_url, upstream, **settings) as broker,
        running(valkey_url, upstream, **settings) as other,
    ):
        session, running_one = await prepared(broker, ACME), await prepared(broker, ACME)
        async with broker.stream(running_one) as connection:
            call = await upstream.call()
            await changed(path, REVOKED[how], broker, other)
            check(await broker.post(headers=ACME), 401, "unauthorized")
            for each in (broker, other):
                [event] = await each.read(session)
                assert (event.kind, event.id) == ("error", "1-1.end")
                assert (event.json["code"], event.json["final"]) == ("unauthorized", True)
                assert event.json["retryable"] is False
                refused = await each.ask("GET", f"/stream/{session}", headers=CURL)
                check(refused, 401, "unauthorized")
            plain(call)  # what runs already goes on
            assert (await connection.rest())[-1].kind == "done"
        assert len(upstream.calls) == 1
        upstream.replies = [plain]
        assert (await broker.read(await prepared(broker, BETA)))[-1].kind == "done"


async def test_a_session_that_runs_elsewhere_is_shown_to_its_viewers(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    """The worker that prepared it believes that it is prepared, and its client is revoked."""
    write(path, table("acme", "one") + BOTH)
    settings: dict[str, Any] = {"clients_file": path}
    async with (
        running(valkey_url, upstream, **settings) as broker,
        running(valkey_url, upstream, **settings) as other,
    ):
        session = await prepared(broker, ACME)
        async with other.stream(session) as connection:
            call = await upstream.call()
            await changed(path, BOTH, broker)
            async with broker.stream(session) as second:
                plain(call)
                assert (await second.rest())[-1].kind == "done"
            await connection.rest()


async def test_a_client_that_comes_back_can_claim_its_sessions(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    write(path, table("acme", "one") + BOTH)
    async with running(valkey_url, upstream, clients_file=path) as broker:
        session = await prepared(broker, ACME)
        await changed(path, BOTH, broker)
        [event] = await broker.read(session)
        assert event.json["code"] == "unauthorized"
        await changed(path, table("acme", "one"), broker)
        upstream.replies = [plain]
        assert (await broker.read(session))[-1].kind == "done"


async def test_limits_of_the_file_are_those_at_the_claim(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    def queue_free(call: Call) -> None:
        call.open()

    write(path, table("acme", "one", "streams = 2") + BOTH)
    upstream.replies = [queue_free]
    async with running(valkey_url, upstream, clients_file=path) as broker:
        sessions = [await prepared(broker, ACME) for _ in range(2)]
        async with broker.stream(sessions[0]):
            await upstream.call()
            await changed(path, table("acme", "one", "streams = 1"), broker)
            [event] = await broker.read(sessions[1])
            assert event.kind == "queued"
            await changed(path, table("acme", "one", "streams = 2"), broker)
            async with broker.stream(sessions[1]):
                await upstream.call(2)


async def test_a_removed_api_key_ends_its_sessions_too(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    write(path, "acme:one,beta:two")
    keys_of = {"api_keys": "acme:one,beta:two", "api_keys_file": path}
    async with running(valkey_url, upstream, **keys_of) as broker:
        session = await prepared(broker, ACME)
        write(path, "beta:two")

        async def is_refused() -> bool:
            return (await broker.post(headers=ACME)).status == 401

        await until(is_refused)
        [event] = await broker.read(session)
        assert (event.json["code"], event.json["final"]) == ("unauthorized", True)
