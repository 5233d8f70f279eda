"""Several brokers as processes of their own, on one Valkey that can be hurt, and an upstream in the test's own process.

The upstream numbers its chunks and knows a session by its marker, which is the session's prompt. So everything that a
page has seen can be compared with what was sent, and every call counts for its session.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import aiohttp
from redis.asyncio import Redis

from broker.store.connection import SCHEMA
from tests import responses
from tests.events import Broken, Connection, Event, opened
from tests.kinds import DOWN_AFTER_MS, Servers, running_servers
from tests.scripted import NOTHING, PATIENCE, Call, ScriptedUpstream, chunk, scripted_upstream
from tests.stopwatch import Stopwatch
from tests.system.harness import (
    DRAIN_TIMEOUT,
    POLL_INTERVAL,
    RunningBroker,
    free_port,
    running_broker,
)

LEASE = 4.0
"""Seconds that a lease holds."""

BURIED = 12.0
"""Seconds after which everybody has been told that a worker has died."""


class Script(NamedTuple):
    """An answer that is sent without the test.

    Attributes:
        chunks: how many with text; one with the finish reason and one with the usage follow where it ends well.
        pause: seconds before each.
        size: bytes of text in each.
        ending: ``done``, ``silent`` (no [DONE] after the finish), ``truncated``, ``reset``, ``error``, ``hang``.
        responses: it is asked and answered in the Responses dialect.
    """

    chunks: int = 5
    pause: float = 0.0
    size: int = 20
    ending: str = "done"
    responses: bool = False

    @property
    def events(self) -> int:
        """Chunks that a page gets of it in all."""
        return self.chunks + (2 if self.ending in ("done", "silent") else 0)


class NumberedCall:
    """One call, to be answered by hand; each chunk carries its number.

    Attributes:
        call: the request, and the bare pen.
        sent: number of the last chunk sent.
    """

    def __init__(self, marker: str, call: Call) -> None:
        self.marker = marker
        self.call = call
        self.in_responses = "input" in call.body
        self.sent = 0
        self.over = False

    def chunks(self, count: int = 1, size: int = 20) -> None:
        """Send more chunks."""
        for _ in range(count):
            text = text_of_chunk(self.sent + 1, size)
            self._send(responses.delta(text) if self.in_responses else chunk(text))

    def finish(self) -> None:
        """Send the finish reason and the usage, in two chunks."""
        if self.in_responses:
            self._send(responses.item_done(responses.MESSAGE))
            self._send(responses.completed())
            return
        self._send(chunk(finish="stop"))
        self._send(chunk(choices=[], usage={"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}))

    def done(self) -> None:
        """End well."""
        self.finish()
        self.call.done()
        self.over = True

    def fail(self) -> None:
        """Send an error in the stream and end."""
        self.call.event(json.dumps({"error": {"code": 500, "message": "It broke."}}).encode())
        self.close()

    def close(self) -> None:
        """Close the connection without an end."""
        self.call.close()
        self.over = True

    def reset(self) -> None:
        """Break the connection."""
        self.call.reset()
        self.over = True

    @property
    def is_open(self) -> bool:
        """Return True if somebody still reads an answer that is not over."""
        return not self.over and not self.call.gone.is_set()

    def _send(self, data: dict[str, Any]) -> None:
        self.sent += 1
        self.call.event(json.dumps({**data, "marker": self.marker, "number": self.sent}).encode())

    async def play(self, script: Script) -> None:
        """Answer by a script, for as long as somebody reads."""
        self.call.open()
        for _ in range(script.chunks):
            await asyncio.sleep(script.pause)
            if self.call.gone.is_set():
                return
            self.chunks(1, script.size)
        endings = {"done": self.done, "truncated": self.close, "reset": self.reset, "error": self.fail}
        if script.ending == "silent":
            self.finish()
            self.call.end()
            self.over = True
        elif script.ending in endings:
            endings[script.ending]()


class Upstream:
    """The model side of a cluster.

    Attributes:
        scripts: by marker; a session without one waits for the test to answer.
        calls: by marker, every call that was ever made.
        scripted: what it is made of.
    """

    def __init__(self, scripted: ScriptedUpstream) -> None:
        self.url = scripted.url
        self.scripts: dict[str, Script] = {}
        self.calls: dict[str, list[NumberedCall]] = defaultdict(list)
        self._asked: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._playing: set[asyncio.Task[None]] = set()
        self.scripted = scripted
        scripted.replies = [self._answer]

    async def call(self, marker: str, within: float = PATIENCE) -> NumberedCall:
        """Wait for the call of a session."""
        async with asyncio.timeout(within):
            await self._asked[marker].wait()
        return self.calls[marker][0]

    def open_calls(self) -> list[str]:
        """Markers of the calls whose answers are neither over nor given up."""
        return [call.marker for calls in self.calls.values() for call in calls if call.is_open]

    @property
    def connections(self) -> int:
        """Connections that are open now, idle ones included."""
        return len(self.scripted._open)

    def _answer(self, call: Call) -> None:
        if call.body is None:  # a request for a record, for which there is no path here
            call.reply(404, "There is no such path.")
            return
        marker = marker_of(call)
        numbered = NumberedCall(marker, call)
        self.calls[marker].append(numbered)
        self._asked[marker].set()
        if marker in self.scripts:
            task = asyncio.create_task(numbered.play(self.scripts[marker]))
            self._playing.add(task)
            task.add_done_callback(self._playing.discard)

    async def close(self) -> None:
        """Stop playing."""
        for task in self._playing:
            task.cancel()
        await asyncio.gather(*self._playing, return_exceptions=True)


class Worker:
    """One place for a broker: the same port for each process.

    Attributes:
        url: where it answers.
        broker: the process, while there is one.
        logs: what those before it have said.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.broker: RunningBroker | None = None
        self.logs: list[str] = []
        self._env = {**env, "PORT": str(self._port)}
        self._stack = AsyncExitStack()

    async def start(self, *, ready: str = "/health/ready") -> None:
        """Start a broker here and wait until it is ready."""
        assert self.broker is None, "one is running here"
        self.broker = await self._stack.enter_async_context(
            running_broker(rehearsal=False, env=self._env, ready=ready)
        )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def freeze(self) -> None:
        """Freeze it."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self.signal(signal.SIGCONT)

    def terminate(self) -> None:
        """Ask it to drain."""
        self.signal(signal.SIGTERM)

    @property
    def process(self) -> Any:
        assert self.broker is not None, "none is running here"
        return self.broker.process

    async def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        await self.ended()

    async def ended(self, within: float = DRAIN_TIMEOUT) -> int:
        """Wait until it has ended, and return its exit status."""
        assert self.broker is not None, "none is running here"
        status = await self.broker.ended(within)
        await self.close()
        return status

    async def close(self) -> None:
        """Kill the process that runs here."""
        if self.broker is not None:
            self.logs.append(self.broker.log())
            self.broker = None
        await self._stack.aclose()

    def log(self) -> str:
        """All that was ever said here."""
        return "".join((*self.logs, self.broker.log() if self.broker is not None else ""))

    def memory(self) -> int:
        """Return the bytes of memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024


