"""The metrics of a broker: each is moved by what it counts, and only those who may see them do."""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.metrics import CHUNK_GAP, PlainHistogram
from broker.web import keys
from broker.web.waiting import MOST, WaitingPages
from tests.broker import Broker, running
from tests.clock import Clock
from tests.replies import plain, refuse
from tests.scripted import PATIENCE, ScriptedUpstream
from tests.system.harness import ValkeyProcess
from tests.system.proxy import program

HERE = Path(__file__)
README = HERE.parents[2] / "README.md"
Values = dict[str, float]


async def scrape(broker: Broker) -> Values:
    """Return all values by name and labels, as `broker_sessions_total{code="",state="done"}`."""
    answer = await broker.ask("GET", "/metrics")
    assert answer.status == 200, answer.text
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    values: Values = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return values


async def scrape_until(broker: Broker, wanted: Callable[[Values], bool]) -> Values:
    """Scrape again until the values are as wanted."""
    async with asyncio.timeout(PATIENCE):
        while not wanted(values := await scrape(broker)):  # noqa: ASYNC110 - so does Prometheus
            await asyncio.sleep(0.01)
    return values


async def test_a_session_that_ends_is_counted(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    await broker.read(await broker.prepare())
    values = await scrape_until(broker, lambda values: values['broker_bytes_total{direction="out"}'] > 0)
    assert values['broker_sessions_total{code="",state="done"}'] == 1
    assert values["broker_chunks_total"] == 4
    assert values['broker_bytes_total{direction="in"}'] > 400
    assert values['broker_bytes_total{direction="out"}'] > values['broker_bytes_total{direction="in"}']
    assert values['broker_tokens_total{kind="prompt"}'] == 10
    assert values['broker_tokens_total{kind="completion"}'] == 5
    assert values["broker_cost_usd_total"] == 0.00123
    assert values["broker_time_to_first_chunk_seconds_count"] == 1
    assert values["broker_session_seconds_count"] == 1
    assert values['broker_upstream_requests_total{status="200"}'] == 1
    assert values['broker_redis_seconds_count{script="claim"}'] == 1


async def test_a_running_session_is_shown(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with broker.stream(await broker.prepare()) as viewer:
        call = (await upstream.call()).open()
        call.chunk("Hello")
        await viewer.take(1)
        values = await scrape(broker)
        assert (values["broker_sessions_running"], values["broker_viewers"]) == (1, 1)
        assert values["broker_journal_bytes"] > 100
        call.chunk("again")
        await viewer.take(1)
        assert (await scrape(broker))["broker_chunk_gap_seconds_count"] >= 1
    await scrape_until(broker, lambda values: values["broker_viewers"] == 0)


async def test_events_that_wait_for_redis_are_a_lag(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with broker.stream(await broker.prepare()) as viewer:
        call = (await upstream.call()).open()
        async with asyncio.timeout(PATIENCE):
            lag = 0.0
            while lag == 0:  # the journal may be written between a chunk and the scrape
                call.chunk("Hello")
                await viewer.take(1)
                lag = (await scrape(broker))["broker_journal_lag_seconds"]


async def test_a_failure_and_a_retry_are_counted(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [refuse(503, headers={"Retry-After": "0"}), refuse(400)]
    await broker.read(await broker.prepare())
    values = await scrape(broker)
    assert values['broker_sessions_total{code="upstream_rejected",state="failed"}'] == 1
    assert values["broker_upstream_retries_total"] == 1
    assert values['broker_upstream_requests_total{status="503"}'] == 1
    assert values['broker_upstream_requests_total{status="400"}'] == 1


async def test_an_upstream_without_an_answer_is_counted(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with broker.stream(await broker.prepare()) as viewer:
        (await upstream.call()).reset()
        await viewer.rest()
    assert (await scrape(broker))['broker_upstream_requests_total{status="none"}'] == 1


async def test_refusals_are_counted_by_code(broker: Broker) -> None:
    await broker.post({"messages": []})
    await broker.read("3f2b8c1e-0d4a-4b7e-9c55-1a2b3c4d5e6f")
    values = await scrape(broker)
    assert values['broker_refused_total{code="invalid_request"}'] == 1
    assert values['broker_refused_total{code="session_not_found"}'] == 1


async def test_a_cancel_is_counted(broker: Broker, upstream: ScriptedUpstream) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as viewer:
        await upstream.call()
        await broker.cancel(session)
        await viewer.rest()
    await broker.cancel(session)  # too late: answered, and not accepted
    values = await scrape(broker)
    assert values["broker_cancels_total"] == 1
    assert values["broker_cancel_seconds_count"] == 2
    assert values['broker_sessions_total{code="",state="cancelled"}'] == 1


async def test_an_abandoned_session_is_counted(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, disconnect_grace=0) as broker:
        async with broker.stream(await broker.prepare()) as viewer:
            (await upstream.call()).open().chunk("Hello")
            await viewer.take(1)
        await scrape_until(broker, lambda values: values["broker_abandoned_total"] == 1)


async def test_resumes_are_counted_by_what_was_found(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream) as owner, running(valkey_url, upstream) as other:
        upstream.replies = [plain]
        session = await owner.prepare()
        await owner.read(session)
        await owner.read(session, "1-1")
        await owner.ask("GET", f"/stream/{session}", headers={"Last-Event-ID": "1-5.end"})
        await owner.read("3f2b8c1e-0d4a-4b7e-9c55-1a2b3c4d5e6f", "1-1")
        await other.read(session, "1-1")
        values = await scrape(owner)
        for result in ("here", "ended", "expired"):
            assert values[f'broker_resumes_total{{result="{result}"}}'] == 1
        assert (await scrape(other))['broker_resumes_total{result="elsewhere"}'] == 1


async def test_pages_in_line_are_counted_while_they_wait(
    valkey_url: str, upstream: ScriptedUpstream, clock: Clock
) -> None:
    async with running(valkey_url, upstream, max_concurrent_streams=1) as broker:
        broker.app[keys.WAITING]._clock = clock

        async def queued() -> float:
            return (await scrape(broker))["broker_queued"]

        async with broker.stream(await broker.prepare()) as running_one:
            call = await upstream.call()
            waiting, cancelled = await broker.prepare(), await broker.prepare()
            for session in (waiting, cancelled, waiting):
                await broker.read(session)
            assert await queued() == 2
            await broker.cancel(cancelled)
            assert await queued() == 1
            plain(call)
            await running_one.rest()
        upstream.replies = [plain]
        await broker.read(waiting)
        assert await queued() == 0


def test_a_page_that_does_not_come_back_counts_no_more(clock: Clock) -> None:
    waiting = WaitingPages(clock)
    waiting.note_waiting("first", 2000)
    waiting.note_waiting("second", 4000)
    clock.now += 3
    assert len(waiting) == 1
    waiting.note_waiting("first", 2000)
    clock.now += 2
    assert len(waiting) == 1
    clock.now += 1
    assert len(waiting) == 0


def test_a_storm_of_waiting_pages_stays_bounded(clock: Clock) -> None:
    waiting = WaitingPages(clock)
    for n in range(MOST + 5):
        waiting.note_waiting(str(n), 2000)
    assert len(waiting) == MOST


async def test_a_redis_that_is_away_is_counted(exposed_broker: Broker, valkey: ValkeyProcess) -> None:
    valkey.kill()
    await exposed_broker.post()
    assert (await scrape(exposed_broker))["broker_redis_errors_total"] >= 1


async def test_a_session_that_another_worker_took_is_counted(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as viewer:
        (await upstream.call()).open().chunk("Hello")
        await viewer.take(1)
        store = broker.app[keys.STORE]
        key = store.session_keys(session)["session"]
        await store.commands([["HSET", key, "claim_id", "of-another", "worker", "another"]])
        await scrape_until(broker, lambda values: values["broker_leases_lost_total"] == 1)


async def test_a_claim_that_no_replica_confirms_is_counted(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    async with running(valkey_url, upstream, redis_wait=1) as broker:
        await broker.read(await broker.prepare())
        assert (await scrape(broker))["broker_claims_unconfirmed_total"] == 1


async def test_the_delay_of_the_event_loop_is_measured(broker: Broker) -> None:
    await scrape_until(broker, lambda values: values["broker_event_loop_lag_seconds_count"] > 0)


async def test_two_brokers_of_a_process_count_apart(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    async with running(valkey_url, upstream) as one, running(valkey_url, upstream) as other:
        await one.read(await one.prepare())
        assert (await scrape(one))["broker_chunks_total"] == 4
        assert (await scrape(other))["broker_chunks_total"] == 0


async def test_workers_of_a_host_answer_for_each_other(
    valkey_url: str, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.replies = [plain]
    async with running(valkey_url, upstream, metrics_directory=tmp_path) as one:
        async with running(valkey_url, upstream, metrics_directory=tmp_path) as other:
            await other.read(await other.prepare())
            for broker in (one, other):
                await scrape_until(broker, lambda values: values["broker_chunks_total"] == 4)
        assert (await scrape(one))["broker_chunks_total"] == 4  # nothing is lost with a worker
        await one.read(await one.prepare())
        assert (await scrape(one))["broker_chunks_total"] == 8


PROMISED: dict[str, set[str]] = {
    "broker_sessions_total": {"state", "code"},
    "broker_sessions_running": set(),
    "broker_viewers": set(),
    "broker_queued": set(),
    "broker_time_to_first_chunk_seconds": set(),
    "broker_chunk_gap_seconds": set(),
    "broker_session_seconds": set(),
    "broker_chunks_total": set(),
    "broker_bytes_total": {"direction"},
    "broker_tokens_total": {"kind"},
    "broker_cost_usd_total": set(),
    "broker_resumes_total": {"result"},
    "broker_abandoned_total": set(),
    "broker_cancels_total": set(),
    "broker_cancel_seconds": set(),
    "broker_upstream_requests_total": {"status"},
    "broker_upstream_retries_total": set(),
    "broker_refused_total": {"code"},
    "broker_redis_seconds": {"script"},
    "broker_redis_errors_total": set(),
    "broker_journal_lag_seconds": set(),
    "broker_journal_bytes": set(),
    "broker_event_loop_lag_seconds": set(),
    "broker_leases_lost_total": set(),
}
"""The names of metrics and their labels."""


async def names_of(broker: Broker) -> set[str]:
    """Return the names of all metrics."""
    text = (await broker.ask("GET", "/metrics")).text
    return set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))


async def test_the_limits_that_alerts_compare_with_are_shown(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, max_streams=7, total_daily_cost="2.5") as broker:
        values = await scrape(broker)
        assert values["broker_sessions_limit"] == 7
        assert values["broker_daily_cost_limit_usd"] == 2.5


async def test_series_are_there_before_they_count_anything(broker: Broker) -> None:
    values = await scrape(broker)
    assert values['broker_sessions_total{code="worker_lost",state="lost"}'] == 0
    assert values['broker_refused_total{code="internal_error"}'] == 0
    assert values['broker_upstream_requests_total{status="401"}'] == 0
    assert values['broker_bytes_total{direction="out"}'] == 0
    assert values['broker_tokens_total{kind="completion"}'] == 0


async def test_every_promised_metric_is_there_with_its_labels(broker: Broker) -> None:
    text = (await broker.ask("GET", "/metrics")).text
    found = {
        sample.name.removesuffix("_count"): set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_sum"))
    }
    assert {name: found.get(name) for name in PROMISED} == PROMISED


async def test_every_metric_is_in_the_readme(broker: Broker) -> None:
    readme = README.read_text(encoding="utf-8")
    assert [name for name in sorted(await names_of(broker)) if f"`{name}" not in readme] == []


def looked_at() -> set[str]:
    """Return the names of all values that the tests of this file look at."""
    found = set()
    tests = [each for each in ast.walk(ast.parse(HERE.read_text())) if isinstance(each, ast.AsyncFunctionDef)]
    for part in (part for test in tests if test.name.startswith("test_") for part in ast.walk(test)):
        if isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Constant | ast.JoinedStr):
            found.add(re.sub(r"^f?['\"]+|[{'\"].*", "", ast.unparse(part.slice)))
    return found


async def test_every_metric_is_moved_by_a_test(broker: Broker) -> None:
    """A test looks at its value; those of this file expect one that is not 0, or wait for it."""
    names = await names_of(broker)
    assert {name for name in names if not {name, f"{name}_count"} & looked_at()} == set()


@pytest.mark.parametrize("shared", [False, True], ids=["one worker", "several"])
async def test_promtool_finds_nothing_wrong(
    shared: bool, valkey_url: str, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    promtool = program("promtool")
    upstream.replies = [plain, refuse(400)]
    async with running(valkey_url, upstream, metrics_directory=tmp_path if shared else None) as broker:
        for _ in range(2):
            await broker.read(await broker.prepare())
        text = (await broker.ask("GET", "/metrics")).text
    found = await asyncio.to_thread(
        subprocess.run,
        [promtool, "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


async def test_a_token_opens_the_metrics(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, metrics_token="secret-token") as broker:
        for shown in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer \xe9"}):
            refused = await broker.ask("GET", "/metrics", headers=shown)
            assert (refused.status, refused.code) == (401, "unauthorized")
        headers = {"Authorization": "Bearer secret-token", "X-Forwarded-For": "192.0.2.1"}
        assert (await broker.ask("GET", "/metrics", headers=headers)).status == 200


@pytest.mark.parametrize(
    "header",
    [
        {"Forwarded": "for=192.0.2.1"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Real-IP": "127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"Host": "broker.example"},
    ],
    ids=lambda header: next(iter(header)),
)
async def test_without_a_token_only_this_machine_sees_metrics(
    header: dict[str, str], valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, host="0.0.0.0") as broker:
        assert (await broker.ask("GET", "/metrics")).status == 200
        refused = await broker.ask("GET", "/metrics", headers=header)
        unknown = await broker.ask("GET", "/nothing-is-here")
        assert (refused.status, refused.json) == (404, unknown.json)


def test_gaps_are_counted_in_their_buckets() -> None:
    gaps = PlainHistogram(CHUNK_GAP)
    for seconds in (0.001, 0.005, 0.02, 1000.0):
        gaps.observe(seconds)
    buckets, total = gaps.buckets()
    assert total == pytest.approx(1000.026)
    counts = dict(buckets)
    assert [counts[bound] for bound in ("0.005", "0.025", "60", "+Inf")] == [2, 3, 3, 4]
    assert len(buckets) == len(CHUNK_GAP) + 1
