"""The page at `/` in its main states: screenshots in `.screenshots`, the rules of axe, sizes and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.system.browser import Complaints, launched_chromium
from tests.system.chat_page import ECHO, PATIENCE, ROOM, ask, idle, reads, ready
from tests.system.harness import RunningBroker, running_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

SCREENSHOTS = Path(__file__).parents[2] / ".screenshots"
WIDTHS = {375: 667, 768: 1024, 1280: 800}
MOST_BYTES = 250_000
ANSWER = """\
A browser reconnects by itself, so the broker only has to know **where** it was:

1. Each event has an `id`.
2. The browser sends the last one it saw.

```js
const source = new EventSource("/stream/42");
source.addEventListener("chunk", (event) => show(event.data));
```

| lost | seen by the reader |
|------|-------------------:|
| one connection | nothing |
| a restart | a pause |
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker() -> AsyncIterator[RunningBroker]:
    async with running_broker(env=ROOM) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with launched_chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="module")
async def page(chromium: Browser) -> AsyncIterator[Page]:
    context = await chromium.new_context(bypass_csp=True)  # for axe, which is evaluated in the page
    context.set_default_timeout(PATIENCE)
    yield await context.new_page()
    await context.close()


async def look(page: Page, state: str, scheme: str) -> None:
    """Take a screenshot at each width, and have no width scroll sideways."""
    for width, height in WIDTHS.items():
        await page.set_viewport_size({"width": width, "height": height})
        assert await page.evaluate("() => document.documentElement.scrollWidth") == width, (state, width)
        await page.screenshot(path=SCREENSHOTS / f"{state}-{width}-{scheme}.png")


