"""The contents of the events of a response, for people."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker.core.responses_said import is_event, said_in_event
from broker.core.result import Transcript
from broker.core.said import NOTHING, Said
from tests.responses import (
    CALL,
    CREATED,
    MESSAGE,
    completed,
    delta,
    event,
    incomplete,
    item_done,
    response,
)

THOUGHT = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
WHOLE = response(output=[THOUGHT, MESSAGE, CALL])


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (delta("Hello"), Said(text="Hello")),
        (delta("No.", "refusal"), Said(text="No.")),
        (delta("Hm", "reasoning_text"), Said(reasoning="Hm")),
        (delta("Hm", "reasoning_summary_text"), Said(reasoning="Hm")),
        (item_done(CALL), Said(calls=(CALL,))),
        (delta('{"a', "function_call_arguments"), NOTHING),
        (item_done(MESSAGE), NOTHING),
        (event("response.output_text.done", text="Hello"), NOTHING),
        (CREATED, NOTHING),
        (completed(output=[MESSAGE]), NOTHING),
        (completed(output=[MESSAGE]) | {"sequence_number": 7}, NOTHING),
        (event("response.completed", sequence_number=0, response=WHOLE), Said("Hello", "Hm.", (CALL,))),
        (incomplete("content_filter", output=[MESSAGE]) | {"sequence_number": 0}, Said("Hello")),
        (delta(None), NOTHING),
        (item_done("odd"), NOTHING),  # type: ignore[arg-type]
        (
            event("response.completed", sequence_number=0, response={"output": [3, {"type": "message"}]}),
            NOTHING,
        ),
        ({}, NOTHING),
    ],
)
def test_text_is_given_once(told: dict[str, Any], said: Said) -> None:
    assert said_in_event(told) == said


def test_an_event_is_distinguished_from_a_chat_chunk() -> None:
    assert is_event(CREATED)
    assert not is_event({"choices": []})
    assert not is_event({"type": 3})


def test_a_transcript_has_the_contents_of_the_events() -> None:
    transcript = Transcript()
    events = [CREATED, delta("Hm", "reasoning_text"), delta("Hel"), delta("lo"), item_done(CALL), completed()]
    transcript.add([json.dumps(each).encode() for each in events])
    assert (transcript.text, transcript.reasoning) == ("Hello", "Hm")
    assert transcript.tool_calls == (
        {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}},
    )
