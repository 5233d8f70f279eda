"""The file of the system message: its contents, and that it is read again when it changes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from broker.cli.serve import require
from broker.settings import Settings, SettingsError, open_door
from broker.system_message import SystemMessage
from broker.watched_file import LOOK_EVERY
from tests.clock import Clock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "system.txt"
    path.write_text("Only weather.\n")
    return path


def replace(path: Path, content: bytes) -> None:
    """Put a new file in the place of the old, as careful people do."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.rename(path)


def test_the_text_of_the_file_is_the_system_message(path: Path) -> None:
    assert SystemMessage(path).text == "Only weather."


def test_without_a_file_there_is_no_system_message() -> None:
    system = SystemMessage(None)
    system.read_again()
    assert system.text is None


BAD_FILES = [
    (None, "a file that can be read: No such file or directory"),
    (b" \n", "a file that is not empty"),
    (b"\xff", "a file of UTF-8 text"),
    (b"x" * 65_537, "a file of at most 65536 bytes"),
]


@pytest.mark.parametrize(("content", "told"), BAD_FILES)
def test_a_bad_file_ends_the_start_with_one_line(path: Path, content: bytes | None, told: str) -> None:
    path.unlink() if content is None else path.write_bytes(content)
    settings = Settings(system_file=path)
    with pytest.raises(SettingsError) as caught:
        require(settings, rehearsal=True, embedded=True)
    assert str(caught.value) == f"BROKER_SYSTEM_FILE must name {told}"
    with pytest.raises(SettingsError):
        SystemMessage(path)


def test_a_changed_file_counts_within_a_second(path: Path, clock: Clock) -> None:
    system = SystemMessage(path, clock=clock)
    assert system.text == "Only weather."
    replace(path, b"Only sports.")
    assert system.text == "Only weather."
    clock.now += LOOK_EVERY
    assert system.text == "Only sports."


def test_a_hangup_reads_the_file_at_once(path: Path, clock: Clock) -> None:
    system = SystemMessage(path, clock=clock)
    assert system.text == "Only weather."
    replace(path, b"Only sports.")
    system.read_again()
    assert system.text == "Only sports."


@pytest.mark.parametrize(("content", "told"), BAD_FILES)
def test_a_file_that_became_bad_leaves_the_old_text(
    path: Path, clock: Clock, log: io.StringIO, content: bytes | None, told: str
) -> None:
    system = SystemMessage(path, clock=clock)
    path.unlink() if content is None else replace(path, content)
    for _ in range(3):
        assert system.text == "Only weather."
        clock.now += LOOK_EVERY
    (line,) = [json.loads(line) for line in log.getvalue().splitlines()]
    assert line["event"] == "the system message cannot be read again, the old one stays"
    assert line["reason"] == f"BROKER_SYSTEM_FILE must name {told}"
    replace(path, b"Only sports.")
    assert system.text == "Only sports."


def test_the_text_is_not_logged(path: Path, clock: Clock, log: io.StringIO) -> None:
    system = SystemMessage(path, clock=clock)
    replace(path, "Nur Fußball.".encode())
    assert system.text == "Nur Fußball."
    system.read_again()
    (line,) = [json.loads(line) for line in log.getvalue().splitlines()]
    assert (line["event"], line["bytes"]) == ("system message changed", 13)
    assert "Nur" not in log.getvalue()


OPEN: dict[str, Any] = {"host": "0.0.0.0"}


def test_an_open_door_without_a_system_file_is_a_free_model() -> None:
    warning = open_door(Settings(**OPEN))
    assert warning is not None
    assert "as a free model" in warning


def test_an_open_broker_with_a_system_file_is_still_reported(path: Path) -> None:
    warning = open_door(Settings(**OPEN, system_file=path))
    assert warning is not None
    assert warning.startswith("anybody who can connect can spend")
    assert "free model" not in warning


@pytest.mark.parametrize(
    "closed", [{"host": "127.0.0.1"}, {"api_keys": "ann:one"}, {"total_daily_cost": "5"}], ids=str
)
def test_a_closed_door_is_not_warned_of(closed: dict[str, Any]) -> None:
    assert open_door(Settings(**{**OPEN, **closed})) is None