async def findings(page: Page) -> list[str]:
    found = await page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    return [f"{each['id']}: {node['html'][:150]}" for each in found["violations"] for node in each["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_main_states_have_no_finding_of_axe(
    page: Page, broker: RunningBroker, axe_core: str, scheme: Any
) -> None:
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    await page.goto(broker.url)
    await ready(page)
    await expect(page.locator("#usage")).not_to_be_empty()
    await page.evaluate(axe_core)

    async def state(name: str) -> None:
        await look(page, name, scheme)
        assert await findings(page) == [], name

    await state("welcome")
    await page.evaluate(FILL, [1, "What does a reader notice when the connection is lost?", ANSWER])
    await page.goto(f"{broker.url}/#many")  # no reload, so that axe stays
    await expect(page.locator(".hljs-string").first).to_be_attached()
    await state("answer")
    turn = await ask(page, "rehearsal/mid-stream-error", "And if the model breaks off?")
    await idle(page)
    await expect(turn.locator(".act")).to_be_visible()
    await state("problem")
    turn = await ask(page, "rehearsal/reasoning", "Think first.")
    await reads(turn.locator(".thoughts"), "What could be misread?")
    await state("reasoning")
    await page.keyboard.press("Escape")
    await idle(page)
    await page.keyboard.press("Control+k")
    await state("models")
    await page.keyboard.press("Escape")
    await page.get_by_role("button", name="Settings").click()
    await state("settings")
    await page.keyboard.press("Escape")
    await page.set_viewport_size({"width": 375, "height": 667})
    await page.get_by_role("button", name="Conversations").click()
    await expect(page.locator("#list li")).to_have_count(1)
    await page.screenshot(path=SCREENSHOTS / f"conversations-375-{scheme}.png")
    assert await findings(page) == []


async def test_the_page_fits_320_pixels(page: Page, broker: RunningBroker) -> None:
    await page.set_viewport_size({"width": 320, "height": 568})
    await page.goto(broker.url)
    await ready(page)
    word = "Donaudampfschiffahrtselektrizitätenhauptbetriebswerkbauunterbeamten" * 3
    turn = await ask(page, ECHO, f"{word}\n\n| {word} | b |\n|---|---|\n| c | d |\n\n```\n{word}\n```")
    await idle(page)
    await reads(turn.locator(".account"), "$")
    assert await page.evaluate("() => document.documentElement.scrollWidth") == 320


async def test_the_composer_takes_a_sixth_of_a_phone_and_grows(page: Page, broker: RunningBroker) -> None:
    await page.set_viewport_size({"width": 375, "height": 667})
    await page.goto(broker.url)
    await ready(page)
    composer = page.locator("#stage > footer")
    before = await composer.bounding_box()
    assert before
    assert before["height"] <= 667 / 6
    await page.get_by_role("textbox", name="Message").fill("One\nTwo\nThree")
    after = await composer.bounding_box()
    assert after
    assert after["height"] > before["height"] + 30


async def test_text_from_right_to_left_is_set_so(page: Page, broker: RunningBroker) -> None:
    await page.goto(broker.url)
    await ready(page)
    turn = await ask(page, ECHO, "שלום עולם\n\n- אחת\n\nHello")
    await idle(page)
    directions = await turn.locator(".answer > *").evaluate_all(
        "(all) => all.map((element) => getComputedStyle(element).direction)"
    )
    assert directions == ["rtl", "rtl", "ltr"]


async def test_the_whole_page_is_small_and_from_one_place(page: Page, broker: RunningBroker) -> None:
    complaints = Complaints(page)
    await page.goto(broker.url)
    await ready(page)
    turn = await ask(page, ECHO, '```js\nlet a = "b";\n```')
    await expect(turn.locator(".hljs-string")).to_be_attached(timeout=PATIENCE)
    await idle(page)
    loaded = await page.evaluate(
        """() => performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation"))
          .map((entry) => [entry.name, entry.transferSize])"""
    )
    assert [name for name, _ in loaded if not name.startswith(broker.url)] == []
    assert sum(size for _, size in loaded) < MOST_BYTES
    assert complaints == []


async def test_a_long_conversation_is_typed_in_without_delay(page: Page, broker: RunningBroker) -> None:
    """A key in a conversation of 200 turns costs about what it costs in an empty one."""
    await page.goto(broker.url)
    await ready(page)
    times = []
    for turns in (0, 200):
        if turns:
            await page.evaluate(FILL, [turns, "Question", ANSWER])
            await page.goto(f"{broker.url}/#many")
            await page.reload()
            await expect(page.locator("article")).to_have_count(turns, timeout=PATIENCE)
        await page.locator("#text").focus()
        cdp = await page.context.new_cdp_session(page)
        await cdp.send("Performance.enable", {"timeDomain": "threadTicks"})
        before = await task_seconds(cdp)
        await page.keyboard.type("The quick brown fox jumps.")
        times.append(await task_seconds(cdp) - before)
    empty, many = times
    assert many < empty + 26 * 0.016, times  # a frame a key


FILL = """async ([turns, question, text]) => {
  const { keep } = await import("/store.js");
  const answers = Array.from({ length: turns }, (_, n) => ({
    id: `answer-${n}`, conversation: "many", turn: `turn-${n}`, question, model: "rehearsal/plain",
    at: n, picked: n, sessionId: "none", cursor: "", text, reasoning: "", tools: {}, sources: [], images: [],
    result: {
      finishReason: "stop", usage: { prompt_tokens: 212, completion_tokens: 104 }, cost: 0.00025,
      ttftMs: 412, totalMs: 2500,
    },
  }));
  await keep({ id: "many", title: question, created: 1, updated: 1 }, answers);
}"""


async def task_seconds(cdp: Any) -> float:
    """Return the processor seconds that tasks of the page's main thread have taken."""
    metrics = (await cdp.send("Performance.getMetrics"))["metrics"]
    return float(next(each["value"] for each in metrics if each["name"] == "TaskDuration"))


async def test_every_sentence_of_the_document_is_in_the_table(page: Page, broker: RunningBroker) -> None:
    await page.goto(broker.url)
    await ready(page)
    missing = await page.evaluate(
        """() => [...document.querySelectorAll("[data-say], [data-label], [data-hint]")]
          .filter((element) => [element.textContent, element.ariaLabel, element.placeholder].includes("undefined"))
          .map((element) => element.outerHTML)"""
    )
    assert missing == []
