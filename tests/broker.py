"""The whole application in this process, on a real socket, and the requests that tests send to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from redis.asyncio import Redis

from broker.core.errors import ModelsUnavailable
from broker.mount import mount
from broker.settings import Settings
from broker.web import keys
from broker.web.server import Runner
from tests.events import Connection, Event, opened
from tests.redis_client import client_of
from tests.scripted import NOTHING, PATIENCE, ScriptedUpstream

KEY = "sk-or-v1-0123456789abcdef"
QUESTION = {"model": "scripted/model-1", "messages": [{"role": "user", "content": "What is a broker?"}]}

# All tests come from one address; a test of limits sets its own.
NO_LIMITS = {"rate_limit": "100000/minute", "max_prepared": 100_000, "max_concurrent_streams": 1000}

PREFIX = ""
"""Under which the broker is a part of an application of somebody else; without one, it is the service itself. The
fixture `form` sets it for a test."""


@dataclass(frozen=True)
class Answer:
    """A complete HTTP answer."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def code(self) -> str:
        """The code of an error."""
        return str(self.json["error"]["code"])


@dataclass(frozen=True)
class Broker:
    """A running broker.

    Attributes:
        url: where it answers, with its prefix.
        app: its own application, without that of which it is a part.
        http: to ask it with.
        redis: to look at what it has stored.
    """

    url: str
    app: web.Application
    http: aiohttp.ClientSession
    redis: Redis

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        """Send a request as curl does, and return the answer."""
        async with self.http.request(method, self.url + path, **options) as response:
            return Answer(response.status, response.headers, await response.text())

    async def post(self, body: object = QUESTION, headers: Mapping[str, str] = NOTHING) -> Answer:
        """Send POST /prepare."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.ask(
            "POST", "/prepare", data=data, headers={"Content-Type": "application/json", **headers}
        )

    async def until_clock_is_known(self) -> None:
        """Wait until this worker has a connection to Redis and has seen its clock, as soon after every start."""
        clock = self.app[keys.STORE].clock
        async with asyncio.timeout(PATIENCE):
            while clock.now_ms() is None:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.01)

    async def prepare(self, **fields: Any) -> str:
        """Prepare a session and return its id."""
        answer = await self.post({**QUESTION, **fields})
        assert answer.status == 201, answer.text
        return str(answer.json["sessionId"])

    def stream(
        self,
        session_id: str,
        cursor: str | None = None,
        *,
        query: str = "",
        headers: Mapping[str, str] = NOTHING,
        **options: Any,
    ) -> AbstractAsyncContextManager[Connection]:
        """Open an EventSource for a session, from its start or from a cursor."""
        resumed = {"Last-Event-ID": cursor} if cursor is not None else {}
        target = f"{urlsplit(self.url).path}/stream/{session_id}{query}"
        return opened(self.url, target, {**resumed, **headers}, **options)

    async def read(self, session_id: str, cursor: str | None = None) -> list[Event]:
        """Return all events of a session, to the end."""
        async with self.stream(session_id, cursor) as connection:
            return await connection.rest()

    async def cancel(self, session_id: str) -> Answer:
        """Send DELETE for a session."""
        return await self.ask("DELETE", f"/stream/{session_id}")


@asynccontextmanager
async def running(
    redis_url: str,
    upstream: ScriptedUpstream | str,
    *,
    telemetry: Any = None,
    metrics_directory: Any = None,
    **settings: Any,
) -> AsyncIterator[Broker]:
    """Run a broker until the block ends, and take it down as the service does, but without time to finish.

    Where the upstream has a list of models, the broker knows it when the block begins: a /prepare waits for it no
    longer than a second from the start, which is too short on a loaded machine.

    Args:
        redis_url: its Redis.
        upstream: a scripted one, or a URL.
        telemetry: takes its spans.
        metrics_directory: where it adds its metrics to those of others.
        settings: those that matter to the test. By default clients have no limits and the upstream is OpenRouter.
    """
    usual = {"openrouter_api_key": KEY, "upstream_kind": "openrouter", "page": False, **NO_LIMITS}
    where = {
        "redis_url": redis_url,
        "upstream_url": upstream if isinstance(upstream, str) else upstream.url,
        "host": "127.0.0.1",
        "drain_timeout": 0,
    }
    outer = web.Application()
    app = mount(
        outer,
        PREFIX,
        Settings(**{**usual, **where, **settings}),
        telemetry=telemetry,
        metrics_directory=metrics_directory,
    )
    runner = web.AppRunner(outer, access_log=None) if PREFIX else Runner(outer)
    try:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        if isinstance(upstream, ScriptedUpstream) and upstream.models is not None:
            with suppress(ModelsUnavailable):  # where the test has a broken list
                await app[keys.CATALOG].models()
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http,
            aclosing(client_of(redis_url)) as redis,
        ):
            yield Broker(f"http://{host}:{port}{PREFIX}", app, http, redis)
    finally:
        await runner.cleanup()
