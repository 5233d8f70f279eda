"""The page at `/` in a real Chromium: what a person sees of answers, turns, conversations and faults."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Route, expect

from tests.scripted import scripted_upstream
from tests.system.browser import Complaints, laid_cable, launched_chromium
from tests.system.chat_page import ALIVE, ECHO, LONG, PATIENCE, ROOM, ask, idle, reads, ready
from tests.system.harness import RunningBroker, running_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

SOONER_THAN_A_TURN = 3_000  # a page that waits for a slot is asked to reconnect after five seconds


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker() -> AsyncIterator[RunningBroker]:
    async with running_broker(env={**ROOM, "BROKER_DAILY_COST": "5"}) as running:
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
    """The page at `/`; whatever the test does, it must have no errors and no report of its policy."""
    complaints = Complaints(page)
    await page.goto(broker.url)
    await ready(page)
    yield page
    assert complaints == []


# Answers


async def test_an_answer_streams_and_its_cost_is_shown(chat: Page) -> None:
    question = " ".join(f"word{n}" for n in range(150))
    turn = await ask(chat, ECHO, question)
    await reads(turn.locator(".answer"), "word20")
    await expect(turn.locator(".account")).to_be_hidden()
    await idle(chat)
    await expect(turn.locator(".answer")).to_have_text(question)
    figures = r"^\$0\.\d+ · [\d,]+ tokens in, [\d,]+ out · first word after [\d.]+ s · \d+ tokens/s$"
    await reads(turn.locator(".account"), re.compile(figures))
    await reads(chat.locator("#total"), re.compile(r"^\$0\.\d+ · [\d,]+ tokens$"))
    await reads(chat.locator("#usage"), re.compile(r"Today: \$0\.\d+, \d+ answers?Left today: \$[45]\.\d+"))


MARKDOWN = """\
# Title

