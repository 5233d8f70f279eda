"""What holds for every Lua script: named keys and arguments, one tag, a list of the scripts that there are."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import pytest

from broker.store.connection import Script, Store, script_text
from tests.broker import running
from tests.money import MODEL, price_list
from tests.scripted import Call, ScriptedUpstream

LUA = resources.files("broker.store").joinpath("lua")
SCRIPTS = sorted(file.name.removesuffix(".lua") for file in LUA.iterdir() if file.name != "prelude.lua")
TAG = re.compile(r"\{(.+?)\}")


def header(name: str) -> str:
    return LUA.joinpath(f"{name}.lua").read_text(encoding="utf-8")


def constants(name: str) -> dict[str, int]:
    found = re.search(r"^-- Constants: (.*(?:\n--     .*)*)", header(name), re.MULTILINE)
    return dict.fromkeys(re.findall(r"[A-Z_]+", found[1]), 1) if found else {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_names_its_keys_and_what_it_returns(name: str) -> None:
    text = script_text(name, constants(name), before="local take, look" if name == "hit" else "")
    assert text.keys
    assert "-- Returns" in header(name) or name == "accept_estimate"
    body = header(name).partition("-- Keys")[2]
    assert "KEYS[" not in body


@pytest.mark.parametrize("name", SCRIPTS)
async def test_a_script_is_loaded_by_the_server(store: Store, name: str) -> None:
    text = script_text(name, constants(name), before="local take, look" if name == "hit" else "")
    assert await store.redis.script_load(text.lua)


def test_a_call_with_other_names_is_a_bug(store: Store) -> None:
    script = store.script("refuse")
    with pytest.raises(TypeError, match="claim_id"):
        script.call(session="s")
    with pytest.raises(TypeError, match="claim_id"):
        script.call(session="s", claim_id="c", other="x")


@pytest.mark.parametrize("batch", [b"", b"\r\n$1\r\n", bytes(range(256)) * 500])
def test_a_call_with_a_kept_beginning_is_the_same_call(store: Store, batch: bytes) -> None:
    append = store.script("append", {"RUNNING_S": 1, "CHANNELS": "c"})
    keys = {"session": "{s}\u00e9", "events": "{s}e", "viewers": "{s}v"}
    whole = append.call(**keys, claim_id="claim", first=7, newest=1234, batch=batch)
    beginning = append.begin(*keys.values(), "claim")
    assert append.call_from(beginning, b"7", b"1234", batch, key=keys["session"]) == whole


def test_a_script_without_its_constants_is_a_bug(store: Store) -> None:
    with pytest.raises(TypeError, match="RUNNING_S"):
        store.script("claim")


async def test_a_constant_may_hold_any_text(store: Store) -> None:
    odd = "it's \\ a\nprefix"
    script = store.script("cancel", {"KEEP_S": 1, "REPLAY_S": 1, "CHANNELS": odd})
    found: Any = await store.redis.eval(f"{script.text.lua.partition('local session')[0]} return CHANNELS", 0)
    assert found.decode() == odd


def hello(call: Call) -> None:
    call.open()
    call.chunk("Hello", finish="stop")
    call.usage(prompt_tokens=3, completion_tokens=4)
    call.done()


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The tags of the keys of every call that is made."""
    seen: list[set[str]] = []
    plain = Script.call

    def call(self: Script, **values: Any) -> Any:
        keys = [name.removesuffix("...") for name in self.text.keys]
        flat: list[str] = []
        for key in keys:
            flat += values[key] if isinstance(values[key], list) else [values[key]]
        found = {match[1] for key in flat if (match := TAG.search(key))}
        seen.append(found if all(TAG.search(key) for key in flat) or len(flat) == 1 else {"none", "some"})
        return plain(self, **values)

    monkeypatch.setattr(Script, "call", call)
    return seen


async def test_no_script_touches_two_tags(
    valkey_url: str, upstream: ScriptedUpstream, tags: list[set[str]]
) -> None:
    """Two whole sessions of two clients, with every limit on."""
    upstream.models = price_list()
    limits = {
        "total_daily_cost": "1",
        "daily_cost": "1",
        "daily_tokens": 10**6,
        "api_keys": "ann:one,bob:two",
    }
    async with running(valkey_url, upstream, **limits) as broker:
        await broker.ask("GET", "/models", headers={"Authorization": "Bearer one"})
        upstream.replies = [hello]
        for key in ("one", "two"):
            answer = await broker.post(
                {"model": MODEL, "messages": [{"role": "user", "content": "Say it."}]},
                headers={"Authorization": f"Bearer {key}", "Idempotency-Key": key},
            )
            assert answer.status == 201, answer.text
            assert (await broker.read(answer.json["sessionId"]))[-1].kind == "done"
    assert len(tags) > 20
    assert [found for found in tags if len(found) > 1] == []
