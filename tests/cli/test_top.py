"""Frames of `broker top`, and the view itself on a terminal with a real Valkey."""

from __future__ import annotations

import datetime as dt
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from rich.console import Console

from broker.cli.scrape import Scrape, parse
from broker.cli.top import LARGEST_METRICS, Scrapes
from broker.cli.top_frame import Frame, Scraped, Spending, draw
from broker.cli.words import printable
from broker.core.accounts import WorstCase
from broker.store.running import Activity, Running
from broker.store.workers import WorkerInfo
from tests.cli.fake_broker import run
from tests.cli.test_scrape import TEXT
from tests.cli.test_sessions import FAR, ID, NOW, OTHER, session
from tests.system.harness import clean_environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

AT = dt.datetime(2026, 11, 20, 12, 0, tzinfo=dt.UTC)
WORKERS = [WorkerInfo("w1", "eu-1", 4711, "0.1.0"), WorkerInfo("w2", "eu-2", 12, "0.1.0")]
RUNNING = Running(NOW, [session(ID), session(FAR, events=0, size=0, client="key:globex")], WORKERS)
SPENT = Spending(AT.date(), {"key:acme": 1_500_000_000, "key:globex": 250_000_000}, 120, 3, 2_000_000_000)
URL = "http://127.0.0.1:3000"
SCRAPED = Scraped(URL, parse(TEXT), parse(TEXT), None)


def drawn(frame: Frame, width: int = 80, height: int | None = None) -> str:
    console = Console(width=width, height=height, force_terminal=False)
    with console.capture() as captured:
        console.print(draw(frame, width=width, height=height))
    return captured.get()


def flat(shown: str) -> str:
    """The words, wherever a line was folded."""
    return " ".join(shown.split())


def row(shown: str, first: str) -> list[str]:
    """The words of the line that begins so."""
    [line] = [line for line in shown.splitlines() if line.startswith(first)]
    return line.split()


def test_a_frame_shows_sessions_workers_times_errors_and_spending() -> None:
    shown = drawn(Frame(AT, RUNNING, None, SPENT, [SCRAPED]))
    assert max(map(len, shown.splitlines())) <= 80
    assert "2 sessions · 1 waiting · 2 workers · 0.0131 USD reserved" in shown
    assert "today 1.75 USD of 2.00 (88%)" in shown
    assert "120 answers, 3 failed" in shown
    assert "most by key:acme 1.50, key:globex 0.2500" in shown
    assert row(shown, "eu-1:4711") == ["eu-1:4711", "0.1.0", "2", "1", "-", "-", "0.0131"]
    assert row(shown, "eu-2:12") == ["eu-2:12", "0.1.0", "0", "0", "-", "-", "0.0000"]
    assert row(shown, URL) == [URL, "3", "4", "625ms", "long", "15", "5", "5"]
    assert "errors: abandoned 3, upstream_timeout 2" in shown
    assert row(shown, "3f2b8c1e")[:3] == ["3f2b8c1e", "key:acme", "a/b"]


def test_rates_are_those_since_the_frame_before() -> None:
    earlier = RUNNING._replace(now_ms=NOW - 2000, sessions=[session(ID, events=300, size=94_400)])
    shown = drawn(Frame(AT, RUNNING, earlier))
    assert row(shown, "eu-1:4711")[4:7] == ["6", "2.0", "kB"]


def test_times_of_the_last_minute_are_said_to_be_that() -> None:
    assert "counts are since the start" in flat(drawn(Frame(AT, RUNNING, brokers=[SCRAPED])))
    assert "counts are of 60 s" in flat(drawn(Frame(AT, RUNNING, brokers=[SCRAPED._replace(seconds=60.0)])))


def test_what_is_not_known_is_said() -> None:
    silent = Scraped("http://a.example", problem="It does not answer in time.")
    shown = drawn(Frame(AT, None, brokers=[silent], problem="Redis cannot be reached (connection refused)."))
    assert "Redis cannot be reached (connection refused)." in shown
    assert row(shown, "http://a.example ")[1:] == ["?"] * 7
    assert "http://a.example: It does not answer in time." in shown


def test_a_worker_that_is_not_listed_is_silent() -> None:
    lost = RUNNING._replace(workers=[], sessions=[session(activity=Activity.OVERDUE)])
    shown = drawn(Frame(AT, lost))
    assert row(shown, "w1 (silent)")[2:4] == ["?", "1"]
    assert "1 overdue" in shown


