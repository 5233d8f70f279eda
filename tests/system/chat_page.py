"""How the tests use the page at `/`: what a person does, and where a person looks."""

from __future__ import annotations

import re

from playwright.async_api import Locator, Page, expect

PATIENCE = 60_000
expect.set_options(timeout=PATIENCE)
ROOM = {"BROKER_RATE_LIMIT": "1000/minute", "BROKER_MAX_CONCURRENT_STREAMS": "50", "BROKER_RETRY_MS": "500"}
ECHO = "rehearsal/echo"
LONG = " ".join(f"word{n}" for n in range(500))  # the echo of it takes about five seconds
ALIVE = re.compile(r"word40\b")  # by then the answer is under way, and far from its end


async def choose(chat: Page, model: str) -> None:
    """Choose a model for the next message, by a click in the list."""
    await chat.locator("#model").click()
    await chat.locator(f'.option[data-id="{model}"]').click()


async def ask(chat: Page, model: str, question: str) -> Locator:
    """Send a question; return the part of the page where its answer comes."""
    await choose(chat, model)
    await chat.get_by_role("textbox", name="Message").fill(question)
    turns = await chat.locator("article").count()
    await chat.get_by_role("button", name="Send").click()
    turn = chat.locator("article").nth(turns)
    await expect(turn).to_be_attached(timeout=PATIENCE)
    return turn


async def idle(chat: Page) -> None:
    """Wait until no answer is under way."""
    await expect(chat.locator("article.running")).to_have_count(0, timeout=PATIENCE)
    await expect(chat.get_by_role("button", name="Send")).to_be_visible(timeout=PATIENCE)


async def reads(part: Locator, text: str | re.Pattern[str]) -> None:
    await expect(part).to_contain_text(text, timeout=PATIENCE)


async def ready(chat: Page) -> None:
    """Wait until the page has its conversation and its models."""
    await chat.locator("html[data-ready]").wait_for(state="attached", timeout=PATIENCE)
