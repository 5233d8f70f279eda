"""Whose an API key is, and that a file of keys is read again when it changes."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from broker.identity.api_keys import ApiKeys
from broker.setting_kinds import ApiKey
from broker.watched_file import LOOK_EVERY

if TYPE_CHECKING:
    from tests.clock import Clock


def pairs(**keys: str) -> list[ApiKey]:
    return [ApiKey(name, SecretStr(key)) for name, key in keys.items()]


def replace(path: Path, text: str) -> None:
    """Put a new file in the place of the old, as careful people do."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("ann:one\nbob:two\n")
    return path


@pytest.fixture
def keys(path: Path, clock: Clock) -> ApiKeys:
    return ApiKeys(pairs(ann="one", bob="two"), path, clock=clock)


def test_a_key_has_an_owner() -> None:
    keys = ApiKeys(pairs(ann="one", bob="two"))
    assert [keys.owner_of(key) for key in ("one", "two")] == ["ann", "bob"]


@pytest.mark.parametrize("key", ["", "on", "onee", "ONE", "one ", "ann", "ann:one", "\udcff", "x" * 8000])
def test_anything_else_has_none(key: str) -> None:
    assert ApiKeys(pairs(ann="one", bob="two")).owner_of(key) is None


def test_without_keys_nobody_owns_any() -> None:
    assert ApiKeys([]).owner_of("") is None


def test_somebody_may_have_several_keys() -> None:
    keys = ApiKeys([*pairs(ann="one"), *pairs(ann="new")])
    assert [keys.owner_of(key) for key in ("one", "new")] == ["ann", "ann"]


def test_a_replaced_file_counts(keys: ApiKeys, path: Path, clock: Clock) -> None:
    assert keys.owner_of("one") == "ann"
    replace(path, "ann:three, eve:four")
    clock.now += LOOK_EVERY
    assert [keys.owner_of(key) for key in ("one", "two", "three", "four")] == [None, None, "ann", "eve"]


def test_a_file_that_is_written_in_place_counts(keys: ApiKeys, path: Path, clock: Clock) -> None:
    assert keys.owner_of("one") == "ann"
    path.write_text("ann:six\nbob:two\n")
    os.utime(path, ns=(1, 1))
    clock.now += LOOK_EVERY
    assert [keys.owner_of(key) for key in ("one", "six")] == [None, "ann"]


def test_the_file_is_checked_only_from_time_to_time(keys: ApiKeys, path: Path, clock: Clock) -> None:
    assert keys.owner_of("one") == "ann"
    replace(path, "ann:three")
    clock.now += LOOK_EVERY - 0.1
    assert keys.owner_of("one") == "ann"
    clock.now += 0.1
    assert keys.owner_of("one") is None


def test_a_file_that_changed_since_the_start_counts_at_once(path: Path, clock: Clock) -> None:
    keys = ApiKeys(pairs(ann="one"), path, clock=clock)
    replace(path, "ann:three")
    assert keys.owner_of("three") == "ann"


def test_an_emptied_file_lets_nobody_in(keys: ApiKeys, path: Path, clock: Clock) -> None:
    assert keys.owner_of("one") == "ann"
    replace(path, "\n")
    clock.now += LOOK_EVERY
    assert [keys.owner_of(key) for key in ("one", "")] == [None, None]


@pytest.mark.parametrize(
    "text", ["gibberish-s3cret", "ann:", ":three", "ann:a b", "a,b:c", "a:one\nb:one", "é:one", ",\n"]
)
def test_a_broken_file_keeps_the_old_keys_and_is_logged_once(
    text: str, keys: ApiKeys, path: Path, clock: Clock, log: io.StringIO
) -> None:
    replace(path, text)
    for _ in range(3):
        assert [keys.owner_of(key) for key in ("one", "two", "three")] == ["ann", "bob", None]
        clock.now += LOOK_EVERY
    (line,) = [json.loads(line) for line in log.getvalue().splitlines()]
    assert line["level"] == "warning"
    assert line["event"] == "the file of api keys is unusable, the old keys stay"
    assert line["reason"].startswith("BROKER_API_KEYS_FILE must be a comma list of name:key pairs")
    assert "s3cret" not in log.getvalue()


def test_a_lost_or_huge_file_leaves_the_old_keys(
    keys: ApiKeys, path: Path, clock: Clock, log: io.StringIO
) -> None:
    path.unlink()
    assert keys.owner_of("one") == "ann"
    path.write_bytes(b"\xff\xfe")
    clock.now += LOOK_EVERY
    assert keys.owner_of("one") == "ann"
    path.write_text("ann:three\n" * 10_000)
    clock.now += LOOK_EVERY
    assert keys.owner_of("one") == "ann"
    assert [json.loads(line)["reason"] for line in log.getvalue().splitlines()] == [
        "BROKER_API_KEYS_FILE must name a file that can be read: No such file or directory",
        "BROKER_API_KEYS_FILE must name a file of UTF-8 text",
        "BROKER_API_KEYS_FILE must name a file of at most 65536 bytes",
    ]


def test_a_broken_file_that_is_mended_counts(
    keys: ApiKeys, path: Path, clock: Clock, log: io.StringIO
) -> None:
    replace(path, "gibberish")
    assert keys.owner_of("one") == "ann"
    replace(path, "ann:three")
    clock.now += LOOK_EVERY
    assert [keys.owner_of(key) for key in ("one", "three")] == [None, "ann"]
    assert json.loads(log.getvalue().splitlines()[-1])["event"] == "api keys changed"
    assert "three" not in log.getvalue()


def test_an_unchanged_file_is_not_logged(keys: ApiKeys, path: Path, clock: Clock, log: io.StringIO) -> None:
    assert keys.owner_of("one") == "ann"
    replace(path, "ann:one,bob:two")
    clock.now += LOOK_EVERY
    assert keys.owner_of("one") == "ann"
    assert log.getvalue() == ""
