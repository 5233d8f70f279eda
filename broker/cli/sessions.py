"""`broker sessions`: what runs now on all workers, and how to end it; straight from Redis.

A session is named by the first characters of its id. The whole id is a bearer secret, so it is never shown.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import re
from contextlib import suppress
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
SHOWN_COMPLAINTS = 10

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
    if client is not None and not found.complete:
        found = await _of_client(store, client)
    ids = shown_ids(found.sessions)
    chosen = [each for each in found.sessions if client is None or is_client(each.client, client)]
    if as_json:
        write(json.dumps({"sessions": [to_json(each, ids, found) for each in chosen]}) + "\n")
    elif chosen:
        show(table(chosen, ids, found))
    else:
        print_note("Nothing runs." if client is None else f"Nothing of {client} runs.")
    if not found.complete:
        print_note(f"More sessions run than are read at once: these are {len(chosen)} of them.")
    if found.unreadable:
        print_note(f"{found.unreadable} more cannot be read: another release may have written them.")
    return 0


async def _of_client(store: Store, client: str) -> Running:
    """Return what runs of a client, by either of its names."""
    reader = RunningStore(store)
    one, *others = [await reader.read(client=name) for name in names_of(client)]
    for other in others:
        one = one._replace(
            sessions=one.sessions + other.sessions,
            complete=one.complete and other.complete,
            unreadable=one.unreadable + other.unreadable,
        )
    return one


def names_of(wanted: str) -> tuple[str, str]:
    """Return the names that a client may have that is meant by this: as it is, or that of an API key."""
    return wanted, f"key:{wanted}"


def is_client(name: str, wanted: str) -> bool:
    """Return True if the client of this name is meant by what was wanted."""
    return name in names_of(wanted)


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
    canceller = _Canceller(store, settings)
    everything = True
    if client is None:
        found = await RunningStore(store).read()
        ids = shown_ids(found.sessions)
        named = _named(str(session).strip().lower(), ids, complete=found.complete)
        chosen = {each.session_id: each.client for each in found.sessions if each.session_id == named}
    else:
        for name in names_of(client):  # first what is pending, or it would start meanwhile
            pending, complete = await RunningStore(store).pending(name)
            await canceller.cancel(dict.fromkeys(pending, name))
            everything = everything and complete
        found = await _of_client(store, client)
        ids = shown_ids(found.sessions)
        chosen = {each.session_id: each.client for each in found.sessions}
        everything = everything and found.complete and not found.unreadable
        if everything and not chosen and not canceller.dropped and not canceller.failed:
            raise NoSuchSessionError(f"Nothing of {client} runs or waits.")
    accepted = await canceller.cancel(chosen)
    late = await canceller.late(accepted)
    write(_summary(len(accepted) - len(late), canceller.dropped) + "\n")
    _complain_of({name: f"could not be cancelled: {why}" for name, why in canceller.failed.items()}, ids)
    _complain_of({name: f"was cancelled, and {why}" for name, why in late.items()}, ids)
    if not everything:
        complain(f"There may be more of {client}: not all of its sessions can be read. Run this again.")
    return 0 if everything and not canceller.failed and not late else 1


def _complain_of(sessions: Mapping[str, str], ids: Mapping[str, str]) -> None:
    """Say of each session what is wrong. One that is not listed is named by the first characters of its id."""
    for session_id, words in list(sessions.items())[:SHOWN_COMPLAINTS]:
        complain(f"{ids.get(session_id) or session_id[:SHORTEST_ID]} {words}")
    if (left := len(sessions) - SHOWN_COMPLAINTS) > 0:
        complain(f"and so {left} more.")


def _named(prefix: str, ids: Mapping[str, str], *, complete: bool) -> str:
    """Return the whole id of the session that is named.

    Raises:
        NoSuchSessionError: none is, or several are.
    """
    named = [session_id for session_id in ids if session_id.startswith(prefix)]
    if not named:
        among = "" if complete else f" among the {len(ids)} that are read, and more run"
        raise NoSuchSessionError(
            f"No running session has an id that begins with {prefix[:SHORTEST_ID]}{among}."
        )
    if len(named) > 1:
        several = ", ".join(sorted(ids[each] for each in named)[:10])
        raise NoSuchSessionError(f"Several sessions begin with {prefix[:SHORTEST_ID]}: {several}. Name one.")
    return named[0]


def _summary(ended: int, dropped: int) -> str:
    parts = [f"{amounts.count(ended, 'session')} ended"] if ended or not dropped else []
    if dropped:
        parts.append(f"{dropped} that {'was' if dropped == 1 else 'were'} prepared will not start")
    return f"Cancelled: {' and '.join(parts)}."


class _Canceller:
    """Cancels sessions as DELETE does, from outside of the service.

    Attributes:
        dropped: number of prepared sessions that can no longer start.
        failed: the sessions that could not be cancelled, each with the reason as a sentence.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self.dropped = 0
        self.failed: dict[str, str] = {}
        self._sessions = SessionStore(
            store,
            session_ttl=settings.session_ttl,
            running_ttl=settings.session_ttl,  # of claims, which are not made here
            resume_ttl=settings.resume_ttl,
        )
        self._pending = PendingStore(store, _NO_LIMITS, session_ttl=settings.session_ttl)

    async def cancel(self, chosen: Mapping[str, str]) -> list[str]:
        """Cancel sessions, each with its client. Returns the ones that end as cancelled once their worker knows.

        One that fails stops no other. If Redis is away for a whole batch, the others are not tried.
        """
        accepted: list[str] = []
        everything = list(chosen.items())
        for start in range(0, len(everything), AT_ONCE):
            part = everything[start : start + AT_ONCE]
            outcomes = await asyncio.gather(*(self._cancel(*each) for each in part))
            for (session_id, _), outcome in zip(part, outcomes, strict=True):
                self.failed.pop(session_id, None)  # it may have been tried as a pending one before
                if isinstance(outcome, StoreUnavailable):
                    self.failed[session_id] = redis_problem(outcome)
                elif outcome is State.PREPARED:
                    self.dropped += 1
                else:
                    accepted.append(session_id)
            if all(
                isinstance(each, StoreUnavailable) and not isinstance(each, StoreRefused) for each in outcomes
            ):
                self.failed |= {each: "Redis was away." for each, _ in everything[start + AT_ONCE :]}
                break
        return accepted

    async def _cancel(self, session_id: str, client: str) -> State | StoreUnavailable:
        """Cancel a session. Returns its state before, or why it was not cancelled."""
        try:
            status = await self._sessions.cancel(session_id, cancelled_before_start())
        except StoreUnavailable as error:
            return error
        if status.state is State.PREPARED:
            with suppress(
                StoreUnavailable
            ):  # it is cancelled, and is counted as pending until its time is over
                await self._pending.forget(client, session_id)
        return status.state

    async def late(self, session_ids: Sequence[str]) -> dict[str, str]:
        """Wait until the sessions have ended. Returns those of which that is not certain, each with the reason."""
        waiting = list(session_ids)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ENDS_WITHIN
        try:
            while waiting := await self._not_ended(waiting):
                if loop.time() >= deadline:
                    return dict.fromkeys(waiting, f"has not ended within {ENDS_WITHIN:.0f} s.")
                await asyncio.sleep(CHECK_EVERY)
        except StoreUnavailable as error:
            return dict.fromkeys(waiting, f"it is not known whether it has ended: {redis_problem(error)}")
        return {}

    async def _not_ended(self, session_ids: Sequence[str]) -> list[str]:
        found: list[str] = []
        for start in range(0, len(session_ids), AT_ONCE):
            part = session_ids[start : start + AT_ONCE]
            records = await self._sessions.describe_many(part)
            found += [
                each
                for each, record in zip(part, records, strict=True)
                if isinstance(record, StoreUnavailable) or (record is not None and record.state not in ENDED)
            ]
        return found
