"""`broker sessions`: what runs now on all workers, and how to end it; straight from Redis.

A session is named by the first characters of its id. The whole id is a bearer secret, so it is never shown.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import re
from typing import TYPE_CHECKING, Any

from rich.table import Table

from broker.cli import amounts
from broker.cli.operator import operator_settings, redis_problem, with_store
from broker.cli.output import require_output, write
from broker.cli.tables import Name, cell, show
from broker.cli.words import BAD_USE, complain, print_note
from broker.core.accounts import Quotas
from broker.core.errors import StoreRefused, StoreUnavailable
from broker.core.events import cancelled_before_start
from broker.core.pricing import to_usd
from broker.core.session import ENDED, State
from broker.settings import SettingsError
from broker.store.pending import PendingStore
from broker.store.running import Activity, RunningSession, RunningStore
from broker.store.sessions import SessionStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from rich.console import RenderableType

    from broker.settings import Settings
    from broker.store.connection import Store
    from broker.store.running import Running
    from broker.store.workers import WorkerInfo

SHORTEST_ID = 8
"""Characters of an id that are shown at least. Logs have as many."""

ENDS_WITHIN = 5.0
"""Seconds in which an accepted cancel should have ended a session; without pub/sub it takes up to three."""

CHECK_EVERY = 0.1
AT_ONCE = 50

_NO_LIMITS = Quotas(
    pending=0, streams=0, daily_tokens=0, daily_cost=0, total_daily_cost=0
)  # nothing is admitted here

_ID = re.compile(r"[0-9a-f][0-9a-f-]{7,35}")


class NoSuchSessionError(Exception):
    """What was named is not one running session; the text is a sentence for a person."""


def sessions(client: str | None, *, as_json: bool) -> int:
    """Print the running sessions of all workers, or those of one client, and return the exit status.

    Raises:
        OutputError: standard output is closed.
    """
    return _with_redis(lambda store, _: _list(store, client, as_json=as_json))


def cancel(session: str | None, client: str | None) -> int:
    """End a session, or everything of a client, and return the exit status: 0 once all of it has ended.

    Args:
        session: the first characters of its id, as `sessions` shows them.
        client: the name of a client, as `sessions` shows it, or the name of an API key.
    """
    if (session is None) == (client is None):
        return complain("name either one session, as `broker sessions` shows it, or a --client", BAD_USE)
    if session is not None and not _ID.fullmatch(session.strip().lower()):
        return complain(
            f"a session is named by the first {SHORTEST_ID} or more characters of its id, as `broker sessions`"
            " shows them",
            BAD_USE,
        )
    return _with_redis(lambda store, settings: _cancel(store, settings, session, client))


def _with_redis(work: Callable[[Store, Settings], Awaitable[int]]) -> int:
    require_output()
    try:
        settings, redis_url = operator_settings()
        return with_store(settings, redis_url, lambda store: work(store, settings))
    except SettingsError as error:
        return complain(error, BAD_USE)
    except StoreUnavailable as error:
        return complain(redis_problem(error))
    except NoSuchSessionError as error:
        return complain(error)


async def _list(store: Store, client: str | None, *, as_json: bool) -> int:
    found = await RunningStore(store).read()
    ids = shown_ids(found.sessions)
    chosen = [each for each in found.sessions if client is None or is_client(each.client, client)]
    if as_json:
        write(json.dumps({"sessions": [to_json(each, ids, found) for each in chosen]}) + "\n")
    elif chosen:
        show(table(chosen, ids, found))
    else:
        print_note("Nothing runs." if client is None else f"Nothing of {client} runs.")
    if not found.complete:
        print_note(f"There are more than these {len(found.sessions)} sessions.")
    if found.unreadable:
        print_note(f"{found.unreadable} more cannot be read: another release may have written them.")
    return 0


def is_client(name: str, wanted: str) -> bool:
    """Return True if a client is meant by this name: its whole name, or that of its API key."""
    return name in (wanted, f"key:{wanted}")


def shown_ids(running: Iterable[RunningSession]) -> dict[str, str]:
    """Return the shown id of each session: its first characters, as many as tell it from all others."""
    whole = sorted({each.session_id for each in running})  # two claims may be after one session
    shown = {}
    for before, this, after in zip(["", *whole], whole, [*whole[1:], ""], strict=False):
        same = max(_same_start(this, other) for other in (before, after))
        shown[this] = this[: max(SHORTEST_ID, same + 1)]
    return shown


def _same_start(one: str, other: str) -> int:
    """Return the number of characters with which both begin."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)


