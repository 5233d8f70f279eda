"""Measure the page at `/` in Chromium: its size, its start, a minute of Markdown at 200 chunks a second, and typing.

    python -m tests.benchmarks.page [--seconds 60] [--rate 200]

A real broker and an upstream of this process. Times of the main thread are processor times, so that what else runs on
the machine does not count. Needs Debian's `chromium`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from contextlib import asynccontextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

from aiohttp import web

from broker.rehearsal.text import PASSAGES
from tests.system.browser import launched_chromium
from tests.system.chat_page import PATIENCE, choose, ready
from tests.system.harness import running_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import CDPSession, Page

MODEL = "bench/markdown"
LETTERS = 5
"""Letters of a chunk: about a token."""

LONG_TASK = 50.0
"""Milliseconds from which a task delays what a person does."""

SLICE = 3.0
"""Seconds that are traced at once."""

SLICE_READ = 30.0
"""Seconds in which the trace of a slice must be there."""

TRACED = {
    "includedCategories": ["disabled-by-default-devtools.timeline"],
    "recordMode": "recordAsMuchAsPossible",
}
CODE = """
```python
async def read(stream: Stream) -> list[str]:
    # Reads until the stream ends.
    return [chunk.text async for chunk in stream if chunk.text]
```

| name | count | share |
|------|------:|------:|
| one  |    12 |  0.25 |
| two  |    36 |  0.75 |
"""


@asynccontextmanager
async def markdown_upstream(rate: float, seconds: float) -> AsyncIterator[str]:
    """An upstream that writes Markdown at so many chunks a second, for so many seconds; gives its URL."""
    text = "\n\n".join([*PASSAGES, CODE, ""])
    pieces = [text[start : start + LETTERS] for start in range(0, len(text), LETTERS)]

    async def models(_: web.Request) -> web.Response:
        price = {"prompt": "0.000001", "completion": "0.000001"}
        return web.json_response({"data": [{"id": MODEL, "context_length": 1_000_000, "pricing": price}]})

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number, piece in zip(range(round(rate * seconds)), cycle(pieces), strict=False):
            await asyncio.sleep(began + number / rate - loop.time())
            await response.write(_event({"choices": [{"index": 0, "delta": {"content": piece}}]}))
        await response.write(_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_get("/models", models)
    app.router.add_post("/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps({"object": "chat.completion.chunk", **chunk}).encode() + b"\n\n"


class Trace:
    """The tasks of a page, traced in slices: the trace of a minute is too large to be read at once.

    Attributes:
        tasks: the processor time of each task that was traced, in milliseconds.
    """

    def __init__(self, cdp: CDPSession) -> None:
        self.tasks: list[float] = []
        self._cdp = cdp
        self._complete = asyncio.Event()
        cdp.on("Tracing.dataCollected", self._collect)
        cdp.on("Tracing.tracingComplete", lambda _: self._complete.set())

    async def run(self, until: float) -> None:
        """Trace until this time of the loop."""
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            self._complete.clear()
            await self._cdp.send("Tracing.start", {"traceConfig": TRACED})
            await asyncio.sleep(min(SLICE, until - loop.time()))
            await self._cdp.send("Tracing.end")
            await asyncio.wait_for(self._complete.wait(), SLICE_READ)

    def _collect(self, found: dict[str, Any]) -> None:
        self.tasks += [event["tdur"] / 1000 for event in found["value"] if _is_task(event)]


def _is_task(event: dict[str, Any]) -> bool:
    return event.get("name") == "RunTask" and "tdur" in event


async def metric(cdp: CDPSession, name: str) -> float:
    """Return a value of the page's main thread: processor seconds, or bytes."""
    metrics = (await cdp.send("Performance.getMetrics"))["metrics"]
    return float(next(each["value"] for each in metrics if each["name"] == name))


async def heap(cdp: CDPSession) -> float:
    """Return the megabytes of JavaScript objects that are in use."""
    await cdp.send("HeapProfiler.collectGarbage")
    return await metric(cdp, "JSHeapUsedSize") / 1e6


async def opened(page: Page, url: str) -> None:
    """Open the page with nothing cached, and print what that takes."""
    await page.goto(url)
    await ready(page)
    size, interactive = await page.evaluate(
        """() => [
          performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation"))
            .reduce((sum, entry) => sum + entry.transferSize, 0),
          performance.getEntriesByType("navigation")[0].domInteractive,
        ]"""
    )
    print(f"over the wire: {size / 1000:.0f} kB; interactive after {interactive:.0f} ms")


async def streamed(page: Page, seconds: float) -> None:
    """Let an answer of so many seconds come, and print what it costs."""
    cdp = await page.context.new_cdp_session(page)
    await cdp.send("Performance.enable", {"timeDomain": "threadTicks"})
    await choose(page, MODEL)
    await page.get_by_role("textbox", name="Message").fill("Write.")
    await page.get_by_role("button", name="Send").click()
    await page.locator(".answer p").first.wait_for()
    loop, trace = asyncio.get_running_loop(), Trace(cdp)
    began, busy = loop.time(), await metric(cdp, "TaskDuration")
    await trace.run(began + seconds / 6)
    early = await heap(cdp)
    await trace.run(began + seconds)
    await page.locator("article.running").wait_for(state="detached")
    share = (await metric(cdp, "TaskDuration") - busy) / (loop.time() - began)
    late = await heap(cdp)
    tasks = sorted(trace.tasks, reverse=True)
    long = sum(task > LONG_TASK for task in tasks)
    letters = await page.locator(".answer").evaluate("element => element.textContent.length")
    print(
        f"main thread: {share:.1%} of a core; longest tasks {', '.join(f'{task:.0f}' for task in tasks[:5])} ms;"
    )
    print(f"{long} of {len(tasks)} over {LONG_TASK:.0f} ms; {letters} letters shown")
    print(f"heap: {early:.1f} MB after a sixth of the time, {late:.1f} MB at the end")


async def measure(rate: float, seconds: float) -> None:
    """Measure and print."""
    async with markdown_upstream(rate, seconds) as upstream, launched_chromium() as chromium:
        env = {"BROKER_UPSTREAM_URL": upstream, "BROKER_MAX_OUTPUT_TOKENS": "100000"}
        async with running_broker(rehearsal=False, env=env) as broker:
            page = await chromium.new_page()
            page.set_default_timeout(PATIENCE)
            await opened(page, broker.url)
            await streamed(page, seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="seconds that the answer takes")
    parser.add_argument("--rate", type=float, default=200, help="chunks a second")
    wanted = parser.parse_args()
    asyncio.run(measure(wanted.rate, wanted.seconds))


if __name__ == "__main__":
    main()
