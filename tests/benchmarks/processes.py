"""The processes of a benchmark: broker, upstream and load, each on its cores, and what they cost.

Every process that is started here ends with the block that started it; upstream and load end with their parent too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import redis
import uvloop

from tests.benchmarks import load, upstream
from tests.benchmarks.load import Mode, Outcome, Progress, Work
from tests.benchmarks.upstream import Answer
from tests.system.harness import clean_environment, free_port

START_TIMEOUT = 30.0
STOP_TIMEOUT = 40.0  # longer than a drain
_WITHOUT_LIMITS = {
    "BROKER_RATE_LIMIT": "100000000/minute",
    "BROKER_MAX_CONCURRENT_STREAMS": "100000",
    "BROKER_MAX_STREAMS": "100000",
    "BROKER_MAX_PREPARED": "100000000",
    "BROKER_MAX_PREPARED_BYTES": str(1024**3),
    "BROKER_TOTAL_PREPARED_BYTES": str(4 * 1024**3),
}
_SPAWN = multiprocessing.get_context("spawn")


class BenchmarkError(Exception):
    """A process of the benchmark did not start, or ended before its time."""


class Cores(NamedTuple):
    """Where processes run; empty where the system cannot say.

    Attributes:
        broker: the one core of the broker, which nothing else here uses.
        others: those of everything else.
    """

    broker: frozenset[int] = frozenset()
    others: frozenset[int] = frozenset()


class Cost(NamedTuple):
    """What a process has cost so far.

    Attributes:
        cpu: seconds of user and system time.
        memory: bytes that are resident.
    """

    cpu: float
    memory: int


def split_cores() -> Cores:
    """Keep a core for the broker, and move this process to the others. With one core, nothing is moved."""
    if not hasattr(os, "sched_setaffinity") or len(cores := sorted(os.sched_getaffinity(0))) < 2:
        return Cores()
    os.sched_setaffinity(0, cores[1:])
    return Cores(frozenset(cores[:1]), frozenset(cores[1:]))


def raise_file_limit() -> None:
    """Allow as many open files as the system lets us; each stream needs one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cost(pid: int) -> Cost | None:
    """Return what a process has cost so far; None where the system has no `/proc`."""
    try:
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pages = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return None
    cpu = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return Cost(cpu, int(pages[1]) * os.sysconf("SC_PAGE_SIZE"))