def to_json(session: RunningSession, ids: dict[str, str], found: Running) -> dict[str, Any]:
    """Return a session for programs. Times are ISO 8601 in UTC, `cost` is in USD."""
    since = session.since_ms
    at = None if since is None else dt.datetime.fromtimestamp(since / 1000, tz=dt.UTC)
    return {
        "id": ids[session.session_id],
        "client": session.client,
        "model": session.model,
        "state": session.activity.value,
        "since": None if at is None else at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "seconds": None if since is None else max(0, found.now_ms - since) / 1000,
        "worker": session.worker or None,
        "host": host_of(session, found) or None,
        "firstChunk": session.events > 0,
        "events": session.events,
        "bytes": session.size,
        "reserved": {"tokens": session.reserved.tokens, "cost": to_usd(session.reserved.cost)},
    }


def host_of(session: RunningSession, found: Running) -> str:
    """Return the machine and process of a session's worker as `host:pid`; empty if it is not among those that live."""
    return next((address_of(each) for each in found.workers if each.id == session.worker), "")


def address_of(worker: WorkerInfo) -> str:
    """Return the machine and process of a worker as `host:pid`; empty if they are not known."""
    return f"{worker.host}:{worker.pid}" if worker.host else ""


def table(
    chosen: Sequence[RunningSession],
    ids: dict[str, str],
    found: Running,
    *,
    fold: bool = True,
    wide: bool = True,
) -> Table:
    """Return a table of sessions. A session without chunks has none in its column.

    Args:
        chosen: the sessions.
        ids: the shown id of each.
        found: everything that runs.
        fold: show long names on several lines; otherwise they are cut.
        wide: show the columns that names need on a narrow terminal.
    """
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    shown.add_column("id", no_wrap=True)
    shown.add_column("client", overflow="fold", min_width=8)
    shown.add_column("model", overflow="fold", min_width=12)
    shown.add_column("state", no_wrap=True)
    shown.add_column("for", justify="right", no_wrap=True)
    shown.add_column("worker", overflow="fold", min_width=7)
    shown.add_column("events", justify="right", no_wrap=True)
    if wide:
        shown.add_column("size", justify="right", no_wrap=True)
        shown.add_column("max USD", justify="right", no_wrap=True)
    for each in chosen:
        worker = host_of(each, found) or each.worker[:6] or "-"
        row: list[RenderableType] = [
            cell(ids[each.session_id]),
            cell(each.client, fold=fold),
            cell(each.model, fold=fold),
            state_of(each),
            "?" if each.since_ms is None else amounts.duration((found.now_ms - each.since_ms) / 1000),
            cell(worker) if fold else Name(worker),
            str(each.events or "-"),
            amounts.size(each.size) if each.events else "-",
            amounts.usd(each.reserved.cost),
        ]
        shown.add_row(*row[: len(shown.columns)])
    return shown


def state_of(session: RunningSession) -> str:
    """Return what a session is doing, in a word; `waiting` before its first chunk."""
    waits = session.activity is Activity.RUNNING and not session.events
    return "waiting" if waits else session.activity.value


