"""The pictures of the README: `broker top`, `broker usage` and `broker sessions`, drawn from an example.

`python -m tests.pictures` draws them again, after a change of what the commands show. A test compares them with what
the commands show now.
"""

from __future__ import annotations

import datetime as dt
import io
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI

from broker.cli import sessions, usage
from broker.cli.scrape import Scrape
from broker.cli.top_frame import Frame, Scraped, Spending, draw
from broker.core.accounts import WorstCase
from broker.store.running import Activity, Running, RunningSession
from broker.store.usage_ledger import METRICS, UsageRow
from broker.store.workers import WorkerInfo

if TYPE_CHECKING:
    from rich.console import RenderableType

# Without the fonts of the library's own form, which a browser would fetch from another site.
_FORMAT = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)

FOLDER = Path(__file__).parent.parent / "deploy" / "pictures"

WIDTH = 100
AT = dt.datetime(2026, 11, 20, 14, 3, 11, tzinfo=dt.UTC)
NOW_MS = round(AT.timestamp() * 1000)
FIRST_DAY = AT.date().replace(day=1)

WORKERS = (
    WorkerInfo("6b1f0c5e9d2a4471", "eu-1", 4711, "0.1.0"),
    WorkerInfo("a40d27c1be8852f3", "eu-1", 4712, "0.1.0"),
    WorkerInfo("f19c83d7045e6ab0", "eu-2", 911, "0.1.0"),
)
MODELS = (
    "meta-llama/llama-4-maverick",
    "mistralai/mistral-large",
    "deepseek/deepseek-chat",
    "qwen/qwen3-max",
)
CLIENTS = ("key:support", "key:editor", "key:search", "sub:5f3c9e12ab34cd56", "addr:9f86d081884c7d65")


def pictures() -> dict[str, str]:
    """Return the SVG of each picture by the name of its file."""
    chosen = running()
    ids = sessions.shown_ids(chosen.sessions)
    rows = usage.summed(days(), "day")
    by_client = usage.summed(days(), "client")
    return {
        "top.svg": _svg("broker top", draw(frame(), width=WIDTH, height=26)),
        "sessions.svg": _svg("broker sessions", sessions.table(chosen.sessions[:10], ids, chosen)),
        "usage.svg": _svg(
            "broker usage --by day", usage.fitted(f"Usage in {AT:%Y-%m} (UTC)", "day", rows, WIDTH)
        ),
        "clients.svg": _svg(
            f"broker usage --month {AT:%Y-%m}",
            usage.fitted(f"Usage in {AT:%Y-%m} (UTC)", "client", by_client, WIDTH),
        ),
    }


def frame() -> Frame:
    """Return a frame of a service with three workers on two machines, one of which shows no metrics."""
    scrape = Scrape(
        running=9,
        viewers=11,
        ended={
            ("done", ""): 412.0,
            ("failed", "upstream_rate_limited"): 6.0,
            ("abandoned", "abandoned"): 3.0,
        },
        refused={"rate_limited": 17.0},
        chunks=52_000.0,
        first_chunk={0.25: 31.0, 0.5: 180.0, 1.0: 333.0, 2.0: 398.0, 5.0: 420.0, float("inf"): 421.0},
    )
    now = running()
    before = now._replace(
        now_ms=now.now_ms - 2000,
        sessions=[_earlier(each) for each in now.sessions],
    )
    spending = Spending(
        AT.date(),
        {client: (len(CLIENTS) - n) ** 3 * 61_300_000 for n, client in enumerate(CLIENTS)},
        requests=4_812,
        failed=37,
        limit=20_000_000_000,
    )
    scraped = [
        Scraped("https://eu-1.example", scrape, scrape, 60.0),
        Scraped(
            "https://eu-2.example",
            problem="It asks for BROKER_METRICS_TOKEN.",
        ),
    ]
    return Frame(AT, now, before, spending, scraped)


def running() -> Running:
    """Return the running sessions of the example."""
    chance = random.Random(20)
    found = []
    for n in range(14):
        events = 0 if n in {4, 11} else chance.randrange(20, 900)
        found.append(
            RunningSession(
                session_id=f"{chance.getrandbits(32):08x}-7425-40de-944b-e07fc1f90ae7",
                client=chance.choice(CLIENTS),
                model=chance.choice(MODELS),
                activity=Activity.STOPPING if n == 2 else Activity.RUNNING,
                since_ms=NOW_MS - round(120_000 / (n + 1)) - 900,
                worker=chance.choice(WORKERS).id,
                events=events,
                size=events * chance.randrange(260, 340),
                reserved=WorstCase(4096, chance.randrange(2, 90) * 1_000_000),
            )
        )
    return Running(NOW_MS, found, list(WORKERS))


def _earlier(session: RunningSession) -> RunningSession:
    chunks = min(session.events, 60)
    return RunningSession(
        session.session_id,
        session.client,
        session.model,
        session.activity,
        session.since_ms,
        session.worker,
        session.events - chunks,
        max(0, session.size - chunks * 300),
        session.reserved,
    )


def days() -> dict[dt.date, list[UsageRow]]:
    """Return the usage ledger of the month of the example."""
    chance = random.Random(11)
    ledger: dict[dt.date, list[UsageRow]] = {}
    for n in range(AT.day):
        day = FIRST_DAY + dt.timedelta(days=n)
        busy = 0.35 if day.isoweekday() > 5 else 1.0
        ledger[day] = [
            UsageRow(client, chance.choice(MODELS), _counts(chance, busy / (at + 1)))
            for at, client in enumerate(CLIENTS)
        ]
    return ledger


def _counts(chance: random.Random, share: float) -> dict[str, int]:
    requests = round(chance.randrange(300, 620) * share)
    prompt, completion = requests * chance.randrange(600, 900), requests * chance.randrange(220, 380)
    return {
        **dict.fromkeys(METRICS, 0),
        "requests": requests,
        "prompt": prompt,
        "completion": completion,
        "cached": prompt // 5,
        "reasoning": completion // 7,
        "cost": prompt * 380 + completion * 1_140,
        "estimated": requests // 200,
        "cancelled": requests // 40,
        "failed": requests // 110,
    }


def _svg(title: str, shown: RenderableType) -> str:
    console = Console(
        width=WIDTH, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(shown)
    name = title.replace(" ", "-")  # of the styles in the file, which would be random
    return console.export_svg(title=title, theme=MONOKAI, unique_id=name, code_format=_FORMAT)


def main() -> None:
    """Write the pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, svg in pictures().items():
        (FOLDER / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