class Answer(NamedTuple):
    """A whole HTTP answer."""

    status: int
    json: Any
    headers: Mapping[str, str]


class Cluster:
    """Workers, their Valkey, their upstream, and what every test asks of them."""

    def __init__(
        self, workers: list[Worker], valkey: Servers, upstream: Upstream, http: aiohttp.ClientSession
    ) -> None:
        self.workers = workers
        self.valkey = valkey
        self.upstream = upstream
        self._http = http
        self._prepared = 0

    async def ask(self, method: str, worker: Worker, path: str, **options: Any) -> Answer:
        """A request as curl sends it."""
        async with self._http.request(method, worker.url + path, **options) as response:
            return Answer(response.status, await response.json(content_type=None), response.headers)

    def marker(self) -> str:
        """A prompt that no other session has."""
        self._prepared += 1
        return f"question {self._prepared}"

    async def prepare(self, worker: Worker, script: Script | None = None) -> Session:
        """A new session, answered by a script or by hand."""
        marker = self.marker()
        if script is not None:
            self.upstream.scripts[marker] = script
        in_responses = script is not None and script.responses
        answer = await self.ask("POST", worker, "/prepare", json=question(marker, in_responses=in_responses))
        assert answer.status == 201, answer
        return Session(self, str(answer.json["sessionId"]), marker)

    def stopwatch(self) -> Stopwatch:
        """A stopwatch that does not count the time that a worker or the Valkey waits for a core."""
        pids = [worker.process.pid for worker in self.workers if worker.broker is not None]
        return Stopwatch(*pids, *self.valkey.pids)

    def redis(self) -> Redis:
        """A client of the Valkey; close it."""
        return self.valkey.client()

    async def journaled(self, session: Session, n: int) -> None:
        """Wait until event number ``n`` of a session is in the journal."""
        async with self.redis() as client:
            while int(await client.hget(f"broker:{SCHEMA}:session:{{{session.id}}}", "last") or 0) < n:  # noqa: ASYNC110 - likewise
                await asyncio.sleep(POLL_INTERVAL)

    async def keys_without_ttl(self) -> list[str]:
        """Keys that would stay for ever, but for the secret that names clients, which has to."""
        async with self.redis() as client:
            keys = [key.decode() async for key in client.scan_iter() if await client.ttl(key) == -1]
        return [key for key in keys if not key.endswith(":name-secret")]


