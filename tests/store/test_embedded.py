"""The embedded Valkey works, is private, and ends with its owner in every case."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest
import redis

from broker.core.errors import StoreUnavailable
from broker.store.embedded import embedded_valkey, valkey_binary
from tests.stopwatch import Stopwatch, waited_for_a_core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.one_server("the Valkey that a broker brings along")

KEEPER = Path(__file__).parents[2] / "broker" / "store" / "keeper.py"
OWNER = """
import redis, sys
from broker.store.embedded import embedded_valkey
with embedded_valkey() as url:
    try:
        print(url, flush=True)  # the test may interrupt as soon as it has read this
        sys.stdin.read()
    except KeyboardInterrupt:
        with redis.Redis.from_url(url) as client:
            print("after Ctrl-C:", client.ping(), flush=True)
"""


def path_of(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def server_pid(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        return int(client.info("server")["process_id"])


def parent_of(pid: int) -> int:
    """Return the parent of a process; 0 where the system does not say."""
    if not Path("/proc/self/stat").exists():
        return 0
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/stat").exists() or " Z " not in Path(f"/proc/{pid}/stat").read_text()


def wait_until(happened: Callable[[], bool], within: float = 5.0) -> None:
    deadline = time.monotonic() + within
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        yield process
        process.kill()


def url_from(owner: subprocess.Popen[str]) -> str:
    assert owner.stdout is not None
    return owner.stdout.readline().strip()


def test_it_answers_to_redis_py_and_keeps_nothing_on_disk() -> None:
    with embedded_valkey() as url, redis.Redis.from_url(url) as client:
        client.set("name", "value")
        assert client.get("name") == b"value"
        assert client.config_get("save")["save"] == ""
        assert client.config_get("appendonly")["appendonly"] == "no"
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"


def test_other_users_cannot_reach_it() -> None:
    with embedded_valkey() as url, redis.Redis.from_url(url) as client:
        assert client.config_get("port")["port"] == "0"
        assert stat.S_IMODE(path_of(url).parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path_of(url).stat().st_mode) == 0o700


def test_process_and_directory_are_gone_after_the_block() -> None:
    with embedded_valkey() as url:
        pid, directory = server_pid(url), path_of(url).parent
    assert not is_alive(pid)
    assert not directory.exists()


def test_process_and_directory_are_gone_after_an_error() -> None:
    with contextlib.suppress(LookupError), embedded_valkey() as url:
        pid, directory = server_pid(url), path_of(url).parent
        raise LookupError
    assert not is_alive(pid)
    assert not directory.exists()


def test_process_and_directory_vanish_when_the_owner_is_killed(owner: subprocess.Popen[str]) -> None:
    url = url_from(owner)
    pid, directory = server_pid(url), path_of(url).parent
    owner.kill()
    wait_until(lambda: not is_alive(pid))
    wait_until(lambda: not directory.exists())


def test_ctrl_c_at_the_terminal_leaves_it_to_the_owner_to_end_it(owner: subprocess.Popen[str]) -> None:
    url = url_from(owner)
    pid = server_pid(url)
    os.killpg(owner.pid, signal.SIGINT)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "after Ctrl-C: True\n"
    assert owner.wait(5) == 0
    assert not is_alive(pid)


def test_signals_to_the_keeper_do_not_take_the_server_away(tmp_path: Path) -> None:
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-S", KEEPER, valkey_binary()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with keeper:
        assert keeper.stdout is not None
        path = Path(keeper.stdout.readline().decode().removeprefix("ready ").strip())
        for unwanted in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            keeper.send_signal(unwanted)
        with redis.Redis(unix_socket_path=str(path)) as client:
            assert client.ping()
    assert keeper.returncode == 0
    assert not path.parent.exists()


def test_two_servers_share_nothing() -> None:
    with (
        embedded_valkey() as one,
        embedded_valkey() as other,
        redis.Redis.from_url(one) as here,
        redis.Redis.from_url(other) as there,
    ):
        here.set("name", "value")
        assert there.get("name") is None


def test_a_temporary_directory_with_a_long_path_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    with embedded_valkey() as url, redis.Redis.from_url(url) as client:
        assert client.ping()
        assert list(deep.iterdir()) == []


def test_odd_characters_in_the_path_survive_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Path("/tmp") / f"b{os.getpid()} %20?#"
    odd.mkdir()
    monkeypatch.setenv("TMPDIR", str(odd))
    try:
        with embedded_valkey() as url, redis.Redis.from_url(url) as client:
            assert client.ping()
    finally:
        odd.rmdir()


def test_it_is_ready_in_a_fraction_of_a_second() -> None:
    def seconds() -> float:
        stopwatch = Stopwatch()
        with embedded_valkey() as url:
            took = stopwatch.seconds
            server = server_pid(url)
            return took - waited_for_a_core(server) - waited_for_a_core(parent_of(server))

    assert min(seconds() for _ in range(3)) < 0.3


def test_a_server_that_cannot_start_is_reported_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    failed = subprocess.run(
        [sys.executable, "-I", "-S", KEEPER, "/bin/false"], capture_output=True, text=True, check=False
    )
    assert failed.stdout == "failed it ended at once\n"
    assert failed.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_without_python_to_start_it_the_store_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(StoreUnavailable, match="did not start"), embedded_valkey():
        pytest.fail("there is nothing to connect to")
