"""Micro-benchmarks of what each chunk passes through."""

from __future__ import annotations

import pytest

from broker.core.chat_answer import ChatAnswer
from broker.core.events import chunk_events
from broker.core.responses_answer import ResponsesAnswer
from broker.core.short_form import shorten
from broker.core.sse import Decoder, encode_data
from tests.benchmarks.micro import CHUNK, COMMENT, Benchmark
from tests.chunks import events_of

EVENT = b"data: " + CHUNK + b"\n\n"
DELTA = (
    b'{"type":"response.output_text.delta","sequence_number":7,"item_id":"msg_1","output_index":0,'
    b'"content_index":0,"delta":" token","logprobs":[]}'
)
MAX_EVENT = 8 * 1024 * 1024


@pytest.mark.parametrize("chunks", [1, 50])
def test_decode_a_read(benchmark: Benchmark, chunks: int) -> None:
    decoder = Decoder(MAX_EVENT, error_lines=True)
    assert len(benchmark(decoder.feed, EVENT * chunks)) == chunks


def test_decode_a_chunk_in_two_reads(benchmark: Benchmark) -> None:
    decoder = Decoder(MAX_EVENT, error_lines=True)

    def read() -> int:
        return len(decoder.feed(EVENT[:150])) + len(decoder.feed(EVENT[150:]))

    assert benchmark(read) == 1


def test_decode_a_comment(benchmark: Benchmark) -> None:
    assert benchmark(Decoder(MAX_EVENT, error_lines=True).feed, COMMENT) == []


def test_read_a_chunk_of_a_chat(benchmark: Benchmark) -> None:
    assert benchmark(ChatAnswer().read, CHUNK) == CHUNK


def test_read_a_chunk_with_usage(benchmark: Benchmark) -> None:
    usage = b',"usage":{"prompt_tokens":14,"completion_tokens":160,"total_tokens":174,"cost":0.0001}}'
    assert benchmark(ChatAnswer().read, CHUNK[:-1] + usage)


def test_read_an_event_of_a_response(benchmark: Benchmark) -> None:
    assert benchmark(ResponsesAnswer().read, DELTA, "response.output_text.delta") == DELTA


@pytest.mark.parametrize("chunks", [1, 50])
def test_frame_events(benchmark: Benchmark, chunks: int) -> None:
    assert benchmark(chunk_events, [encode_data(CHUNK)] * chunks, 17).count(b"\n\n") == chunks


@pytest.mark.parametrize("chunks", [1, 50])
def test_shorten_events(benchmark: Benchmark, chunks: int) -> None:
    assert benchmark(shorten, events_of([CHUNK] * chunks, 1), None)
