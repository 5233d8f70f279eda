"""A broker whose answers a test decides, connection by connection, and that remembers its requests."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from tests.system.harness import clean_environment

SESSION = "3f2b8c1e-9a4d-4e6f-8b7a-1c2d3e4f5a6b"

Connection = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class FakeBroker:
    """Attributes: the connections of GET /stream in order, and the requests.

    With ``key`` it asks who is there; ``shown`` is what /prepare and /models were shown.
    """

    lines: Sequence[Connection]
    prepare: list[web.Response] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    key: str = ""
    never_cancels: bool = False
    url: str = ""
    prepared: list[dict[str, Any]] = field(default_factory=list)
    cursors: list[str | None] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    shown: list[str | None] = field(default_factory=list)
    streaming: asyncio.Event = field(default_factory=asyncio.Event)
    cancelling: asyncio.Event = field(default_factory=asyncio.Event)

    async def on_prepare(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._unknown(request):
            return refusal
        self.prepared.append(await request.json())
        if self.prepare:
            return self.prepare.pop(0)
        return web.json_response({"sessionId": SESSION}, status=201)

    async def on_stream(self, request: web.Request) -> web.StreamResponse:
        self.cursors.append(request.headers.get("Last-Event-ID"))
        self.streaming.set()
        return await self.lines[min(len(self.cursors), len(self.lines)) - 1](request)

    async def on_cancel(self, _request: web.Request) -> web.StreamResponse:
        self.asked.append("cancel")
        self.cancelling.set()
        if self.never_cancels:
            await asyncio.Event().wait()
        return web.json_response({"state": "cancelled"}, status=202)

    async def on_models(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._unknown(request):
            return refusal
        self.asked.append(f"models?{request.query_string}")
        return web.json_response({"data": self.models})

    def _unknown(self, request: web.Request) -> web.Response | None:
        self.shown.append(request.headers.get("Authorization"))
        if not self.key or self.shown[-1] == f"Bearer {self.key}":
            return None
        error = {"code": "unauthorized", "message": "This needs an API key or a token."}
        return web.json_response({"error": error}, status=401)


@asynccontextmanager
async def fake_broker(
    *lines: Connection, tls: ssl.SSLContext | None = None, **told: Any
) -> AsyncIterator[FakeBroker]:
    broker = FakeBroker(lines, **told)
    app = web.Application()
    app.router.add_post("/prepare", broker.on_prepare)
    app.router.add_get("/stream/{id}", broker.on_stream)
    app.router.add_delete("/stream/{id}", broker.on_cancel)
    app.router.add_get("/models", broker.on_models)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        broker.url = site.name
        yield broker
    finally:
        await runner.cleanup()


def sends(*blocks: str, breaks: bool = False, stays: bool = False) -> Connection:
    """Return a connection that sends these blocks of an event stream, and then ends, breaks, or stays open."""

    async def line(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b"retry: 10\n: open\n\n")
        for block in blocks:
            await response.write(block.encode() + b"\n\n")
        if stays:
            await asyncio.Event().wait()
        if breaks:
            assert request.transport is not None
            request.transport.abort()
        return response

    return line


def answers(status: int, body: object = None) -> Connection:
    """Return a connection that is refused."""

    async def line(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=status) if body is None else web.json_response(body, status=status)

    return line


def chunk(number: int, text: str, thought: str = "") -> str:
    delta = {"content": text} if text else {"reasoning": thought}
    return _event(f"1-{number}", "chunk", {"choices": [{"delta": delta}]})


def done(number: int) -> str:
    usage = {"prompt_tokens": 5, "completion_tokens": 7}
    return _event(f"1-{number}.end", "done", {"finishReason": "stop", "usage": usage, "cost": 0.001})


def refused(code: str, message: str, *, final: bool = True) -> str:
    event_id = "1-1.end" if final else ""
    return _event(event_id, "error", {"code": code, "message": message, "final": final})


def _event(event_id: str, event: str, data: object) -> str:
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {event}\ndata: {orjson.dumps(data).decode()}"


async def start(
    *args: str | bytes,
    stdin: int | None = asyncio.subprocess.DEVNULL,
    stdout: int = asyncio.subprocess.PIPE,
    env: Mapping[str, str] | None = None,
) -> asyncio.subprocess.Process:
    """Start the command line as a user does."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "broker",
        *args,
        stdin=stdin,
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(env or {}),
    )


async def run(
    *args: str | bytes,
    typed: str | bytes | None = None,
    stdout: int = asyncio.subprocess.PIPE,
    env: Mapping[str, str] | None = None,
) -> tuple[int, str, str]:
    """Run the command line to its end and give its status and both outputs."""
    stdin = asyncio.subprocess.PIPE if typed is not None else asyncio.subprocess.DEVNULL
    process = await start(*args, stdin=stdin, stdout=stdout, env=env)
    try:
        async with asyncio.timeout(30):
            out, err = await process.communicate(typed.encode() if isinstance(typed, str) else typed)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, (out or b"").decode(), err.decode()


async def run_shell(script: str) -> tuple[int, str, str]:
    """Run a shell command in which ``broker`` is the command line."""
    line = f'broker() {{ "{sys.executable}" -m broker "$@"; }}; {script}'
    process = await asyncio.create_subprocess_exec(
        *("bash", "-o", "pipefail", "-c", line),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment({}),
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()