class Broker:
    """A broker process that is ready.

    Attributes:
        port: where it listens, on 127.0.0.1.
        pid: of the process.
    """

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port = port
        self.pid = process.pid
        self._process = process
        self._log = log

    def check(self) -> None:
        """Check that it runs.

        Raises:
            BenchmarkError: it has ended; the text has the end of its log.
        """
        if (status := self._process.poll()) is not None:
            raise BenchmarkError(f"the broker ended with {status}:\n{self._log.read_text()[-3000:]}")

    def cost(self) -> Cost | None:
        """Return what it has cost so far, all its workers together."""
        costs = [found for pid in (self.pid, *self.workers()) if (found := cost(pid)) is not None]
        return Cost(sum(each.cpu for each in costs), sum(each.memory for each in costs)) if costs else None

    def workers(self) -> list[int]:
        """Return the processes that it has started for workers; none where it is one itself."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except OSError:
            return []
        return [int(pid) for pid in children if "worker_main" in Path(f"/proc/{pid}/cmdline").read_text()]


@contextmanager
def running_broker(
    redis_url: str, upstream_port: int, cores: Cores, settings: dict[str, str]
) -> Iterator[Broker]:
    """Run a worker on its own core, or several on all cores, with no limit that the load could reach."""
    port = free_port()
    environment = {
        "OPENROUTER_API_KEY": "sk-none",
        "BROKER_UPSTREAM_URL": f"http://127.0.0.1:{upstream_port}/v1",
        "REDIS_URL": redis_url,
        "PORT": str(port),
        "BROKER_LOG_LEVEL": "warning",
        "PYTHONPATH": os.getcwd(),  # noqa: PTH109 - a text
        **_WITHOUT_LIMITS,
        **settings,
    }
    with tempfile.TemporaryDirectory(prefix="broker-bench-") as directory:
        log = Path(directory, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "broker", "serve"],
                env=clean_environment(environment),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            if cores.broker:
                several = settings.get("BROKER_WORKERS", "1") != "1"
                os.sched_setaffinity(process.pid, cores.broker | cores.others if several else cores.broker)
            broker = Broker(port, process, log)
            _wait_until_ready(broker)
            yield broker
        finally:
            _end(process)


def _wait_until_ready(broker: Broker) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        broker.check()
        with contextlib.suppress(OSError):  # an answer other than 200 is one too
            with urllib.request.urlopen(f"http://127.0.0.1:{broker.port}/health/ready", timeout=2):
                return
        if time.monotonic() > deadline:
            raise BenchmarkError("the broker was not ready in time")
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Upstream(NamedTuple):
    """An upstream that is ready: its port on 127.0.0.1, and its process."""

    port: int
    pid: int


@contextmanager
def running_upstream(answers: Sequence[Answer]) -> Iterator[Upstream]:
    """Run the upstream of these models during the block."""
    port = free_port()
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve_upstream, args=(theirs, port, list(answers)), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_TIMEOUT):
            raise BenchmarkError("the upstream did not start in time")
        try:
            ours.recv()
        except EOFError:
            raise BenchmarkError("the upstream ended") from None
        yield Upstream(port, process.pid or 0)
    finally:
        process.kill()
        process.join()
        ours.close()


def _serve_upstream(parent: Connection, port: int, answers: list[Answer]) -> None:
    _prepare_child(parent)
    uvloop.run(upstream.serve(port, answers, ready=lambda: parent.send("ready")))


def run_load(
    mode: Mode, port: int, work: Work, watch: Callable[[Progress], None], processes: int = 1
) -> Outcome:
    """Run the load in processes of its own; returns what has come of all of them.

    Args:
        mode: what is asked.
        port: who is asked.
        work: is divided among the processes.
        watch: is told now and then how far they are together.
        processes: so many.

    Raises:
        BenchmarkError: one of them ended before its time.
    """
    shares = [share for share in _divided(work, processes) if share.streams]
    running: dict[Connection, Any] = {}
    try:
        for share in shares:
            ours, theirs = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_load, args=(theirs, mode, port, share), daemon=True)
            process.start()
            theirs.close()
            running[ours] = process
        return _collect(list(running), watch)
    finally:
        for connection, process in running.items():
            process.kill()
            process.join()
            connection.close()


def _divided(work: Work, processes: int) -> Iterator[Work]:
    for n in range(processes):
        streams = len(range(n, work.streams, processes))
        concurrent = len(range(n, min(work.concurrent, work.streams), processes))
        yield work._replace(streams=streams, concurrent=concurrent, rate=work.rate / processes)


def _collect(connections: list[Connection], watch: Callable[[Progress], None]) -> Outcome:
    """Receive from all loads until each has told its outcome."""
    latest: dict[Connection, Progress] = {}
    outcomes: dict[Connection, Outcome] = {}
    while len(outcomes) < len(connections):
        for ready in multiprocessing.connection.wait([c for c in connections if c not in outcomes]):
            assert isinstance(ready, Connection)
            try:
                told = ready.recv()
            except EOFError:
                raise BenchmarkError("a process of the load ended before its time") from None
            if isinstance(told, Progress):
                latest[ready] = told
            else:
                outcomes[ready] = told
        if len(latest) == len(connections) and not outcomes:
            all_of_them = list(latest.values())
            watch(
                Progress(
                    sum(each.chunks for each in all_of_them),
                    sum(each.ended for each in all_of_them),
                    all(each.steady for each in all_of_them),
                )
            )
    return _together(list(outcomes.values()))


def _together(outcomes: list[Outcome]) -> Outcome:
    first, *others = outcomes
    for other in others:
        first.complete += other.complete
        first.lost += other.lost
        first.chunks += other.chunks
        first.seconds = max(first.seconds, other.seconds)
        first.cpu = max(first.cpu, other.cpu)
        first.latencies += other.latencies
        first.gaps += other.gaps
        first.firsts += other.firsts
        first.prepares += other.prepares
    return first


def _load(parent: Connection, mode: Mode, port: int, work: Work) -> None:
    _prepare_child(parent)
    parent.send(uvloop.run(load.run(mode, port, work, parent.send)))


def _prepare_child(parent: Connection) -> None:
    """Leave Ctrl-C to the parent, and end when it ends, in whatever way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_file_limit()

    def end_with_parent() -> None:
        with contextlib.suppress(EOFError, OSError):
            parent.recv()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def redis_cpu(url: str) -> float:
    """Return the seconds of CPU of a Redis so far."""
    with redis.Redis.from_url(url) as client:
        said = client.info("cpu")
    return float(said["used_cpu_user"] + said["used_cpu_sys"])


def empty_redis(url: str) -> None:
    """Remove everything that a Redis stores."""
    with redis.Redis.from_url(url) as client:
        client.flushall()
