"""Complete answers as different services stream them, each with the expected end."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from broker.core.dialect import CHAT, RESPONSES, Dialect
from tests import responses
from tests.responses import CALL, CREATED, MESSAGE, completed, delta, event, failed, incomplete, item_done

USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
ZEROS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


class Recording(NamedTuple):
    """One answer.

    Attributes:
        body: its bytes, with LF as line ends.
        reason: the expected finish reason; None where it fails.
        code: the expected error; None where it ends well.
        usage: the final usage; None where there is none.
        dialect: its dialect.
    """

    body: bytes
    reason: str | None = None
    code: str | None = None
    usage: dict[str, Any] | None = None
    dialect: Dialect = CHAT


def piece(delta: object = None, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "delta": {} if delta is None else delta, "finish_reason": finish}
    return {"id": "c-1", "model": "m", "choices": [choice], **fields}


def said(text: str, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return piece({"content": text}, finish, **fields)


def of_response(*events: dict[str, Any], end: str = "") -> bytes:
    """Return events of a response, each with its own name."""
    return stream(
        *(f"event: {each['type']}\ndata: {json.dumps(each, ensure_ascii=False)}\n\n" for each in events),
        end=end,
    )


def stream(*events: object, end: str = "data: [DONE]\n\n") -> bytes:
    """Return events of one data line each; a text is used unchanged."""
    lines = [
        event if isinstance(event, str) else f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
        for event in events
    ]
    return ("".join(lines) + end).encode()


STOP = piece({"content": ""}, "stop")
BILL = {"id": "c-1", "choices": [], "usage": USAGE}
FAILED = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
COST = {**USAGE, "cost": 0.00123, "is_byok": False}
XAI = {
    "prompt_tokens": 12,
    "completion_tokens": 2,
    "total_tokens": 354,
    "completion_tokens_details": {"reasoning_tokens": 340},
    "cost_in_usd_ticks": 1_700_000,
}
PERPLEXITY = {**USAGE, "cost": {"input_tokens_cost": 0.001, "total_cost": 0.006}}
THOUGHTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "hm é"}]},
    {"type": "text", "text": "so"},
]
NAMELESS = {"tool_calls": [{"index": 1, "id": "", "type": "", "function": {"name": "f", "arguments": "{}"}}]}
SIGNED = {
    "tool_calls": [
        {
            "index": 0,
            "id": "call_1",
            "type": "function",
            "function": {"name": "f", "arguments": '{"a":"ü"}'},
            "extra_content": {"google": {"thought_signature": "c2ln"}},
        }
    ]
}
CITED = {"type": "url_citation", "url_citation": {"url": "https://example.com/n", "title": "News"}}

BILLED = {**responses.USAGE, "cost": 0.00123, "is_byok": False}

RECORDINGS: dict[str, Recording] = {
    "openrouter": Recording(
        stream(
            ": OPENROUTER PROCESSING\n\n",
            ": OPENROUTER PROCESSING\n\n",
            piece({"role": "assistant", "content": ""}, provider="OpenAI"),
            said("Grüße 👋"),
            STOP,
            {**STOP, "usage": COST},
        ),
        "stop",
        usage=COST,
    ),
    "reasoning, usage on its last chunk": Recording(
        stream(
            piece({"reasoning": "why", "reasoning_details": [{"type": "reasoning.text", "text": "why"}]}),
            said("so"),
            piece({"content": ""}, "length", usage=COST),
        ),
        "length",
        usage=COST,
    ),
    "tool calls": Recording(
        stream(
            piece({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "w", "arguments": ""}}]}),
            piece({"tool_calls": [{"index": 0, "function": {"arguments": '{"city":"Köln"}'}}]}),
            piece({"content": ""}, "tool_calls"),
        ),
        "tool_calls",
    ),
    "annotations": Recording(
        stream(said("see"), piece({"content": "", "annotations": [CITED]}), STOP, BILL), "stop", usage=USAGE
    ),
    "error with a number": Recording(
        stream(
            said("Hel"),
            {"id": "c-1", "error": {"code": 429, "message": "Rate limit exceeded"}, "choices": [FAILED]},
        ),
        code="upstream_rate_limited",
    ),
    "error with a word": Recording(
        stream(
            said("Hel"),
            {"error": {"code": "server_error", "message": "Provider disconnected"}, "choices": [FAILED]},
            end="",
        ),
        code="upstream_error",
    ),
    "xai": Recording(
        stream(piece({"reasoning_content": "hm"}), said("4"), STOP, {**BILL, "usage": XAI}), "stop", usage=XAI
    ),
    "deepseek": Recording(
        stream(piece({"role": "assistant", "content": ""}, usage=ZEROS), said("你好"), STOP, BILL),
        "stop",
        usage=USAGE,
    ),
    "usage on every chunk": Recording(
        stream(
            said("a", usage={**USAGE, "completion_tokens": 1, "total_tokens": 10}),
            said("b", usage={**USAGE, "completion_tokens": 2, "total_tokens": 11}),
            piece({"content": ""}, "stop", usage=USAGE),
        ),
        "stop",
        usage=USAGE,
    ),
    "groq": Recording(
        stream(said("a"), piece(None, "stop", x_groq={"id": "req_1", "usage": USAGE})), "stop", usage=USAGE
    ),
    "groq fails": Recording(
        stream(
            said("a"),
            'event: error\ndata: {"error":{"message":"Failed to call a function","status_code":400}}\n\n',
        ),
        code="upstream_error",
    ),
    "mistral": Recording(
        stream(
            piece({"content": THOUGHTS}, p="abcdef"), said("é"), piece({"content": ""}, "stop", usage=USAGE)
        ),
        "stop",
        usage=USAGE,
    ),
    "perplexity": Recording(
        stream(
            {
                "choices": [
                    {
                        "index": 0,
                        "delta": {"content": "a"},
                        "message": {"content": "a"},
                        "finish_reason": None,
                    }
                ],
                "citations": ["https://example.com"],
            },
            {
                "choices": [
                    {
                        "index": 0,
                        "delta": {"content": "b"},
                        "message": {"content": "ab"},
                        "finish_reason": "stop",
                    }
                ],
                "usage": PERPLEXITY,
            },
            end="",
        ),
        "stop",
        usage=PERPLEXITY,
    ),
    "mimo": Recording(
        stream(
            {"choices": [{"index": 0, "message": {"content": "whole"}, "finish_reason": None}]},
            {"choices": [{"index": 0, "message": {"content": ""}, "finish_reason": "stop"}], "usage": USAGE},
        ),
        "stop",
        usage=USAGE,
    ),
    "azure": Recording(
        stream(
            {"choices": [], "id": "", "model": "", "prompt_filter_results": [{"prompt_index": 0}]},
            said("a", obfuscation="x7Yz"),
            {**STOP, "obfuscation": ""},
            BILL,
        ),
        "stop",
        usage=USAGE,
    ),
    "encrypted reasoning": Recording(
        stream(
            piece({"reasoning_details": [{"type": "reasoning.encrypted", "data": "Z0FBQUFB"}]}),
            said("a"),
            STOP,
        ),
        "stop",
    ),
    "llama.cpp fails": Recording(
        stream(said("a"), 'error: {"code":500,"message":"context shift is disabled"}\n\n', end=""),
        code="upstream_error",
    ),
    "llama.cpp": Recording(
        stream(said("a"), piece(None, "stop", usage=USAGE, timings={"predicted_n": 4})), "stop", usage=USAGE
    ),
    "minimax fails": Recording(
        stream(
            said("a"), {"choices": None, "base_resp": {"status_code": 1013, "status_msg": "unknown"}}, end=""
        ),
        code="upstream_error",
    ),
    "minimax": Recording(
        stream(said("a", base_resp={"status_code": 0, "status_msg": ""}), STOP, BILL), "stop", usage=USAGE
    ),
    "error_message": Recording(
        stream(said("a"), {"error_type": "overloaded", "error_message": "Überlast"}, end=""),
        code="upstream_error",
    ),
    "event: error": Recording(
        stream(said("a"), 'event: error\ndata: {"message":"gone"}\n\n', end=""), code="upstream_error"
    ),
    "keep-alives and a quoted end": Recording(
        stream(
            "data: null\n\n", "data:\n\n", said("a"), "data: null\n\n", STOP, BILL, end='data: "[DONE]"\n\n'
        ),
        "stop",
        usage=USAGE,
    ),
    "no blank line at the end": Recording(
        stream(said("a"), STOP, BILL, end="data: [DONE]"), "stop", usage=USAGE
    ),
    "stop on the reasoning": Recording(
        stream(
            piece({"reasoning": "hm"}, "stop", usage={**USAGE, "completion_tokens": 1}),
            said("text"),
            end="\n",
        ),
        "stop",
    ),
    "an empty reason on every chunk": Recording(
        stream(said("a", ""), piece(NAMELESS, ""), piece(None, "tool_calls"), BILL), "tool_calls", usage=USAGE
    ),
    "gemini": Recording(stream(piece(SIGNED), STOP, BILL, end=""), "stop", usage=USAGE),
    "gemini fails": Recording(
        stream(
            said("a"), [{"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}], end=""
        ),
        code="upstream_error",
    ),
    "an error behind the end": Recording(
        stream(
            said("a"),
            piece(None, "length"),
            piece(None, "length"),
            {"error": {"code": 502, "message": "Token limit reached"}, "usage": USAGE},
            end="",
        ),
        "length",
        usage=USAGE,
    ),
    "an error on the last chunk": Recording(
        stream(
            said("a"),
            {
                "choices": [{**FAILED, "native_finish_reason": "MALFORMED_FUNCTION_CALL"}],
                "error": {"code": 502, "message": "x"},
            },
            {**BILL, "usage": COST},
        ),
        code="upstream_error",
    ),
    "fields of all kinds": Recording(
        stream(
            "\ufeffretry: 3000\nid: 1\nevent: message\n",
            said("a"),
            "id: 2\n: comment\nx-unknown: y\n",
            STOP,
            "event: ping\n\n",
            BILL,
        ),
        "stop",
        usage=USAGE,
    ),
    "a response": Recording(
        of_response(CREATED, delta("Grüße "), delta("👋"), item_done(MESSAGE), completed()),
        "stop",
        usage=responses.USAGE,
        dialect=RESPONSES,
    ),
    "a response of OpenRouter": Recording(
        stream(": OPENROUTER PROCESSING\n\n", CREATED, delta("Grüße"), completed(usage=BILLED)),
        "stop",
        usage=BILLED,
        dialect=RESPONSES,
    ),
    "a response of the older kind": Recording(
        stream(CREATED, delta("Hi", "content_part"), event("response.done", response={"usage": BILLED})),
        "stop",
        usage=BILLED,
        dialect=RESPONSES,
    ),
    "a response with reasoning and a call": Recording(
        of_response(
            CREATED,
            delta("hm é", "reasoning_summary_text"),
            item_done({"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}),
            delta('{"a"', "function_call_arguments", 1),
            delta(":1}", "function_call_arguments", 1),
            item_done(CALL, 1),
            completed(),
        ),
        "tool_calls",
        usage=responses.USAGE,
        dialect=RESPONSES,
    ),
    "a response that is cut": Recording(
        of_response(CREATED, delta("Hello"), incomplete("max_output_tokens")),
        "length",
        usage=responses.USAGE,
        dialect=RESPONSES,
    ),
    "a response that is told as whole and was cut": Recording(
        of_response(CREATED, delta("Hello"), completed(status="incomplete")),
        "length",
        usage=responses.USAGE,
        dialect=RESPONSES,
    ),
    "a response that fails": Recording(
        of_response(CREATED, delta("Hello"), failed({"code": "server_error", "message": "It broke."})),
        code="upstream_error",
        dialect=RESPONSES,
    ),
    "a response that ends in an error": Recording(
        of_response(CREATED, delta("Hello"), event("error", code="rate_limit_exceeded", message="Slowly.")),
        code="upstream_rate_limited",
        dialect=RESPONSES,
    ),
    "a response without an end": Recording(
        of_response(CREATED, delta("Hello"), end="data: [DONE]\n\n"),
        code="upstream_interrupted",
        dialect=RESPONSES,
    ),
}
LINE_ENDS = {"LF": b"\n", "CRLF": b"\r\n", "CR": b"\r"}


def with_line_ends(body: bytes, ends: str) -> bytes:
    return body.replace(b"\n", LINE_ENDS[ends])
