"""The browser client in a real Firefox, whose EventSource is another program than Chromium's."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlencode

import pytest
import pytest_asyncio

from tests.system.browser import foreign_site, laid_cable
from tests.system.firefox import Firefox, launched_firefox
from tests.system.harness import RunningBroker, running_broker
from tests.system.test_client import LONG, ROOM

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

UNTIL = "(async () => {{ while (!({})) await new Promise(wake => setTimeout(wake, 20)); }})()"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker() -> AsyncIterator[RunningBroker]:
    async with running_broker(env=ROOM) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def firefox() -> AsyncIterator[Firefox]:
    async with launched_firefox() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site() -> AsyncIterator[str]:
    async with foreign_site() as url:
        yield url


async def visit(firefox: Firefox, site: str, base: str) -> None:
    await firefox.goto(f"{site}/client.html?{urlencode({'base': base})}")
    await firefox.evaluate(UNTIL.format("window.ask"))


async def test_firefox_reads_text_and_events(firefox: Firefox, site: str, broker: RunningBroker) -> None:
    await visit(firefox, site, broker.url)
    assert await firefox.evaluate("read(ask('In Firefox'))") == "In Firefox"
    types = await firefox.evaluate("""(async () => {
      const types = [];
      for await (const {type} of ask("Again").events()) types.push(type);
      return types;
    })()""")
    assert set(types) == {"chunk", "done"}
    told = await firefox.evaluate("ask('Hello', {}, 'rehearsal/mid-stream-error').result.catch(told)")
    assert (told["ours"], told["code"]) == (True, "upstream_error")


async def test_firefox_stops_an_answer(firefox: Firefox, site: str, broker: RunningBroker) -> None:
    await visit(firefox, site, broker.url)
    await firefox.evaluate(f"void (window.chatting = ask('{LONG}'), window.reading = read(chatting))")
    await firefox.evaluate(UNTIL.format("window.text?.includes('word20 ')"))
    result = await firefox.evaluate("chatting.stop()")
    assert (result["finishReason"], result["model"]) == ("cancelled", "rehearsal/echo")
    assert LONG.startswith(await firefox.evaluate("reading"))


async def test_firefox_survives_a_cut_and_a_502_of_a_proxy(
    firefox: Firefox, site: str, broker: RunningBroker
) -> None:
    async with laid_cable(broker.port) as (cable, base):
        await visit(firefox, site, base)
        await firefox.evaluate(f"void (window.chatting = ask('{LONG}'), window.reading = read(chatting))")
        await firefox.evaluate(UNTIL.format("window.text?.includes('word40 ')"))
        cable.cut()
        await firefox.evaluate(UNTIL.format("window.text.includes('word100 ')"))
        cable.down = True
        cable.cut()
        await cable.refused.wait()
        await firefox.evaluate(UNTIL.format("window.chatting.state === 'reconnecting'"))
        cable.down = False
        assert await firefox.evaluate("reading") == LONG
