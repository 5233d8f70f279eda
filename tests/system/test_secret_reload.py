"""Secrets that change under a running service, and SIGHUP, which never ends it."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import jwt
import pytest

from tests.events import opened
from tests.scripted import PATIENCE
from tests.system.harness import eventually, running_broker

if TYPE_CHECKING:
    from tests.scripted import ScriptedUpstream
    from tests.system.harness import RunningBroker

QUESTION = {"model": "scripted/model-1", "messages": [{"role": "user", "content": "Who asks?"}]}
OLD, NEW = "sk-or-v1-the-old-one", "sk-or-v1-the-new-one"
OLD_SECRET, NEW_SECRET = "the old secret of the tokens, long", "the new secret of the tokens, long"


def lines(broker: RunningBroker, event: str) -> list[dict[str, Any]]:
    found = []
    for line in broker.log().splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [line for line in found if line["event"] == event]


def replace(path: Path, text: str) -> None:
    """Replace a file by another one, as programs do that rotate secrets."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.rename(path)


async def hang_up(broker: RunningBroker) -> list[str]:
    """Send SIGHUP, wait until it was heeded, and give the names of what changed."""
    before = len(lines(broker, "secrets read again"))
    broker.process.send_signal(signal.SIGHUP)
    await eventually(lambda: len(lines(broker, "secrets read again")) > before)
    changed = lines(broker, "secrets read again")[-1]["changed"]
    assert broker.process.poll() is None
    return [str(name) for name in changed]


