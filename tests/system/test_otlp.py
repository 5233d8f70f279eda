"""Traces and metrics of a real process, as a collector gets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from tests.events import opened
from tests.system.collector import collecting
from tests.system.harness import clean_environment, eventually, free_port, running_broker, running_program
from tests.system.test_workers import all_serve, frozen, workers_of

pytestmark = pytest.mark.slow

TRACE = "0af7651916cd43dd8448eb211c80319c"
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_METRIC_EXPORT_INTERVAL": "200"}


async def first_model(url: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(f"{url}/models") as answer:
        return str((await answer.json())["data"][0]["id"])


async def chat(url: str) -> str:
    """Prepare a session in a trace, and read it to its end."""
    model = await first_model(url)
    async with aiohttp.ClientSession() as http:
        body = {"model": model, "messages": [{"role": "user", "content": "What is a broker?"}]}
        headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        async with http.post(f"{url}/prepare", json=body, headers=headers) as answer:
            session = str((await answer.json())["sessionId"])
    async with opened(url, f"/stream/{session}") as connection:
        assert (await connection.rest())[-1].kind == "done"
    return session


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_collector_gets_traces_and_metrics(protocol: str) -> None:
    async with collecting(protocol) as (collector, url):
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol, **SOON}
        async with running_broker(env=env) as broker:
            session = await chat(broker.url)
            await eventually(lambda: len(collector.spans()) >= 3 and len(collector.metrics()) >= 4)
    spans = collector.spans()
    by_kind = {name.split()[0]: span for name, span in spans.items()}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert by_kind["chat"].parent_span_id == by_kind["session"].span_id
    assert by_kind["session"].parent_span_id == by_kind["POST"].span_id
    assert collector.services() == {"session-broker"}
    told = b"".join(request.SerializeToString() for request in collector.requests)
    assert session[:8].encode() in told
    assert session.encode() not in told


async def test_what_is_not_sent_yet_is_sent_at_the_end() -> None:
    async with collecting("grpc") as (collector, url):
        async with running_broker(
            env={"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_SERVICE_NAME": "shop"}
        ) as broker:
            await chat(broker.url)
            broker.process.terminate()
            assert await broker.ended() == 0
        assert len(collector.spans()) == 3
        assert "gen_ai.client.token.usage" in collector.metrics()
        assert collector.services() == {"shop"}


async def test_each_worker_is_an_instance_of_its_own() -> None:
    """Else a collector takes the counters of two workers for one that jumps."""
    async with collecting("grpc") as (collector, url):
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "BROKER_WORKERS": "2", **SOON}
        async with running_broker(env=env) as broker:
            await all_serve(broker)
            for worker in workers_of(broker.process.pid):
                with frozen(worker):  # so that the other one answers
                    await chat(broker.url)
            await eventually(lambda: len(collector.instances()) == 2)
            assert all(UUID(each).version == 4 for each in collector.instances())


async def test_a_collector_that_is_away_delays_nothing() -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}", **SOON}
    async with running_broker(env=env) as broker:
        await chat(broker.url)
        broker.process.terminate()
        assert await broker.ended(within=20) == 0


async def test_variables_in_the_dotenv_file_count(tmp_path: Path) -> None:
    port = free_port()
    async with collecting("http/protobuf") as (collector, url):
        lines = [f"OTEL_EXPORTER_OTLP_ENDPOINT={url}", "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"]
        (tmp_path / ".env").write_text("\n".join([*lines, "OTEL_BSP_SCHEDULE_DELAY=100", ""]))
        command = ["-m", "broker", "serve", "--rehearsal"]
        root = str(Path(__file__).parents[2])
        env = {"PORT": str(port), "PYTHONPATH": root}
        async with running_program(command, port, env=env, cwd=tmp_path, ready="/health/ready") as broker:
            await chat(broker.url)
            await eventually(lambda: len(collector.spans()) >= 3)


def test_a_protocol_that_does_not_exist_ends_the_start(tmp_path: Path) -> None:
    found = serve(
        tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", OTEL_EXPORTER_OTLP_PROTOCOL="http/json"
    )
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "OTEL_EXPORTER_OTLP_PROTOCOL must be grpc or http/protobuf, not 'http/json'" in found.stderr


def serve(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "broker", "serve", "--rehearsal"],
        cwd=tmp_path,
        env=clean_environment(env),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


WITHOUT_EXTRA = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"opentelemetry", "grpc", "google"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from broker.cli import main
sys.argv = ["broker", "serve", "--rehearsal"]
main()
"""


@pytest.mark.parametrize(
    "env", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}], ids=["off", "on"]
)
async def test_everything_else_works_without_the_extra(env: dict[str, Any], tmp_path: Path) -> None:
    port = free_port()
    settings = {"PORT": str(port), "PYTHONPATH": str(Path(__file__).parents[2]), **env}
    async with running_program(
        ["-c", WITHOUT_EXTRA], port, env=settings, cwd=tmp_path, ready="/health/ready"
    ) as broker:
        await chat(broker.url)
        assert ("session-broker[otel] is not installed" in broker.log()) is bool(env)