async def _cancel(store: Store, settings: Settings, session: str | None, client: str | None) -> int:
    reader = RunningStore(store)
    canceller = _Canceller(store, settings)
    if client is not None:
        for name in dict.fromkeys((client, f"key:{client}")):  # first what waits, or it would start meanwhile
            await canceller.drop(name, await reader.pending(name))
    found = await reader.read()
    ids = shown_ids(found.sessions)
    if client is not None:
        chosen = {each.session_id: each.client for each in found.sessions if is_client(each.client, client)}
        if not chosen and not canceller.dropped:
            raise NoSuchSessionError(f"Nothing of {client} runs or waits.")
    else:
        named = _named(str(session).strip().lower(), ids)
        chosen = {each.session_id: each.client for each in found.sessions if each.session_id == named}
    await canceller.end(chosen)
    late = await canceller.late(list(chosen))
    write(_summary(len(chosen) - len(late), canceller.dropped) + "\n")
    for session_id in late:
        complain(f"{ids[session_id]} was cancelled, and has not ended within {ENDS_WITHIN:.0f} s.")
    return 1 if late else 0


def _named(prefix: str, ids: dict[str, str]) -> str:
    """Return the whole id of the session that is named.

    Raises:
        NoSuchSessionError: none is, or several are.
    """
    named = [session_id for session_id in ids if session_id.startswith(prefix)]
    if not named:
        raise NoSuchSessionError(f"No running session has an id that begins with {prefix[:SHORTEST_ID]}.")
    if len(named) > 1:
        several = ", ".join(sorted(ids[each] for each in named)[:10])
        raise NoSuchSessionError(f"Several sessions begin with {prefix[:SHORTEST_ID]}: {several}. Name one.")
    return named[0]


def _summary(ended: int, dropped: int) -> str:
    parts = [f"{ended} {'session' if ended == 1 else 'sessions'} ended"] if ended or not dropped else []
    if dropped:
        parts.append(f"{dropped} that {'was' if dropped == 1 else 'were'} prepared will not start")
    return f"Cancelled: {' and '.join(parts)}."


class _Canceller:
    """Cancels sessions as DELETE does, from outside of the service.

    Attributes:
        dropped: number of prepared sessions that can no longer start.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self.dropped = 0
        self._store = store
        self._sessions = SessionStore(
            store,
            session_ttl=settings.session_ttl,
            running_ttl=settings.session_ttl,  # of claims, which are not made here
            resume_ttl=settings.resume_ttl,
        )
        self._pending = PendingStore(store, _NO_LIMITS, session_ttl=settings.session_ttl)

    async def drop(self, client: str, session_ids: Sequence[str]) -> None:
        """Cancel prepared sessions of a client, and count them. One that was claimed meanwhile is cancelled as well."""
        self.dropped += await self._cancel(dict.fromkeys(session_ids, client))

    async def end(self, chosen: Mapping[str, str]) -> None:
        """Cancel running sessions, each with its client."""
        await self._cancel(chosen)

    async def _cancel(self, chosen: Mapping[str, str]) -> int:
        """Cancel sessions. Returns the number of those that had not been claimed."""
        prepared = 0
        everything = list(chosen.items())
        for start in range(0, len(everything), AT_ONCE):
            part = everything[start : start + AT_ONCE]
            cancels = (self._sessions.cancel(session_id, cancelled_before_start()) for session_id, _ in part)
            statuses = await asyncio.gather(*cancels)
            for (session_id, client), status in zip(part, statuses, strict=True):
                if status.state is State.PREPARED:
                    prepared += 1
                    await self._pending.forget(client, session_id)
        return prepared

    async def late(self, session_ids: Sequence[str]) -> list[str]:
        """Wait until the sessions have ended, and return those that have not after `ENDS_WITHIN` seconds."""
        waiting = list(session_ids)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ENDS_WITHIN
        while True:
            records = await self._sessions.describe_many(waiting)
            waiting = [
                each
                for each, record in zip(waiting, records, strict=True)
                if isinstance(record, StoreRefused) or (record is not None and record.state not in ENDED)
            ]
            if not waiting or loop.time() >= deadline:
                return waiting
            await asyncio.sleep(CHECK_EVERY)
