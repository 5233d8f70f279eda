"""Messages that a page collected from our stream can be sent back, from any provider."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest

from broker.core.chat import parse_chat
from broker.core.checking import RequestRules
from broker.core.document import parse_json
from broker.core.fitting import FitRules, fit

CHAT_RULES = RequestRules(default_model=None, extra_parameters=(), allowed_models=("*",), max_messages=200)
FIT_RULES = FitRules(0, 4096, switch_off_compression=False, user=None)
ASKED = {"role": "user", "content": "Look"}


def collect(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge deltas as a simple page does: tool calls by index, text and lists grow, the rest is set."""
    message: dict[str, Any] = {"role": "assistant"}
    for delta in deltas:
        for key, value in delta.items():
            if key == "tool_calls" and value:
                message[key] = merge_calls(message.get(key) or [], value)
            else:
                message[key] = grown(key, message.get(key), value)
    return message


def grown(key: str, before: Any, value: Any) -> Any:
    if value is None:
        return before
    if isinstance(before, str) and isinstance(value, str) and key != "role":
        return before + value
    if isinstance(before, list) and isinstance(value, list):
        return before + value
    if isinstance(before, list):
        return [*before, value]
    if isinstance(before, dict) and isinstance(value, dict):
        return {**before, **{name: grown(name, before.get(name), inner) for name, inner in value.items()}}
    return copy.deepcopy(value)


def merge_calls(calls: list[Any], found: list[dict[str, Any]]) -> list[Any]:
    """`calls[delta.index] = …` of JavaScript, which leaves a null where nothing was put."""
    calls = list(calls)
    for delta in found:
        place = delta.get("index")
        place = len(calls) if place is None else place
        calls += [None] * (place + 1 - len(calls))
        call = calls[place] or {}
        for key, value in delta.items():
            call[key] = call.get(key) if value is None else value
        call["function"] = {**call.get("function", {})}
        arguments = ((calls[place] or {}).get("function") or {}).get("arguments") or ""
        if calls[place] is not None:
            before = calls[place]["function"]
            call["function"] = {**before, **(delta.get("function") or {})}
            call["function"]["name"] = before.get("name") or call["function"].get("name")
            call["function"]["arguments"] = arguments + ((delta.get("function") or {}).get("arguments") or "")
        calls[place] = call
    return calls


def call(**fields: Any) -> dict[str, Any]:
    return {
        "index": 0,
        "id": "c1",
        "type": "function",
        "function": {"name": "look", "arguments": "{}"},
        **fields,
    }


DIALECTS: dict[str, list[dict[str, Any]]] = {
    "OpenAI": [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ],
    "OpenAI, refusal": [{"role": "assistant", "content": "", "refusal": ""}, {"refusal": "I cannot"}],
    "tool call in pieces": [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call(function={"name": "look", "arguments": ""})],
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
    ],
    "empty id and type": [{"role": "assistant", "content": "", "tool_calls": [call(id="", type="")]}],
    "null type, no index": [
        {"tool_calls": [{"id": "c1", "type": None, "function": {"name": "look", "arguments": "{}"}}]}
    ],
    "neither id nor type": [{"tool_calls": [{"index": 0, "function": {"name": "look", "arguments": "{}"}}]}],
    "index from 1": [{"tool_calls": [call(index=1)]}, {"tool_calls": [call(index=2, id="c2")]}],
    "Gemini": [
        {
            "role": "assistant",
            "tool_calls": [call(extra_content={"google": {"thought_signature": "x" * 5000}})],
        }
    ],
    "Gemini, thoughts": [
        {"content": "hm", "extra_content": {"google": {"thought": True}}},
        {"content": "yes"},
    ],
    "OpenRouter, signed reasoning": [
        {
            "role": "assistant",
            "content": "",
            "reasoning": "Let",
            "reasoning_details": [
                {"type": "reasoning.text", "text": "Let", "signature": None, "format": "f", "index": 0}
            ],
        },
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "AA", "id": "r1", "index": 1}]},
        {"content": "Yes", "annotations": [{"type": "url_citation", "url_citation": {"url": "https://a"}}]},
        {"images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}, "index": 0}]},
    ],
    "a detail in every chunk": [
        {"content": "", "reasoning_details": [{"type": "reasoning.text", "text": "x"}]} for _ in range(3000)
    ],
    "DeepSeek": [
        {"role": "assistant", "content": None, "reasoning_content": "hm"},
        {"content": "Yes", "reasoning_content": None},
    ],
    "Mistral": [
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}],
        },
        {"content": [{"type": "text", "text": "14"}, {"type": "reference", "reference_ids": [1, 2]}]},
        {"content": "4"},
    ],
    "Mistral, whole": [{"role": "assistant", "content": "x", "tool_calls": None, "prefix": False}],
    "empty list of parts": [{"role": "assistant", "content": [], "tool_calls": [call()]}],
    "plain strings among parts": [{"content": ["a", {"type": "text", "text": "b"}, "c"]}],
    "Groq": [
        {"role": "assistant", "content": "", "channel": "analysis", "reasoning": "hm"},
        {
            "executed_tools": [
                {"index": 0, "type": "search", "output": "x", "search_results": {"results": []}}
            ]
        },
    ],
    "LiteLLM": [
        {
            "role": "assistant",
            "content": "",
            "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s"}],
            "provider_specific_fields": {"citation": None},
            "tool_calls": [call(provider_specific_fields={"thought_signature": "s"})],
        }
    ],
    "a sound": [
        {"role": "assistant", "content": None, "audio": {"id": "a", "transcript": "He", "data": ""}},
        {"audio": {"data": "AAAA", "transcript": "llo"}},
        {"audio": {"expires_at": 1}},
    ],
    "an old function call": [
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": "{"}},
        {"function_call": {"arguments": "}"}},
    ],
    "arguments as an object": [{"tool_calls": [call(function={"name": "look", "arguments": {"a": 1}})]}],
    "a signature for an id": [{"tool_calls": [call(id="c1__thought__" + "A" * 3000)]}],
    "nothing": [{}],
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_collected_messages_can_be_sent_back(dialect: str) -> None:
    collected = collect(DIALECTS[dialect])
    calls = [each for each in collected.get("tool_calls") or [] if each]
    answers: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": each.get("id") or "", "content": []} for each in calls
    ]
    document = {"model": "a/b", "messages": [ASKED, collected, *answers, ASKED]}
    request = parse_chat(parse_json(orjson.dumps(document)), CHAT_RULES)
    sent = fit(request, {}, FIT_RULES).body["messages"]
    assert sent[1].get("content") == collected.get("content")
    assert (sent[1].get("tool_calls") or []) == calls
    assert {**sent[1], "tool_calls": 0} == {**collected, "tool_calls": 0}
    assert sent[2:-1] == answers


def test_collected_messages_count_in_full() -> None:
    for key, value in {
        "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "x" * 30_000}]}],
        "tool_calls": [call(extra_content={"a": "x" * 30_000})],
        "thinking_blocks": ["x" * 30_000],
        "reasoning_details": [{"type": "reasoning.encrypted", "data": "x" * 30_000}],
    }.items():
        document = {"model": "a/b", "messages": [ASKED, {"role": "assistant", key: value}, ASKED]}
        assert fit(parse_chat(document, CHAT_RULES), {}, FIT_RULES).prompt_tokens >= 10_000
