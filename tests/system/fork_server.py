"""A process that has imported the broker and forks brokers: each starts in a tenth of the time of a new Python.

What a fork does not repeat is the import alone. It has its own environment, working directory, outputs and session, and
runs the command line from its first step. `python -m tests.system.fork_server <socket>` is this process; it ends when
its standard input does.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

PRELOADED = (
    "broker.cli.commands",
    "broker.cli.serve",
    "broker.identity.clients_file",
    "broker.rehearsal.app",
    "broker.service",
    "broker.store.embedded",
    "uvloop",
)
"""What `broker serve` imports when it runs."""

START_TIMEOUT = 45.0


@dataclass
class ForkedProcess:
    """A fork, with what tests need of `subprocess.Popen`."""

    pid: int
    returncode: int | None = None
    _status: socket.socket = field(kw_only=True)
    _lock: threading.Lock = field(default_factory=threading.Lock, kw_only=True)

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while it runs."""
        with self._lock:
            if self.returncode is None and select.select([self._status], [], [], 0)[0]:
                self.returncode = int(self._status.recv(16))
                self._status.close()
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after so many seconds.
        """
        ready = select.poll()
        if self.poll() is None:
            ready.register(self._status, select.POLLIN)
            ready.poll(None if timeout is None else timeout * 1000)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired("broker", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Starts the process when it is first asked for a broker."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="broker-test-")
        self._path = str(Path(self._folder.name, "socket"))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, arguments: list[str], env: dict[str, str], cwd: Path, log_path: Path) -> ForkedProcess:
        """Start `broker` with these arguments, as `python -m broker` would."""
        if self._process is None:
            self._process = self._started()
        status = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        status.settimeout(START_TIMEOUT)
        status.connect(self._path)
        asked = {"arguments": arguments, "env": env, "cwd": str(cwd), "log": str(log_path)}
        status.send(json.dumps(asked).encode())
        return ForkedProcess(int(status.recv(16)), _status=status)

    def close(self) -> None:
        """End the process. What it has forked goes on."""
        if self._process is not None:
            self._process.communicate()
        self._folder.cleanup()

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.system.fork_server", self._path],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process


def main() -> None:
    """Fork a broker for each connection, and tell it the process id and at its end the exit status."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(sys.argv[1])
    listener.listen()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # by the file descriptor that tells of the end
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                asked = json.loads(connection.recv(1 << 20))
                if (pid := os.fork()) == 0:
                    selector.close()
                    listener.close()
                    connection.close()
                    for end, (_, other) in running.items():
                        os.close(end)
                        other.close()
                    _become_a_broker(asked)
                    return
                connection.send(b"%d" % pid)
                end = os.pidfd_open(pid)
                running[end] = (pid, connection)
                selector.register(end, selectors.EVENT_READ)
            else:
                selector.unregister(key.fd)
                pid, connection = running.pop(key.fd)
                os.close(key.fd)
                _, status = os.waitpid(pid, 0)
                connection.send(b"%d" % os.waitstatus_to_exitcode(status))
                connection.close()


def _become_a_broker(asked: dict[str, object]) -> None:
    os.setsid()
    os.chdir(str(asked["cwd"]))
    os.environ.clear()
    os.environ.update(asked["env"])  # type: ignore[call-overload]  # as it was sent
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(str(asked["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for opened, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(opened, place)
    os.close(nothing)
    os.close(log)
    sys.argv = ["broker", *asked["arguments"]]  # type: ignore[misc]  # as it was sent
    gc.unfreeze()
    from broker.cli import main as broker  # noqa: PLC0415 - this module is imported by every test, too

    broker()


if __name__ == "__main__":
    main()
