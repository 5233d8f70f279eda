"""The client's package in projects of Vite: the hook for React and the transport for the AI SDK, in a real Chromium.

The projects are the recipes, and a test page with a component that can be unmounted.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Request, expect

from tests.system.browser import PAGES, foreign_site, launched_chromium
from tests.system.harness import RunningBroker, running_broker
from tests.system.npm import ran
from tests.system.test_client import LONG, PATIENCE, ROOM, Requests, is_stop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
PROJECTS = {"react": RECIPES / "react", "ai-sdk": RECIPES / "ai-sdk", "hook": PAGES / "hook"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker() -> AsyncIterator[RunningBroker]:
    async with running_broker(env={**ROOM, "BROKER_DEFAULT_MODEL": "rehearsal/echo"}) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with launched_chromium() as browser:
        yield browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(project: Path, broker: RunningBroker) -> AsyncIterator[str]:
    """The projects, checked by TypeScript and built by Vite for this broker."""
    programs = project.parent / "node_modules" / ".bin"
    env = f"VITE_BROKER={broker.url}"
    for name, source in PROJECTS.items():
        shutil.copytree(source, project / name)
        build = ("build", "--base", "./", "--logLevel", "warn")
        status, told = await ran("env", env, str(programs / "vite"), *build, cwd=project / name)
        assert status == 0, told
    options = json.loads((RECIPES / "react" / "tsconfig.json").read_text())
    (project / "tsconfig.json").write_text(json.dumps({**options, "include": ["*/*.tsx"]}))
    assert await ran(str(programs / "tsc"), "-p", str(project)) == (0, "")
    async with foreign_site(project) as url:
        yield url


@pytest_asyncio.fixture(loop_scope="module")
async def page(chromium: Browser) -> AsyncIterator[Page]:
    """A page without exceptions: neither uncaught ones nor rejections that nobody handles."""
    context = await chromium.new_context()
    context.set_default_timeout(PATIENCE)
    page = await context.new_page()
    exceptions: list[str] = []
    page.on("pageerror", lambda error: exceptions.append(error.message))
    yield page
    await context.close()
    assert exceptions == []


async def visit(page: Page, site: str, name: str, model: str = "") -> None:
    await page.goto(f"{site}/{name}/dist/index.html" + (f"?model=rehearsal/{model}" if model else ""))


async def ask(page: Page, question: str) -> None:
    await page.fill("input", question)
    await page.click("text=Send")


BOTH = pytest.mark.parametrize("recipe", ["react", "ai-sdk"])


@BOTH
async def test_a_question_is_answered_once_and_its_cost_is_shown(page: Page, site: str, recipe: str) -> None:
    requests = Requests(page)
    await visit(page, site, recipe)
    await ask(page, "Say this back to me.")
    await expect(page.locator(".assistant small")).to_contain_text("USD")
    await expect(page.locator(".assistant p")).to_have_text("Say this back to me.")
    await ask(page, "And this.")
    await expect(page.locator(".assistant p").nth(1)).to_have_text("And this.")
    await expect(page.locator("[role=status]")).to_have_text("")
    assert requests == ["POST /prepare", "GET /stream"] * 2


@BOTH
async def test_a_click_stops_the_answer(page: Page, site: str, recipe: str) -> None:
    await visit(page, site, recipe, "long")
    await ask(page, "Tell me everything")
    await page.wait_for_function("document.querySelector('.assistant p')?.textContent.length > 50")
    async with page.expect_response(is_stop) as stopped:
        await page.click("text=Stop")
    assert (await stopped.value).status == 202
    await expect(page.locator("[role=status]")).to_have_text("")
    await expect(page.locator("[role=alert]")).to_have_count(0)
    assert await page.locator(".assistant p").count() == 1


@BOTH
async def test_a_reload_loses_nothing_of_a_conversation(page: Page, site: str, recipe: str) -> None:
    requests = Requests(page)
    await visit(page, site, recipe)
    await ask(page, LONG)
    await page.wait_for_function("document.querySelector('.assistant')?.textContent.includes('word40 ')")
    await page.reload()
    await expect(page.locator(".assistant small")).to_contain_text("USD")
    await expect(page.locator(".assistant p")).to_have_text(LONG)
    await expect(page.locator(".user p")).to_have_text(LONG)
    assert requests == ["POST /prepare", "GET /stream", "GET /stream"]
    await page.reload()
    await expect(page.locator("article")).to_have_count(2)
    assert len(requests) == 3


@BOTH
async def test_an_error_is_shown_and_the_question_asked_again(page: Page, site: str, recipe: str) -> None:
    requests = Requests(page)
    await visit(page, site, recipe, "payment-required")
    await ask(page, "Hello")
    await expect(page.locator("[role=alert]")).to_be_visible()
    async with page.expect_request("**/prepare"):
        await page.click("text=Again")
    await expect(page.locator("[role=alert]")).to_be_visible()
    assert requests == ["POST /prepare", "GET /stream"] * 2


@BOTH
async def test_thoughts_come_before_the_text(page: Page, site: str, recipe: str) -> None:
    await visit(page, site, recipe, "reasoning")
    await ask(page, "Think first")
    thoughts, text = page.locator(".assistant details"), page.locator(".assistant p")
    await expect(text).to_contain_text("Streams rarely break")
    assert await thoughts.count() == await text.count() == 1
    assert len(await thoughts.text_content() or "") > 20


async def test_the_ai_sdk_shows_sources(page: Page, site: str) -> None:
    await visit(page, site, "ai-sdk", "annotations")
    await ask(page, "Who says so?")
    await expect(page.locator(".assistant a")).to_have_text(
        ["Streams for the patient", "Errors & how to say them"]
    )


async def test_the_ai_sdk_calls_tools_and_sends_their_results(page: Page, site: str) -> None:
    bodies: list[Any] = []

    def sent(request: Request) -> None:
        if request.method == "POST":
            bodies.append(request.post_data_json)

    page.on("request", sent)
    await visit(page, site, "ai-sdk", "tools")
    await ask(page, "What time is it?")
    await expect(page.locator(".assistant small")).to_contain_text("USD")
    await expect(page.locator(".assistant p")).to_have_count(1)
    assert await page.locator("article.assistant").count() == 1
    calls = await page.locator(".assistant code").all_inner_texts()
    assert calls
    assert all("tool-local_time" in call and "output-available" in call for call in calls)
    assert len(bodies) == 2
    messages = bodies[1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", *["tool"] * len(calls)]
    assert [call["id"] for call in messages[1]["tool_calls"]] == [
        each["tool_call_id"] for each in messages[2:]
    ]


# A component


async def mount(page: Page, site: str, question: str, options: str = "{}") -> None:
    await visit(page, site, "hook")
    await page.wait_for_function("!!window.mount")
    await page.evaluate(f"question => mount(question, {options})", question)


async def test_an_effect_that_asks_twice_prepares_once(page: Page, site: str) -> None:
    requests = Requests(page)
    await mount(page, site, "Only once")
    await page.wait_for_function("chat.state === 'ended'")
    assert await page.evaluate("chat.messages.map(({content}) => content)") == ["Only once", "Only once"]
    assert requests == ["POST /prepare", "GET /stream"]


async def test_a_component_that_is_unmounted_stops_its_answer(page: Page, site: str) -> None:
    await mount(page, site, LONG)
    await page.wait_for_function("chat.state === 'streaming'")
    async with page.expect_response(is_stop) as stopped:
        await page.evaluate("unmount()")
    assert (await stopped.value).status == 202


async def test_a_component_that_keeps_its_answer_finds_it_again(page: Page, site: str) -> None:
    requests = Requests(page)
    keeping = "{keep: true, remember: sessionStorage}"
    await mount(page, site, LONG, keeping)
    await page.wait_for_function("chat.messages[1]?.content.includes('word40 ')")
    await page.evaluate("unmount()")
    await page.evaluate(f"mount('', {keeping})")
    await page.wait_for_function("chat.state === 'ended'")
    assert await page.evaluate("chat.messages.map(({content}) => content)") == [LONG, LONG]
    assert requests == ["POST /prepare", "GET /stream", "GET /stream"]


async def test_a_fast_answer_is_shown_in_few_renders(page: Page, site: str) -> None:
    await mount(page, site, "Hurry", "{model: 'rehearsal/fast'}")
    told = await page.evaluate("""async () => {
      while (chat.state !== "ended") await new Promise(requestAnimationFrame);
      const {content, result} = chat.messages[1];
      return {renders, seen: document.querySelector("p").textContent, content, ms: result.totalMs,
              tokens: result.usage.completion_tokens};
    }""")
    assert told["seen"] == f"Hurry\n{told['content']}"
    assert told["tokens"] > 1000
    assert told["renders"] < 20 + told["ms"] / 30
    assert told["renders"] < told["tokens"] / 4


async def test_a_queued_hook_is_stopped_before_its_turn(page: Page, site: str) -> None:
    await mount(page, site, "Never mind")
    await page.evaluate("chat.stop()")
    await page.wait_for_function("chat.state === 'ended'")
    assert await page.evaluate("[chat.messages.at(-1).result?.finishReason, chat.busy]") == [
        "cancelled",
        False,
    ]
