"""Real processes for the system tests: a broker as its users start it, and a Valkey that can be hurt.

Every process that is started here has ended at the end of its block, whatever a test does.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import aiohttp
from redis.asyncio import Redis

from broker.settings import Settings, setting_name
from tests.servers import server_binary
from tests.system.fork_server import ForkedProcess, ForkServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

START_TIMEOUT = 45.0
STOP_TIMEOUT = 5.0  # what a block leaves running is not worth a whole drain
DRAIN_TIMEOUT = 35.0  # longer than the default drain
POLL_INTERVAL = 0.02

OURS = {setting_name(name) + suffix for name in Settings.model_fields for suffix in ("", "_FILE")}
"""The environment variables of settings."""

SERVER = "valkey"
"""Which of `tests.servers.SERVERS` is started here; the fixture `redis_server` sets it for a test."""

KIND = "plain"
"""On which of `tests.kinds.KINDS` the tests of this run work; the option ``--servers`` sets it."""

REDIS_URL: str | None = None
"""The servers of brokers that name none; without it each has an embedded Valkey."""

BROKERS = ForkServer()
"""Starts the brokers of this process of the tests."""
atexit.register(BROKERS.close)

Process = subprocess.Popen[bytes] | ForkedProcess


class NotStartedError(AssertionError):
    """A process ended, or stayed silent, before it was ready; the text has its log."""


@dataclass
class RunningBroker:
    """A broker that is ready.

    Attributes:
        url: where it answers, without a slash at the end.
        log_path: both its outputs.
    """

    url: str
    port: int
    process: Process
    log_path: Path

    def log(self) -> str:
        """All that it has said so far."""
        return _text(self.log_path)

    async def ended(self, within: float = DRAIN_TIMEOUT) -> int:
        """Wait for the process to end, and return its exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        return await asyncio.to_thread(self.process.wait, within)


@dataclass
class ValkeyProcess:
    """A Valkey on a TCP port of 127.0.0.1.

    Attributes:
        keeps: it has all it knew when it starts again; else it keeps nothing on disk.
        options: more of its command line.
    """

    port: int
    directory: Path
    keeps: bool = False
    options: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        """The same before and after a restart."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def is_running(self) -> bool:
        """True between a start and a kill."""
        return self.process is not None

    async def start(self) -> None:
        """Start it, empty unless it keeps what it knew, and wait until it answers."""
        assert self.process is None, "it is running"
        log_path = self.directory / "log"
        self.process = _spawn(
            [server_binary(SERVER), *self.arguments()], os.environ, self.directory, log_path
        )
        await _poll(self._answers, self.process, log_path)

    def arguments(self) -> list[str]:
        """Return its command line behind the program."""
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        arguments += (
            ["--appendonly", "yes", "--appendfsync", "always"] if self.keeps else ["--appendonly", "no"]
        )
        return [*arguments, *self.options]

    @property
    def pids(self) -> list[int]:
        """Its process, if it runs."""
        return [self.process.pid] if self.process is not None else []

    def client(self) -> Redis:
        """Return a client; close it."""
        return Redis.from_url(self.url, protocol=2)

    def kill(self) -> None:
        """End it as a power cut would, and wait for that."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """Keep its connections open and its answers away."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on where it was frozen."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None, "it is not running"
        self.process.send_signal(number)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            writer.write(b"PING\r\n")
            return (await reader.readline()).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False
        finally:
            writer.close()


class Exposed(Protocol):
    """Servers of Redis that a test may hurt: one, or several at once."""

    @property
    def is_running(self) -> bool:
        """True between a start and a kill."""

    async def start(self) -> None:
        """Start them."""

    def thaw(self) -> None:
        """Let them go on where they were frozen."""


@asynccontextmanager
async def running_broker(
    *,
    rehearsal: bool = True,
    env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
    ready: str = "/health/ready",
) -> AsyncIterator[RunningBroker]:
    """Run `broker serve` until the block ends; SIGTERM then, and SIGKILL where that is not enough.

    The broker sees no setting but those in `env`, a free ``PORT`` and a test's ``OPENROUTER_API_KEY``. It is ready
    when `ready` answers 200; while Redis is away only ``/health/live`` does.

    Raises:
        NotStartedError: it ended before it was ready, or was not ready in time.
    """
    port = int((env or {}).get("PORT") or free_port())
    if REDIS_URL is not None and not {"REDIS_URL", "REDIS_URL_FILE"} & set(env or {}):
        env = {
            "REDIS_URL": REDIS_URL,
            "BROKER_KEY_PREFIX": f"broker-{port}-{secrets.token_hex(4)}",
            **(env or {}),
        }
    settings = {"OPENROUTER_API_KEY": "sk-test", "PORT": str(port), **(env or {})}
    arguments = ["serve", *(["--rehearsal"] if rehearsal else []), *args]
    environment = clean_environment(settings)
    # A variable that is none of the broker's may change what an import does.
    forks = hasattr(os, "pidfd_open") and all(name in OURS or name.startswith("BROKER_") for name in settings)

    def start(cwd: Path, log_path: Path) -> Process:
        if forks:
            return BROKERS.start(arguments, environment, cwd, log_path)
        return _spawn([sys.executable, "-m", "broker", *arguments], environment, cwd, log_path)

    with tempfile.TemporaryDirectory() as cwd:
        async with _running(lambda log_path: start(Path(cwd), log_path), port, ready=ready) as broker:
            yield broker


