"""Foreign pages as their authors write them, and the page at `/`, in a real Chromium."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import aiohttp
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, expect

from tests.scripted import scripted_upstream
from tests.system.browser import Complaints, foreign_site, laid_cable, launched_chromium
from tests.system.harness import RunningBroker, running_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOM = {"BROKER_RATE_LIMIT": "1000/minute", "BROKER_MAX_CONCURRENT_STREAMS": "50", "BROKER_RETRY_MS": "500"}
PATIENCE = 30_000
SOONER_THAN_A_TURN = 3_000  # a page that waits for a slot is asked to reconnect after five seconds
LONG = " ".join(f"word{n}" for n in range(500))  # the echo of it takes about five seconds
ALIVE = re.compile(r"word40\b")  # by then the answer is under way, and far from its end
ECHO = "rehearsal/echo"


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


@pytest_asyncio.fixture(loop_scope="module")
async def chat(page: Page, broker: RunningBroker) -> AsyncIterator[Page]:
    """The page at `/`; whatever the test does, it must have no errors."""
    complaints = Complaints(page)
    await page.goto(broker.url)
    yield page
    assert complaints == []


async def ask(chat: Page, model: str, question: str) -> Locator:
    """Sends a question and gives the part of the page where its answer comes."""
    await chat.get_by_label("Model", exact=True).select_option(model)
    await chat.get_by_role("textbox").fill(question)
    await chat.get_by_role("button", name="Send").click()
    return chat.locator("article").last


async def idle(chat: Page) -> None:
    await expect(chat.get_by_role("button", name="Send")).to_be_enabled(timeout=PATIENCE)


async def reads(part: Locator, text: str | re.Pattern[str]) -> None:
    await expect(part).to_contain_text(text, timeout=PATIENCE)


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


# The page at /


async def test_an_answer_streams_and_its_cost_is_shown(chat: Page) -> None:
    question = " ".join(f"word{n}" for n in range(150))
    turn = await ask(chat, ECHO, question)
    await reads(turn.locator(".answer"), "word20")
    await expect(turn.locator(".account")).to_be_hidden()
    await idle(chat)
    assert await turn.locator(".answer").text_content() == question
    await reads(turn.locator(".account"), re.compile(r"^\$0\.\d+ · [\d,]+ tokens in, [\d,]+ out"))
    await reads(chat.locator("#total"), re.compile(r"^\$0\.\d+ · [\d,]+ tokens$"))


@pytest.mark.parametrize("model", ["rehearsal/plain", "rehearsal/slow"])
async def test_stop_keeps_the_text_so_far(chat: Page, model: str) -> None:
    turn = await ask(chat, model, "Go on until I say so.")
    if model == "rehearsal/plain":
        await reads(turn.locator(".answer"), re.compile(r"\w+ \w+"))
    await chat.get_by_role("button", name="Stop").click()
    await idle(chat)
    await reads(turn.locator(".account"), "Stopped")
    await expect(chat.get_by_role("button", name="Stop")).to_be_disabled()


async def test_a_failure_shows_a_message_and_restores_the_question(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/mid-stream-error", "Try this, please.")
    await idle(chat)
    await expect(turn.locator(".answer")).not_to_be_empty()
    await reads(turn.locator(".sentence"), re.compile(r"\w+ \w+"))
    await reads(turn.locator(".problem"), "upstream_")
    await turn.get_by_role("button", name="Try again").click()
    await expect(chat.get_by_role("textbox")).to_have_value("Try this, please.")
    await expect(chat.locator("article")).to_have_count(0)


async def test_a_refusal_says_how_long_to_wait(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/rate-limited", "Now?")
    await reads(turn.locator(".problem"), "Wait about 40 s first.")
    await idle(chat)


@pytest.mark.slow
async def test_a_reload_in_mid_answer_leaves_no_gap_and_no_repeat(chat: Page) -> None:
    await ask(chat, ECHO, LONG)
    for word in ("word40", "word200"):
        await reads(chat.locator(".answer"), word)
        await chat.reload()
    await idle(chat)
    await reads(chat.locator(".account"), "$")
    assert await chat.locator(".answer").text_content() == LONG


@pytest.mark.slow
async def test_a_reload_before_the_first_text_waits_for_it(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/slow", "Take your time.")
    await reads(turn.locator(".status"), "Waiting for the first word")  # "Sending…" until there is a session
    async with chat.expect_request("**/stream/*"):
        await chat.reload()
    await reads(chat.locator(".answer"), re.compile(r"\w+ \w+"))
    await chat.keyboard.press("Escape")
    await idle(chat)


async def test_a_reload_after_the_end_shows_the_conversation(chat: Page) -> None:
    await ask(chat, ECHO, "Keep this.")
    await idle(chat)
    spent = await chat.locator("#total").text_content()
    await chat.reload()
    await expect(chat.locator(".answer")).to_have_text("Keep this.")
    await expect(chat.locator("#total")).to_have_text(spent or "")
    await chat.get_by_role("button", name="New chat").click()
    await expect(chat.locator("article")).to_have_count(0)


async def test_markup_in_an_answer_is_text(chat: Page) -> None:
    markup = "<script>alert(1)</script><img src=x onerror=alert(2)><b>bold</b>"
    turn = await ask(chat, ECHO, markup)
    await idle(chat)
    assert await turn.locator(".answer").text_content() == markup
    await expect(turn.locator("script, img, b")).to_have_count(0)


async def test_reasoning_stands_apart_from_the_answer(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/reasoning", "Think first.")
    await reads(turn.locator(".status"), "Thinking")
    await turn.get_by_text("Reasoning", exact=True).click()
    await reads(turn.locator(".reasoning p"), re.compile(r"\w+ \w+"))
    await expect(turn.locator(".answer")).not_to_be_empty(timeout=PATIENCE)
    await chat.keyboard.press("Escape")
    await idle(chat)


async def test_tool_calls_are_shown_as_text(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/tools", "What is the weather?")
    await idle(chat)
    await expect(turn.locator(".tools")).to_have_text(
        re.compile(r"^\w+\(\{.*\}\)\s\w+\(\{.*\}\)$", re.DOTALL)
    )
    await reads(turn.locator(".account"), "asks for a tool")


async def test_sources_are_links(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/annotations", "Says who?")
    link = turn.get_by_role("link", name="Streams for the patient")
    await expect(link).to_have_attribute("href", "https://example.com/streams", timeout=PATIENCE)
    await idle(chat)


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADU"
    "lEQVR42mNk+M/wHwAEBgIApD5fRAAAAABJRU5ErkJggg=="
)
THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "12 times 12 … "}]}
TEXT = {"type": "text", "text": "1"}


@pytest.mark.parametrize(
    ("delta", "shown"),
    [
        ({"content": [TEXT, "44"]}, {"text": "144"}),
        ({"content": ["1", {"text": "44", "type": "text"}]}, {"text": "144"}),
        ({"content": [THINKING, TEXT]}, {"text": "1", "reasoning": "12 times 12 … "}),
        ({"content": [{"type": "thinking", "thinking": "Hm"}]}, {"reasoning": "Hm"}),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, {"text": "No."}),
        ({"content": None, "refusal": "I cannot."}, {"text": "I cannot."}),
        ({"reasoning_details": [{"type": "reasoning.text", "text": "Hm"}]}, {"reasoning": "Hm"}),
        ({"reasoning": "", "reasoning_details": [{"summary": "S"}]}, {"reasoning": "S"}),
        ({"reasoning": "Hm", "reasoning_details": [{"text": "Hm"}]}, {"reasoning": "Hm"}),
        ({"reasoning": "", "reasoning_content": "Hm"}, {"reasoning": "Hm"}),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "gAAA"}]}, {}),
        ({"images": [{"type": "image_url", "image_url": {"url": PIXEL}}]}, {"images": [PIXEL]}),
        ({"content": [{"type": "image_url", "image_url": PIXEL}, "!"]}, {"images": [PIXEL], "text": "!"}),
        (
            {"images": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]},
            {"sources": [{"url": "https://example.com/a.png", "title": "Image"}]},
        ),
        ({"images": [{"type": "image_url", "image_url": {"url": "data:text/html,x"}}]}, {"text": "[image]"}),
        ({"content": [None, 5, [], {}, {"type": "text"}, {"type": "text", "text": {"value": 5}}]}, {}),
        ({"images": 5, "reasoning_details": [5, None], "tool_calls": [None], "annotations": {}}, {}),
    ],
)
@pytest.mark.parametrize("name", ["delta", "message"])
async def test_a_chunk_is_read_in_every_shape_that_is_known(
    chat: Page, name: str, delta: Any, shown: Any
) -> None:
    turn = await chat.evaluate(
        """async (chunk) => {
          const { take } = await import("/page-chunk.js");
          const turn = { text: "", reasoning: "", tools: {}, sources: [] };
          take(turn, chunk);
          return turn;
        }""",
        {"choices": [{"index": 0, name: delta}]},
    )
    turn.pop("tools")
    assert turn == {"text": "", "reasoning": "", "sources": [], **shown}


async def test_text_in_parts_and_images_are_shown(page: Page) -> None:
    async with scripted_upstream() as upstream:
        env = {**ROOM, "BROKER_UPSTREAM_URL": upstream.url, "BROKER_DEFAULT_MODEL": "scripted/model-1"}
        async with running_broker(rehearsal=False, env=env) as broker:
            complaints = Complaints(page)
            await page.goto(broker.url)
            await expect(page.get_by_label("Model", exact=True)).to_contain_text("Default model")
            await page.get_by_role("textbox").fill("What is 12 times 12?")
            await page.get_by_role("button", name="Send").click()
            call = (await upstream.call()).open()
            image = {"type": "image_url", "image_url": {"url": PIXEL}}
            for delta in (
                {"content": [THINKING]},
                {"content": [TEXT]},
                {"content": "44"},
                {"images": [image]},
            ):
                call.event(json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode())
            call.chunk(finish="stop")
            call.done()
            await idle(page)
            assert await page.locator(".answer").text_content() == "144"
            assert await page.locator(".reasoning p").text_content() == "12 times 12 … "
            await expect(page.locator(".images img")).to_have_js_property("naturalWidth", 1)
    # The browser itself complains of the list of models that this upstream does not have.
    assert [complaint for complaint in complaints if "502" not in complaint] == []


async def test_the_conversation_so_far_goes_with_each_message(chat: Page) -> None:
    await ask(chat, ECHO, "The first message.")
    await idle(chat)
    turn = await ask(chat, "rehearsal/small", "The second message.")
    await reads(turn.locator(".answer"), "messages: 3,")
    await chat.keyboard.press("Escape")
    await idle(chat)


async def test_the_keyboard_alone_will_do(chat: Page) -> None:
    await chat.get_by_label("Model", exact=True).select_option("rehearsal/plain")
    box = chat.get_by_role("textbox")
    await box.press_sequentially("One")
    await box.press("Shift+Enter")
    await box.press_sequentially("Two")
    await box.press("Enter")
    await expect(chat.locator(".question")).to_have_text("One\nTwo")
    await expect(chat.locator("#conversation")).to_have_attribute("aria-busy", "true")
    await expect(chat.locator(".answer")).not_to_be_empty(timeout=PATIENCE)
    await box.press("Escape")
    await reads(chat.locator(".account"), "Stopped")
    await expect(box).to_be_focused()
    await expect(chat.locator("#conversation")).to_have_attribute("aria-busy", "false")


async def test_the_first_model_is_chosen_and_many_can_be_narrowed(chat: Page) -> None:
    choice = chat.get_by_label("Model", exact=True)
    await expect(choice).to_have_value("rehearsal/plain")
    await chat.get_by_label("Filter models").fill("ECHO")
    await expect(choice.locator("option")).to_have_count(2)
    await expect(choice).to_have_value(ECHO)
    await reads(choice, f"{ECHO}:free — free")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_fits_320_pixels(chat: Page, scheme: Any) -> None:
    await chat.emulate_media(color_scheme=scheme)
    await chat.set_viewport_size({"width": 320, "height": 568})
    turn = await ask(chat, ECHO, "Donaudampfschiffahrtselektrizitätenhauptbetriebswerkbauunterbeamten" * 3)
    await idle(chat)
    await reads(turn.locator(".account"), "$")
    assert await chat.evaluate("() => document.documentElement.scrollWidth") == 320


@pytest.mark.slow
async def test_a_broken_connection_is_shown_and_resumed(page: Page, broker: RunningBroker) -> None:
    async with laid_cable(broker.port) as (cable, url):
        await page.goto(url)
        turn = await ask(page, ECHO, LONG)
        await reads(turn.locator(".answer"), ALIVE)
        cable.cut()
        await reads(turn.locator(".status"), "Reconnecting")
        await idle(page)
        assert await turn.locator(".answer").text_content() == LONG


@pytest.mark.slow
async def test_a_proxy_that_answers_502_for_a_while_is_outlasted(page: Page, broker: RunningBroker) -> None:
    async with laid_cable(broker.port) as (cable, url):
        await page.goto(url)
        turn = await ask(page, ECHO, LONG)
        await reads(turn.locator(".answer"), ALIVE)
        cable.down = True
        cable.cut()
        await cable.refused.wait()
        cable.down = False
        await idle(page)
        assert await turn.locator(".answer").text_content() == LONG


@pytest.mark.slow
async def test_a_message_waits_its_turn_or_is_stopped_at_once(chromium: Browser) -> None:
    async with running_broker(env={**ROOM, "BROKER_MAX_CONCURRENT_STREAMS": "1"}) as broker:
        first, second = await chromium.new_page(), await chromium.new_page()
        await first.goto(broker.url)
        await second.goto(broker.url)
        holding = await ask(first, "rehearsal/stall", "Hold the line.")
        await reads(holding.locator(".answer"), re.compile(r"\w+"))

        stopped = await ask(second, ECHO, "Never mind.")
        await reads(stopped.locator(".status"), "as soon as there is room")
        await second.get_by_role("button", name="Stop").click()
        await expect(stopped.locator(".account")).to_contain_text("Stopped", timeout=SOONER_THAN_A_TURN)

        waiting = await ask(second, ECHO, "My turn yet?")
        await reads(waiting.locator(".status"), "number 1 of 1 in line")
        await first.get_by_role("button", name="Stop").click()
        await expect(waiting.locator(".answer")).to_have_text("My turn yet?", timeout=PATIENCE)


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


async def test_a_broker_with_keys_asks_for_one(page: Page) -> None:
    async with running_broker(env={**ROOM, "BROKER_API_KEYS": "reader:a-key-for-the-reader"}) as broker:
        await page.goto(broker.url)
        await page.get_by_label("This broker asks for an access key.").fill("a-key-for-the-reader")
        await page.get_by_role("button", name="Use key").click()
        turn = await ask(page, ECHO, "Let me in.")
        await expect(turn.locator(".answer")).to_have_text("Let me in.", timeout=PATIENCE)


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js", "/icon.svg", "/favicon.ico"])
async def test_the_files_of_the_page_are_guarded_and_revalidated(broker: RunningBroker, path: str) -> None:
    async with aiohttp.ClientSession(broker.url) as session:
        async with session.get(path) as answer:
            assert answer.status == 200
            assert await answer.read()
            assert answer.headers["Cache-Control"] == "no-cache"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        tag = answer.headers["ETag"]
        async with session.get(path, headers={"If-None-Match": f'"other", W/{tag}'}) as known:
            assert (known.status, await known.read()) == (304, b"")
        async with session.head(path) as head:
            assert (head.status, head.headers["ETag"]) == (200, tag)
