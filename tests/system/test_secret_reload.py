"""Secrets that change under a running service, and SIGHUP, which never ends it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import jwt
import pytest
import redis

from tests.events import opened
from tests.money import until
from tests.scripted import PATIENCE
from tests.system.harness import NotStartedError, eventually, running_broker, running_valkey

if TYPE_CHECKING:
    from tests.scripted import ScriptedUpstream
    from tests.system.harness import RunningBroker

QUESTION = {"model": "scripted/model-1", "messages": [{"role": "user", "content": "Who asks?"}]}
OLD, NEW = "sk-or-v1-the-old-one", "sk-or-v1-the-new-one"
OLD_SECRET, NEW_SECRET = "the old secret of the tokens is long", "the new secret of the tokens is long"


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


async def prepared(
    broker: RunningBroker, token: str | None = None, model: str = "scripted/model-1"
) -> tuple[int, str]:
    """The status of a /prepare, and its session."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http,
        http.post(f"{broker.url}/prepare", json={**QUESTION, "model": model}, headers=headers) as answer,
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
        await eventually(lambda: lines(broker, "a secret cannot be read again, the old one stays"))
        assert await key_of_next_call(broker, upstream) == f"Bearer {OLD}"
        await replaced(broker, path, f"{NEW}\n")
        assert await key_of_next_call(broker, upstream) == f"Bearer {NEW}"
        assert lines(broker, "secrets read again")[-1]["changed"] == ["OPENROUTER_API_KEY"]


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


async def replaced(broker: RunningBroker, path: Path, content: str) -> None:
    """Replace a file of a secret, and wait until it was read."""
    before = len(lines(broker, "secrets read again"))
    replace(path, content)
    await eventually(lambda: len(lines(broker, "secrets read again")) > before)


async def test_a_changed_file_of_token_secrets_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(f"{OLD_SECRET}\n")
    async with running_broker(env={"BROKER_JWT_SECRET_FILE": str(path)}) as broker:
        for content, old, new in (
            (f"{OLD_SECRET}\n{NEW_SECRET}\n", 201, 201),  # while both are in use
            (f"{NEW_SECRET}\n", 401, 201),
        ):
            await replaced(broker, path, content)
            assert lines(broker, "secrets read again")[-1]["changed"] == ["BROKER_JWT_SECRET"]
            assert (await prepared(broker, token(OLD_SECRET)))[0] == old
            assert (await prepared(broker, token(NEW_SECRET)))[0] == new


async def status_of(broker: RunningBroker, path: str, shown: str) -> int:
    headers = {"Authorization": f"Bearer {shown}"}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http,
        http.get(f"{broker.url}{path}", headers=headers) as answer,
    ):
        return answer.status


async def test_a_changed_file_of_the_metrics_token_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("the-old-token")
    async with running_broker(env={"BROKER_METRICS_TOKEN_FILE": str(path)}) as broker:
        assert await status_of(broker, "/metrics", "the-old-token") == 200
        replace(path, "the-new-token")
        await eventually(lambda: lines(broker, "secrets read again"))
        assert await status_of(broker, "/metrics", "the-old-token") == 401
        assert await status_of(broker, "/metrics", "the-new-token") == 200
        assert "the-new-token" not in broker.log()


async def test_a_changed_file_of_the_name_secret_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("the secret of names, before")

    async def requests(broker: RunningBroker) -> int:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http,
            http.get(f"{broker.url}/usage") as answer,
        ):
            return int((await answer.json())["requests"])

    env = {"BROKER_NAME_SECRET_FILE": str(path), "BROKER_ALLOWED_MODELS": "*"}
    async with running_broker(env=env) as broker:
        _, session = await prepared(broker, model="rehearsal/plain")
        async with opened(broker.url, f"/stream/{session}") as connection:
            await connection.rest()
        assert await requests(broker) == 1
        replace(path, "the secret of names, after")
        await eventually(lambda: lines(broker, "secrets read again"))
        assert await requests(broker) == 0  # the same address has another name now


@pytest.mark.one_server("its password")
async def test_a_changed_password_of_redis_is_used_for_new_connections(tmp_path: Path) -> None:
    path = tmp_path / "url"
    async with running_valkey() as valkey:
        with redis.Redis(port=valkey.port) as admin:
            admin.config_set("requirepass", "the-old-password")
        path.write_text(f"redis://:the-old-password@127.0.0.1:{valkey.port}/0")
        async with running_broker(env={"REDIS_URL_FILE": str(path)}) as broker:
            assert (await prepared(broker, model="rehearsal/plain"))[0] == 201
            with redis.Redis(port=valkey.port, password="the-old-password") as admin:
                admin.config_set("requirepass", "the-new-password")
            replace(path, path.read_text().replace("old", "new"))
            await eventually(lambda: lines(broker, "secrets read again"))
            assert lines(broker, "secrets read again")[0]["changed"] == ["REDIS_URL"]
            with redis.Redis(port=valkey.port, password="the-new-password") as admin:
                admin.client_kill_filter(_type="normal", skipme=True)
                admin.client_kill_filter(_type="pubsub")

            async def works() -> bool:
                return (await prepared(broker, model="rehearsal/plain"))[0] == 201

            await until(works)
            replace(path, path.read_text().replace("/0", "/1"))
            await eventually(lambda: lines(broker, "setting has changed and needs a restart"))
            assert lines(broker, "setting has changed and needs a restart")[0]["name"] == "REDIS_URL"
            assert "password" not in broker.log()


async def test_a_hangup_reads_the_clients_file_again(tmp_path: Path) -> None:
    path = tmp_path / "clients.toml"
    table = "[page]\nsha256 = '{}'\n"
    path.write_text(table.format(hashlib.sha256(b"the-old-key").hexdigest()))
    before = path.stat()
    async with running_broker(env={"BROKER_CLIENTS_FILE": str(path)}) as broker:
        assert (await prepared(broker, "the-old-key", "rehearsal/plain"))[0] == 201
        path.write_text(table.format(hashlib.sha256(b"the-new-key").hexdigest()))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # so that only the signal causes a reload
        await hang_up(broker)
        await eventually(lambda: lines(broker, "clients changed"))
        assert (await prepared(broker, "the-old-key", "rehearsal/plain"))[0] == 401
        assert (await prepared(broker, "the-new-key", "rehearsal/plain"))[0] == 201


async def test_a_broken_clients_file_ends_the_start_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "clients.toml"
    path.write_text("[acme]\nsha256 = []\ndaily_cost = -1\n")
    with pytest.raises(NotStartedError) as error:
        async with running_broker(env={"BROKER_CLIENTS_FILE": str(path)}):
            pass
    told = str(error.value).partition("\n")[2]
    assert told == (
        'broker: BROKER_CLIENTS_FILE: [acme] daily_cost must be an amount in USD such as 2.50 or "2.50",'
        " from 0 to 1000000\n"
    )


async def test_a_removed_secret_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("page:the-old-key")
    async with running_broker(env={"BROKER_API_KEYS_FILE": str(path)}) as broker:
        path.unlink()
        broker.process.send_signal(signal.SIGHUP)
        await eventually(lambda: lines(broker, "a secret cannot be read again, the old one stays"))
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
