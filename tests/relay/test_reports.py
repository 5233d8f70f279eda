"""The report of a session has the facts of its end, and a bug in it changes nothing."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from broker.core.session import State
from broker.relay.reports import report_end, report_of, report_of_lost
from broker.store.sessions import SessionRecord
from tests.relay.fakes import COUNTED, DONE, ERROR, FINISH, HELLO, PREPARED, SESSION, watched
from tests.relay.test_generation import running


async def test_a_finished_session_has_its_facts() -> None:
    async with running(reads=()) as run:
        with watched(run.generation):
            await run.clock.advance(0.25)
            await run.read(HELLO)
            await run.clock.advance(2)
            await run.read(FINISH, DONE, None)
            await run.generation.ended()
        report = report_of(run.generation)
    assert (report.session, report.client, report.model) == (SESSION, "client", "a/b")
    assert (report.state, report.code, report.finish_reason) == (State.DONE, None, "stop")
    assert (report.prompt_tokens, report.completion_tokens) == (COUNTED.prompt, COUNTED.completion)
    assert (report.ttft_ms, report.duration_ms) == (250, 2250)
    assert (report.chunks, report.viewers) == (2, 1)
    assert report.generation_id == "gen-1"


async def test_a_failed_session_has_its_error() -> None:
    async with running() as run:
        await run.read(ERROR)
        await run.generation.ended()
        report = report_of(run.generation)
    assert (report.state, report.code, report.upstream_status) == (State.FAILED, "upstream_error", 502)


async def test_each_session_has_one_line_at_its_end() -> None:
    with capture_logs() as lines:
        async with running() as run:
            await run.read(FINISH, DONE, None)
            await run.generation.ended()
    [line] = [line for line in lines if line["event"] == "session ended"]
    assert (line["session"], line["state"]) == (SESSION[:8], State.DONE)


async def test_a_bug_in_a_report_is_logged_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as run:
        await run.read(FINISH, DONE, None)
        await run.generation.ended()
        monkeypatch.setattr(run.generation, "prepared", None)
        with capture_logs() as lines:
            report_end(run.generation)
    assert [line["event"] for line in lines] == ["session cannot be reported"]


@pytest.mark.parametrize(
    ("state", "code", "reason"), [(State.LOST, "worker_lost", None), (State.CANCELLED, None, "cancelled")]
)
def test_a_session_of_a_dead_worker_has_what_was_stored(
    state: State, code: str | None, reason: str | None
) -> None:
    record = SessionRecord(State.RUNNING, "claim", "worker", PREPARED.spec)
    report = report_of_lost(SESSION, record, state)
    assert (report.state, report.code, report.finish_reason) == (state, code, reason)
    assert (report.client, report.model, report.estimated) == ("client", "a/b", True)
