"""`broker keys new`: a key, and its table for the clients file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from broker.cli.keys import new, table
from broker.identity.clients_file import ClientsFile
from tests.system.harness import clean_environment


def test_a_new_key_opens_with_its_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "broker", "keys", "new", "acme"],
        cwd=tmp_path,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0
    key, _, printed = done.stdout.partition("\n\n")
    assert len(key) > 40
    assert key.startswith("sb_")
    path = tmp_path / "clients.toml"
    path.write_text(printed)
    assert ClientsFile(path).owner_of(key) == "acme"
    assert key not in printed
    assert key not in done.stderr
    assert "BROKER_CLIENTS_FILE" in done.stderr


def test_no_two_keys_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    keys = set()
    for _ in range(2):
        assert new("acme") == 0
        keys.add(capsys.readouterr().out.partition("\n")[0])
    assert len(keys) == 2


@pytest.mark.parametrize("name", ["a", "a-b_C9", "a.b", "ann@example.com", "x+y", "9"])
def test_a_table_of_any_name_can_be_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "clients.toml"
    path.write_text(table(name, "key"))
    assert ClientsFile(path).owner_of("key") == name


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a\nb", "é", "[a]"])
def test_a_name_that_no_table_can_have_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert new(name) == 2
    told = "broker: a name has 1 to 64 letters, digits or any of . _ @ + -\n"
    assert capsys.readouterr() == ("", told)
