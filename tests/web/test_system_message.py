"""The operator's system message in what is sent upstream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.broker import Broker, running
from tests.replies import plain
from tests.scripted import ScriptedUpstream

TEXT = "Only weather. " * 30
SYSTEM = {"role": "system", "content": TEXT.strip()}
QUESTION = {"role": "user", "content": "Will it rain?"}
OLD_TURN = [{"role": "user", "content": "x" * 3000}, {"role": "assistant", "content": "y" * 3000}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "system.txt"
    path.write_text(TEXT)
    return path


async def sent(broker: Broker, upstream: ScriptedUpstream, messages: list[dict[str, Any]]) -> Any:
    """The messages of the upstream request of a new session."""
    upstream.replies = [plain]
    await broker.read(await broker.prepare(messages=messages))
    return upstream.calls[-1].body["messages"]


async def test_the_system_message_is_sent_before_every_conversation(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    own = {"role": "system", "content": "Be brief."}
    async with running(valkey_url, upstream, system_file=path, max_messages=2) as broker:
        assert await sent(broker, upstream, [own, QUESTION]) == [SYSTEM, own, QUESTION]
        assert await sent(broker, upstream, [QUESTION]) == [SYSTEM, QUESTION]


async def test_the_system_message_counts_as_a_part_of_the_prompt(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    request = {"model": "scripted/model-1", "messages": [QUESTION], "max_tokens": 10}
    async with running(valkey_url, upstream) as broker:
        without = (await broker.post(request)).json["promptTokens"]
    async with running(valkey_url, upstream, system_file=path, daily_tokens=without + 20) as broker:
        refused = await broker.post(request)
        assert (refused.status, refused.code) == (422, "invalid_request")  # its worst case is above the limit
    async with running(valkey_url, upstream, system_file=path) as broker:
        assert (await broker.post(request)).json["promptTokens"] >= without + len(TEXT) // 4


async def test_trimming_never_takes_the_system_message(
    valkey_url: str, upstream: ScriptedUpstream, path: Path
) -> None:
    async with running(valkey_url, upstream, system_file=path, max_prompt_tokens=500) as broker:
        answer = await broker.post({"model": "scripted/model-1", "messages": [*OLD_TURN, QUESTION]})
        assert answer.json["droppedMessages"] == 2
        assert await sent(broker, upstream, [*OLD_TURN, QUESTION]) == [SYSTEM, QUESTION]
    async with running(valkey_url, upstream, system_file=path, max_prompt_tokens=50) as broker:
        answer = await broker.post({"model": "scripted/model-1", "messages": [*OLD_TURN, QUESTION]})
        assert (answer.status, answer.code) == (422, "prompt_too_long")