def test_a_spending_that_is_not_known_hides_nothing_else() -> None:
    shown = drawn(Frame(AT, RUNNING, problem="Redis refuses to be read: NOPERM."))
    assert "spending of today: not known" in shown
    assert "Redis refuses to be read: NOPERM." in shown
    assert row(shown, "eu-1:4711")


HOST = "a-service-with-a-long-name-7d9f8b6c5-x2x4z"


def crowded() -> Frame:
    """A frame of long names, with more of everything than any terminal has room for."""
    workers = [WorkerInfo(f"w{n}", HOST, 4000 + n, "10.11.12rc1") for n in range(70)]
    found = [
        replace(
            session(OTHER, client=f"key:{HOST}", model=f"a/{HOST}"),
            session_id=f"{n:08x}-{OTHER[9:]}",
            worker=f"w{n % 70}",
            size=98_765_432,
            reserved=WorstCase(1, 12_345_670_000_000),
        )
        for n in range(80)
    ]
    spent = SPENT._replace(cost={f"{n} {HOST}": 12_345_670_000_000 for n in range(9)}, limit=1)
    scrape = replace(parse(TEXT), ended={("failed", f"{n} {HOST}"): 9.0 for n in range(9)})
    brokers = [Scraped(f"https://{HOST}.example:{n}", scrape, scrape, 60.0) for n in range(70)]
    brokers += [Scraped(f"https://{n}.example", problem="It is away. " * 90) for n in range(5)]
    problem = "Redis is away. " * 90
    return Frame(
        AT, Running(NOW, found, workers, complete=False, unreadable=5), None, spent, brokers, problem
    )


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 40), (200, 50)])
def test_the_whole_frame_fits_the_terminal(width: int, height: int) -> None:
    assert len(drawn(crowded(), width, 14).splitlines()) <= 14
    lines = drawn(crowded(), width, height).splitlines()
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert len([line for line in lines if "more" in line and "and " in line and "more s" not in line]) == 4


def test_a_small_terminal_shows_something_of_everything() -> None:
    many = [replace(session(OTHER), session_id=f"{n:08x}-{OTHER[9:]}") for n in range(40)]
    workers = [WorkerInfo(f"w{n}", "eu-1", 4000 + n, "0.1.0") for n in range(40)]
    shown = drawn(Frame(AT, Running(NOW, many, workers), None, SPENT, [SCRAPED]), height=24)
    assert len(shown.splitlines()) == 24
    assert row(shown, URL)
    assert row(shown, "and 35 more")
    assert row(shown, "00000003")
    assert shown.splitlines()[-1].split() == ["and", "36", "more"]


def test_rooms_are_shared_and_none_is_wasted() -> None:
    workers = [WorkerInfo(f"w{n}", "eu-1", 4000 + n, "0.1.0") for n in range(9)]
    shown = drawn(Frame(AT, RUNNING._replace(workers=workers), None, SPENT, [SCRAPED]), height=24)
    assert "more" not in shown
    assert len([line for line in shown.splitlines() if line.startswith("eu-1:")]) == 9


def test_workers_of_one_host_can_be_told_apart() -> None:
    shown = drawn(crowded(), 80, 40)
    names = [line.split()[0] for line in shown.splitlines() if line.startswith("…")]
    assert [name[-11:] for name in names[:2]] == ["-x2x4z:4000", "-x2x4z:4001"]
    [first] = [line for line in shown.splitlines() if line.startswith("00000001")]
    assert "…" in first
    assert first.split()[-2].endswith(":4001")


def test_what_others_wrote_cannot_command_the_terminal() -> None:
    bad = "a\x1b[2J\x1b]0;x\x07\u202eb\n\u2066\x9bc[red]d"
    found = Running(
        NOW,
        [session(bad, client=bad, model=bad), session(FAR, worker=bad)],
        [WorkerInfo("w1", bad, 1, bad)],
    )
    scrape = replace(parse(TEXT), ended={("failed", bad): 3.0})
    brokers = [Scraped(bad, scrape, scrape), Scraped(URL, problem=bad)]
    spent = SPENT._replace(cost={bad: 5_000_000_000})
    for frame in (Frame(AT, found, None, spent, brokers, bad), Frame(AT, None, problem=bad)):
        for size in ((300, None), (300, 60)):
            shown = drawn(frame, *size)
            assert printable(shown) == shown
            assert "[2J" in shown
            assert "c[red]d" in shown


