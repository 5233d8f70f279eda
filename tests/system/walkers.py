"""The pages of the random walk, and the judgement of what they saw.

A page may reconnect in the other form of a session, long or short (``?events=token``): numbers, text and end are
the same.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import aiohttp

from tests.events import Broken, Event
from tests.system.cluster import number_of, text_of_chunk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.events import Connection
    from tests.system.cluster import Cluster, Script, Session, Worker
    from tests.system.faults import Trouble

LINE_ENDS = frozenset(
    {"session_not_found", "session_expired", "replay_gap", "invalid_cursor", "already_claimed"}
)
"""Errors that end one page's line and are no part of the session."""

ENDINGS = {
    "truncated": "upstream_interrupted",
    "reset": "upstream_interrupted",
    "error": "upstream_error",
    "hang": "upstream_timeout",
}
"""What becomes of an answer that does not end well."""


SHORT = 0.4
"""Part of the lines that are in the short form."""

LONGEST = 30.0
"""Seconds after which a page takes another line, so that one which never ends is found."""


def _text_in(chunk: dict[str, Any]) -> str:
    """The text of a chunk of either dialect."""
    if "choices" not in chunk:
        return str(chunk.get("delta", ""))
    return "".join(choice["delta"].get("content", "") for choice in chunk["choices"])


