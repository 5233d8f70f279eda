"""A program, not a module to import. It runs one Valkey server while its standard input is open.

It prints one line, `ready <socket path>` or `failed <reason>`. It makes the private directory itself, so that the
directory is always removed. It uses the standard library alone, because it runs without site-packages.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_LONGEST_SOCKET_PATH = 100  # the kernel's limit is 107 bytes on Linux and 103 on macOS
_START_TIMEOUT = 10.0
_POLL_INTERVAL = 0.002


class NotStarted(Exception):  # noqa: N818 - used in this program alone
    """The server did not start; the text says why."""


def main(binary: str) -> int:
    """Start the server, report, wait for the end of the input, and remove everything."""
    # These are sent to whole groups of processes. The broker gets them too, and closes the pipe when it has finished.
    for unwanted in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(unwanted, signal.SIG_IGN)
    directory = _private_directory()
    try:
        return _keep(binary, directory)
    except (NotStarted, OSError) as error:
        sys.stdout.write(f"failed {error}\n")
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _private_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="broker-"))
    if len(os.fsencode(_socket_of(directory))) <= _LONGEST_SOCKET_PATH:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix="broker-", dir="/tmp"))


def _keep(binary: str, directory: Path) -> int:
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(  # noqa: S603 - the binary that our caller found
            _command(binary, directory), cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        _wait_until_ready(server, directory)
        sys.stdout.write(f"ready {_socket_of(directory)}\n")
        sys.stdout.flush()
        sys.stdin.buffer.read()
    finally:
        server.kill()
        server.wait()
    return 0


def _command(binary: str, directory: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(_socket_of(directory)),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "maxmemory-policy": "noeviction",
        "loglevel": "warning",
    }
    return [binary, *(word for name, value in options.items() for word in (f"--{name}", value))]


def _socket_of(directory: Path) -> Path:
    return directory / "valkey.sock"


def _wait_until_ready(server: subprocess.Popen[bytes], directory: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while not _answers(_socket_of(directory)):
        if server.poll() is not None:
            lines = (directory / "log").read_text(errors="replace").split("\n")
            raise NotStarted(next((line for line in reversed(lines) if line), "it ended at once"))
        if time.monotonic() > deadline:
            raise NotStarted("it does not answer")
        time.sleep(_POLL_INTERVAL)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(os.fspath(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(5) == b"+PONG"
        except OSError:
            return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