async def prepared(broker: RunningBroker, token: str | None = None) -> tuple[int, str]:
    """The status of a /prepare, and its session."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http,
        http.post(f"{broker.url}/prepare", json=QUESTION, headers=headers) as answer,
    ):
        body = await answer.json()
    return answer.status, str(body.get("sessionId", ""))


async def key_of_next_call(broker: RunningBroker, upstream: ScriptedUpstream) -> str:
    """The key that the upstream is asked with."""
    number = len(upstream.calls) + 1
    _, session = await prepared(broker)
    async with opened(broker.url, f"/stream/{session}") as connection:
        call = await upstream.call(number)
        call.open().done()
        await connection.rest()
    return call.headers["authorization"]


async def test_a_hangup_reads_the_upstream_key_again_and_streams_go_on(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_text(OLD)
    env = {
        "OPENROUTER_API_KEY": "",
        "OPENROUTER_API_KEY_FILE": str(path),
        "BROKER_UPSTREAM_URL": upstream.url,
    }
    async with running_broker(rehearsal=False, env=env) as broker:
        _, session = await prepared(broker)
        async with opened(broker.url, f"/stream/{session}") as connection:
            call = (await upstream.call()).open()
            assert call.headers["authorization"] == f"Bearer {OLD}"
            call.chunk("before ")
            await connection.event()
            replace(path, NEW)
            await hang_up(broker)
            assert await key_of_next_call(broker, upstream) == f"Bearer {NEW}"
            call.chunk("after", finish="stop")
            call.done()
            assert [event.kind for event in await connection.rest()] == ["chunk", "done"]
        assert await hang_up(broker) == []
        log = broker.log()
    assert broker.process.returncode == 0
    assert OLD not in log
    assert NEW not in log


async def test_a_changed_file_of_the_upstream_key_is_read_again(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_text(OLD)
    env = {
        "OPENROUTER_API_KEY": "",
        "OPENROUTER_API_KEY_FILE": str(path),
        "BROKER_UPSTREAM_URL": upstream.url,
    }
    async with running_broker(rehearsal=False, env=env) as broker:
        replace(path, "")
        await eventually(lambda: lines(broker, "the settings cannot be read again, the old secrets stay"))
        assert await key_of_next_call(broker, upstream) == f"Bearer {OLD}"
        replace(path, f"{NEW}\n")
        await eventually(lambda: lines(broker, "secrets read again"))
        assert await key_of_next_call(broker, upstream) == f"Bearer {NEW}"
        assert lines(broker, "secrets read again")[0]["changed"] == ["OPENROUTER_API_KEY"]


async def test_a_refusal_that_repeats_a_changed_key_is_cleaned(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_text(OLD)
    upstream.replies = [
        lambda call: call.reply(400, {"error": {"message": f"Neither {OLD} nor {NEW} is known here."}})
    ]
    env = {
        "OPENROUTER_API_KEY": "",
        "OPENROUTER_API_KEY_FILE": str(path),
        "BROKER_UPSTREAM_URL": upstream.url,
    }
    async with running_broker(rehearsal=False, env=env) as broker:
        replace(path, NEW)
        await hang_up(broker)
        _, session = await prepared(broker)
        async with opened(broker.url, f"/stream/{session}") as connection:
            (error,) = await connection.rest()
    assert "is known here" in error.json["message"]
    assert OLD not in error.data
    assert NEW not in error.data


def token(secret: str) -> str:
    return jwt.encode({"sub": "somebody", "exp": 4_000_000_000}, secret, algorithm="HS256")


async def test_a_hangup_reads_the_secret_of_tokens_again(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(OLD_SECRET)
    async with running_broker(
        env={"BROKER_JWT_SECRET_FILE": str(path), "BROKER_DEFAULT_MODEL": "x/y"}
    ) as broker:
        assert (await prepared(broker, token(OLD_SECRET)))[0] == 201
        assert (await prepared(broker, token(NEW_SECRET)))[0] == 401
        replace(path, NEW_SECRET)
        await hang_up(broker)
        assert (await prepared(broker, token(OLD_SECRET)))[0] == 401
        assert (await prepared(broker, token(NEW_SECRET)))[0] == 201


async def test_a_hangup_reads_the_file_of_api_keys_again(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("page:the-old-key")
    async with running_broker(env={"BROKER_API_KEYS_FILE": str(path)}) as broker:
        assert (await prepared(broker, "the-old-key"))[0] == 201
        replace(path, "page:the-new-key")
        await hang_up(broker)
        assert (await prepared(broker, "the-old-key"))[0] == 401
        assert (await prepared(broker, "the-new-key"))[0] == 201


async def test_a_removed_secret_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("page:the-old-key")
    async with running_broker(env={"BROKER_API_KEYS_FILE": str(path)}) as broker:
        path.unlink()
        broker.process.send_signal(signal.SIGHUP)
        await eventually(lambda: lines(broker, "the settings cannot be read again, the old secrets stay"))
        assert (await prepared(broker))[0] == 401
        assert (await prepared(broker, "the-old-key"))[0] == 201


@pytest.mark.slow
async def test_a_hangup_at_any_moment_does_not_end_the_service() -> None:
    async with running_broker(ready="/health/live") as broker:
        for _ in range(200):
            os.kill(broker.process.pid, signal.SIGHUP)
        await hang_up(broker)
        broker.process.send_signal(signal.SIGTERM)
        while broker.process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(broker.process.pid, signal.SIGHUP)
            await eventually(lambda: True)
    assert broker.process.returncode == 0


async def test_a_hangup_reads_the_system_message_again(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    path = tmp_path / "system.txt"
    path.write_text("Only weather.")
    before = path.stat()
    env = {
        "OPENROUTER_API_KEY": OLD,
        "BROKER_SYSTEM_FILE": str(path),
        "BROKER_UPSTREAM_URL": upstream.url,
    }
    async with running_broker(rehearsal=False, env=env) as broker:
        path.write_text("Only dancing.")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # so that only the signal causes a reload
        await hang_up(broker)
        _, session = await prepared(broker)
        async with opened(broker.url, f"/stream/{session}") as connection:
            call = await upstream.call()
            call.open().done()
            await connection.rest()
        log = broker.log()
    assert call.body["messages"][0] == {"role": "system", "content": "Only dancing."}
    assert "dancing" not in log
