"""The clients file: what it may hold, and how a change takes effect."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.core.client_limits import ClientLimits
from broker.core.errors import Unauthorized
from broker.identity.api_keys import ApiKeys
from broker.identity.clients_file import LARGEST, MAX_CLIENTS, ClientsFile, _tables, read_clients_file
from broker.identity.known_clients import Known, KnownClients
from broker.setting_kinds import ApiKey
from broker.settings import Settings, SettingsError
from broker.watched_file import WatchedFile
from tests.clock import Clock


def sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def table(name: str, key: str, more: str = "") -> str:
    return f'[{name}]\nsha256 = "{sha(key)}"\n{more}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "clients.toml"
    path.write_text(table("acme", "one"))
    return path


def complaint(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError) as error:
        read_clients_file(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("BROKER_CLIENTS_FILE")
    return str(error.value).removeprefix("BROKER_CLIENTS_FILE").strip()


# Contents


def test_a_key_finds_its_client(path: Path) -> None:
    path.write_text(
        table("acme", "one", "streams = 2")
        + f'["b.c@d+e-f_9"]\nsha256 = ["{sha("two")}", "{sha("three").upper()}"]\n'
    )
    file = ClientsFile(path)
    assert len(file) == 2
    assert [file.owner_of(key) for key in ("one", "two", "three")] == ["acme", "b.c@d+e-f_9", "b.c@d+e-f_9"]
    assert file.limits_of("acme") == ClientLimits(narrows=False, streams=2)
    for unknown in ("One", "", sha("one"), "one\udcff", "x" * 100_000):
        assert file.owner_of(unknown) is None


def test_an_empty_file_has_no_clients(path: Path) -> None:
    path.write_text("# none yet\n")
    assert len(ClientsFile(path)) == 0


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[acme\n", "must name a TOML file: "),
        ("a = 1\n[acme]\n", ": [a] must be a table"),
        ("[acme]\nstreams = 1\n", ": [acme] must have sha256"),
        ('[a.b]\nsha256 = ""\n', ': [a] must have sha256; a name with dots needs quotes, such as ["a.b"]'),
        ('["a b"]\nsha256 = ""\n', ": [a b] must be a name of 1 to 64 letters"),
        ('["a\\nb"]\n', ": [a?b] must be a name of 1 to 64 letters"),
        ('[acme]\nsha256 = "secret"\n', ": [acme] sha256 must be the SHA-256 of a key in 64 hexadecimal"),
        ("[acme]\nsha256 = 1\n", ": [acme] sha256 must be the SHA-256"),
        (f'[acme]\nsha256 = ["{"0" * 64}", 1]\n', ": [acme] sha256 must be the SHA-256"),
        (
            table("acme", "one") + table("beta", "one"),
            ": [beta] sha256 must be of a key of its own, not of [acme]",
        ),
        (table("acme", "one", 'rate = "often"'), ': [acme] rate must be a rate such as "30/minute"'),
        (table("acme", "one", 'key = "secret"'), ": [acme] key is not the name of a limit"),
        (table("acme", "one", "daily_cost = nan"), ": [acme] daily_cost must be an amount in USD"),
        (table("acme", "one") + table("acme", "two"), "must name a TOML file: "),
        ("a = " + "[" * 100_000, "must name a TOML file: "),
        ("a = " + "9" * 10_000, "must name a TOML file: "),
        (b"\xff", "must name a file of UTF-8 text"),
        (b"#" * (LARGEST + 1), f"must name a file of at most {LARGEST} bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_cannot_be_used_is_refused(path: Path, content: str | bytes, told: str) -> None:
    found = complaint(path, content)
    assert found.startswith(told)
    assert "secret" not in found
    assert sha("one") not in found


def test_a_syntax_error_says_the_line(path: Path) -> None:
    assert "(at line 4, column 6)" in complaint(path, "\n[acme]\n\nrate 5\n")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="must name a file that can be read: No such file"):
        read_clients_file(tmp_path / "clients.toml")


def test_the_number_of_clients_is_bounded(path: Path) -> None:
    path.write_text("[c0]\nsha256 = []\n[c1]\nsha256 = []\n")
    assert len(read_clients_file(path).limits) == 2
    # As the parser gives them: it takes seconds for so many.
    tables: dict[str, Any] = {f"c{n}": {"sha256": []} for n in range(MAX_CLIENTS + 1)}
    with pytest.raises(SettingsError, match=f"must have at most {MAX_CLIENTS} clients"):
        _tables(tables)
    del tables["c0"]
    assert len(_tables(tables).limits) == MAX_CLIENTS


# Changes


@asynccontextmanager
async def watched(file: ClientsFile) -> AsyncIterator[None]:
    task = asyncio.create_task(file.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_lines(log: io.StringIO, event: str, count: int = 1) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            lines = [json.loads(line) for line in log.getvalue().splitlines()]
            found = [line for line in lines if line["event"] == event]
            if len(found) >= count:
                return dict(found[-1])
            await asyncio.sleep(0.02)


def replace_file(path: Path, content: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(content)
    fresh.rename(path)


def append(path: Path, content: str) -> None:
    """Change the file in place, as an editor may."""
    with path.open("a") as opened:
        opened.write(content)


def remove(path: Path) -> None:
    path.unlink()


async def test_a_changed_file_is_read_again(path: Path, log: io.StringIO) -> None:
    file = ClientsFile(path)
    async with watched(file):
        replace_file(path, table("beta", "two"))
        assert (await until_lines(log, "clients changed"))["count"] == 1
        assert file.owner_of("one") is None
        assert file.owner_of("two") is not None
        append(path, table("acme", "one"))
        assert (await until_lines(log, "clients changed", 2))["count"] == 2
        assert file.owner_of("one") is not None


async def test_a_file_that_did_not_change_is_read_once(path: Path) -> None:
    reads: list[Path] = []

    def read(path: Path) -> str:
        reads.append(path)
        return path.read_text()

    clock = Clock()
    file = WatchedFile(path, read, refusal="unusable", clock=clock)
    assert file.read() == table("acme", "one")
    for _ in range(3):
        await clock.advance(60)
        assert file.changed() is None
    assert len(reads) == 1
    replace_file(path, table("beta", "two"))
    await clock.advance(60)
    assert file.changed() == table("beta", "two")


async def test_a_broken_file_keeps_the_clients_and_warns(path: Path, log: io.StringIO) -> None:
    file = ClientsFile(path)
    async with watched(file):
        replace_file(path, table("acme", "one", "streams = 0"))
        line = await until_lines(log, "the clients file is unusable, the old clients stay")
        assert line["level"] == "warning"
        assert line["reason"] == "BROKER_CLIENTS_FILE: [acme] streams must be a whole number, 1 or more"
        assert file.owner_of("one") is not None
        remove(path)
        await until_lines(log, "the clients file is unusable, the old clients stay", 2)
        assert file.owner_of("one") is not None
        replace_file(path, table("beta", "two"))
        await until_lines(log, "clients changed")
        assert file.owner_of("one") is None


async def test_asking_reads_a_file_that_seems_unchanged(path: Path, log: io.StringIO) -> None:
    file = ClientsFile(path, clock=Clock())  # whose time never comes
    replace_file(path, table("acme", "two"))
    async with watched(file):
        file.ask()
        await until_lines(log, "clients changed")
    assert file.owner_of("two") is not None


# Together with API keys


KEYS = Settings(api_keys="acme:old,other:else").api_keys


def test_limits_of_a_name_hold_for_its_api_keys_too(path: Path) -> None:
    path.write_text(table("acme", "new", "streams = 2"))
    known = KnownClients(KEYS, None, path)
    limits = ClientLimits(narrows=False, streams=2)
    assert known.owner_of("old") == known.owner_of("new") == Known("acme", limits)
    assert known.owner_of("else") == Known("other", None)
    assert known.owner_of("unknown") is None
    assert known.limits_now("key:acme", None) == limits
    assert known.limits_now("key:other", None) is None


@pytest.mark.parametrize("more", ["disabled = true", "expires = 2001-01-01"])
def test_a_client_that_may_not_ask_is_refused(path: Path, more: str) -> None:
    path.write_text(table("acme", "new", more))
    known = KnownClients(KEYS, None, path)
    for key in ("old", "new"):
        with pytest.raises(Unauthorized):
            known.owner_of(key)
    with pytest.raises(Unauthorized):
        known.limits_now("key:acme", None)


def test_a_client_without_a_key_is_refused_at_the_claim(path: Path) -> None:
    known = KnownClients(KEYS, None, path)
    with pytest.raises(Unauthorized):
        known.limits_now("key:gone", None)
    known.replace_api_keys([], None)
    with pytest.raises(Unauthorized):
        known.limits_now("key:other", None)
    assert known.limits_now("key:acme", None) is not None


def test_only_names_of_keys_are_looked_up_at_the_claim(path: Path) -> None:
    known = KnownClients((), None, path)
    stored = ClientLimits(streams=1)
    for name in ("sub:0123", "addr:0123", "acme"):
        assert known.limits_now(name, None) is None
        assert known.limits_now(name, stored) == stored
    assert KnownClients().limits_now("key:gone", None) is None


def test_the_limits_of_a_token_end_with_their_time() -> None:
    known = KnownClients(now=lambda: 100.0)
    stored = ClientLimits(expires=100.5)
    assert known.limits_now("sub:0123", stored) == stored
    with pytest.raises(Unauthorized):
        KnownClients(now=lambda: 100.5).limits_now("sub:0123", stored)


def test_api_keys_know_their_owners() -> None:
    keys = ApiKeys(KEYS)
    assert keys.has_owner("acme")
    assert not keys.has_owner("gone")
    keys.replace([ApiKey("gone", KEYS[0].key)], None)
    assert keys.has_owner("gone")
    assert not keys.has_owner("acme")
