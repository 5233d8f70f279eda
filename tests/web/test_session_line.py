"""The log lines of a session: that of its end, and how lines of its requests are found by it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.broker import Broker, running
from tests.replies import plain, refuse
from tests.scripted import PATIENCE, ScriptedUpstream


async def found(log: io.StringIO, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait for the first line that is wanted."""
    async with asyncio.timeout(PATIENCE):
        while True:
            for line in map(json.loads, log.getvalue().splitlines()):
                if wanted(line):
                    return dict(line)
            await asyncio.sleep(0.01)


async def end_of(log: io.StringIO, session: str) -> dict[str, Any]:
    return await found(log, lambda line: line["event"] == "session ended" and line["session"] == session[:8])


async def test_a_session_that_ends_well_is_told_whole(
    log: io.StringIO, broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    session = await broker.prepare(model="scripted/asked")
    await broker.read(session)
    await broker.read(session, "1-1")  # after the end: the line does not count it
    line = await end_of(log, session)
    assert line["level"] == "info"
    assert (line["model"], line["answered_by"], line["provider"]) == (
        "scripted/asked",
        "scripted/model-1",
        "Scripted",
    )
    assert (line["state"], line["code"], line["finish_reason"]) == ("done", None, "stop")
    assert (line["upstream_status"], line["generation_id"]) == (200, "gen-chunk")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (10, 5)
    assert (line["cost"], line["estimated"]) == (0.00123, False)
    assert (line["chunks"], line["viewers"], line["resumes"], line["retries"]) == (4, 1, 0, 0)
    assert line["bytes"] > 400
    assert 0 <= line["ttft_ms"] <= line["duration_ms"]
    assert line["client"]
    assert line["queued_ms"] == 0


async def test_a_failed_session_is_told_as_a_warning(
    log: io.StringIO, broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [refuse(503, headers={"Retry-After": "0"}), refuse(400)]
    session = await broker.prepare()
    await broker.read(session)
    line = await end_of(log, session)
    assert (line["level"], line["state"], line["code"]) == ("warning", "failed", "upstream_rejected")
    assert (line["upstream_status"], line["retries"], line["chunks"]) == (400, 1, 0)
    assert "Secret words" not in str(line)


async def test_a_line_counts_viewers_and_resumes(
    log: io.StringIO, broker: Broker, upstream: ScriptedUpstream
) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as first:
        call = await upstream.call()
        call.open().chunk("Hello")
        await first.event()
        async with broker.stream(session, "1-1") as second:
            call.chunk("", finish="stop")
            call.done()
            await second.rest()
    line = await end_of(log, session)
    assert (line["viewers"], line["resumes"]) == (2, 1)


async def test_all_lines_of_a_session_have_one_request_id(
    log: io.StringIO, broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    answer = await broker.post(headers={"X-Request-Id": "from-the-page"})
    session = answer.json["sessionId"]
    await broker.read(session)
    prepare = await found(log, lambda line: line.get("path") == "/prepare")
    stream = await found(log, lambda line: line.get("path") == f"/stream/{session[:8]}")
    end = await end_of(log, session)
    ids = prepare["request_id"], stream["prepared_by"], end["request_id"]
    assert ids == ("from-the-page",) * 3
    assert prepare["session"] == stream["session"] == end["session"] == session[:8]


async def test_a_stream_on_another_worker_has_that_id_too(
    log: io.StringIO, valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream) as owner, running(valkey_url, upstream) as other:
        answer = await owner.post(headers={"X-Request-Id": "from-the-page"})
        session = answer.json["sessionId"]
        async with owner.stream(session) as here, other.stream(session) as elsewhere:
            plain(await upstream.call())
            await here.rest()
            await elsewhere.rest()

    def is_stream(line: dict[str, Any]) -> bool:
        return line.get("path") == f"/stream/{session[:8]}"

    # Both brokers are closed, so both lines are written.
    streams = [line for line in map(json.loads, log.getvalue().splitlines()) if is_stream(line)]
    assert [line["prepared_by"] for line in streams] == ["from-the-page"] * 2


async def test_the_time_in_line_is_told_wherever_the_page_waited(
    log: io.StringIO, valkey_url: str, upstream: ScriptedUpstream
) -> None:
    limits = {"max_concurrent_streams": 1}
    async with (
        running(valkey_url, upstream, **limits) as one,
        running(valkey_url, upstream, **limits) as other,
    ):
        waiting = await one.prepare()
        async with one.stream(await one.prepare()) as first:
            call = await upstream.call()
            [event] = await one.read(waiting)
            assert event.kind == "queued"
            redis = one.redis
            [line_key] = await redis.keys("*:line:*")
            await redis.zincrby(line_key, -5000, waiting)  # as if that was five seconds ago
            plain(call)
            await first.rest()
        upstream.replies = [plain]
        assert (await other.read(waiting))[-1].kind == "done"
        line = await end_of(log, waiting)
    assert 5000 <= line["queued_ms"] < 60_000


@pytest.mark.parametrize("how", ["before the first chunk", "after it"])
async def test_a_cancelled_session_is_told(
    how: str, log: io.StringIO, broker: Broker, upstream: ScriptedUpstream
) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as viewer:
        call = await upstream.call()
        if how == "after it":
            call.open().chunk("Hello")
            await viewer.event()
        await broker.cancel(session)
        await viewer.rest()
    line = await end_of(log, session)
    assert (line["level"], line["state"], line["finish_reason"]) == ("info", "cancelled", "cancelled")
    assert (line["ttft_ms"] is None) is (how != "after it")