class Session:
    """A session of a cluster.

    Attributes:
        id: its id.
        marker: its prompt.
    """

    def __init__(self, cluster: Cluster, session_id: str, marker: str) -> None:
        self.id = session_id
        self.marker = marker
        self._cluster = cluster

    def stream(
        self,
        worker: Worker,
        cursor: str | None = None,
        *,
        query: bool = False,
        short: bool = False,
        **options: Any,
    ) -> AbstractAsyncContextManager[Connection]:
        """Open an EventSource on a worker, from the start or from a cursor in the header or the query.

        It reads the long form, or the short one.
        """
        asked, headers = {"events": "token"} if short else {}, {}
        if cursor is not None and query:
            asked["lastEventId"] = cursor
        elif cursor is not None:
            headers = {"Last-Event-ID": cursor}
        target = f"/stream/{self.id}" + (f"?{urlencode(asked)}" if asked else "")
        return opened(worker.url, target, headers or NOTHING, **options)

    async def read(self, worker: Worker, cursor: str | None = None, *, query: bool = False) -> list[Event]:
        """Return all events from a cursor to the end of the connection."""
        async with self.stream(worker, cursor, query=query) as line:
            assert line.status == 200
            return await line.rest()

    async def read_through(self, worker: Worker, cursor: str | None = None) -> list[Event]:
        """Read it to its end as an EventSource does, over as many connections as that takes.

        A connection that is refused or breaks is an error.
        """
        events: list[Event] = []
        while True:
            async with self.stream(worker, cursor) as line:
                assert line.status == 200
                events += await line.rest()
                cursor = line.last_id or cursor
            if events and events[-1].kind in ("done", "error"):
                return events
            await asyncio.sleep(line.retry / 1000)

    async def cancel(self, worker: Worker, *, post: bool = False) -> Answer:
        """Stop it, in one of the two ways."""
        if post:
            return await self._cluster.ask("POST", worker, f"/stream/{self.id}/cancel")
        return await self._cluster.ask("DELETE", worker, f"/stream/{self.id}")

    async def call(self) -> NumberedCall:
        """The upstream's side of it, opened."""
        call = await self._cluster.upstream.call(self.marker)
        call.call.open()
        return call

    @property
    def calls(self) -> int:
        """Return the number of calls to the upstream for it."""
        return len(self._cluster.upstream.calls[self.marker])


