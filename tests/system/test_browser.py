"""Foreign pages as their authors write them, in a real Chromium."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import aiohttp
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page

from tests.system.browser import Complaints, foreign_site, laid_cable, launched_chromium
from tests.system.chat_page import ALIVE, ECHO, LONG, PATIENCE, ROOM, reads
from tests.system.harness import RunningBroker, running_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
    context = await chromium.new_context()
    context.set_default_timeout(PATIENCE)
    yield await context.new_page()
    await context.close()


def address(site: str, name: str, base: str, question: str, model: str = ECHO) -> str:
    return f"{site}/{name}?{urlencode({'base': base, 'model': model, 'question': question})}"


async def text_of(page: Page) -> Any:
    return await page.locator("#answer").text_content()


# Foreign pages


async def test_ten_lines_on_a_foreign_page_show_a_whole_answer(page: Page, broker: RunningBroker) -> None:
    complaints = Complaints(page)
    async with foreign_site() as site:
        await page.goto(address(site, "ten_lines.html", broker.url, "Say this back to me."))
        await page.wait_for_function("window.result")
    assert await text_of(page) == "Say this back to me."
    result = await page.evaluate("window.result")
    assert result["finishReason"] == "stop"
    assert result["cost"] > 0
    assert complaints == []


async def test_ten_lines_get_the_error_of_a_failed_upstream(page: Page, broker: RunningBroker) -> None:
    async with foreign_site() as site:
        await page.goto(address(site, "ten_lines.html", broker.url, "Hello", "rehearsal/mid-stream-error"))
        await page.wait_for_function("window.failure")
    failure = await page.evaluate("window.failure")
    assert failure["final"] is True
    assert failure["code"].startswith("upstream_")
    assert await text_of(page) != ""


async def test_ten_lines_throw_the_message_of_a_refused_request(page: Page, broker: RunningBroker) -> None:
    async with foreign_site() as site, page.expect_event("pageerror") as thrown:
        await page.goto(address(site, "ten_lines.html", broker.url, "Hello", "rehearsal/plain:online"))
    async with aiohttp.ClientSession() as http:
        asked = {"model": "rehearsal/plain:online", "messages": [{"role": "user", "content": "Hello"}]}
        async with http.post(f"{broker.url}/prepare", json=asked) as refused:
            told = (await refused.json())["error"]["message"]
    assert (await thrown.value).message == told
    assert await text_of(page) == ""


async def test_ten_lines_notice_that_a_proxy_ended_the_connection(page: Page, broker: RunningBroker) -> None:
    async with foreign_site() as site, laid_cable(broker.port) as (cable, base):
        await page.goto(address(site, "ten_lines.html", base, LONG))
        await reads(page.locator("#answer"), ALIVE)
        cable.down = True
        cable.cut()
        await page.wait_for_function("window.failure || window.result")
    assert await page.evaluate("window.failure") == {"message": "The connection was lost."}
    assert await page.evaluate("window.result") is None


async def test_ten_lines_stay_connected_while_they_wait_for_a_slot(page: Page) -> None:
    one = {**ROOM, "BROKER_MAX_CONCURRENT_STREAMS": "1"}
    async with running_broker(env=one) as broker, foreign_site() as site, aiohttp.ClientSession() as other:
        asked = {"model": "rehearsal/stall", "messages": [{"role": "user", "content": "Hold the line."}]}
        async with other.post(f"{broker.url}/prepare", json=asked) as prepared:
            holding = f"{broker.url}/stream/{(await prepared.json())['sessionId']}"
        async with other.get(holding, headers={"Accept": "text/event-stream"}) as held:
            await held.content.readuntil(b"event: chunk")
            async with page.expect_response("**/stream/*"):
                await page.goto(address(site, "ten_lines.html", broker.url, "My turn yet?"))
            async with other.delete(holding):
                await page.wait_for_function("window.result || window.failure")
    assert await page.evaluate("window.failure") is None
    assert await text_of(page) == "My turn yet?"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["", "&short=yes"])
async def test_ten_lines_survive_a_cut_without_a_gap_or_a_repeat(
    page: Page, broker: RunningBroker, form: str
) -> None:
    async with foreign_site() as site, laid_cable(broker.port) as (cable, base):
        await page.goto(address(site, "ten_lines.html", base, LONG) + form)
        for word in ("word40", "word200"):
            await reads(page.locator("#answer"), word)
            cable.cut()
        await page.wait_for_function("window.result")
    assert await text_of(page) == LONG


async def test_a_page_that_never_closes_is_sent_away_after_the_end(page: Page, broker: RunningBroker) -> None:
    async with foreign_site() as site:
        await page.goto(address(site, "never_closes.html", broker.url, "Once is enough."))
        await page.wait_for_function("window.source?.readyState === EventSource.CLOSED")
    assert await text_of(page) == "Once is enough."
    assert await page.evaluate("window.ends") == 1


@pytest.mark.slow
async def test_a_page_that_mishandles_errors_still_gets_its_answer(page: Page, broker: RunningBroker) -> None:
    complaints = Complaints(page)
    async with foreign_site() as site, laid_cable(broker.port) as (cable, base):
        await page.goto(address(site, "careless.html", base, LONG))
        await reads(page.locator("#answer"), ALIVE)
        cable.cut()
        await page.wait_for_function("window.result")
    assert await text_of(page) == LONG
    assert any("SyntaxError" in complaint for complaint in complaints), "the page was to trip"
    assert "Traceback" not in broker.log()


@pytest.mark.slow
async def test_ten_lines_that_only_wait_get_their_turn(chromium: Browser) -> None:
    async with (
        running_broker(env={**ROOM, "BROKER_MAX_CONCURRENT_STREAMS": "1"}) as broker,
        foreign_site() as site,
    ):
        first, second = await chromium.new_page(), await chromium.new_page()
        await first.goto(address(site, "ten_lines.html", broker.url, LONG))
        await reads(first.locator("#answer"), ALIVE)
        await second.goto(address(site, "ten_lines.html", broker.url, "My turn yet?"))
        await second.wait_for_function("window.result", timeout=PATIENCE)
        assert await text_of(second) == "My turn yet?"
        assert await text_of(first) == LONG
