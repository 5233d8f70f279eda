"""Measure the memory of a worker: over many sessions, and of finished sessions that are kept for replay.

    python -m tests.benchmarks memory [--sessions 200000] [--rate 0]

Memory is what the system says is resident. The collector of the worker runs as it is shipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final, NamedTuple

from rich.console import Console

from broker.store.embedded import embedded_valkey
from tests.benchmarks import load, processes
from tests.benchmarks.arguments import count, progress_bar, setting
from tests.benchmarks.load import Work
from tests.benchmarks.measure import WARM_UP
from tests.benchmarks.processes import BenchmarkError, Broker
from tests.benchmarks.upstream import Answer

SHORT: Final = Answer(3)
"""Of the many sessions."""

LONG: Final = Answer(200)
"""Of those that fill what is kept for replay: 70 KB each."""

_LONG_SESSIONS: Final = 3000
_AT_A_TIME: Final = 20
_MIB: Final = 1024 * 1024


class Growth(NamedTuple):
    """Bytes of resident memory of a worker.

    Attributes:
        started: after the warm-up.
        first: after the first part of the sessions.
        last: after all of them.
        lost: lines on lost streams.
    """

    started: int
    first: int
    last: int
    lost: list[str]


def main(arguments: list[str]) -> int:
    """Measure and print; returns the exit status."""
    wanted = _parsed(arguments)
    errors, output = Console(stderr=True), Console(highlight=False, soft_wrap=True)
    cores = processes.split_cores()
    processes.raise_file_limit()
    first_part = max(1, min(20_000, wanted.sessions // 10))
    try:
        with (
            embedded_valkey() as redis_url,
            processes.running_upstream([SHORT, LONG, WARM_UP.answer]) as upstream,
            progress_bar(errors) as bar,
        ):

            def grown(answer: Answer, sessions: int, first_part: int) -> Growth:
                processes.empty_redis(redis_url)
                work = Work(answer, sessions, _AT_A_TIME, timeout=24 * 3600, timed=False, rate=wanted.rate)
                task = bar.add_task(f"sessions of {answer.chunks} chunks", total=sessions)
                with processes.running_broker(redis_url, upstream.port, cores, dict(wanted.env)) as broker:
                    return _grown(broker, work, first_part, lambda ended: bar.update(task, completed=ended))

            many = grown(SHORT, wanted.sessions, first_part)
            long_sessions = min(wanted.sessions, _LONG_SESSIONS)
            kept = grown(LONG, long_sessions, long_sessions)
    except BenchmarkError as error:
        errors.print(f"[red]{error}[/]", highlight=False)
        return 2
    output.print(f"started and warmed up: {many.started / _MIB:.1f} MiB")
    output.print(f"after {first_part:,} sessions of {SHORT.chunks} chunks: {many.first / _MIB:.1f} MiB")
    growth = (many.last - many.first) / many.first * 100
    output.print(f"after {wanted.sessions:,} sessions: {many.last / _MIB:.1f} MiB, {growth:+.1f} %")
    output.print("finished sessions that are kept for replay, with what the worker needs for them:")
    output.print(f"  short ones: {(many.first - many.started) / _MIB:.1f} MiB")
    output.print(
        f"  long ones ({long_sessions:,} of {LONG.chunks} chunks): {(kept.last - kept.started) / _MIB:.1f} MiB"
    )
    for line in (*many.lost, *kept.lost):
        errors.print(line, style="red", highlight=False)
    return 1 if many.lost or kept.lost else 0


def _grown(broker: Broker, work: Work, first_part: int, tell: Callable[[int], None]) -> Growth:
    """Run sessions, and look at the memory of the broker on the way."""
    warm = processes.run_load("broker", broker.port, WARM_UP, lambda _: None)
    started, first = _memory(broker), 0

    def watch(progress: load.Progress) -> None:
        nonlocal first
        broker.check()
        tell(progress.ended)
        if not first and progress.ended >= first_part:
            first = _memory(broker)

    outcome = processes.run_load("broker", broker.port, work, watch)
    broker.check()
    last = _memory(broker)
    lost = [f"lost: {why}, {number} times" for why, number in (warm.lost + outcome.lost).items()]
    return Growth(started, first or last, last, lost)


def _memory(broker: Broker) -> int:
    if (cost := broker.cost()) is None:
        raise BenchmarkError("this system does not tell the memory of a process")
    return cost.memory


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks memory", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--sessions", type=count, default=200_000, help="so many short sessions")
    parser.add_argument("--rate", type=count, default=0, help="sessions a second at most, for less load")
    parser.add_argument(
        "--env",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the broker",
    )
    return parser.parse_args(arguments)
