"""The shop of the README, run as its readers would: with its own login, a chat under its prefix, and stored answers."""

from __future__ import annotations

import re
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import pytest_asyncio
from playwright.async_api import expect

from broker.rehearsal.app import rehearsal_beside
from tests.system.browser import README, Complaints, launched_chromium
from tests.system.chat_page import ask
from tests.system.harness import RunningBroker, eventually, free_port, running_program

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PATIENCE = 60_000
QUESTION = {"model": "rehearsal/echo", "messages": [{"role": "user", "content": "Two apples."}]}
LOGIN: dict[str, str | float | bool] = {"name": "anna", "password": "apples"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shop")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(directory: Path) -> AsyncIterator[RunningBroker]:
    """The README's program, with an upstream that costs nothing."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    assert program.count("port=8080") == 1
    port = free_port()
    (directory / "shop.py").write_text(program.replace("port=8080", f"port={port}"))
    async with rehearsal_beside() as upstream:
        env = {
            "SHOP_SECRET": "nobody knows",
            "OPENROUTER_API_KEY": "sk-test",
            "BROKER_UPSTREAM_URL": upstream,
        }
        async with running_program(["shop.py"], port, env=env, cwd=directory, ready="/") as running:
            yield running


@pytest_asyncio.fixture(loop_scope="module")
async def visitor() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        cookie_jar=aiohttp.CookieJar(unsafe=True), timeout=aiohttp.ClientTimeout(20)
    ) as http:
        yield http


def answers(directory: Path) -> list[Any]:
    if not (directory / "answers.db").exists():
        return []
    with closing(sqlite3.connect(directory / "answers.db")) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchall():
            return []  # the file is made before its table
        return database.execute("SELECT customer, state, text, cost FROM answers").fetchall()


async def test_a_customer_asks_and_the_shop_keeps_the_answer(
    shop: RunningBroker, visitor: aiohttp.ClientSession, directory: Path
) -> None:
    async with visitor.post(f"{shop.url}/ai/prepare", json=QUESTION) as refused:
        assert refused.status == 401
        assert (await refused.json())["error"] == {"code": "unauthorized", "message": "Log in first."}
    for wrong in ({}, {"name": "ben"}, {"name": "anna", "password": ""}):
        async with visitor.post(f"{shop.url}/login", data=wrong) as refused:
            assert refused.status == 403
    async with visitor.post(f"{shop.url}/login", data=LOGIN) as welcome:
        assert "Ask our assistant" in await welcome.text()
    async with visitor.post(f"{shop.url}/ai/prepare", json=QUESTION) as prepared:
        where = prepared.headers["Location"]
    async with visitor.get(shop.url + where, headers={"Accept": "text/event-stream"}) as stream:
        assert "event: done" in await stream.text()
    await eventually(lambda: answers(directory))
    ((customer, state, text, cost),) = answers(directory)
    assert (customer, state, text) == ("anna", "done", "Two apples.")
    assert cost > 0
    async with visitor.get(f"{shop.url}/ai/usage") as usage:
        assert (await usage.json())["requests"] == 1
    for cookie in ("anna", "anna.00", "anna.\u00e9", ".", ""):
        async with aiohttp.ClientSession(cookies={"shop": cookie}) as forger:
            async with forger.get(f"{shop.url}/ai/usage") as refused:
                assert refused.status == 401


async def test_the_chat_page_works_under_the_prefix(shop: RunningBroker, directory: Path) -> None:
    async with launched_chromium() as chromium:
        page = await chromium.new_page()
        page.set_default_timeout(PATIENCE)
        await page.context.request.post(f"{shop.url}/login", form=LOGIN)
        complaints = Complaints(page)
        await page.goto(f"{shop.url}/ai")
        await ask(page, "rehearsal/echo", "Three pears, please.")
        await expect(page.locator("article .answer").last).to_have_text(
            "Three pears, please.", timeout=PATIENCE
        )
        await page.reload()
        await expect(page.locator("article .answer").last).to_have_text(
            "Three pears, please.", timeout=PATIENCE
        )
        assert complaints == []
    await eventually(lambda: any(text == "Three pears, please." for _, _, text, _ in answers(directory)))


async def test_a_stopped_shop_lets_answers_end(
    shop: RunningBroker, visitor: aiohttp.ClientSession, directory: Path
) -> None:
    long = " ".join(f"word{n}" for n in range(150))
    async with visitor.post(f"{shop.url}/login", data=LOGIN):
        pass
    asked = {**QUESTION, "messages": [{"role": "user", "content": long}]}
    async with visitor.post(f"{shop.url}/ai/prepare", json=asked) as prepared:
        where = prepared.headers["Location"]
    async with visitor.get(shop.url + where, headers={"Accept": "text/event-stream"}) as stream:
        await stream.content.readuntil(b"event: chunk")
        shop.process.send_signal(signal.SIGTERM)
        assert "event: done" in await stream.text()
    assert await shop.ended() == 0
    assert ("anna", "done", long) in [answer[:3] for answer in answers(directory)]