@asynccontextmanager
async def running_program(
    arguments: Sequence[str | Path],
    port: int,
    *,
    env: Mapping[str, str],
    cwd: Path,
    ready: str,
    python: str | Path = sys.executable,
) -> AsyncIterator[RunningBroker]:
    """Run a Python until the block ends, with no setting of a broker's but those in `env`.

    Raises:
        NotStartedError: it ended before `ready` on the port answered 200, or that did not come in time.
    """
    command = [python, *arguments]
    async with _running(
        lambda log_path: _spawn(command, clean_environment(env), cwd, log_path), port, ready=ready
    ) as broker:
        yield broker


@asynccontextmanager
async def _running(
    start: Callable[[Path], Process], port: int, *, ready: str
) -> AsyncIterator[RunningBroker]:
    with tempfile.TemporaryDirectory(prefix="broker-test-") as name:
        log_path = Path(name, "log")
        process = start(log_path)
        try:
            broker = RunningBroker(f"http://127.0.0.1:{port}", port, process, log_path)
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
                await _poll(lambda: _is_ready(session, broker.url + ready), process, log_path)
            yield broker
        finally:
            await _end(process)


@asynccontextmanager
async def healed(valkey: Exposed) -> AsyncIterator[None]:
    """Make a Valkey run and answer again at the end of the block."""
    try:
        yield
    finally:
        if not valkey.is_running:
            await valkey.start()
        valkey.thaw()


@asynccontextmanager
async def running_valkey(*, keeps: bool = False, options: Sequence[str] = ()) -> AsyncIterator[ValkeyProcess]:
    """Run a separate Valkey during the block; with ``keeps`` it survives a power cut."""
    with tempfile.TemporaryDirectory(prefix="broker-test-") as name:
        valkey = ValkeyProcess(free_port(), Path(name), keeps, options)
        try:
            await valkey.start()
            yield valkey
        finally:
            valkey.kill()


async def eventually(happened: Callable[[], object], within: float = 20.0) -> None:
    """Wait until something outside of this process, which cannot be awaited, has happened."""
    async with asyncio.timeout(within):
        while not happened():  # noqa: ASYNC110 - it happens in another process, which sets no event of ours
            await asyncio.sleep(POLL_INTERVAL)


def free_port() -> int:
    """Find a TCP port of 127.0.0.1 that nobody listens on now.

    Below those that the system gives to outgoing connections, so that it is still free after a restart.
    """
    while True:
        try:
            with socket.create_server(("127.0.0.1", random.randrange(10_000, 32_000))) as server:
                return int(server.getsockname()[1])
        except OSError:
            continue


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process, without any setting of the broker's, and then `extra`."""
    kept = {n: v for n, v in os.environ.items() if n not in OURS and not n.startswith("BROKER_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def _spawn(
    command: Sequence[str | Path], env: Mapping[str, str], cwd: Path, log_path: Path
) -> subprocess.Popen[bytes]:
    with log_path.open("ab") as log:
        return subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


async def _is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def _poll(happened: Callable[[], Awaitable[bool]], process: Process, log_path: Path) -> None:
    """Ask again and again until it has happened, for as long as the process lives and the time lasts."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_TIMEOUT
    while not await happened():
        if process.poll() is not None:
            raise NotStartedError(f"it ended with {process.returncode}:\n{_text(log_path)}")
        if loop.time() > deadline:
            raise NotStartedError(f"it was not ready in time:\n{_text(log_path)}")
        await asyncio.sleep(POLL_INTERVAL)


def _text(log_path: Path) -> str:
    return log_path.read_text(errors="replace")


async def _end(process: Process) -> None:
    try:
        if process.poll() is None:
            process.terminate()
            process.send_signal(signal.SIGCONT)  # one that a test has frozen could not end otherwise
            await asyncio.to_thread(process.wait, STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()