ODD_METRICS: dict[str, dict[str, Any]] = {
    "html": {"text": "<html>"},
    "broken": {"text": TEXT.replace('code="rate', "code=")},
    "bound": {"text": TEXT.replace('le="0.5"', 'le="x"')},
    "nan": {"text": TEXT.replace("4.0", "NaN")},
    "long": {"body": bytes(LARGEST_METRICS + 1)},
    "packed": {"text": TEXT, "headers": {"Content-Encoding": "gzip"}},
    "refused": {"status": 500, "text": "no"},
}


@asynccontextmanager
async def odd_brokers() -> AsyncIterator[str]:
    """Serve odd metrics, each under a path of its name; gives the URL above them."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(**ODD_METRICS[request.match_info["name"]])

    app = web.Application()
    app.router.add_get("/{name}/metrics", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield site.name
    finally:
        await runner.cleanup()


async def test_metrics_that_cannot_be_read_are_said() -> None:
    async with odd_brokers() as url:
        found = {name: await Scrapes(f"{url}/{name}").read(None) for name in ODD_METRICS}
    assert {each.now for each in found.values()} == {None}
    cannot = "Its metrics cannot be read:"
    assert {name: each.problem.replace(url, "") for name, each in found.items()} == {
        "html": f"{cannot} they are not those of a session broker.",
        "broken": f"{cannot} a line of them is broken.",
        "bound": f"{cannot} the bound of a histogram is not a number.",
        "nan": f"{cannot} the value of broker_viewers is not a count.",
        "long": "The broker's answer is longer than 4194304 bytes.",
        "packed": "The broker at /packed cannot be reached (the connection broke).",
        "refused": "The broker answered with status 500 and no explanation.",
    }


def test_counts_after_a_restart_are_those_since_then() -> None:
    def counts(ended: int, chunks: int) -> Scrape:
        return Scrape(1, 1, {("done", ""): ended}, chunks=chunks)

    scrapes = Scrapes(URL)
    scrapes.compare(counts(10, 700), at=0.0)
    before = scrapes.compare(counts(12, 800), at=2.0)
    assert before.recent == counts(2, 100)
    again = scrapes.compare(counts(11, 60), at=4.0)
    assert (again.recent, again.seconds) == (counts(11, 60), 2.0)
    later = scrapes.compare(counts(13, 900), at=6.0)
    assert (later.recent, later.seconds) == (counts(13, 900), 4.0)


async def test_one_frame_is_printed_for_a_script(valkey_url: str) -> None:
    status, out, _ = await run("top", "--once", "--url", "http://127.0.0.1:1", env={"REDIS_URL": valkey_url})
    assert status == 1, "the metrics are not known"
    assert "0 sessions · 0 workers" in out
    assert "The broker at http://127.0.0.1:1 cannot be reached (connection refused)." in out


async def test_a_live_view_needs_a_terminal(valkey_url: str) -> None:
    told = "broker: the live view needs a terminal; --once prints one frame\n"
    assert await run("top", env={"REDIS_URL": valkey_url}) == (2, "", told)


class Terminal:
    """A terminal of 80 columns and 24 rows, and the view that runs on it."""

    def __init__(self, cwd: Path, redis_url: str) -> None:
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before: Any = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "broker", "top", "--interval", "0.5", "--url", "http://127.0.0.1:1"],
            cwd=cwd,
            env=clean_environment({"REDIS_URL": redis_url, "TERM": "xterm"}),
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            start_new_session=True,
        )
        self.shown = ""

    def until(self, words: str) -> None:
        """Read until the words have been shown."""
        while words not in self.shown:  # the time limit of a test ends this
            self.shown += os.read(self.ours, 65_536).decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["q", "Q", "ctrl-c", "sigterm"])
def test_the_view_ends_and_leaves_the_terminal_as_it_was(tmp_path: Path, valkey_url: str, way: str) -> None:
    terminal = Terminal(tmp_path, valkey_url)
    try:
        terminal.until("0 sessions")
        assert termios.tcgetattr(terminal.theirs) != terminal.before
        if way.startswith(("q", "Q")):
            os.write(terminal.ours, way.encode())
        else:
            terminal.process.send_signal(signal.SIGINT if way == "ctrl-c" else signal.SIGTERM)
        terminal.until("\x1b[?1049l")  # back from the other screen
        assert terminal.process.wait(20) == 0
        assert termios.tcgetattr(terminal.theirs) == terminal.before
        assert "Traceback" not in terminal.shown
    finally:
        terminal.close()
