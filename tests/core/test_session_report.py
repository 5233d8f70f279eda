"""The log line of a session that has ended."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from broker.core.session import State
from broker.core.session_report import SessionReport, level_of, session_line

SESSION = "3f2b8c1e-0d4a-4b7e-9c55-1a2b3c4d5e6f"


def report(**fields: Any) -> SessionReport:
    known: dict[str, Any] = {
        "session": SESSION,
        "request_id": "req-1",
        "client": "anna",
        "model": "a/b",
        "state": State.DONE,
    }
    return SessionReport(**known | fields)


def test_a_line_has_all_facts_of_a_session() -> None:
    facts = {
        "answered_by": "a/b-2026",
        "provider": "Scripted",
        "state": State.FAILED,
        "code": "upstream_rate_limited",
        "upstream_status": 429,
        "generation_id": "gen-1",
        "finish_reason": None,
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "cost": 0.5,
        "estimated": True,
        "ttft_ms": 12,
        "duration_ms": 34,
        "chunks": 3,
        "bytes": 400,
        "viewers": 2,
        "resumes": 1,
        "retries": 2,
        "queued_ms": 5,
    }
    line = session_line(report(**facts))
    known = {"session": "3f2b8c1e", "request_id": "req-1", "client": "anna", "model": "a/b"}
    assert line == known | facts | {"state": "failed"}


@pytest.mark.parametrize("state", [State.FAILED, State.LOST])
def test_a_failed_session_is_a_warning(state: State) -> None:
    assert level_of(report(state=state)) == logging.WARNING


@pytest.mark.parametrize("state", [State.DONE, State.CANCELLED, State.ABANDONED])
def test_any_other_end_is_an_info(state: State) -> None:
    assert level_of(report(state=state)) == logging.INFO


def test_a_line_has_no_whole_session_id() -> None:
    assert SESSION not in str(session_line(report()))


def test_long_names_of_an_upstream_are_cut() -> None:
    line = session_line(report(provider="p" * 1000, generation_id="g" * 1000))
    assert len(line["provider"]) == len(line["generation_id"]) == 128