Some **bold**, *slanted* and `code`, and a [link](https://example.com/a).

| name | count |
|------|------:|
| one  |    12 |

1. first
2. second
   - inner

```python
print("hi")  # done
```

> quoted
"""


async def test_markdown_is_shown_as_what_it_means(chat: Page) -> None:
    turn = await ask(chat, ECHO, MARKDOWN)
    await idle(chat)
    answer = turn.locator(".answer")
    await expect(answer.locator("h3")).to_have_text("Title")
    await expect(answer.locator("strong")).to_have_text("bold")
    await expect(answer.locator("em")).to_have_text("slanted")
    await expect(answer.locator("td")).to_have_text(["one", "12"])
    await expect(answer.locator("ol > li ul li")).to_have_text("inner")
    await expect(answer.locator("blockquote")).to_have_text("quoted")
    link = answer.get_by_role("link", name="link")
    await expect(link).to_have_attribute("href", "https://example.com/a")
    await expect(link).to_have_attribute("rel", re.compile("noopener"))
    await expect(answer.locator(".bar span")).to_have_text("python")
    await expect(answer.locator(".hljs-string")).to_have_text('"hi"')


async def test_code_is_copied_without_its_frame(chat: Page) -> None:
    await chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    turn = await ask(chat, ECHO, "```python\nprint(1)\n```")
    await idle(chat)
    await turn.locator(".code").get_by_role("button", name="Copy").click()
    await expect(turn.locator(".code").get_by_role("button", name="Copied")).to_be_visible()
    assert await chat.evaluate("() => navigator.clipboard.readText()") == "print(1)\n"


async def test_markup_in_an_answer_is_text_and_never_runs(chat: Page) -> None:
    markup = "<script>alert(1)</script><img src=x onerror=alert(2)> and <b>bold</b>"
    hostile = f"{markup}\n\n[press](javascript:alert(3)) ![see](https://127.0.0.1:1/x.png)\n\n```html\n{markup}\n```"
    turn = await ask(chat, ECHO, hostile)
    await idle(chat)
    answer = turn.locator(".answer")
    await expect(answer.locator("p").first).to_have_text(markup)
    await expect(answer.locator("code")).to_have_text(f"{markup}\n")
    await expect(answer.locator("script, img, b")).to_have_count(0)
    await expect(answer.get_by_role("link")).to_have_text(["Image: see"])


async def test_no_beginning_of_markdown_shows_its_marks(chat: Page) -> None:
    """Each beginning of the text is shown as words only, and no shown word is taken back."""
    seen: list[str] = await chat.evaluate(
        """async (text) => {
          const { MarkdownView } = await import("/markdown.js");
          const root = document.createElement("div");
          const view = new MarkdownView(root);
          const seen = [];
          for (let end = 1; end <= text.length; end++) {
            view.write(text.slice(0, end), false);
            seen.push(root.textContent.replace(/\\s+/g, " "));
          }
          return seen;
        }""",
        "Plain **bold words** and *slanted*, `code`, [a link](https://example.com/a).\n\n"
        "- one\n- two **strong**\n\n| a | b |\n|---|---|\n| c | d |\n\nEnd.\n",
    )
    assert "Plain bold words and slanted, code, a link." in seen[-1]
    assert [text for text in seen if re.search(r"[*`\[\]|#]|https", text)] == []
    lengths = [len(text.strip()) for text in seen]
    assert max(before - after for before, after in pairwise(lengths)) <= 1


async def test_complete_blocks_stay_the_same_elements(chat: Page) -> None:
    """Only the last block is made again, so that nothing flickers and a selection stays."""
    same: bool = await chat.evaluate(
        """async () => {
          const { MarkdownView } = await import("/markdown.js");
          const root = document.createElement("div");
          const view = new MarkdownView(root);
          view.write("First *paragraph*.\\n\\n- one\\n- two", false);
          const before = [root.querySelector("p"), root.querySelector("em"), root.querySelector("li")];
          view.write("First *paragraph*.\\n\\n- one\\n- two\\n- three\\n\\nLast.", false);
          view.write("First *paragraph*.\\n\\n- one\\n- two\\n- three\\n\\nLast.", true);
          const after = [root.querySelector("p"), root.querySelector("em"), root.querySelector("li")];
          return before.every((node, n) => node === after[n]) && root.querySelectorAll("li").length === 3;
        }"""
    )
    assert same


async def test_reasoning_opens_and_folds_when_the_text_begins(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/reasoning", "Think first.")
    reasoning = turn.locator(".reasoning")
    await expect(reasoning).to_have_attribute("open", "", timeout=PATIENCE)
    await reads(reasoning.locator(".thoughts"), re.compile(r"\w+ \w+"))
    await expect(turn.locator(".answer")).to_be_visible(timeout=PATIENCE)
    await expect(reasoning).not_to_have_attribute("open", "")
    await reads(reasoning.locator("summary"), re.compile(r"Reasoned for [\d.]+ s"))
    await chat.keyboard.press("Escape")
    await idle(chat)


async def test_tool_calls_are_shown_as_text(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/tools", "What is the weather?")
    await idle(chat)
    await reads(turn.locator(".tools"), "which this page does not run")
    await expect(turn.locator(".tools pre")).to_have_text([re.compile(r"^\w+\(\{.*\}\)$", re.DOTALL)] * 2)


async def test_sources_are_links(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/annotations", "Says who?")
    link = turn.get_by_role("link", name="Streams for the patient")
    await expect(link).to_have_attribute("href", "https://example.com/streams", timeout=PATIENCE)
    await idle(chat)


async def test_a_refusal_of_the_model_is_told_as_one(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/refusal", "Would you?")
    await idle(chat)
    await reads(turn.locator(".note"), "The model refuses.")
    await expect(turn.locator(".answer")).to_be_visible()


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADU"
    "lEQVR42mNk+M/wHwAEBgIApD5fRAAAAABJRU5ErkJggg=="
)
THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "12 times 12 … "}]}
TEXT = {"type": "text", "text": "1"}


SHAPES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"content": [TEXT, "44"]}, {"text": "144"}),
    ({"content": ["1", {"text": "44", "type": "text"}]}, {"text": "144"}),
    ({"content": [THINKING, TEXT]}, {"text": "1", "reasoning": "12 times 12 … "}),
    ({"content": [{"type": "thinking", "thinking": "Hm"}]}, {"reasoning": "Hm"}),
    ({"content": [{"type": "refusal", "refusal": "No."}]}, {"text": "No.", "refused": True}),
    ({"content": None, "refusal": "I cannot."}, {"text": "I cannot.", "refused": True}),
    ({"reasoning_details": [{"type": "reasoning.text", "text": "Hm"}]}, {"reasoning": "Hm"}),
    ({"reasoning": "", "reasoning_details": [{"summary": "S"}]}, {"reasoning": "S"}),
    ({"reasoning": "Hm", "reasoning_details": [{"text": "Hm"}]}, {"reasoning": "Hm"}),
    ({"reasoning": "", "reasoning_content": "Hm"}, {"reasoning": "Hm"}),
    ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "gAAA"}]}, {"encrypted": True}),
    ({"images": [{"type": "image_url", "image_url": {"url": PIXEL}}]}, {"images": [PIXEL]}),
    ({"content": [{"type": "image_url", "image_url": PIXEL}, "!"]}, {"images": [PIXEL], "text": "!"}),
    (
        {"images": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]},
        {"sources": [{"url": "https://example.com/a.png", "title": "Image"}]},
    ),
    ({"images": [{"type": "image_url", "image_url": {"url": "data:text/html,x"}}]}, {"text": "[image]"}),
    ({"content": [None, 5, [], {}, {"type": "text"}, {"type": "text", "text": {"value": 5}}]}, {}),
    ({"images": 5, "reasoning_details": [5, None], "tool_calls": [None], "annotations": {}}, {}),
]


async def test_a_chunk_is_read_in_every_shape_that_is_known(chat: Page) -> None:
    named = [(name, delta, shown) for delta, shown in SHAPES for name in ("delta", "message")]
    turns = await chat.evaluate(
        """async (chunks) => {
          const { take } = await import("/chunk.js");
          return chunks.map((chunk) => {
            const turn = { text: "", reasoning: "", tools: {}, sources: [] };
            take(turn, chunk);
            return turn;
          });
        }""",
        [{"choices": [{"index": 0, name: delta}]} for name, delta, _ in named],
    )
    for (name, delta, shown), turn in zip(named, turns, strict=True):
        turn.pop("tools")
        assert turn == {"text": "", "reasoning": "", "sources": [], **shown}, (name, delta)


async def test_text_in_parts_and_images_are_shown(page: Page) -> None:
    async with scripted_upstream() as upstream:
        env = {**ROOM, "BROKER_UPSTREAM_URL": upstream.url, "BROKER_DEFAULT_MODEL": "scripted/model-1"}
        async with running_broker(rehearsal=False, env=env) as broker:
            complaints = Complaints(page)
            await page.goto(broker.url)
            await expect(page.locator("#model")).to_contain_text("Default model")
            await page.get_by_role("textbox", name="Message").fill("What is 12 times 12?")
            await page.get_by_role("button", name="Send").click()
            call = (await upstream.call()).open()
            image = {"type": "image_url", "image_url": {"url": PIXEL}}
            encrypted = {"reasoning_details": [{"type": "reasoning.encrypted", "data": "gAAA"}]}
            for delta in (
                {"content": [THINKING]},
                encrypted,
                {"content": [TEXT]},
                {"content": "44"},
                {"images": [image]},
            ):
                call.event(json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode())
            call.chunk(finish="stop")
            call.done()
            await idle(page)
            await expect(page.locator(".answer")).to_have_text("144")
            await expect(page.locator(".thoughts")).to_have_text("12 times 12 …")
            await expect(page.locator(".images img")).to_have_js_property("naturalWidth", 1)
    # The browser itself complains of the list of models that this upstream does not have.
    assert [complaint for complaint in complaints if "502" not in complaint] == []


# Turns


@pytest.mark.parametrize("model", ["rehearsal/plain", "rehearsal/slow"])
async def test_one_button_sends_then_stops_and_keeps_the_text(chat: Page, model: str) -> None:
    turn = await ask(chat, model, "Go on until I say so.")
    await expect(chat.get_by_role("button", name="Send")).to_have_count(0)
    if model == "rehearsal/plain":
        await reads(turn.locator(".answer"), re.compile(r"\w+ \w+"))
    await chat.get_by_role("button", name="Stop").click()
    await idle(chat)
    await reads(turn.locator(".finish"), "Stopped")
    if model == "rehearsal/plain":
        await reads(turn.locator(".account"), re.compile(r"about \$0\.\d+"))


async def test_try_again_keeps_the_answer_before(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/mid-stream-error", "Try this, please.")
    await idle(chat)
    first = await turn.locator(".answer").text_content()
    assert first
    await reads(turn.locator(".account"), "about $")
    await turn.get_by_role("button", name="Other model").click()
    await chat.locator(f'.option[data-id="{ECHO}"]').click()
    await expect(turn.locator(".answer")).to_have_text("Try this, please.", timeout=PATIENCE)
    await idle(chat)
    await expect(turn.locator(".pager")).to_contain_text("2 of 2")
    await turn.get_by_role("button", name="Previous answer").click()
    await expect(turn.locator(".answer")).to_have_text(first)
    await turn.get_by_role("button", name="Try again").click()
    await expect(turn.locator(".pager")).to_contain_text("3 of 3", timeout=PATIENCE)
    await idle(chat)
    await expect(chat.locator("article")).to_have_count(1)


async def test_a_broken_answer_is_continued_behind_its_text(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/truncated", "Tell me.")
    await idle(chat)
    await reads(turn.locator(".sentence"), "The answer was broken off.")
    before = (await turn.locator(".answer").text_content() or "").strip()
    async with chat.expect_request("**/prepare") as asked:
        await turn.get_by_role("button", name="Continue").click()
    messages = (await asked.value).post_data_json["messages"]  # type: ignore[index]
    assert [each["role"] for each in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"].strip() == before
    await idle(chat)
    text = (await turn.locator(".answer").text_content() or "").strip()
    assert text.startswith(before)
    assert len(text) > len(before)


async def test_an_edited_question_is_asked_again(chat: Page) -> None:
    turn = await ask(chat, ECHO, "Frist")
    await idle(chat)
    await ask(chat, ECHO, "Second")
    await idle(chat)
    await turn.get_by_role("button", name="Edit").click()
    await chat.get_by_role("textbox", name="Message").fill("First")
    await chat.keyboard.press("Enter")
    await expect(turn.locator(".answer")).to_have_text("First", timeout=PATIENCE)
    await expect(chat.locator("article")).to_have_count(1)
    await chat.get_by_role("button", name="Undo").click()
    await expect(chat.locator(".asked")).to_have_text(["First", "Second"])
    await idle(chat)


async def test_a_deleted_turn_comes_back_with_undo(chat: Page) -> None:
    for text in ("One", "Two"):
        turn = await ask(chat, ECHO, text)
        await idle(chat)
    await chat.locator("article").first.get_by_role("button", name="Delete").click()
    await expect(chat.locator(".asked")).to_have_text(["Two"])
    await chat.get_by_role("button", name="Undo").click()
    await expect(chat.locator(".asked")).to_have_text(["One", "Two"])
    await turn.get_by_role("button", name="Delete").click()
    await expect(chat.locator(".asked")).to_have_text(["One"])
    await chat.reload()
    await expect(chat.locator(".asked")).to_have_text(["One"])


async def test_the_conversation_and_the_settings_go_with_each_message(chat: Page) -> None:
    await ask(chat, ECHO, "The first message.")
    await idle(chat)
    await chat.get_by_role("button", name="Settings").click()
    await chat.get_by_label("System prompt").fill("Be brief.")
    await chat.get_by_label("Temperature").fill("0.3")
    await chat.get_by_label("Longest answer").fill("50")
    await chat.get_by_label("Reasoning effort").select_option("low")
    await chat.keyboard.press("Escape")
    await chat.reload()
    await ready(chat)
    async with chat.expect_request("**/prepare") as asked:
        await ask(chat, ECHO, "The second message.")
    sent = (await asked.value).post_data_json
    assert sent == {
        "model": ECHO,
        "temperature": 0.3,
        "max_tokens": 50,
        "reasoning": {"effort": "low"},
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "The first message."},
            {"role": "assistant", "content": "The first message."},
            {"role": "user", "content": "The second message."},
        ],
    }
    await idle(chat)


# Conversations


async def test_conversations_stay_when_the_tab_closes(chat: Page, broker: RunningBroker) -> None:
    await ask(chat, ECHO, "Keep this.")
    await idle(chat)
    spent = await chat.locator("#total").text_content()
    context = chat.context
    await chat.close()
    later = await context.new_page()
    await later.goto(broker.url)
    await expect(later.locator("article")).to_have_count(0)
    await later.get_by_role("link", name="Keep this.").click()
    await expect(later.locator(".answer")).to_have_text("Keep this.")
    await expect(later.locator("#total")).to_have_text(spent or "")
    await later.get_by_role("button", name="Delete “Keep this.”").click()
    await expect(later.locator("#list li")).to_have_count(0)
    await later.get_by_role("button", name="Undo").click()
    await expect(later.locator(".answer")).to_have_text("Keep this.")


async def test_a_conversation_is_exported_as_markdown(chat: Page, tmp_path: Path) -> None:
    await ask(chat, ECHO, "Some *text*.")
    await idle(chat)
    async with chat.expect_download() as download:
        await chat.get_by_role("button", name="Export").click()
    file = await download.value
    assert file.suggested_filename == "Some-text-.md"
    await file.save_as(tmp_path / "export.md")
    exported = (tmp_path / "export.md").read_text()
    assert exported == "# Some *text*.\n\n## You\n\nSome *text*.\n\n## Rehearsal: Echo\n\nSome *text*.\n"


async def test_a_reload_in_mid_answer_leaves_no_gap_and_no_repeat(chat: Page) -> None:
    await ask(chat, ECHO, LONG)
    for word in ("word40", "word200"):
        await reads(chat.locator(".answer"), word)
        await chat.reload()
    await idle(chat)
    await expect(chat.locator(".answer")).to_have_text(LONG)
    await reads(chat.locator(".account"), "$")


async def test_another_tab_in_mid_answer_goes_on_too(chat: Page) -> None:
    await ask(chat, ECHO, LONG)
    await reads(chat.locator(".answer"), ALIVE)
    other = await chat.context.new_page()
    await other.goto(chat.url)
    await reads(other.locator(".answer"), "word60")
    for each in (chat, other):
        await idle(each)
        await expect(each.locator(".answer")).to_have_text(LONG)


HOLD_NEWS = """() => {
  const { prototype } = BroadcastChannel;
  const { postMessage } = prototype;
  const held = [];
  prototype.postMessage = function (news) { held.push(() => postMessage.call(this, news)); };
  window.tellNews = () => {
    prototype.postMessage = postMessage;
    for (const tell of held) tell();
  };
}"""
"""Keeps what the page tells other tabs until `tellNews()`: as if they all did something at the same moment."""


async def test_two_tabs_write_in_one_conversation(chat: Page) -> None:
    await ask(chat, ECHO, "Zero")
    await idle(chat)
    other = await chat.context.new_page()
    await other.goto(chat.url)
    await expect(other.locator(".answer")).to_have_text("Zero")
    for each in (chat, other):
        await each.evaluate(HOLD_NEWS)
    await asyncio.gather(ask(chat, ECHO, "One"), ask(other, ECHO, "Two"))
    for each in (chat, other):
        await each.evaluate("() => window.tellNews()")
    for each in (chat, other):
        await idle(each)
        await expect(each.locator("article")).to_have_count(3)
    await chat.reload()
    await expect(chat.locator(".answer:visible")).to_have_count(3)
    answers = await chat.locator(".answer").all_text_contents()
    assert sorted(text.strip() for text in answers) == ["One", "Two", "Zero"]


CLICK_WHEN_IT_STOPS = """() => {
  const button = document.querySelector("#send");
  new MutationObserver((_, observer) => {
    if (button.textContent !== "Stop") return;
    observer.disconnect();
    button.click();
  }).observe(button, { childList: true });
}"""
"""Clicks the button in the moment in which it becomes one that stops, as a reader does who wanted to send."""


async def test_a_click_that_was_to_send_does_not_stop_the_answer_of_another_tab(chat: Page) -> None:
    await ask(chat, ECHO, "Zero")
    await idle(chat)
    other = await chat.context.new_page()
    await other.goto(chat.url)
    await ready(other)
    await chat.get_by_role("textbox", name="Message").fill("Mine")
    await chat.evaluate(CLICK_WHEN_IT_STOPS)
    await other.evaluate(HOLD_NEWS)
    turn = await ask(other, ECHO, LONG)
    await reads(turn.locator(".answer"), ALIVE)  # so that the other tab could stop it at once
    await other.evaluate("() => window.tellNews()")
    for each in (other, chat):
        await expect(each.locator(".answer:visible")).to_have_text(["Zero", LONG])
        await idle(each)
    await chat.get_by_role("button", name="Send").click()
    await expect(chat.locator(".answer:visible")).to_have_text(["Zero", LONG, "Mine"])
    await idle(chat)


CLICK_WHILE_READING = """(selector) => {
  const { getAll } = IDBIndex.prototype;
  IDBIndex.prototype.getAll = function (...range) {
    IDBIndex.prototype.getAll = getAll;
    const read = getAll.apply(this, range); // knows nothing of what changes from here on
    document.querySelector(selector).click();
    return read;
  };
}"""
"""Clicks while the page reads what another tab has told it about."""


KEEP_ONE_MORE = """async () => {
  const { answersOf, conversations, keep } = await import("/store.js");
  const [conversation] = await conversations();
  const [zero] = await answersOf(conversation.id);
  await keep(conversation, [{ ...zero, id: "two", turn: "two", question: "Two", text: "Two", at: zero.at + 1 }]);
}"""
"""Adds an answer that has ended, so that this is the only thing that the tab tells."""


async def test_a_question_is_shown_though_another_tab_writes_at_that_moment(chat: Page) -> None:
    await ask(chat, ECHO, "Zero")
    await idle(chat)
    other = await chat.context.new_page()
    await other.goto(chat.url.partition("#")[0])
    await ready(other)
    await chat.get_by_role("textbox", name="Message").fill("One")
    await chat.evaluate(CLICK_WHILE_READING, "#send")
    await other.evaluate(KEEP_ONE_MORE)
    await expect(chat.locator(".answer:visible")).to_have_text(["Zero", "Two", "One"])
    await idle(chat)


async def test_a_deleted_turn_stays_away_though_another_tab_writes_at_that_moment(chat: Page) -> None:
    await ask(chat, ECHO, "Zero")
    await idle(chat)
    other = await chat.context.new_page()
    await other.goto(chat.url.partition("#")[0])
    await ready(other)
    await chat.evaluate(CLICK_WHILE_READING, "article .actions > button:last-child")
    await other.evaluate(KEEP_ONE_MORE)
    await expect(chat.locator(".answer:visible")).to_have_text(["Two"])
    await chat.get_by_role("button", name="Undo").click()
    await expect(chat.locator(".answer:visible")).to_have_text(["Zero", "Two"])


@asynccontextmanager
async def asked_without_models(chat: Page, question: str) -> AsyncIterator[None]:
    """Ask in the open conversation; the page waits for the list of models, and sends the question after the block."""
    listed = asyncio.Event()

    async def hold(route: Route) -> None:
        await listed.wait()
        await route.continue_()

    await chat.route("**/models", hold)
    await chat.reload()
    await ready(chat)
    turns = await chat.locator("article").count()
    await chat.get_by_role("textbox", name="Message").fill(question)
    await chat.keyboard.press("Enter")
    await expect(chat.locator("article")).to_have_count(turns + 1)
    yield
    listed.set()


async def test_a_question_that_is_not_sent_yet_survives_the_news_of_another_tab(chat: Page) -> None:
    await ask(chat, ECHO, "Zero")
    await idle(chat)
    other = await chat.context.new_page()
    await other.goto(chat.url.partition("#")[0])
    await ready(other)
    async with asked_without_models(chat, "One"):
        await other.evaluate(KEEP_ONE_MORE)
        await expect(chat.locator(".answer:visible")).to_have_text(["Zero", "Two"])
    await expect(chat.locator(".answer:visible")).to_have_text(["Zero", "Two", "One"])
    await idle(chat)


async def test_a_question_goes_with_the_conversation_that_it_was_asked_in(chat: Page) -> None:
    await ask(chat, ECHO, "Zero")
    await idle(chat)
    async with chat.expect_request("**/prepare") as asked, asked_without_models(chat, "One"):
        await chat.get_by_role("button", name="New chat").first.click()
        await expect(chat.locator("article")).to_have_count(0)
    messages = (await asked.value).post_data_json["messages"]  # type: ignore[index]
    assert [each["content"] for each in messages] == ["Zero", "Zero", "One"]
    await chat.get_by_role("link", name="Zero").click()
    await expect(chat.locator(".answer:visible")).to_have_text(["Zero", "One"])
    await idle(chat)


KEEP_UNSENT = """async (more) => {
  const { answersOf, conversations, keep } = await import("/store.js");
  const [conversation] = await conversations();
  const [{ result, ...zero }] = await answersOf(conversation.id);
  const unsent = { ...zero, id: "one", turn: "one", question: "One", text: "", sessionId: null, at: zero.at + 1 };
  await keep(conversation, [{ ...unsent, ...more, ...(more.text && { result }) }]);
}"""
"""Adds a question of a page that was left before it sent it, or, with a text, the same with its answer."""


async def test_a_question_that_was_not_sent_is_known_as_such_until_it_has_an_answer(chat: Page) -> None:
    await ask(chat, ECHO, "Zero")
    await idle(chat)
    other = await chat.context.new_page()
    await other.goto(chat.url.partition("#")[0])
    await ready(other)
    await other.evaluate(KEEP_UNSENT, {})
    await chat.evaluate("() => { Date.now = ((now) => () => now() + 60_000)(Date.now.bind(Date)); }")
    await chat.get_by_role("button", name="New chat").first.click()
    await chat.get_by_role("link", name="Zero").click()
    unsent = chat.locator(".sentence").filter(has_text="closed before this message was sent")
    await expect(unsent).to_be_visible()
    await other.evaluate(KEEP_ONE_MORE)
    await expect(chat.locator("article")).to_have_count(3)
    await expect(unsent).to_be_visible()
    await expect(chat.get_by_role("button", name="Send")).to_be_visible()
    await other.evaluate(KEEP_UNSENT, {"text": "One"})
    await expect(chat.locator(".answer:visible")).to_have_text(["Zero", "One", "Two"])
    await expect(unsent).to_be_hidden()


async def test_an_answer_that_a_restart_broke_off_can_be_continued(page: Page) -> None:
    async with running_broker(env={**ROOM, "BROKER_DRAIN_TIMEOUT": "1"}) as restarted:
        await page.goto(restarted.url)
        await ready(page)
        turn = await ask(page, ECHO, LONG)
        await reads(turn.locator(".answer"), ALIVE)
        restarted.process.terminate()
        await reads(turn.locator(".sentence"), "The broker was restarted, and the answer broken off.")
        await expect(turn.get_by_role("button", name="Continue")).to_be_enabled()
        await reads(turn.locator(".answer"), ALIVE)


async def test_a_reload_before_the_first_text_waits_for_it(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/slow", "Take your time.")
    await reads(turn.locator(".status"), "Waiting for the first word")  # "Sending…" until there is a session
    async with chat.expect_request("**/stream/*"):
        await chat.reload()
    await reads(chat.locator(".answer"), re.compile(r"\w+ \w+"))
    await chat.keyboard.press("Escape")
    await idle(chat)


# Models


async def test_models_are_searched_filtered_and_sorted(chat: Page) -> None:
    await expect(chat.locator("#model")).to_contain_text("Rehearsal: Plain")
    await expect(chat.locator("#rehearsal")).to_be_visible()
    await chat.keyboard.press("Control+k")
    dialog = chat.get_by_role("dialog", name="Models")
    search = dialog.get_by_label("Search models")
    await expect(search).to_be_focused()
    await expect(dialog.locator(".option .id").first).to_contain_text("A few paragraphs of Markdown")
    await dialog.get_by_label("Sort by").select_option("context")
    await reads(dialog.locator(".option").first, "131K context")
    await search.fill("ECHO")
    await expect(dialog.locator(".option")).to_have_count(2)
    await dialog.get_by_label("Free only").check()
    await expect(dialog.locator(".option")).to_have_count(1)
    await reads(dialog.locator(".option"), "free")
    await search.press("Enter")
    await expect(dialog).to_be_hidden()
    await chat.reload()
    await expect(chat.locator("#model")).to_contain_text("Rehearsal: Echo (free)")


# What goes wrong

FAULTS = {
    "rate-limited": r"The model is asked by too many right now\.You can try again in \d+ s\.",
    "unavailable": r"The model's service cannot be reached right now\.",
    "server-error": r"The model's service cannot be reached right now\.",
    "timeout": r"The model did not answer in time\.",
    "unauthorized": r"does not accept the broker's key",
    "no-credit": r"has no credit",
    "moderated": r"does not allow this question",
    "rejected": r"did not accept this request",
    "html": r"something that cannot be read",
    "json-error": r"The model's service had an error\.",
    "mid-stream-error": r"The model's service had an error\.",
    "mid-stream-error-string": r"The model's service had an error\.",
    "mid-stream-rate-limited": r"asked by too many",
    "vllm-error": r"The model's service had an error\.",
    "not-json": r"something that cannot be read",
    "truncated": r"The answer was broken off\.",
    "blank": r"The answer was broken off\.",
    "reset": r"The answer was broken off\.",
    "dropped": r"The answer was broken off\.",
    "empty": r"The model ended without a word\.",
    "length": r"Cut off at the longest answer allowed",
    "content-filter": r"Held back by a content filter",
    "stall": r"Nothing has come for \d+ s\. You can wait, or stop\.",
    "hang": r"Nothing has come for \d+ s\. You can wait, or stop\.",
}
CODE = re.compile(r"\b[a-z]+_[a-z_]+\b")


async def test_every_fault_is_told_in_one_sentence(chromium: Browser, broker: RunningBroker) -> None:
    context = await chromium.new_context()
    tabs: asyncio.Queue[Page] = asyncio.Queue()
    for _ in range(5):
        page = await context.new_page()
        await page.goto(broker.url)
        await ready(page)
        tabs.put_nowait(page)

    async def fault(name: str, sentence: str) -> None:
        page = await tabs.get()
        try:
            turn = await ask(page, f"rehearsal/{name}", "Go.")
            await reads(turn.locator(".reply"), re.compile(sentence))
            assert not CODE.search(await turn.inner_text()), name
            await page.keyboard.press("Escape")
            await idle(page)
            await page.get_by_role("button", name="New chat").first.click()
            await expect(page.locator("article")).to_have_count(0)
        finally:
            tabs.put_nowait(page)

    try:
        # Those that take ten seconds first.
        await asyncio.gather(*(fault(*each) for each in reversed(FAULTS.items())))
    finally:
        await context.close()


async def test_a_rate_limit_counts_down_and_tells_its_code_when_asked(chat: Page) -> None:
    turn = await ask(chat, "rehearsal/rate-limited", "Now?")
    await reads(turn.locator(".wait"), "You can try again in 39 s.")
    await expect(turn.locator(".act")).to_be_disabled()
    await expect(turn.locator("code")).to_be_hidden()
    await turn.get_by_text("Details").click()
    await expect(turn.locator("code")).to_have_text("upstream_rate_limited")


async def test_a_connection_cut_twice_with_a_502_between(page: Page, broker: RunningBroker) -> None:
    async with laid_cable(broker.port) as (cable, url):
        await page.goto(url)
        turn = await ask(page, ECHO, LONG)
        await reads(turn.locator(".answer"), ALIVE)
        cable.cut()
        await reads(turn.locator(".status"), "Reconnecting")
        await expect(turn.locator(".status")).to_be_hidden(timeout=PATIENCE)
        cable.down = True
        cable.cut()
        await cable.refused.wait()
        await reads(turn.locator(".status"), "the connection was lost 2 times")
        cable.down = False
        await idle(page)
        await expect(turn.locator(".answer")).to_have_text(LONG)


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
        await expect(stopped.locator(".finish")).to_contain_text("Stopped", timeout=SOONER_THAN_A_TURN)

        waiting = await ask(second, ECHO, "My turn yet?")
        await reads(waiting.locator(".status"), "number 1 of 1")
        await first.get_by_role("button", name="Stop").click()
        await expect(waiting.locator(".answer")).to_have_text("My turn yet?", timeout=PATIENCE)


async def test_a_broker_with_keys_asks_for_one(page: Page) -> None:
    async with running_broker(env={**ROOM, "BROKER_API_KEYS": "reader:a-key-for-the-reader"}) as broker:
        await page.goto(broker.url)
        await page.get_by_label("This broker asks for an access key.").fill("a-key-for-the-reader")
        await page.get_by_role("button", name="Use key").click()
        await expect(page.locator("#model")).to_contain_text("Rehearsal")
        turn = await ask(page, ECHO, "Let me in.")
        await expect(turn.locator(".answer")).to_have_text("Let me in.", timeout=PATIENCE)


# Without a mouse


async def test_the_keyboard_alone_will_do(chat: Page) -> None:
    box = chat.get_by_role("textbox", name="Message")
    await expect(box).to_be_focused()
    await chat.keyboard.press("Control+k")
    await chat.keyboard.type("plain")
    await chat.keyboard.press("Enter")
    await expect(box).to_be_focused()
    await box.press_sequentially("One")
    await box.press("Shift+Enter")
    await box.press_sequentially("Two")
    await box.press("Enter")
    await expect(chat.locator(".asked")).to_have_text("One\nTwo")
    await expect(chat.locator("#conversation")).to_have_attribute("aria-busy", "true")
    await expect(chat.locator("#live")).to_have_text("The answer is being written.")
    await reads(chat.locator(".answer"), re.compile(r"\w+ \w+"))
    await box.press("Escape")
    await reads(chat.locator(".finish"), "Stopped")
    await expect(box).to_be_focused()
    await expect(chat.locator("#conversation")).to_have_attribute("aria-busy", "false")
    await expect(chat.locator("#live")).to_contain_text("The answer is complete.")
    await box.press("ArrowUp")
    await expect(box).to_have_value("One\nTwo")
    await box.press("Escape")
    await expect(box).to_have_value("")
    await chat.keyboard.press("Control+/")
    await expect(chat.get_by_role("dialog", name="Shortcuts")).to_contain_text("Edit the last message")
    await chat.keyboard.press("Escape")
    await chat.keyboard.press("Control+Shift+O")
    await expect(chat.locator("article")).to_have_count(0)


@pytest.mark.parametrize("height", [400, 700])
async def test_a_reader_who_scrolls_up_is_left_there(chat: Page, height: int) -> None:
    await chat.set_viewport_size({"width": 800, "height": height})
    await ask(chat, "rehearsal/long", "Go on.")
    await chat.wait_for_function("() => document.documentElement.scrollHeight > 1500")
    await expect(chat.locator("#toEnd")).to_be_hidden()
    await chat.mouse.move(400, 150)
    await chat.mouse.wheel(0, -500)
    await expect(chat.locator("#toEnd")).to_be_in_viewport(ratio=1)
    place = await chat.evaluate("() => scrollY")
    grown = await chat.evaluate("() => document.documentElement.scrollHeight + 300")
    await chat.wait_for_function("(grown) => document.documentElement.scrollHeight > grown", arg=grown)
    assert await chat.evaluate("() => scrollY") == place
    await chat.get_by_role("button", name="To the end").click()
    await expect(chat.locator("#toEnd")).to_be_hidden()
    await chat.keyboard.press("Escape")
    await idle(chat)


async def test_a_reader_who_scrolls_up_by_a_line_is_left_there(chat: Page) -> None:
    await chat.set_viewport_size({"width": 800, "height": 700})
    await ask(chat, "rehearsal/long", "Go on.")
    await chat.wait_for_function("() => document.documentElement.scrollHeight > 1000")
    await chat.mouse.move(400, 150)
    await chat.mouse.wheel(0, -30)
    await expect(chat.locator("#toEnd")).to_be_visible()
    place = await chat.evaluate("() => scrollY")
    grown = await chat.evaluate("() => document.documentElement.scrollHeight + 300")
    await chat.wait_for_function("(grown) => document.documentElement.scrollHeight > grown", arg=grown)
    assert await chat.evaluate("() => scrollY") == place
    await chat.keyboard.press("Escape")
    await idle(chat)


@pytest.mark.parametrize(
    "path", ["/", "/page.css", "/page.js", "/icon.svg", "/favicon.ico", "/vendor/marked.js"]
)
async def test_the_files_of_the_page_are_guarded_and_revalidated(broker: RunningBroker, path: str) -> None:
    async with aiohttp.ClientSession(broker.url) as session:
        async with session.get(path) as answer:
            assert answer.status == 200
            body = await answer.read()
            assert body
            assert answer.headers["Cache-Control"] == "no-cache"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert "require-trusted-types-for 'script'" in answer.headers["Content-Security-Policy"]
        tag = answer.headers["ETag"]
        async with session.get(path, headers={"If-None-Match": f'"other", W/{tag}'}) as known:
            assert (known.status, await known.read()) == (304, b"")
        async with session.head(path) as head:
            assert (head.status, head.headers["ETag"]) == (200, tag)
        plainly = {"Accept-Encoding": "identity"}
        async with session.get(path, headers=plainly) as plain:
            assert "Content-Encoding" not in plain.headers
            assert await plain.read() == body
