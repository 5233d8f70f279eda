"""The metrics under the names of the conventions for generative AI."""

from __future__ import annotations

import asyncio

from opentelemetry.semconv._incubating.metrics import gen_ai_metrics

from broker.telemetry.names import MOST, OTHER, ModelNames
from tests.broker import running
from tests.replies import plain, refuse
from tests.scripted import PATIENCE, ScriptedUpstream
from tests.telemetry.recorder import Recorder

ALL = (
    "gen_ai.client.token.usage",
    "gen_ai.client.operation.duration",
    "gen_ai.client.operation.time_to_first_chunk",
    "gen_ai.server.time_to_first_token",
)


def test_all_names_are_those_of_the_conventions() -> None:
    assert set(ALL) <= {value for value in vars(gen_ai_metrics).values() if isinstance(value, str)}


async def counted(recorder: Recorder, number: int) -> None:
    """Wait until so many sessions are counted."""
    async with asyncio.timeout(PATIENCE):
        while sum(point.count for _, point in recorder.points(ALL[1])) < number:  # noqa: ASYNC110 - as a reader
            await asyncio.sleep(0.01)


async def test_a_session_is_counted_under_the_usual_names(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    recorder = Recorder()
    upstream.replies = [plain]
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        await broker.read(await broker.prepare())
        await counted(recorder, 1)
    labels = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openrouter",
        "gen_ai.request.model": "scripted/model-1",
        "gen_ai.response.model": "scripted/model-1",
        "server.address": "models.example",
        "server.port": 443,
    }
    tokens = {told["gen_ai.token.type"]: (told, point) for told, point in recorder.points(ALL[0])}
    for kind, number in (("input", 10), ("output", 5)):
        told, point = tokens[kind]
        assert told == {**labels, "gen_ai.token.type": kind}
        assert (point.count, point.sum) == (1, number)
        assert point.explicit_bounds == tuple(4**power for power in range(14))
    for name in ALL[1:]:
        [(told, point)] = recorder.points(name)
        assert told == labels
        assert point.count == 1
        assert 0 <= point.sum < PATIENCE


async def test_a_failure_is_counted_by_its_code(valkey_url: str, upstream: ScriptedUpstream) -> None:
    recorder = Recorder()
    upstream.replies = [refuse(400)]
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        await broker.read(await broker.prepare())
        await counted(recorder, 1)
    [(told, _)] = recorder.points(ALL[1])
    assert told["error.type"] == "upstream_rejected"
    assert recorder.points(ALL[2]) == recorder.points(ALL[3]) == []


async def test_a_page_cannot_make_up_values_of_labels(valkey_url: str, upstream: ScriptedUpstream) -> None:
    recorder = Recorder()
    upstream.replies = [refuse(404)]
    async with running(valkey_url, upstream, telemetry=recorder.telemetry) as broker:
        for n in range(3):
            await broker.read(await broker.prepare(model=f"made/up-{n}"))
        await counted(recorder, 3)
    [(told, point)] = recorder.points(ALL[1])
    assert (told["gen_ai.request.model"], point.count) == (OTHER, 3)


def test_models_are_named_once_they_have_answered_and_up_to_a_bound() -> None:
    names = ModelNames()
    assert names.name("a", answered=False) == OTHER
    assert [names.name(f"m{n}", answered=True) for n in range(MOST)] == [f"m{n}" for n in range(MOST)]
    assert names.name("one-more", answered=True) == OTHER
    assert names.name("m1", answered=False) == "m1"