def question(marker: str, *, in_responses: bool = False) -> dict[str, Any]:
    """The body of a /prepare."""
    asked = {"input": marker} if in_responses else {"messages": [{"role": "user", "content": marker}]}
    return {"model": "scripted/model-1", **asked}


def marker_of(call: Call) -> str:
    """The marker of the session that a call is made for."""
    body = call.body
    return str(body["input"] if "input" in body else body["messages"][-1]["content"])


def text_of_chunk(n: int, size: int) -> str:
    """Return the text of chunk number ``n``: so many bytes that begin with its number."""
    return f"{n} ".ljust(size, "x")


def number_of(event: Event) -> int:
    """The number in an event's id."""
    assert event.id is not None
    return int(event.id.removesuffix(".end").partition("-")[2])


def check_chunks(events: Iterable[Event], marker: str, after: int = 0) -> int:
    """Make sure that these are the chunks of a session from number ``after + 1`` on, and return the last number."""
    for event in events:
        assert event.kind == "chunk", event
        after += 1
        assert event.id == f"1-{after}", (event.id, after)
        assert event.json["number"] == after, (event.json["number"], after)
        assert event.json["marker"] == marker, (event.json["marker"], marker)
    return after


def check_whole(events: list[Event], marker: str, after: int = 0) -> Event:
    """Make sure that these are the rest of a session and its end, and return the end."""
    assert events, "nothing came"
    *chunks, end = events
    last = check_chunks(chunks, marker, after)
    assert end.kind in ("done", "error"), end
    assert end.id == f"1-{last + 1}.end", (end, last)
    return end


def kinds(events: Iterable[Event]) -> Counter[str]:
    """Return the number of each kind."""
    return Counter(event.kind for event in events)


async def came_again(line: Connection) -> bool:
    """Return True if a connection asked its page to reconnect: a retry time, a comment, no event, a proper end."""
    try:
        return line.status == 200 and not await line.rest() and line.blocks[0].startswith(b"retry: ")
    except Broken:
        return False


SETTINGS: Mapping[str, str] = {
    "BROKER_PAGE": "false",
    "BROKER_LOG_FORMAT": "json",
    "BROKER_HEARTBEAT": "1",
    "BROKER_RETRY_MS": "100",
    "BROKER_RATE_LIMIT": "100000/minute",
    "BROKER_MAX_PREPARED": "100000",
    "BROKER_MAX_CONCURRENT_STREAMS": "10000",
}


@asynccontextmanager
async def running_cluster(
    workers: int = 2,
    *,
    servers: str = "",
    keeps: bool = False,
    down_after_ms: int = DOWN_AFTER_MS,
    models: bytes | None = None,
    **settings: object,
) -> AsyncIterator[Cluster]:
    """Run so many workers until the block ends.

    Args:
        workers: how many.
        servers: one of `tests.kinds.KINDS`; by default this run's.
        keeps: their Valkey survives a power cut.
        down_after_ms: milliseconds of silence after which a primary is replaced, where there is another.
        models: the list that their upstream gives.
        settings: of all of them, named as in the environment without ``BROKER_``, in lower case.
    """
    async with AsyncExitStack() as stack:
        valkey = await stack.enter_async_context(
            running_servers(servers, keeps=keeps, down_after_ms=down_after_ms)
        )
        upstream = Upstream(await stack.enter_async_context(scripted_upstream()))
        stack.push_async_callback(upstream.close)
        upstream.scripted.models = models
        env = {
            **SETTINGS,
            "REDIS_URL": valkey.url,
            "BROKER_UPSTREAM_URL": upstream.url,
            **{f"BROKER_{name.upper()}": str(value) for name, value in settings.items()},
        }
        running = [Worker(env) for _ in range(workers)]
        for worker in running:
            stack.push_async_callback(worker.close)
        await asyncio.gather(*(worker.start() for worker in running))
        http = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE))
        )
        try:
            yield Cluster(running, valkey, upstream, http)
        except BaseException:
            for number, worker in enumerate(running):  # shown with the failure of a test
                print(f"--- worker {number} at {worker.url}\n{worker.log()}")
            raise
