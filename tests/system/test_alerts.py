"""The shipped Prometheus configuration, alert rules and dashboard, in a real Prometheus before a real broker."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.system.harness import free_port, running_broker
from tests.system.npm import MAKING_TIMEOUT, STRICT, ran
from tests.system.proxy import program
from tests.system.test_otlp import chat

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "session-broker.json"
RULES: list[dict[str, Any]] = yaml.safe_load((SHIPPED / "alerts.yml").read_text())["groups"][0]["rules"]

ONE = '{instance="a"}'


def series(name: str, values: str) -> dict[str, str]:
    return {"series": name, "values": values}


def steady(name: str, step: float, start: float = 0) -> dict[str, str]:
    """A counter that grows by so much in each 15 seconds."""
    return series(name, f"{start}+{step}x400")


def buckets(name: str, *counts: tuple[str, float], labels: str = "") -> list[dict[str, str]]:
    """A histogram to which so many values up to each bound come in each 15 seconds."""
    return [steady(f'{name}_bucket{{instance="a",{labels}le="{bound}"}}', count) for bound, count in counts]


REQUESTS = "broker_upstream_requests_total"
SESSIONS = "broker_sessions_total"
FINE = [
    series('up{job="session-broker",instance="a"}', "1x400"),
    steady(f'{SESSIONS}{{state="done",code=""}}', 100),
    steady(f'{SESSIONS}{{state="failed",code="upstream_timeout"}}', 1),
    steady(f'{SESSIONS}{{state="cancelled",code=""}}', 10),
    series(f'{SESSIONS}{{state="lost",code="worker_lost"}}', "0x400"),
    series(f'{SESSIONS}{{state="failed",code="internal_error"}}', "0x400"),
    series('broker_refused_total{code="internal_error"}', "0x400"),
    series('broker_refused_total{code="overloaded",instance="a"}', "0x400"),
    steady(f'{REQUESTS}{{status="200"}}', 100),
    steady(f'{REQUESTS}{{status="503"}}', 1),
    series(f'{REQUESTS}{{status="401"}}', "0x400"),
    series(f"broker_redis_errors_total{ONE}", "3x400"),
    *buckets("broker_redis_seconds", ("0.005", 99), ("0.3", 100), ("+Inf", 100), labels='script="claim",'),
    series(f"broker_journal_lag_seconds{ONE}", "0.4x400"),
    *buckets("broker_time_to_first_chunk_seconds", ("2", 99), ("30", 100), ("+Inf", 100)),
    series(f"broker_sessions_running{ONE}", "700x400"),
    series(f"broker_sessions_limit{ONE}", "1000x400"),
    steady(f"broker_cost_usd_total{ONE}", 0.001),
    series(f"broker_daily_cost_limit_usd{ONE}", "50x400"),
    series(f"broker_leases_lost_total{ONE}", "2x400"),
    *buckets("broker_event_loop_lag_seconds", ("0.01", 999), ("1", 1000), ("+Inf", 1000)),
]
"""An hour of a service that is well, with a few failures."""

BROKEN: dict[str, list[dict[str, str]]] = {
    "BrokerDown": [series('up{job="session-broker",instance="a"}', "0x400")],
    "BrokerSessionsFail": [steady(f'{SESSIONS}{{state="failed",code="upstream_timeout"}}', 20)],
    "BrokerUpstreamDown": [steady(f'{REQUESTS}{{status="503"}}', 300)],
    "BrokerUpstreamRefusesKey": [steady(f'{REQUESTS}{{status="401"}}', 1)],
    "BrokerRedisErrors": [steady(f"broker_redis_errors_total{ONE}", 15)],
    "BrokerRedisSlow": buckets(
        "broker_redis_seconds", ("0.005", 50), ("0.3", 100), ("+Inf", 100), labels='script="claim",'
    ),
    "BrokerJournalLag": [series(f"broker_journal_lag_seconds{ONE}", "0+1x400")],
    "BrokerFirstChunkSlow": buckets(
        "broker_time_to_first_chunk_seconds", ("2", 50), ("30", 100), ("+Inf", 100)
    ),
    "BrokerNearlyFull": [series(f"broker_sessions_running{ONE}", "900x400")],
    "BrokerOverloaded": [steady('broker_refused_total{code="overloaded",instance="a"}', 1)],
    "BrokerSpending": [steady(f"broker_cost_usd_total{ONE}", 1)],
    "BrokerLeasesLost": [steady(f"broker_leases_lost_total{ONE}", 1)],
    "BrokerWorkerLost": [steady(f'{SESSIONS}{{state="lost",code="worker_lost"}}', 1)],
    "BrokerLoopLag": buckets("broker_event_loop_lag_seconds", ("0.01", 900), ("1", 1000), ("+Inf", 1000)),
    "BrokerBugs": [steady('broker_refused_total{code="internal_error"}', 1)],
}
"""What is different where something is wrong."""


def with_these(changed: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {each["series"] for each in changed}
    assert names <= {each["series"] for each in FINE}
    return [*changed, *(each for each in FINE if each["series"] not in names)]


def outcome_of(*tests: dict[str, Any]) -> tuple[int, str]:
    """Run tests of the rules. Returns the status and what promtool says."""
    document = {
        "rule_files": [str(SHIPPED / "alerts.yml")],
        "evaluation_interval": "15s",
        "tests": list(tests),
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        yaml.safe_dump(document, file)
        file.flush()
        found = subprocess.run(
            [program("promtool"), "test", "rules", file.name], capture_output=True, text=True, check=False
        )
    return found.returncode, found.stdout + found.stderr


def test_prometheus_takes_configuration_and_rules() -> None:
    for command, file in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        found = subprocess.run(
            [program("promtool"), "check", command, SHIPPED / file],
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stdout + found.stderr


def test_a_service_that_is_well_raises_no_alert() -> None:
    silent = {"expr": "ALERTS", "eval_time": "50m", "exp_samples": []}
    status, told = outcome_of({"interval": "15s", "input_series": FINE, "promql_expr_test": [silent]})
    assert status == 0, told


def test_every_alert_is_tested() -> None:
    assert [rule["alert"] for rule in RULES] == list(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_an_alert_fires_alone_where_its_reason_is_there(name: str) -> None:
    all_firing = {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": "50m",
        "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1}],
    }
    status, told = outcome_of(
        {"interval": "15s", "input_series": with_these(BROKEN[name]), "promql_expr_test": [all_firing]}
    )
    assert status == 0, told


def test_a_service_without_a_budget_is_never_said_to_spend_too_much() -> None:
    no_budget = [*BROKEN["BrokerSpending"], series(f"broker_daily_cost_limit_usd{ONE}", "0x400")]
    silent = {"expr": "ALERTS", "eval_time": "50m", "exp_samples": []}
    status, told = outcome_of(
        {"interval": "15s", "input_series": with_these(no_budget), "promql_expr_test": [silent]}
    )
    assert status == 0, told


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"].endswith(".")
    assert len(rule["annotations"]["runbook"].split()) >= 10


# The dashboard


def panels() -> Iterator[dict[str, Any]]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] != "row":
            yield panel


def queries() -> list[str]:
    """Return every query of the dashboard, as Grafana sends it."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [each.replace("$instance", ".*").replace("$__rate_interval", "1m") for each in found]


