"""The benchmark runs, tells what it promises, and loses no stream. Nothing about speed is asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.measure import PERCENTILES
from tests.benchmarks.scenarios import FIGURES, SCENARIOS

ROOT = Path(__file__).parent.parent.parent
TINY = ("--rounds", "1", "--streams", "4", "--chunks", "3")
PATIENCE = 240.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(PATIENCE + 20)]


def benchmarks(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the benchmarks to their end."""
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `results.json` and `plot.svg` of a small run of all scenarios."""
    directory = tmp_path_factory.mktemp("benchmarks")
    ran = benchmarks(*TINY, "--json", directory / "results.json", "--svg", directory / "plot.svg")
    assert ran.returncode == 0, ran.stderr
    return directory


def told(results: Path) -> dict[str, Any]:
    """What the JSON of the run says."""
    read: dict[str, Any] = json.loads((results / "results.json").read_text())
    return read


def test_every_scenario_runs_without_a_lost_stream(results: Path) -> None:
    scenarios = told(results)["scenarios"]
    assert list(scenarios) == list(SCENARIOS)
    for scenario in scenarios.values():
        assert scenario["lost"] == []
        assert scenario["figures"]
        assert set(scenario["figures"]) <= set(FIGURES)
        assert len(scenario["rounds"]) == 1


def test_each_scenario_tells_its_own_figures(results: Path) -> None:
    figures = {name: set(scenario["figures"]) for name, scenario in told(results)["scenarios"].items()}
    assert {"chunks_per_s", "latency_p50_ms", "gap_p99_ms", "first_p50_ms"} <= figures["mod"]
    assert {"chunks_per_s", "first_p50_ms"} <= figures["flat"]
    assert not {"latency_p50_ms", "gap_p50_ms"} & figures["flat"]
    assert "prepares_per_s" in figures["prepare"]
    assert "sessions_per_s" in figures["session"]
    if Path("/proc/self/stat").exists():
        assert "cpu_chunk_us" in figures["mod"]
        assert "memory_stream_kib" in figures["idle"]
        assert "cpu_prepare_us" in figures["prepare"]
        assert "cpu_session_us" in figures["session"]


def test_distributions_have_all_percentiles_in_order(results: Path) -> None:
    mod = told(results)["scenarios"]["mod"]
    for side in (mod["direct"], mod["broker"]):
        assert set(side) == {"latency", "gap", "first"}
        for name, curve in side.items():
            assert len(curve) == len(PERCENTILES)
            assert curve == sorted(curve)
            assert curve[0] > 0 or name == "gap"  # chunks of one read have none between them
            assert curve[0] >= 0


def test_a_plot_has_a_line_for_each_distribution(results: Path) -> None:
    drawn = ET.parse(results / "plot.svg").getroot()
    scenarios = told(results)["scenarios"].values()
    curves = sum(len(each["direct"]) + len(each["broker"]) for each in scenarios)
    assert len(drawn.findall(".//{*}polyline")) == curves > 0


def test_a_run_is_compared_with_an_earlier_one(results: Path) -> None:
    ran = benchmarks("--scenario", "session", *TINY, "--compare", results / "results.json")
    assert ran.returncode == 0, ran.stderr
    assert " times)" in ran.stdout
    assert "(was " in ran.stdout


def test_a_file_of_something_else_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    ran = benchmarks("--compare", tmp_path / "other.json")
    assert ran.returncode == 2
    assert "does not have results of this benchmark" in ran.stderr.replace("\n", " ")


def test_lost_streams_are_told_and_change_the_status() -> None:
    ran = benchmarks("--scenario", "mod", *TINY, "--env", "BROKER_MAX_RESPONSE=512")
    assert ran.returncode == 1
    assert "through the broker (error response_too_large: 4)" in ran.stderr.replace("\n", " ")


@pytest.mark.parametrize("name", ["relay", "prepare", "scripts"])
def test_each_micro_benchmark_runs_once(name: str) -> None:
    installed = importlib.util.find_spec("pytest_benchmark") is not None
    options = ["-o", "addopts=", *(["--benchmark-disable"] if installed else [])]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, f"tests/benchmarks/micro_{name}.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout


def test_the_memory_benchmark_runs() -> None:
    ran = benchmarks("memory", "--sessions", "40")
    assert ran.returncode == 0, ran.stderr
    assert "after 40 sessions" in ran.stdout
