"""The recipes for pages, in a real Chromium: projects of Vite with React and the AI SDK, a plain page, a login.

Another project has a component that the test can unmount.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import jwt
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Request, expect

from tests.system.browser import PAGES, foreign_site, laid_cable, launched_chromium
from tests.system.harness import RunningBroker, free_port, running_broker, running_program
from tests.system.npm import MAKING_TIMEOUT, missing, ran
from tests.system.test_client import LONG, PATIENCE, ROOM, Requests, is_stop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(MAKING_TIMEOUT),
    pytest.mark.asyncio(loop_scope="module"),
]

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
ADDRESS = "https://broker.example"  # the broker's in the recipes
SECRET = "the secret that signs the tokens of the site"
BUILT = ("react", "ai-sdk", "fetch-event-source")
PROJECTS = {"hook": PAGES / "hook", **{name: RECIPES / name for name in BUILT}}


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
    # React calls everything twice in StrictMode only in its build for development.
    env = (f"VITE_BROKER={broker.url}", "NODE_ENV=development")
    for name, source in PROJECTS.items():
        shutil.copytree(source, project / name)
        build = ("build", "--base", "./", "--logLevel", "warn")
        status, told = await ran("env", *env, str(programs / "vite"), *build, cwd=project / name)
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


async def test_fetch_event_source_survives_a_cut(page: Page, site: str, broker: RunningBroker) -> None:
    async with laid_cable(broker.port) as (cable, base):
        query = urlencode({"base": base, "model": "rehearsal/echo", "ask": LONG})
        await page.goto(f"{site}/fetch-event-source/dist/index.html?{query}")
        await page.wait_for_function("answer.textContent.includes('word40 ')")
        cable.cut()
        await expect(page).to_have_title(re.compile("USD"), timeout=PATIENCE)
    await expect(page.locator("#answer")).to_have_text(LONG)


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
    """The model writes 180 tokens a second."""
    await mount(page, site, "Hurry", "{model: 'rehearsal/long'}")
    await page.wait_for_function("chat.messages[1]?.content.length > 1500")
    told = await page.evaluate("""() => {
      const {content} = chat.messages[1];
      chat.stop();
      return {renders, words: content.split(" ").length, seen: document.querySelector("p").textContent, content};
    }""")
    assert told["seen"] == f"Hurry\n{told['content']}"
    assert told["renders"] < told["words"] / 2


async def test_a_hook_stops_its_answer(page: Page, site: str) -> None:
    await mount(page, site, LONG)
    await page.wait_for_function("chat.state !== 'idle'")
    await page.evaluate("chat.stop()")
    await page.wait_for_function("chat.state === 'ended'")
    assert await page.evaluate("[chat.messages.at(-1).result?.finishReason, chat.busy]") == [
        "cancelled",
        False,
    ]


# Pages without a build


@pytest_asyncio.fixture(loop_scope="module")
async def plain(page: Page, broker: RunningBroker, tmp_path: Path) -> AsyncIterator[Page]:
    """The plain page, with the address of this broker."""
    source = (RECIPES / "page" / "index.html").read_text()
    assert source.count(ADDRESS) == 1
    (tmp_path / "index.html").write_text(source.replace(ADDRESS, broker.url))
    async with foreign_site(tmp_path) as site:
        await page.goto(f"{site}/index.html")
        yield page


async def test_a_plain_page_has_a_conversation(plain: Page) -> None:
    requests = Requests(plain)
    await ask(plain, "Say this back to me.")
    await expect(plain.locator("[role=status]")).to_have_text("")
    await ask(plain, "And this.")
    await expect(plain.locator("main p")).to_have_text(["Say this back to me."] * 2 + ["And this."] * 2)
    assert requests == ["POST /prepare", "GET /stream"] * 2


async def test_a_plain_page_goes_on_after_a_reload(plain: Page) -> None:
    await ask(plain, LONG)
    await plain.wait_for_function("document.querySelector('.assistant')?.textContent.includes('word40 ')")
    await plain.reload()
    await plain.wait_for_function("document.querySelector('.assistant')?.textContent.includes('word60 ')")
    async with plain.expect_response(is_stop):
        await plain.click("text=Stop")
    await expect(plain.locator("[role=status]")).to_have_text("")
    shown = await plain.locator("main p").all_inner_texts()
    assert shown[0] == LONG
    assert LONG.startswith(shown[1])


async def test_a_plain_page_shows_why_an_answer_failed(plain: Page) -> None:
    await plain.goto(f"{plain.url}?model=rehearsal/mid-stream-error")
    await ask(plain, "Hello")
    await expect(plain.locator("[role=alert]")).not_to_have_text("")
    assert await plain.locator(".assistant").count() == 1


async def test_a_login_fetches_a_token_when_the_broker_refuses_its_own(page: Page) -> None:
    node = shutil.which("node") or missing("there is no node on this machine")
    expired = jwt.encode({"sub": "ann", "exp": time.time() - 100}, SECRET, algorithm="HS256")
    fetched: list[str] = []

    def sent(request: Request) -> None:
        if request.url.endswith(("/chat-token", "/prepare")):
            fetched.append(request.url.rsplit("/", 1)[1])

    page.on("request", sent)
    port = free_port()
    async with running_broker(env={**ROOM, "BROKER_JWT_SECRET": SECRET}) as broker:
        env = {"PORT": str(port), "BROKER": broker.url, "CHAT_TOKEN_SECRET": SECRET}
        server = RECIPES / "login" / "server.mjs"
        async with running_program([server], port, env=env, cwd=RECIPES, ready="/", python=node) as site:
            await page.goto(site.url)
            await ask(page, "Let me in")
            await expect(page.locator("[role=alert]")).to_have_text("Please log in.")
            async with page.expect_response("**/login"):
                await page.click("text=Log in")
            await page.evaluate(
                """expired => {
                  const real = fetch;
                  window.fetch = async (...asked) => {
                    window.fetch = real;
                    return new Response(expired);
                  };
                }""",
                expired,
            )
            await ask(page, "Let me in now")
            await expect(page.locator("#answer")).to_have_text("Let me in now")
            await ask(page, "And again")
            await expect(page.locator("#answer")).to_have_text("And again")
    assert fetched == ["chat-token", "prepare", "chat-token", "prepare", "prepare"]