def names_in(text: str) -> set[str]:
    return set(re.findall(r"broker_\w+", text))


def known_names() -> set[str]:
    """Return the names of all series that a broker shows, as the README has them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("### Metrics") : readme.index("### Traces")]
    return names_in(table)


def test_dashboard_and_alerts_use_metrics_that_exist() -> None:
    used = names_in(DASHBOARD.read_text()) | {name for rule in RULES for name in names_in(rule["expr"])}
    unknown = {re.sub("_(bucket|count|sum)$", "", name) for name in used} - known_names()
    assert unknown == set()


def test_the_dashboard_shows_every_metric() -> None:
    shown = {re.sub("_bucket$", "", name) for query in queries() for name in names_in(query)}
    assert known_names() - shown == set()


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    document = json.loads(DASHBOARD.read_text())
    for panel in document["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in document["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["description"] for panel in panels())


@pytest.mark.slow
@pytest.mark.timeout(MAKING_TIMEOUT)
async def test_grafanas_own_types_take_the_dashboard(node_modules: Path) -> None:
    source = node_modules.parent / "dashboard.ts"
    document = DASHBOARD.read_text()
    source.write_text(
        'import type { Dashboard } from "@grafana/schema/dist/types/raw/dashboard/x/types.gen";\n'
        f"export const dashboard: Dashboard = {document};\n"
    )
    options = ("--target", "es2022", "--module", "esnext", "--moduleResolution", "node", "--skipLibCheck")
    compiler = str(node_modules / ".bin" / "tsc")
    status, told = await ran(compiler, *STRICT, *options, str(source), cwd=node_modules.parent)
    assert status == 0, told


# In a real Prometheus


@asynccontextmanager
async def running_prometheus(target: str, directory: Path) -> AsyncIterator[str]:
    """Run Prometheus with the shipped files, which asks this broker once a second. Gives its address."""
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(SHIPPED / "alerts.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={file}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


class Prometheus:
    """The HTTP API of Prometheus."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url

    async def ask(self, path: str, **parameters: str) -> Any:
        async with self._http.get(f"{self._url}/api/v1/{path}", params=parameters) as answer:
            body = await answer.json()
            assert body["status"] == "success", (parameters, body)
            return body["data"]

    async def value(self, query: str) -> float | None:
        """Return the value of a query with one result; None without one."""
        try:
            result = (await self.ask("query", query=query))["result"]
        except aiohttp.ClientConnectionError:  # it is still starting
            return None
        return float(result[0]["value"][1]) if result else None

    async def rules(self) -> list[dict[str, Any]]:
        """Return all rules once each of them was evaluated; none before."""
        [group] = (await self.ask("rules"))["groups"]
        rules: list[dict[str, Any]] = group["rules"]
        return rules if all(rule["health"] != "unknown" for rule in rules) else []


async def until(happened: Callable[[], Awaitable[object]]) -> None:
    """Ask a program that works by itself until it has done something."""
    async with asyncio.timeout(60):
        while not await happened():  # noqa: ASYNC110 - nobody tells us
            await asyncio.sleep(0.2)


@pytest.mark.slow
async def test_a_real_prometheus_answers_every_query(tmp_path: Path) -> None:
    program("prometheus")
    async with (
        running_broker() as broker,
        running_prometheus(broker.url.removeprefix("http://"), tmp_path) as url,
        aiohttp.ClientSession() as http,
    ):
        prometheus = Prometheus(http, url)
        await chat(broker.url)
        await until(lambda: prometheus.value('sum(broker_sessions_total{state="done"})'))
        for query in queries():
            await prometheus.ask("query", query=query)
        stored = set(await prometheus.ask("label/__name__/values"))
        for name in known_names():
            assert {name, f"{name}_count"} & stored, name
        await until(prometheus.rules)
        rules = await prometheus.rules()
        assert {rule["name"]: rule.get("lastError", "") for rule in rules} == dict.fromkeys(BROKEN, "")
        assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
