"""One frame of `broker top`: what is known as tables, and what is not known in words. No I/O and no clock."""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from broker.cli import amounts, sessions
from broker.cli.tables import cell
from broker.store.running import Activity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console, RenderableType

    from broker.cli.scrape import Scrape
    from broker.store.running import Running, RunningSession

_SHOWN_ERRORS = 4
_SHOWN_SPENDERS = 5
_NAME_WIDTH = 24
_BAR_WIDTH = 20
_SESSIONS_OF_A_SCRIPT = 10
_FEWEST_SESSIONS = 3


class Spending(NamedTuple):
    """What was spent on a day.

    Attributes:
        day: the day, UTC.
        cost: nano-USD by client.
        requests: number of answers.
        failed: number of those that failed.
        limit: nano-USD that all clients together may spend a day; 0 for no limit.
    """

    day: dt.date
    cost: Mapping[str, int]
    requests: int
    failed: int
    limit: int = 0


class Scraped(NamedTuple):
    """The metrics of one broker.

    Attributes:
        url: where they were asked for.
        now: what they are; None if that is not known.
        recent: what was added within the last `seconds`, or since its start at the first frame.
        seconds: the length of that time; None since the start of the broker.
        problem: why they are not known, as a sentence.
    """

    url: str
    now: Scrape | None = None
    recent: Scrape | None = None
    seconds: float | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything that a frame shows.

    Attributes:
        at: the time of the frame.
        running: what Redis says; None if it cannot be reached.
        before: what it said at the frame before; None at the first.
        spending: what was spent today; None if not known.
        brokers: the metrics of each URL.
        problem: why Redis is not known, as a sentence.
    """

    at: dt.datetime
    running: Running | None = None
    before: Running | None = None
    spending: Spending | None = None
    brokers: Sequence[Scraped] = field(default_factory=tuple)
    problem: str = ""


def draw(frame: Frame, *, console: Console | None = None) -> RenderableType:
    """Return a frame, with as many sessions as this console has room for; without one, ten."""
    parts: list[RenderableType] = [_head(frame)]
    if frame.running is None:
        parts += [
            Text(f"Redis: {frame.problem} Workers, streams and spending are not known.", style="bold red")
        ]
    else:
        parts += [
            _summary(frame.running),
            *_spent(frame.spending),
            Text(),
            _workers(frame.running, frame.before),
        ]
    if frame.brokers:
        parts += [Text(), *_brokers(frame.brokers)]
    if frame.running is not None and frame.running.sessions:
        parts.append(Text())
        parts.append(_longest(frame.running, _room(console, parts)))
    return Group(*parts)


def _room(console: Console | None, above: Sequence[RenderableType]) -> int:
    """Return the number of sessions for which there is room below these parts."""
    if console is None:
        return _SESSIONS_OF_A_SCRIPT
    used = len(console.render_lines(Group(*above)))
    heading_and_rest = 2
    return max(_FEWEST_SESSIONS, console.height - used - heading_and_rest)


def _head(frame: Frame) -> Text:
    line = Text("broker top", style="bold")
    line.append(f"  {frame.at:%Y-%m-%d %H:%M:%S} UTC", style="not bold dim")
    return line


def _summary(running: Running) -> Text:
    states = Counter(_state(each) for each in running.sessions)
    reserved = sum(each.reserved.cost for each in running.sessions)
    words = [f"{len(running.sessions)} sessions"]
    words += [f"{count} {state}" for state, count in sorted(states.items()) if state != "running"]
    words += [f"{len(_workers_of(running))} workers", f"{amounts.usd(reserved)} USD reserved"]
    if not running.complete:
        words.append("more sessions than are read")
    if running.unreadable:
        words.append(f"{running.unreadable} cannot be read")
    return Text(" · ".join(words))


def _state(session: RunningSession) -> str:
    waits = session.activity is Activity.RUNNING and not session.events
    return "waiting" if waits else session.activity.value


def _spent(spending: Spending | None) -> list[RenderableType]:
    if spending is None:
        return [Text("spending of today: not known yet", style="dim")]
    cost = sum(spending.cost.values())
    line = Text(f"today {amounts.usd(cost)} USD")
    if spending.limit:
        share = cost / spending.limit
        line.append(f" of {amounts.usd(spending.limit)} ({share:.0%}) ")
        line.append(amounts.bar(share, _BAR_WIDTH), style="red" if share >= 0.9 else "cyan")
    line.append(f" · {spending.requests:,} answers, {spending.failed:,} failed")
    dearest = sorted(spending.cost.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN_SPENDERS]
    spenders = [f"{cell(client).plain[:_NAME_WIDTH]} {amounts.usd(nano)}" for client, nano in dearest if nano]
    return [line, Text(f"most by {', '.join(spenders)}", style="dim")] if spenders else [line]


def _workers_of(running: Running) -> dict[str, str]:
    """Return the workers as `host:pid` by their ids, including those that are not listed but have sessions."""
    known = {each.id: f"{each.host}:{each.pid}" if each.host else each.id[:8] for each in running.workers}
    others = sorted({each.worker for each in running.sessions if each.worker} - known.keys())
    return {**known, **{worker: f"{worker[:8]} (silent)" for worker in others}}


def _workers(running: Running, before: Running | None) -> Table:
    shown = _table("worker", "release", "running", "waiting", "events/s", "bytes/s", "reserved USD")
    releases = {each.id: each.version for each in running.workers}
    names = _workers_of(running)
    if not names:
        shown.add_row(Text("no worker is known", style="dim"), *[""] * 6)
    for worker, name in names.items():
        own = [each for each in running.sessions if each.worker == worker]
        events, size = _rates(own, running, before)
        shown.add_row(
            cell(name),
            cell(releases.get(worker) or "?"),
            str(len(own)),
            str(sum(not each.events for each in own)),
            "-" if events is None else f"{events:,.0f}",
            "-" if size is None else amounts.size(size),
            amounts.usd(sum(each.reserved.cost for each in own)),
        )
    return shown


def _rates(
    own: Sequence[RunningSession], running: Running, before: Running | None
) -> tuple[float | None, float | None]:
    """Return the events and bytes a second that were journaled since the frame before."""
    if before is None or running.now_ms <= before.now_ms:
        return None, None
    seconds = (running.now_ms - before.now_ms) / 1000
    old = {each.session_id: each for each in before.sessions}
    events = size = 0
    for each in own:
        earlier = old.get(each.session_id)
        events += each.events - (earlier.events if earlier else 0)
        size += each.size - (earlier.size if earlier else 0)
    return max(0.0, events / seconds), max(0.0, size / seconds)


def _brokers(brokers: Sequence[Scraped]) -> list[RenderableType]:
    times = {each.seconds for each in brokers if each.now is not None}
    since = f"of {max(filter(None, times)):.0f} s" if any(times) else "since the start"
    shown = _table("metrics of", "running", "viewers", "first chunk", "95 %", "ended", "failed", "refused")
    for each in brokers:
        if each.now is None or each.recent is None:
            shown.add_row(cell(each.url), *["?"] * 7)
            continue
        recent = each.recent
        shown.add_row(
            cell(each.url),
            str(each.now.running),
            "?" if each.now.viewers is None else str(each.now.viewers),
            _seconds(recent.quantile(0.5)),
            _seconds(recent.quantile(0.95)),
            f"{recent.total:,.0f}",
            f"{sum(recent.errors().values()):,.0f}",
            f"{sum(recent.refused.values()):,.0f}",
        )
    note = f"half and 95 % of the first chunks came within this; counts are {since}"
    parts: list[RenderableType] = [shown, Text(note, style="dim")]
    errors: Counter[str] = Counter()
    for each in brokers:
        if each.recent is not None:
            errors.update({code: round(count) for code, count in each.recent.errors().items()})
    if errors:
        told = ", ".join(f"{code} {count}" for code, count in errors.most_common(_SHOWN_ERRORS))
        parts.append(Text(f"errors: {told}", style="yellow"))
    parts += [Text(_problem(each), style="bold red") for each in brokers if each.problem]
    return parts


def _problem(broker: Scraped) -> str:
    return broker.problem if broker.url in broker.problem else f"{broker.url}: {broker.problem}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return "long" if math.isinf(value) else amounts.wait(value)


def _longest(running: Running, room: int) -> Table:
    ids = sessions.shown_ids(running.sessions)
    shown = sessions.table(running.sessions[:room], ids, running)
    left = len(running.sessions) - room
    if left > 0:
        shown.add_row("", Text(f"and {left} more", style="dim"))
    return shown


def _table(first: str, *headings: str) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", expand=False)
    shown.add_column(first, overflow="fold", min_width=_NAME_WIDTH)
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    return shown
