"""Whole answers of many services: however the bytes are cut into reads the outcome is the same, and wherever they end
nothing is lost, nothing is called whole that is not, and nothing is counted as less than was written.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple, cast

import pytest

from broker.core.dialect import CHAT, Dialect
from broker.core.errors import UpstreamError
from broker.relay.config import GenerationLimits
from broker.relay.upstream_reader import UpstreamReader
from broker.store.sessions import Prepared
from broker.upstream.client import UpstreamClient
from tests.recordings import LINE_ENDS, RECORDINGS, Recording, with_line_ends
from tests.relay.fakes import Relaying, chunks_in

MIB = 1024 * 1024
LIMITS = GenerationLimits(
    first_data_timeout=60, idle_timeout=60, deadline=60, grace=0, max_response=MIB, max_retries=0
)
RESPONSE_ENDS = ("response.completed", "response.incomplete", "response.done")
WRITTEN = ("content", "reasoning", "reasoning_content", "text", "thinking", "data", "arguments")


class Outcome(NamedTuple):
    """The result of an answer."""

    chunks: list[bytes]
    code: str | None
    message: str | None
    reason: str | None
    usage: dict[str, Any] | None
    text_bytes: int


class Pieces(Relaying):
    """An upstream whose answer comes in these reads; the stream of it as well."""

    generation_id = None
    status = 200
    whole = None
    secrets = ("sk-or-v1-0123456789abcdef",)

    def __init__(self, pieces: tuple[bytes, ...]) -> None:
        self._pieces = pieces

    async def ask(self, body: bytes, *, referer: str, model: str, dialect: Dialect, **_: object) -> Pieces:
        del body, referer, model, dialect
        return self

    async def blocks(self, max_body: int) -> AsyncGenerator[bytes]:
        del max_body
        for piece in self._pieces:
            yield piece

    def close(self) -> None:
        pass


async def replayed(*pieces: bytes, dialect: Dialect = CHAT) -> Outcome:
    """Return what the reader makes of these reads; after an error it reads on for the usage."""
    chunks: list[bytes] = []
    prepared = Prepared(
        request=b"{}", model="m", prompt_tokens=1, referer="", client="c", worst=cast("Any", None)
    )
    reader = UpstreamReader(
        prepared,
        dialect=dialect,
        upstream=cast("UpstreamClient", Pieces(pieces)),
        limits=LIMITS,
        take=lambda taken, _, event=None: chunks.extend(chunks_in(taken, event)),
    )
    fault = None
    try:
        await reader.run()
    except UpstreamError as error:
        fault = error
        if reader.may_tell_usage:
            await reader.read_usage()
    answer = reader.answer
    return Outcome(
        chunks,
        None if fault is None else fault.code,
        None if fault is None else fault.message,
        answer.finish_reason,
        answer.usage,
        answer.text_bytes,
    )


EACH = [
    pytest.param(recording, ends, id=f"{name}, {ends}")
    for name, recording in RECORDINGS.items()
    for ends in LINE_ENDS
]


def count_written(value: object) -> int:
    """Bytes of what a model wrote, counted in the plainest way and never too many."""
    if isinstance(value, list):
        return sum(map(count_written, value))
    if not isinstance(value, dict):
        return 0
    # the details of reasoning repeat the reasoning
    inner = {
        key: item for key, item in value.items() if key != "reasoning_details" or "reasoning" not in value
    }
    return sum(
        len(item.encode()) if isinstance(item, str) and key in WRITTEN else count_written(item)
        for key, item in inner.items()
    )


def written_in(chunks: list[bytes]) -> int:
    choices = [choice for chunk in chunks for choice in json.loads(chunk).get("choices") or ()]
    pieces = [json.loads(chunk).get("delta") for chunk in chunks]
    deltas = [choice.get("delta") or choice.get("message") for choice in choices]
    return sum(map(count_written, deltas)) + sum(len(piece.encode()) for piece in pieces if piece)


def ends_in(chunks: list[bytes]) -> list[str]:
    """Return the marks of a clean end: finish reasons, or the last event of a response."""
    parsed = [json.loads(chunk) for chunk in chunks]
    choices = [choice for chunk in parsed for choice in chunk.get("choices") or ()]
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    return reasons + [chunk["type"] for chunk in parsed if chunk.get("type") in RESPONSE_ENDS]


def usage_in(chunk: bytes) -> object:
    parsed = json.loads(chunk)
    return parsed.get("usage") or parsed.get("response", {}).get("usage")


def whole_events(body: bytes, ends: bytes) -> list[bytes]:
    """Return the data of each event that a blank line has closed."""
    blocks = body.removeprefix("\ufeff".encode()).split(ends + ends)[:-1]
    lines = [line for block in blocks for line in block.split(ends)]
    return [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: {")]


@pytest.mark.parametrize(("recording", "ends"), EACH)
async def test_a_recording_ends_as_it_should(recording: Recording, ends: str) -> None:
    outcome = await replayed(with_line_ends(recording.body, ends), dialect=recording.dialect)
    assert outcome.code == recording.code
    if recording.code is None:
        assert (outcome.reason, outcome.usage) == (recording.reason, recording.usage)
    assert outcome.chunks
    assert outcome.text_bytes >= written_in(outcome.chunks) > 0


@pytest.mark.parametrize(("recording", "ends"), EACH)
async def test_a_recording_may_be_cut_anywhere(recording: Recording, ends: str) -> None:
    body = with_line_ends(recording.body, ends)
    whole = await replayed(recording.body, dialect=recording.dialect)
    for cut in range(len(body) + 1):
        assert await replayed(body[:cut], body[cut:], dialect=recording.dialect) == whole, cut
    assert await replayed(*(bytes([byte]) for byte in body), dialect=recording.dialect) == whole


@pytest.mark.parametrize(("recording", "ends"), EACH)
async def test_a_recording_may_end_anywhere(recording: Recording, ends: str) -> None:
    body = with_line_ends(recording.body, ends)
    whole = await replayed(recording.body, dialect=recording.dialect)
    for cut in range(len(body) + 1):
        torn = await replayed(body[:cut], dialect=recording.dialect)
        ended = ends_in(torn.chunks)
        if torn.code is None:
            assert ended or (recording.dialect is CHAT and b"[DONE]" in body[:cut]), cut
        assert torn.chunks == whole.chunks[: len(torn.chunks)], cut
        told = [data for data in whole_events(body[:cut], LINE_ENDS[ends]) if data in whole.chunks]
        assert len(torn.chunks) >= len(told), cut
        assert torn.text_bytes >= written_in(torn.chunks), cut
        if torn.usage is not None:  # what came before the end counts only as a lower bound
            assert ended or torn.code is not None, cut
            assert torn.usage == whole.usage or any(
                usage_in(chunk) == torn.usage for chunk in torn.chunks[-1:]
            ), cut