@dataclass
class Page:
    """One page: reads a session over as many connections as it takes, as an EventSource does.

    Attributes:
        seen: number of the last chunk; in the short form, of the last that said anything.
        text: what the chunks said.
        waits: how often it was told its place in line.
        end: the event that ended it.
        ended_short: it came in the short form.
        ended_at: when, by the loop's clock.
        online: its connections, each with start and end.
        findings: what it saw and should not have.
    """

    seen: int = 0
    text: str = ""
    waits: int = 0
    last_id: str | None = None
    end: Event | None = None
    ended_short: bool = False
    ended_at: float = 0.0
    online: list[tuple[float, float]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    async def watch(self, session: Session, workers: Sequence[Worker], random: Random) -> None:
        """Come and go until the end."""
        while self.end is None:
            await self.visit(
                session,
                random.choice(workers),
                leave_after=random.choice([1, 3, 10, 10_000]),
                short=random.random() < SHORT,
            )
            await asyncio.sleep(random.uniform(0, 0.4))
        if random.random() < 0.2:
            await self._come_back(session, random.choice(workers))

    async def visit(
        self, session: Session, worker: Worker, leave_after: int = 1_000_000, *, short: bool = False
    ) -> None:
        """Open one connection, in the long or the short form, which is dropped after so many events at the latest."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        try:
            async with asyncio.timeout(LONGEST), session.stream(worker, self.last_id, short=short) as line:
                since = loop.time()
                if line.status != 200:
                    self.findings.append(f"status {line.status} before the end")
                    return
                await self._read(line, session, leave_after, short=short)
        except (OSError, Broken, TimeoutError, asyncio.IncompleteReadError):
            pass  # connections break when workers are hurt
        finally:
            self.online.append((since, loop.time()))

    async def _read(self, line: Connection, session: Session, leave_after: int, *, short: bool) -> None:
        for _ in range(leave_after):
            event = await line.event()
            if event is None:
                return
            if self.end is not None:
                self.findings.append(f"{event.kind} after the end")
                return
            self._take(event, session.marker, short=short)

    def _take(self, event: Event, marker: str, *, short: bool) -> None:
        match event.kind:
            case "start" | "queued":  # what comes before the first chunk, and is no part of the session
                if self.seen or event.id is not None or (event.kind == "start" and not short):
                    self.findings.append(f"{event.kind} with the id {event.id} after 1-{self.seen}")
                self.waits += event.kind == "queued"
            case "token" if short:
                self._take_token(event)
            case "chunk" if not short:
                self._take_chunk(event, marker)
            case "done" | "error":
                if event.kind == "done" or event.json["final"]:
                    self.end, self.ended_short = event, short
                    self.ended_at = asyncio.get_running_loop().time()
            case _:
                self.findings.append(f"an event of kind {event.kind}")
        self.last_id = event.id or self.last_id

    def _take_token(self, event: Event) -> None:
        if number_of(event) <= self.seen:
            self.findings.append(f"{event.id} after 1-{self.seen}")
        self.seen = number_of(event)
        self.text += event.json["text"]

    def _take_chunk(self, event: Event, marker: str) -> None:
        if event.id != f"1-{self.seen + 1}":
            self.findings.append(f"{event.id} after 1-{self.seen}")
        self.seen = number_of(event)
        if event.json["number"] != self.seen or event.json["marker"] != marker:
            self.findings.append(f"chunk {event.json['number']} of {event.json['marker']} as {event.id}")
        self.text += _text_in(event.json)

    async def _come_back(self, session: Session, worker: Worker) -> None:
        try:
            async with session.stream(worker, self.last_id) as line:
                if line.status != 204:
                    self.findings.append(f"status {line.status} after the end")
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass

    @property
    def code(self) -> str:
        """Return the kind of its end."""
        if self.end is None:
            return "never"
        return str(self.end.json["finishReason"] if self.end.kind == "done" else self.end.json["code"])

    @property
    def saw_the_end(self) -> bool:
        """Return True if its end is that of the session."""
        return self.end is not None and self.code not in LINE_ENDS


@dataclass
class Walk:
    """One session of the walk.

    Attributes:
        session, script: what it is.
        pages: who watches it.
        cancel_sent: somebody has asked for a cancel.
        cancel_accepted: and was answered that it is certain.
    """

    session: Session
    script: Script
    pages: list[Page]
    began_at: float
    cancel_sent: bool = False
    cancel_accepted: bool = False

    async def run(self, cluster: Cluster, random: Random) -> None:
        """Watch it to the end, and cancel it on the way where chance has it."""
        async with asyncio.TaskGroup() as group:
            for page in self.pages:
                group.create_task(page.watch(self.session, cluster.workers, Random(random.random())))
            if random.random() < 0.25:
                group.create_task(self._cancel(random.choice(cluster.workers), random.uniform(0, 3)))

    async def _cancel(self, worker: Worker, after: float) -> None:
        await asyncio.sleep(after)
        self.cancel_sent = True
        try:
            answer = await self.session.cancel(worker)
        except (OSError, TimeoutError, aiohttp.ClientError):
            return
        self.cancel_accepted = answer.status == 202

    def judge(self, troubles: Sequence[Trouble], grace: float) -> Iterator[str]:
        """Return what is wrong in what the pages saw, given the faults of the cluster."""
        for page in self.pages:
            yield from page.findings
            if page.end is None:
                yield f"a page never got its end, after {page.seen} chunks"
        if self.session.calls > 1:
            yield f"{self.session.calls} upstream calls"
        last = max((page.ended_at for page in self.pages), default=0.0)
        happened = {t.kind for t in troubles if t.since <= last and t.until >= self.began_at - 1}
        yield from self._judge_refusals(happened)
        yield from self._judge_ends(happened, grace)

    def _judge_refusals(self, happened: set[str]) -> Iterator[str]:
        for page in self.pages:
            if page.end is not None and not page.saw_the_end and "redis killed" not in happened:
                yield f"{page.code} at {page.last_id} although Redis lost nothing"

    def _judge_ends(self, happened: set[str], grace: float) -> Iterator[str]:
        ended = [page for page in self.pages if page.saw_the_end]
        ends = {page.end for page in ended}
        redis_hurt = bool(happened & {"redis killed", "redis frozen"})
        worker_hurt = bool(happened & {"worker killed", "worker frozen for long", "worker drained"})
        # A worker that could not ask Redis gives its own word. It may die before that is written, or find then that
        # a cancel was accepted elsewhere.
        if len(ends) > 1 and not (redis_hurt and (worker_hurt or self.cancel_sent)):
            yield f"ends differ: {sorted(str(end) for end in ends)}"
        for page in ended:
            yield from self._judge_end(page, happened, grace)

    def _judge_end(self, page: Page, happened: set[str], grace: float) -> Iterator[str]:
        end, code = page.end, page.code
        assert end is not None
        last = number_of(end) - 1
        other_epoch = (end.id or "").startswith("2-")
        # The finish and the usage say nothing, so a page in the short form has seen the chunks before them.
        least = min(last, self.script.chunks) if page.ended_short else last
        if page.seen < least or (page.seen > last and not other_epoch):
            yield f"{end.id} ({code}) after {page.seen} chunks"
        if page.text != self._text(min(page.seen, self.script.chunks)):
            yield f"{len(page.text)} bytes of text after {page.seen} chunks of {self.script.size}"
        if self.cancel_accepted and code != "cancelled" and not happened & {"redis killed", "redis frozen"}:
            yield f"{code} although a cancel was accepted"
        if code == "stop" and (last != self.script.events or self.script.ending not in ("done", "silent")):
            yield f"done after {last} of {self.script.events} chunks that end in {self.script.ending}"
        expected = {"stop", "cancelled" if self.cancel_sent else "", ENDINGS.get(self.script.ending, "")}
        if happened & {"worker killed", "worker frozen for long"}:
            expected.add("worker_lost")
        if self._unwatched(page.ended_at) > grace * 0.8 or happened & {
            "worker frozen for long",
            "worker killed",
            "redis killed",
            "redis frozen",
        }:
            expected.add("abandoned")
        if (
            self.script.ending == "hang"
            and "worker drained" in happened
            and happened & {"worker frozen", "worker frozen for long"}
        ):
            expected.add("server_shutdown")  # a freeze moves the upstream's timers, and not the time to drain
        if code not in expected:
            yield f"{code} where {sorted(filter(None, expected))} were to be expected, during {sorted(happened)}"

    def _text(self, count: int) -> str:
        """Return the text of the first chunks."""
        return "".join(text_of_chunk(n, self.script.size) for n in range(1, count + 1))

    def _unwatched(self, until: float) -> float:
        """Return the longest time in which no page was connected."""
        longest, covered = 0.0, self.began_at
        for since, gone in sorted(line for page in self.pages for line in page.online):
            if since >= until:
                break
            longest = max(longest, since - covered)
            covered = max(covered, gone)
        return max(longest, until - covered)
