"""`broker top`: a live view of workers, streams, first-chunk times, errors and spending.

Workers, sessions and spending are read from Redis; times and errors from `/metrics` of the brokers that are named.
`top_frame` draws what was read; this module reads, again and again, and watches the keyboard.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import signal
import sys
from collections import Counter, deque
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from broker.cli.operator import operator_settings, reach, redis_problem
from broker.cli.output import Output, require_output
from broker.cli.scrape import NotMetricsError, Scrape, parse
from broker.cli.tables import show, terminal_width
from broker.cli.talk import TalkError, broker_at
from broker.cli.top_frame import Frame, Scraped, Spending, draw
from broker.cli.words import BAD_USE, complain
from broker.core.errors import StoreUnavailable
from broker.core.pricing import to_nano
from broker.settings import SettingsError
from broker.store.connection import Store
from broker.store.running import RunningStore
from broker.store.usage_ledger import UsageLedger

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence

    from broker.settings import Settings
    from broker.store.running import Running

SPENDING_EVERY = 10.0
"""Seconds between two reads of the usage ledger, which may be large."""

RECENT = 60.0
"""Seconds over which times and errors are counted."""

SCRAPE_WITHIN = 3.0
"""Seconds that a broker has to send its metrics."""

LARGEST_METRICS = 4 * 1024 * 1024
"""Maximum bytes of the metrics of a broker."""


def top(urls: Sequence[str], *, once: bool, interval: float) -> int:
    """Show the view until `q` or Ctrl-C, or print one frame, and return the exit status.

    Args:
        urls: the brokers whose metrics are shown.
        once: print one frame. The exit status is then 1 if something could not be read.
        interval: seconds between two frames.

    Raises:
        OutputError: standard output is closed.
    """
    require_output()
    if not once and not Output().isatty():
        return complain("the live view needs a terminal; --once prints one frame", BAD_USE)
    try:
        settings, redis_url = operator_settings()
    except SettingsError as error:
        return complain(error, BAD_USE)
    return asyncio.run(_top(settings, redis_url, urls, once=once, interval=interval))


async def _top(
    settings: Settings, redis_url: str, urls: Sequence[str], *, once: bool, interval: float
) -> int:
    store = Store(redis_url, settings.key_prefix)
    try:
        with suppress(StoreUnavailable):  # the frame says so
            await reach(store)
        reader = Reader(store, settings, urls)
        if once:
            frame = await reader.frame()
            show(draw(frame, width=terminal_width()))
            return 1 if frame.problem or any(each.problem for each in frame.brokers) else 0
        await _show(reader, interval)
        return 0
    finally:
        await store.close()


async def _show(reader: Reader, interval: float) -> None:
    console = Console(file=Output())
    with ExitStack() as stack:
        quitting = stack.enter_context(_quit_keys())
        # Without the redirection: the library would send what `Output` writes back to its own console.
        live = stack.enter_context(
            Live(
                console=console,
                screen=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
        )
        while not quitting.is_set():
            frame = await _unless(quitting, reader.frame())
            if frame is None:
                return
            live.update(draw(frame, width=console.width, height=console.height), refresh=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await quitting.wait()


async def _unless(quitting: asyncio.Event, reading: Coroutine[Any, Any, Frame]) -> Frame | None:
    """Return a frame, or None if the view is left before it has been read."""
    read = asyncio.ensure_future(reading)
    left = asyncio.ensure_future(quitting.wait())
    try:
        await asyncio.wait({read, left}, return_when=asyncio.FIRST_COMPLETED)
        return read.result() if read.done() else None
    finally:
        for task in (read, left):
            task.cancel()
        await asyncio.gather(read, left, return_exceptions=True)


@contextmanager
def _quit_keys() -> Iterator[asyncio.Event]:
    """Give an event that `q`, Ctrl-C and SIGTERM set. The terminal is as before afterwards."""
    quitting = asyncio.Event()
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, quitting.set)
            stack.callback(loop.remove_signal_handler, number)
        if sys.stdin is not None and sys.stdin.isatty():
            # termios is only on systems that have terminals of this kind.
            import termios  # noqa: PLC0415 - see above
            import tty  # noqa: PLC0415 - see above

            keyboard = sys.stdin.fileno()
            before = termios.tcgetattr(keyboard)
            stack.callback(termios.tcsetattr, keyboard, termios.TCSADRAIN, before)
            tty.setcbreak(keyboard)

            def pressed() -> None:
                keys = os.read(keyboard, 64)
                if not keys or b"q" in keys.lower():  # nothing: the terminal is gone
                    quitting.set()

            loop.add_reader(keyboard, pressed)
            stack.callback(loop.remove_reader, keyboard)
        yield quitting


class Reader:
    """Reads frames, one after the other.

    Args:
        store: Redis.
        settings: the metrics token, and the budget of all clients.
        urls: the brokers whose metrics are read.
    """

    def __init__(self, store: Store, settings: Settings, urls: Sequence[str]) -> None:
        self._store = store
        self._ledger = UsageLedger(store)
        self._limit = to_nano(settings.total_daily_cost) or 0
        token = settings.metrics_token
        self._token = token.get_secret_value() if token is not None else None
        self._scrapes = {url: Scrapes(url) for url in urls}
        self._before: Running | None = None
        self._spending: Spending | None = None
        self._spending_at = float("-inf")

    async def frame(self) -> Frame:
        """Return the next frame. What cannot be read is in it as a sentence."""
        async with asyncio.TaskGroup() as group:
            redis = group.create_task(self._redis())
            scraping = [group.create_task(each.read(self._token)) for each in self._scrapes.values()]
        running, problem = redis.result()
        brokers = [each.result() for each in scraping]
        before, self._before = self._before, running
        return Frame(dt.datetime.now(tz=dt.UTC), running, before, self._spending, brokers, problem)

    async def _redis(self) -> tuple[Running | None, str]:
        try:
            running = await RunningStore(self._store).read()
        except StoreUnavailable as error:
            return None, redis_problem(error)
        now = asyncio.get_running_loop().time()
        if now - self._spending_at >= SPENDING_EVERY:
            try:
                self._spending = await self._spent()
            except StoreUnavailable as error:
                self._spending = None
                return running, redis_problem(error)
            self._spending_at = now
        return running, ""

    async def _spent(self) -> Spending:
        day, rows = await self._ledger.rows(None)
        cost: Counter[str] = Counter()
        requests = failed = 0
        for row in rows:
            cost[row.client] += row.counts["cost"]
            requests += row.counts["requests"]
            failed += row.counts["failed"]
        return Spending(day, cost, requests, failed, self._limit)


class Scrapes:
    """The metrics of one broker, over time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._past: deque[tuple[float, Scrape]] = deque()

    async def read(self, token: str | None) -> Scraped:
        """Read the metrics, and compare them with those of a minute ago."""
        try:
            async with asyncio.timeout(SCRAPE_WITHIN), broker_at(self._url, token) as broker:
                body = await broker.ask("GET", "/metrics", longest=LARGEST_METRICS)
            now = parse(body.decode(errors="replace"))
        except TalkError as error:
            return Scraped(self._url, problem=_why(error, token))
        except NotMetricsError as error:
            return Scraped(self._url, problem=f"Its metrics cannot be read: {error}.")
        except TimeoutError:
            return Scraped(self._url, problem="It does not answer in time.")
        return self.compare(now, at=asyncio.get_running_loop().time())

    def compare(self, now: Scrape, *, at: float) -> Scraped:
        """Compare what was read at this time with what was read before. If the broker has restarted, that is gone."""
        past = self._past
        if past and now.began_after(past[-1][1]):
            # All of its counts have come since the last time, and those before are gone.
            last, _ = past[-1]
            past.clear()
            past.append((last, Scrape()))
        while len(past) > 1 and at - past[1][0] >= RECENT:
            past.popleft()
        recent, seconds = (now.since(past[0][1]), at - past[0][0]) if past else (now, None)
        past.append((at, now))
        return Scraped(self._url, now, recent, seconds)


def _why(error: TalkError, token: str | None) -> str:
    code = error.document.get("code")
    if code == "not_found" and token is None:
        return "It shows its metrics only to its own machine; elsewhere BROKER_METRICS_TOKEN is needed."
    if code == "unauthorized":
        wrong = "refuses this" if token is not None else "asks for"
        return f"It {wrong} BROKER_METRICS_TOKEN."
    return str(error)
