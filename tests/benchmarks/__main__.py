"""Measure the broker: what it costs, and what it adds to the same load straight to the upstream.

    python -m tests.benchmarks [--scenario mod,load,flat] [--rounds 3] [--json FILE] [--compare FILE] [--svg FILE]
    python -m tests.benchmarks memory [--sessions 200000]

It asserts nothing about speed. It exits with 1 if streams were lost, and says which. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from broker.store.embedded import embedded_valkey
from tests.benchmarks import load, memory, processes, results
from tests.benchmarks.arguments import count, progress_bar, setting
from tests.benchmarks.measure import WARM_UP, Place, Round, measure
from tests.benchmarks.plot import plot
from tests.benchmarks.scenarios import SCENARIOS, Scenario
from tests.benchmarks.table import table


def main(arguments: list[str]) -> int:
    """Measure and print; returns the exit status."""
    if arguments[:1] == ["memory"]:
        return memory.main(arguments[1:])
    wanted = _parsed(arguments)
    errors = Console(stderr=True)
    try:
        earlier = results.read_figures(wanted.compare) if wanted.compare else None
        measured = run(wanted, errors)
    except (results.UnusableError, processes.BenchmarkError) as error:
        errors.print(f"[red]{error}[/]", highlight=False)
        return 2
    found = {name: results.summary(rounds) for name, rounds in measured.items()}
    if wanted.json and str(wanted.json) == "-":
        print(results.to_json(found))
    else:
        Console().print(table(found, earlier, wanted.rounds))
        if wanted.json:
            wanted.json.write_text(results.to_json(found) + "\n")
    if wanted.svg:
        wanted.svg.write_text(plot(found))
    lost = [f"{name}: {line}" for name, result in found.items() for line in result.lost]
    for line in lost:
        errors.print(line, style="red", highlight=False)
    return 1 if lost else 0


def run(wanted: argparse.Namespace, errors: Console) -> dict[str, list[Round]]:
    """Measure all scenarios; returns the rounds of each."""
    scenarios = {name: SCENARIOS[name].smaller(wanted.streams, wanted.chunks) for name in wanted.scenario}
    answers = {scenario.work.answer for scenario in scenarios.values()} | {WARM_UP.answer}
    cores = processes.split_cores()
    processes.raise_file_limit()
    measured: dict[str, list[Round]] = {name: [] for name in scenarios}
    with (
        embedded_valkey() as redis_url,
        processes.running_upstream(sorted(answers)) as upstream,
        progress_bar(errors) as bar,
    ):
        place = Place(redis_url, upstream, cores, dict(wanted.env), wanted.load_processes)
        task = bar.add_task("", total=sum(_runs(each) for each in scenarios.values()) * wanted.rounds)
        done = 0
        for number in range(wanted.rounds):
            for name, scenario in scenarios.items():
                bar.update(task, description=f"{name}, round {number + 1} of {wanted.rounds}")
                tell = _teller(scenario, functools.partial(_advance, bar, task, done))
                measured[name].append(measure(scenario, place, tell))
                done += _runs(scenario)
                bar.update(task, completed=done)
    return measured


def _advance(bar: Progress, task: TaskID, done: float, part: float) -> None:
    bar.update(task, completed=done + part)


def _runs(scenario: Scenario) -> int:
    return 2 if scenario.streams else 1


def _teller(scenario: Scenario, advance: Callable[[float], None]) -> Callable[[str, load.Progress], None]:
    """Return a function that turns the progress of a load into that of the bar."""

    def tell(mode: str, progress: load.Progress) -> None:
        work = scenario.work
        part = progress.chunks / (work.streams * work.answer.chunks)
        if not scenario.streams:
            part = progress.ended / work.streams
        advance(part + (1 if mode == "broker" and scenario.streams else 0))

    return tell


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure what the broker costs, and what it adds. `memory` as the first word measures its memory.",
        epilog="; ".join(f"{name}: {scenario.says}" for name, scenario in SCENARIOS.items()),
    )
    parser.add_argument(
        "--scenario", type=_names, default=list(SCENARIOS), help="names, with commas; all by default"
    )
    parser.add_argument("--rounds", type=count, default=3, help="medians are of so many rounds")
    parser.add_argument("--streams", type=count, help="streams of each scenario, instead of its own number")
    parser.add_argument("--chunks", type=count, help="chunks of each stream, instead of its own number")
    parser.add_argument("--load-processes", type=count, default=1, help="processes that make the load")
    parser.add_argument(
        "--env",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the broker",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results; - for stdout")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="show the ratios to an earlier --json")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the distributions")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SCENARIOS]:
        raise argparse.ArgumentTypeError(
            f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}"
        )
    return names


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the other processes too
    sys.exit(main(sys.argv[1:]))
