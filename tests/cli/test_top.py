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
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from broker.cli.scrape import parse
from broker.cli.top_frame import Frame, Scraped, Spending, draw
from broker.store.running import Activity, Running
from broker.store.workers import WorkerInfo
from tests.cli.fake_broker import run
from tests.cli.test_scrape import TEXT
from tests.cli.test_sessions import FAR, ID, NOW, OTHER, session
from tests.system.harness import clean_environment

if TYPE_CHECKING:
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
        console.print(draw(frame, console=console if height is not None else None))
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
    silent = Scraped(
        "http://a.example", problem="It does not answer in time. Its times and errors are not known."
    )
    shown = drawn(Frame(AT, None, brokers=[silent], problem="The session store cannot be reached right now."))
    assert "Redis: The session store cannot be reached right now." in shown
    assert row(shown, "http://a.example ")[1:] == ["?"] * 7
    assert "http://a.example: It does not answer in time." in shown


def test_a_worker_that_is_not_listed_is_silent() -> None:
    lost = RUNNING._replace(workers=[], sessions=[session(activity=Activity.OVERDUE)])
    shown = drawn(Frame(AT, lost))
    assert row(shown, "w1 (silent)")[2:4] == ["?", "1"]
    assert "1 overdue" in shown


def test_a_low_terminal_shows_what_fits_and_how_many_are_left() -> None:
    many = [replace(session(OTHER), session_id=f"{n:08x}-{OTHER[9:]}") for n in range(40)]
    shown = drawn(Frame(AT, RUNNING._replace(sessions=many), None, SPENT, [SCRAPED]), height=24)
    assert len(shown.splitlines()) <= 24
    assert "more" in shown.splitlines()[-1]


async def test_one_frame_is_printed_for_a_script(valkey_url: str) -> None:
    status, out, _ = await run("top", "--once", "--url", "http://127.0.0.1:1", env={"REDIS_URL": valkey_url})
    assert status == 1, "the metrics are not known"
    assert "0 sessions · 0 workers" in out
    assert "cannot be reached (connection refused). Its times and errors are not known." in out


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
