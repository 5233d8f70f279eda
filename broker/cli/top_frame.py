"""One frame of `broker top`: what is known as tables, and what is not known in words. No I/O and no clock.

On a terminal a row is one line, and the frame is as high as the terminal: rows that have no room are counted.
"""

from __future__ import annotations

import datetime as dt
import io
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from broker.cli import amounts, sessions
from broker.cli.tables import Name, cell

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from broker.cli.scrape import Scrape
    from broker.store.running import Running, RunningSession

_Row = TypeVar("_Row")

_SHOWN_ERRORS = 4
_SHOWN_SPENDERS = 5
_SHOWN_PROBLEMS = 2
_LONGEST_PROBLEM = 150  # two lines of a narrow terminal
_NAME_WIDTH = 24
_BAR_WIDTH = 20
_SESSIONS_OF_A_SCRIPT = 10
_WIDE = 100
"""Columns of a terminal from which on sessions have all their columns; before that, names need the room."""


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
        problem: why Redis, or only the spending of today, is not known, as a sentence.
    """

    at: dt.datetime
    running: Running | None = None
    before: Running | None = None
    spending: Spending | None = None
    brokers: Sequence[Scraped] = field(default_factory=tuple)
    problem: str = ""


def draw(frame: Frame, *, width: int | None = None, height: int | None = None) -> Group:
    """Return a frame for a terminal of this size. Without a height, all rows but those of sessions beyond ten.

    Args:
        frame: what is shown.
        width: columns of the terminal; None for a script.
        height: lines of the terminal; None for a script.
    """
    running = frame.running
    workers = [] if running is None else _workers(running, frame.before)
    brokers = [_broker(each) for each in frame.brokers]
    listed = [] if running is None else running.sessions
    above, below = _above(frame), _below(frame.brokers) if brokers else []
    rooms: Sequence[int | None] = (None, None, _SESSIONS_OF_A_SCRIPT + 1)
    if height is not None:
        used = _lines([*above, *below], width) + sum(2 for rows in (workers, brokers, listed) if rows)
        rooms = _shares(height - used, [len(workers), len(brokers), len(listed)])
    parts: list[RenderableType] = [*above]
    if workers and rooms[0] != 0:
        parts += [Text(), _table(_WORKER, workers, rooms[0])]
    if brokers and rooms[1] != 0:
        parts += [Text(), _table(_BROKER, brokers, rooms[1])]
    parts += below
    if running is not None and listed and rooms[2] != 0:
        parts += [Text(), _longest(running, rooms[2], wide=width is None or width >= _WIDE)]
    return Group(*parts)


def _above(frame: Frame) -> list[Text]:
    """Return the lines above the tables."""
    if frame.running is None:
        return [
            _head(frame),
            _problem(frame.problem),
            cell("Workers, streams and spending are not known.", style="dim", fold=False),
        ]
    lines = [_head(frame), _summary(frame.running), *_spent(frame.spending)]
    return [*lines, _problem(frame.problem)] if frame.problem else lines


def _shares(room: int, wanted: Sequence[int]) -> list[int]:
    """Return how many of the lines each table gets: all get the same, and what one does not need goes to the others."""
    given = [0] * len(wanted)
    for _ in range(min(room, sum(wanted))):
        at = min((n for n, most in enumerate(wanted) if given[n] < most), key=given.__getitem__)
        given[at] += 1
    return given


def _lines(parts: Sequence[RenderableType], width: int | None) -> int:
    console = Console(file=io.StringIO(), width=width or _WIDE)
    return len(console.render_lines(Group(*parts)))


def _head(frame: Frame) -> Text:
    line = Text("broker top", style="bold")
    line.append(f"  {frame.at:%Y-%m-%d %H:%M:%S} UTC", style="not bold dim")
    return line


def _summary(running: Running) -> Text:
    states = Counter(sessions.state_of(each) for each in running.sessions)
    reserved = sum(each.reserved.cost for each in running.sessions)
    words = [amounts.count(len(running.sessions), "session")]
    words += [f"{count} {state}" for state, count in sorted(states.items()) if state != "running"]
    words += [amounts.count(len(_workers_of(running)), "worker"), f"{amounts.usd(reserved)} USD reserved"]
    if not running.complete:
        words.append("more sessions than are read")
    if running.unreadable:
        words.append(f"{running.unreadable} cannot be read")
    return cell(" · ".join(words), fold=False)


def _spent(spending: Spending | None) -> list[Text]:
    if spending is None:
        return [cell("spending of today: not known", style="dim", fold=False)]
    cost = sum(spending.cost.values())
    line = cell(f"today {amounts.usd(cost)} USD", fold=False)
    if spending.limit:
        share = cost / spending.limit
        line.append(f" of {amounts.usd(spending.limit)} ({share:.0%}) ")
        line.append(amounts.bar(share, _BAR_WIDTH), style="red" if share >= 0.9 else "cyan")
    line.append(f" · {amounts.count(spending.requests, 'answer')}, {spending.failed:,} failed")
    dearest = sorted(spending.cost.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN_SPENDERS]
    spenders = [f"{cell(client).plain[:_NAME_WIDTH]} {amounts.usd(nano)}" for client, nano in dearest if nano]
    return [line, cell(f"most by {', '.join(spenders)}", style="dim", fold=False)] if spenders else [line]


def _workers_of(running: Running) -> dict[str, str]:
    """Return the workers as `host:pid` by their ids, including those that are not listed but have sessions."""
    known = {each.id: sessions.address_of(each) or each.id[:8] for each in running.workers}
    others = sorted({each.worker for each in running.sessions if each.worker} - known.keys())
    return {**known, **{worker: f"{worker[:8]} (silent)" for worker in others}}


_WORKER = ("worker", "release", "running", "waiting", "events/s", "bytes/s", "reserved USD")
_BROKER = ("metrics of", "running", "viewers", "first chunk", "95 %", "ended", "failed", "refused")


def _workers(running: Running, before: Running | None) -> list[list[RenderableType]]:
    """Return a row for each worker."""
    releases = {each.id: each.version for each in running.workers}
    names = _workers_of(running)
    rows: list[list[RenderableType]] = []
    for worker, name in sorted(names.items(), key=lambda item: item[1]):
        own = [each for each in running.sessions if each.worker == worker]
        events, size = _rates(own, running, before)
        rows.append(
            [
                Name(name, _NAME_WIDTH),
                cell(releases.get(worker) or "?"),
                str(len(own)),
                str(sum(not each.events for each in own)),
                "-" if events is None else f"{events:,.0f}",
                "-" if size is None else amounts.size(size),
                amounts.usd(sum(each.reserved.cost for each in own)),
            ]
        )
    return rows or [[Text("no worker is known", style="dim"), *[""] * (len(_WORKER) - 1)]]


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


def _broker(broker: Scraped) -> list[RenderableType]:
    """Return the row of a broker."""
    name = Name(broker.url, _NAME_WIDTH)
    if broker.now is None or broker.recent is None:
        return [name, *["?"] * (len(_BROKER) - 1)]
    recent = broker.recent
    return [
        name,
        str(broker.now.running),
        "?" if broker.now.viewers is None else str(broker.now.viewers),
        _seconds(recent.quantile(0.5)),
        _seconds(recent.quantile(0.95)),
        f"{recent.total:,.0f}",
        f"{sum(recent.errors().values()):,.0f}",
        f"{sum(recent.refused.values()):,.0f}",
    ]


def _below(brokers: Sequence[Scraped]) -> list[Text]:
    """Return the lines below the table of brokers."""
    times = {each.seconds for each in brokers if each.now is not None}
    since = f"of {max(filter(None, times)):.0f} s" if any(times) else "since the start"
    note = f"half and 95 % of the first chunks came within this; counts are {since}"
    lines = [cell(note, style="dim", fold=False)]
    errors: Counter[str] = Counter()
    for each in brokers:
        if each.recent is not None:
            errors.update({code: round(count) for code, count in each.recent.errors().items()})
    if errors:
        told = ", ".join(f"{code} {count}" for code, count in errors.most_common(_SHOWN_ERRORS))
        lines.append(cell(f"errors: {told}", style="yellow", fold=False))
    problems = [
        each.problem if each.url in each.problem else f"{each.url}: {each.problem}"
        for each in brokers
        if each.problem
    ]
    lines += [_problem(each) for each in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(_problem(f"and {len(problems) - _SHOWN_PROBLEMS} more cannot be read"))
    return lines


def _problem(sentence: str) -> Text:
    """Return a sentence that may take more than one line, because all of it is needed."""
    text = cell(sentence, style="bold red")
    text.truncate(_LONGEST_PROBLEM, overflow="ellipsis")
    return text


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return "long" if math.isinf(value) else amounts.wait(value)


def _longest(running: Running, room: int | None, *, wide: bool) -> Table:
    ids = sessions.shown_ids(running.sessions)
    rows, left = _cut(running.sessions, room)
    shown = sessions.table(rows, ids, running, fold=False, wide=wide)
    if left:
        shown.add_row("", _more(left))
    return shown


def _cut(rows: Sequence[_Row], room: int | None) -> tuple[Sequence[_Row], int]:
    """Return the rows that fit into so many lines, and the number of the others, which takes a line too."""
    if room is None or len(rows) <= room:
        return rows, 0
    shown = max(0, room - 1)
    return rows[:shown], len(rows) - shown


def _more(left: int) -> Text:
    return cell(f"and {left} more", style="dim", fold=False)


def _table(headings: Sequence[str], rows: Sequence[Sequence[RenderableType]], room: int | None) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", expand=False)
    shown.add_column(headings[0])
    for heading in headings[1:]:
        shown.add_column(heading, justify="right", no_wrap=True)
    fitting, left = _cut(rows, room)
    for row in fitting:
        shown.add_row(*row)
    if left:
        shown.add_row(_more(left))
    return shown
