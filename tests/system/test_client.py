"""The browser client on a page of another origin, in a real Chromium, and in Node."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode, urlsplit

import aiohttp
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Request, Response, Route

from tests.system.browser import README, foreign_site, laid_cable, launched_chromium
from tests.system.harness import RunningBroker, running_broker
from tests.system.npm import BROWSER, CLIENT, MAKING_TIMEOUT, STRICT, ran

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOM = {"BROKER_RATE_LIMIT": "10000/minute", "BROKER_MAX_CONCURRENT_STREAMS": "50", "BROKER_RETRY_MS": "500"}
KEYS = {**ROOM, "BROKER_API_KEYS": "reader:a-key-for-the-reader"}
ONE = {**ROOM, "BROKER_MAX_CONCURRENT_STREAMS": "1"}
PATIENCE = 60_000
LONG = " ".join(f"word{n}" for n in range(500))  # the echo of it takes about five seconds
UNDER_WAY = "window.text?.includes('word40 ')"

# The lines of the README, with what their page has around them.
AROUND = """
declare const model: string;
declare const messages: {role: "user" | "assistant"; content: string}[];
declare function show(text: string): void;
"""
TYPED = """
import {BrokerError, chat, resume, type Chat, type Done} from "./client.js";

declare const controller: AbortController;
const answer: Chat = chat({model: "m", messages: [{role: "user", content: "Hello"}], temperature: 1}, {
  base: "", token: async () => "t", signal: controller.signal, EventSource, remember: sessionStorage, keep: true,
  onstate: (state, place) => console.log(state, place?.position, place?.of),
});
for await (const event of answer.events()) {
  if (event.type === "chunk") console.log(event.data.choices?.[0]?.delta?.content);
  else if (event.type === "queued") console.log(event.data.position + event.data.of);
  else if (event.type === "error") console.log(event.data.final, event.data.retryAfter);
}
try {
  const end: Done = await answer.result;
  console.log(end.cost?.toFixed(4), (await answer.stop()).finishReason);
} catch (error) {
  if (error instanceof BrokerError) console.log(error.code, error.retryAfter, error.status);
}
const known: Chat | null = resume(null, null, {remember: localStorage});
const other: Chat = resume(answer.sessionId ?? "", answer.lastEventId);
// @ts-expect-error - a request has messages or an input
chat({model: "m"});
// @ts-expect-error - nothing can be remembered without a storage
resume(null, null, {});
console.log(known?.state === "queued", other.state);
"""

IN_NODE = """
import { EventSource } from "eventsource";
import { chat } from "session-broker-client";

const ask = (model, content) =>
  chat({ model, messages: [{ role: "user", content }] }, { base: process.argv[2], EventSource });
const answer = ask("rehearsal/echo", "From Node");
for await (const text of answer) process.stdout.write(text);
console.log("", (await answer.result).finishReason);
console.log(await ask("rehearsal/mid-stream-error", "Hello").result.catch(error => error.code));
const left = ask("rehearsal/stall", "Hello");
for await (const text of left) break;
console.log((await left.result).finishReason);
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker() -> AsyncIterator[RunningBroker]:
    async with running_broker(env={**ROOM, "BROKER_PAGE": "false"}) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with launched_chromium() as browser:
        yield browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site() -> AsyncIterator[str]:
    async with foreign_site() as url:
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


@pytest_asyncio.fixture(loop_scope="module")
async def client(page: Page, site: str, broker: RunningBroker) -> Page:
    """The page, with the client that the broker serves."""
    return await visit(page, site, broker.url)


async def visit(page: Page, site: str, base: str) -> Page:
    await page.goto(f"{site}/client.html?{urlencode({'base': base})}")
    await page.wait_for_function("!!window.ask")
    return page


class Requests(list[str]):
    """What a page has sent to a broker, as `POST /prepare`."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        page.on("request", self._sent)

    def _sent(self, request: Request) -> None:
        if "/prepare" in request.url or "/stream/" in request.url:
            self.append(f"{request.method} /{request.url.split('/')[3]}")


class Forms(list[str]):
    """The forms in which a page has asked for its streams."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        page.on("request", self._sent)

    def _sent(self, request: Request) -> None:
        if "/stream/" in request.url:
            self.append(parse_qs(urlsplit(request.url).query)["events"][0])


def is_stop(response: Response) -> bool:
    return response.request.method == "DELETE"


def states(told: list[list[Any]]) -> list[str]:
    return [state for state, *_ in told]


@asynccontextmanager
async def held_slot(broker: RunningBroker) -> AsyncIterator[str]:
    """Take a slot of the broker until the block ends; gives the URL that frees it earlier by DELETE."""
    async with aiohttp.ClientSession() as other:
        asked = {"model": "rehearsal/stall", "messages": [{"role": "user", "content": "Hold the line."}]}
        async with other.post(f"{broker.url}/prepare", json=asked) as prepared:
            holding = f"{broker.url}/stream/{(await prepared.json())['sessionId']}"
        async with other.get(holding, headers={"Accept": "text/event-stream"}) as held:
            await held.content.readuntil(b"event: chunk")
            yield holding
            await other.delete(holding)


# Reading


async def test_a_loop_reads_the_text_of_an_answer(client: Page) -> None:
    told = await client.evaluate("""async () => {
      const chat = ask("Say this back to me.");
      const before = [chat.state, chat.sessionId, chat.lastEventId];
      const text = await read(chat);
      return {before, text, result: await chat.result, after: [chat.state, chat.sessionId, chat.lastEventId], states};
    }""")
    assert told["before"] == ["preparing", None, ""]
    assert told["text"] == "Say this back to me."
    assert told["result"]["finishReason"] == "stop"
    assert told["result"]["cost"] > 0
    state, session, cursor = told["after"]
    assert (state, len(session), cursor.endswith(".end")) == ("ended", 36, True)
    assert states(told["states"]) == ["preparing", "connecting", "streaming", "ended"]


async def test_events_are_told_with_their_types(client: Page) -> None:
    events = await client.evaluate("""async () => {
      const events = [];
      for await (const event of ask("One two three").events()) events.push(event);
      return events;
    }""")
    types = [event["type"] for event in events]
    assert set(types) == {"chunk", "done"}
    assert types[-1] == "done"
    deltas = [event["data"]["choices"] for event in events[:-1]]
    assert (
        "".join(choices[0]["delta"].get("content") or "" for choices in deltas if choices) == "One two three"
    )


async def test_a_later_loop_reads_the_whole_answer_again(client: Page) -> None:
    texts = await client.evaluate("""async () => {
      const chat = ask("Twice, please");
      await chat.result;
      return [await read(chat), await read(chat)];
    }""")
    assert texts == ["Twice, please", "Twice, pleaseTwice, please"]


async def test_a_responses_request_gives_text_as_well(client: Page) -> None:
    text = await client.evaluate("read(chat({model: 'rehearsal/echo', input: 'In the other dialect'}))")
    assert text == "In the other dialect"


async def test_a_loop_over_the_text_asks_for_the_short_form(client: Page) -> None:
    forms = Forms(client)
    told = await client.evaluate("""async () => {
      const text = await read(ask("Only text"));
      const parts = [];
      for await (const event of ask("In short", {events: "token"}).events()) parts.push(event);
      for await (const event of ask("In full").events()) ;
      return {text, parts};
    }""")
    assert told["text"] == "Only text"
    assert "".join(event["data"].get("text", "") for event in told["parts"]) == "In short"
    assert {event["type"] for event in told["parts"]} == {"token", "done"}
    assert forms == ["token", "token", "chunk"]


async def test_events_asked_for_behind_the_text_are_complete(client: Page) -> None:
    forms = Forms(client)
    told = await client.evaluate("""async () => {
      const chat = ask("The text first");
      const text = await read(chat);
      const types = [];
      for await (const {type} of chat.events()) types.push(type);
      return {text, types};
    }""")
    assert told["text"] == "The text first"
    assert len(told["types"]) > 4
    assert set(told["types"]) == {"chunk", "done"}
    assert forms == ["token", "chunk"]


# Failures


async def test_a_refused_request_is_an_error_with_its_details(client: Page) -> None:
    told = await client.evaluate("read(chat({model: 'rehearsal/echo', messages: []})).catch(told)")
    assert (told["name"], told["ours"], told["code"]) == ("BrokerError", True, "invalid_request")
    assert (told["status"], told["retryable"]) == (422, False)
    assert told["details"][0]["field"] == "messages"


async def test_an_html_page_of_a_proxy_is_an_error(client: Page) -> None:
    async def answer(route: Route) -> None:
        headers = {"Access-Control-Allow-Origin": "*", "Retry-After": "7"}
        headers["Access-Control-Expose-Headers"] = "Retry-After"
        await route.fulfill(
            status=502, content_type="text/html", body="<h1>Bad gateway</h1>", headers=headers
        )

    await client.route("**/prepare", answer)
    told = await client.evaluate("ask('Hello').result.catch(told)")
    assert (told["ours"], told["code"], told["status"]) == (True, "status_502", 502)
    assert (told["retryable"], told["retryAfter"]) == (True, 7)


async def test_an_unreachable_broker_is_an_error(client: Page) -> None:
    await client.route("**/prepare", lambda route: route.abort())
    told = await client.evaluate("ask('Hello').result.catch(told)")
    assert (told["ours"], told["code"], told["retryable"]) == (True, "unreachable", True)


async def test_a_failed_answer_is_an_error_behind_its_text(client: Page) -> None:
    told = await client.evaluate("""async () => {
      const chat = ask("Hello", {}, "rehearsal/mid-stream-error");
      return [await read(chat).catch(told), await chat.result.catch(told), window.text];
    }""")
    read, result, text = told
    assert read == result
    assert (read["ours"], read["code"], read["retryable"]) == (True, "upstream_error", True)
    assert text


async def test_a_result_that_nobody_uses_is_no_unhandled_rejection(client: Page) -> None:
    await client.evaluate("{ ask('Hello', {}, 'rehearsal/rejected'); }")
    await client.wait_for_function("window.states.at(-1)[0] === 'ended'")  # the fixture checks for exceptions


# Access


@pytest.mark.slow
async def test_a_token_is_asked_again_after_a_401(page: Page, site: str) -> None:
    async with running_broker(env=KEYS) as broker:
        await visit(page, site, broker.url)
        told = await page.evaluate("""async () => {
          const tokens = ["an-old-key", "a-key-for-the-reader", "never"];
          const text = await read(ask("Let me in", {token: async () => tokens.shift()}));
          const refused = await ask("Me too", {token: "an-old-key"}).result.catch(told);
          const often = await ask("Me too", {token: () => "an-old-key"}).result.catch(told);
          return {text, left: tokens, refused, often};
        }""")
    assert (told["text"], told["left"]) == ("Let me in", ["never"])
    for refused in (told["refused"], told["often"]):
        assert (refused["code"], refused["status"], refused["retryable"]) == ("unauthorized", 401, False)


# Leaving


async def test_stop_while_preparing_is_a_cancelled_end(client: Page) -> None:
    async with client.expect_response(is_stop) as stopped:
        told = await client.evaluate("""async () => {
          const chat = ask("Never mind");
          chat.stop();
          return {result: await chat.result, text: await read(chat), state: chat.state};
        }""")
    assert told["result"]["finishReason"] == "cancelled"
    assert (told["text"], told["state"]) == ("", "ended")
    assert (await stopped.value).status == 202


async def test_stop_does_not_wait_for_a_token(client: Page) -> None:
    requests = Requests(client)
    result = await client.evaluate("ask('Never mind', {token: () => new Promise(() => {})}).stop()")
    assert result["finishReason"] == "cancelled"
    assert requests == []


@pytest.mark.slow
async def test_stop_while_queued_gives_the_place_back(page: Page, site: str) -> None:
    async with running_broker(env=ONE) as broker, held_slot(broker):
        await visit(page, site, broker.url)
        await page.evaluate("{ window.waiting = ask('My turn yet?'); }")
        await page.wait_for_function("window.waiting.state === 'queued'")
        async with page.expect_response(is_stop) as stopped:
            result = await page.evaluate("waiting.stop()")
        assert (await stopped.value).status == 202
        assert (result["finishReason"], result["cost"]) == ("cancelled", 0)


@pytest.mark.parametrize("leaving", ["break", "stop", "signal"])
async def test_leaving_an_answer_stops_it_at_the_broker(client: Page, leaving: str) -> None:
    async with client.expect_response(is_stop) as stopped:
        result = await client.evaluate(
            """async ([question, leaving]) => {
              const controller = new AbortController();
              const chat = ask(question, {signal: controller.signal});
              for await (const text of chat) {
                if (leaving === "break") break;
                if (leaving === "stop") chat.stop();
                else controller.abort();
              }
              return chat.result;
            }""",
            [LONG, leaving],
        )
    assert (await stopped.value).status == 202
    assert result["finishReason"] == "cancelled"
    assert result["model"]  # the broker's own end


async def test_a_stop_that_a_proxy_refuses_is_sent_again(client: Page) -> None:
    attempts = 0

    async def refuse_once(route: Route) -> None:
        nonlocal attempts
        attempts += route.request.method == "DELETE"
        await (route.abort() if route.request.method == "DELETE" and attempts == 1 else route.continue_())

    await client.route("**/stream/*", refuse_once)
    async with client.expect_response(is_stop) as stopped:
        await client.evaluate("question => { window.chatting = ask(question); }", LONG)
        await client.wait_for_function("window.chatting.state === 'streaming'")
        result = await client.evaluate("chatting.stop()")
    assert ((await stopped.value).status, attempts) == (202, 2)
    assert result["finishReason"] == "cancelled"


async def test_an_aborted_signal_stops_before_anything_streams(client: Page) -> None:
    requests = Requests(client)
    async with client.expect_response(is_stop):
        result = await client.evaluate("ask('Never mind', {signal: AbortSignal.abort()}).result")
    assert result["finishReason"] == "cancelled"
    assert "GET /stream" not in requests


@pytest.mark.slow
async def test_keep_leaves_the_session_to_be_resumed(client: Page) -> None:
    requests = Requests(client)
    told = await client.evaluate(
        """async question => {
          const left = ask(question, {keep: true});
          let text = "";
          for await (const more of left) {
            text += more;
            if (text.includes("word20 ")) break;
          }
          const {code} = await left.result.catch(told);
          text += await read(resume(left.sessionId, left.lastEventId));
          return {code, text};
        }""",
        LONG,
    )
    assert told == {"code": "left", "text": LONG}
    assert "DELETE /stream" not in requests


async def test_a_resume_behind_the_end_tells_it_again(client: Page) -> None:
    told = await client.evaluate("""async () => {
      const first = ask("All of it");
      const result = await first.result;
      const again = resume(first.sessionId, first.lastEventId);
      return {same: JSON.stringify(await again.result) === JSON.stringify(result), text: await read(again)};
    }""")
    assert told == {"same": True, "text": ""}


# Called twice


async def test_a_chat_that_is_left_and_asked_again_at_once_goes_on(client: Page) -> None:
    """As React does in its StrictMode with an effect and its cleanup."""
    requests = Requests(client)
    told = await client.evaluate("""async () => {
      const first = ask("Only once", {idempotencyKey: "key-of-a-mount"});
      first.stop();
      const second = ask("Only once", {idempotencyKey: "key-of-a-mount"});
      return [(await first.result).finishReason, await read(second), (await second.result).finishReason];
    }""")
    assert told == ["cancelled", "Only once", "stop"]
    assert requests == ["POST /prepare", "GET /stream"]


@pytest.mark.slow
async def test_a_resume_that_is_left_and_asked_again_at_once_goes_on(client: Page) -> None:
    """As React does in its StrictMode after a reload."""
    requests = Requests(client)
    told = await client.evaluate(
        """async question => {
          const remember = sessionStorage;
          for await (const text of ask(question, {remember, keep: true})) break;
          const controller = new AbortController();
          resume(null, "", {remember, signal: controller.signal});
          controller.abort();
          const text = await read(resume(null, "", {remember}));
          return {text, after: resume(null, "", {remember})};
        }""",
        LONG,
    )
    assert told == {"text": LONG, "after": None}
    assert "DELETE /stream" not in requests


@pytest.mark.slow
async def test_two_chats_with_one_key_share_one_session(client: Page) -> None:
    requests = Requests(client)
    told = await client.evaluate(
        """async question => {
          const first = ask(question, {idempotencyKey: "key-for-two"});
          const second = ask(question, {idempotencyKey: "key-for-two"});
          for await (const text of first) break;
          const left = (await first.result).finishReason;
          return {left, text: await read(second), same: first.sessionId === second.sessionId};
        }""",
        LONG,
    )
    assert told == {"left": "cancelled", "text": LONG, "same": True}
    assert requests.count("POST /prepare") == 1
    assert "DELETE /stream" not in requests


# Waiting


@pytest.mark.slow
async def test_a_queued_chat_tells_its_place_and_gets_its_turn(page: Page, site: str) -> None:
    async with running_broker(env=ONE) as broker, held_slot(broker) as holding:
        await visit(page, site, broker.url)
        await page.evaluate("{ window.waiting = ask('My turn yet?'); }")
        await page.wait_for_function("window.waiting.state === 'queued'")
        async with aiohttp.ClientSession() as other, other.delete(holding):
            assert await page.evaluate("read(waiting)") == "My turn yet?"
        told = await page.evaluate("states")
    assert told[:3] == [["preparing"], ["connecting"], ["queued", {"position": 1, "of": 1}]]
    assert states(told)[-2:] == ["streaming", "ended"]


async def test_a_page_that_had_its_turn_waits_in_line_no_more(client: Page) -> None:
    await client.evaluate("""() => {
      class Silent extends EventTarget {
        readyState = 1;
        constructor() {
          super();
          const data = JSON.stringify({position: 1, of: 1});
          queueMicrotask(() => this.dispatchEvent(new MessageEvent("queued", {data})));
        }
        close() {}
      }
      window.silent = ask("Hello", {EventSource: Silent, stallAfter: 0.2});
    }""")
    await client.wait_for_function("window.silent.state === 'stalled'")
    assert states(await client.evaluate("states"))[-2:] == ["queued", "stalled"]


async def test_a_silent_answer_is_told_to_be_stalled(client: Page) -> None:
    await client.evaluate("{ window.silent = ask('Hello', {stallAfter: 0.5}, 'rehearsal/silence'); }")
    await client.wait_for_function("window.silent.state === 'stalled'")
    assert (await client.evaluate("silent.stop()"))["finishReason"] == "cancelled"
    assert "streaming" in states(await client.evaluate("states"))


async def test_onstate_may_be_set_later_and_may_throw(
    chromium: Browser, site: str, broker: RunningBroker
) -> None:
    async with await chromium.new_context() as context:
        page = await visit(await context.new_page(), site, broker.url)
        async with page.expect_event("pageerror") as thrown:
            text = await page.evaluate("""() => {
              const chat = ask("Go on");
              chat.onstate = state => { if (state === "streaming") throw new Error("a bug of the page"); };
              return read(chat);
            }""")
    assert text == "Go on"
    assert (await thrown.value).message == "a bug of the page"


# Bad connections


@pytest.mark.slow
async def test_an_answer_survives_a_cut_and_a_502_of_a_proxy(
    page: Page, site: str, broker: RunningBroker
) -> None:
    async with laid_cable(broker.port) as (cable, base):
        await visit(page, site, base)
        await page.evaluate("question => { window.reading = read(window.chatting = ask(question)); }", LONG)
        await page.wait_for_function(UNDER_WAY)
        cable.cut()
        await page.wait_for_function("window.text.includes('word100 ')")
        cable.down = True
        cable.cut()
        await cable.refused.wait()
        await page.wait_for_function("window.chatting.state === 'reconnecting'")
        cable.down = False
        assert await page.evaluate("reading") == LONG
    assert "reconnecting" in states(await page.evaluate("states"))


async def test_pauses_grow_until_no_session_can_be_there(client: Page) -> None:
    await client.clock.install()
    await client.evaluate("""() => {
      window.attempts = [];
      class Refused extends EventTarget {
        readyState = 2;
        constructor() {
          super();
          attempts.push(Date.now());
          queueMicrotask(() => this.dispatchEvent(new Event("error")));
        }
        close() {}
      }
      window.failing = ask("Hello", {EventSource: Refused}).result.catch(told);
    }""")
    await client.wait_for_function("attempts.length > 0")
    await client.clock.run_for("20:00")
    told, attempts = await client.evaluate("failing.then(told => [told, attempts])")
    assert (told["ours"], told["code"], told["retryable"]) == (True, "unreachable", True)
    pauses = [(later - earlier) / 1000 for earlier, later in pairwise(attempts)]
    assert pauses[0] < 1 < pauses[3]
    assert 10 < max(pauses) < 20
    assert 15 * 60 < sum(pauses) < 16 * 60


@pytest.mark.slow
async def test_pings_are_events_too(page: Page, site: str) -> None:
    async with running_broker(
        env={**ROOM, "BROKER_PING_EVENTS": "true", "BROKER_HEARTBEAT": "0.5"}
    ) as broker:
        await visit(page, site, broker.url)
        data = await page.evaluate("""async () => {
          const chat = ask("Hello", {}, "rehearsal/silence");
          for await (const {type, data} of chat.events()) if (type === "ping") return data;
        }""")
        assert data == {}
        await page.wait_for_function("window.states.at(-1)[0] === 'ended'")


@pytest.mark.slow
@pytest.mark.parametrize(
    "event",
    ["window.dispatchEvent(new Event('online'))", "document.dispatchEvent(new Event('resume'))"],
    ids=["online", "resume"],
)
async def test_a_page_that_is_back_reconnects_at_once(client: Page, event: str) -> None:
    await client.evaluate("question => { window.reading = read(ask(question)); }", LONG)
    await client.wait_for_function(UNDER_WAY)
    async with client.expect_request("**/stream/*lastEventId=*"):
        await client.evaluate(event)
    assert await client.evaluate("reading") == LONG


async def test_a_silent_chat_reconnects_when_its_page_is_looked_at(client: Page) -> None:
    await client.evaluate("{ window.silent = ask('Hello', {stallAfter: 0.5}, 'rehearsal/silence'); }")
    await client.wait_for_function("window.silent.state === 'stalled'")
    async with client.expect_request("**/stream/*lastEventId=*"):
        await client.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    assert (await client.evaluate("silent.stop()"))["finishReason"] == "cancelled"


async def test_a_device_that_slept_reconnects_at_once(client: Page) -> None:
    await client.clock.install()
    await client.evaluate("{ window.silent = ask('Hello', {}, 'rehearsal/silence'); }")
    await client.wait_for_function("window.silent.state === 'streaming'")
    async with client.expect_request("**/stream/*lastEventId=*"):
        await client.clock.fast_forward("10:00")
    assert (await client.evaluate("silent.stop()"))["finishReason"] == "cancelled"


@pytest.mark.slow
async def test_a_reloaded_page_goes_on_where_it_was(client: Page) -> None:
    requests = Requests(client)
    await client.evaluate("question => { read(ask(question, {remember: sessionStorage})); }", LONG)
    await client.wait_for_function(UNDER_WAY)
    await client.evaluate("addEventListener('pagehide', () => { sessionStorage.text = window.text; })")
    await client.reload()
    await client.wait_for_function("!!window.ask")
    told = await client.evaluate("""async () => {
      window.text = sessionStorage.text;
      const options = {remember: sessionStorage};
      const text = await read(resume(null, null, options));
      return {text, after: resume(null, null, options)};
    }""")
    assert told == {"text": LONG, "after": None}
    assert requests == ["POST /prepare", "GET /stream", "GET /stream"]


# A page that is open for long


@pytest.mark.slow
async def test_hundreds_of_answers_leave_nothing_behind(client: Page) -> None:
    """An answer that stayed would take some kilobytes, and its listeners."""
    devtools = await client.context.new_cdp_session(client)
    await devtools.send("Performance.enable")

    async def ask(count: int) -> None:
        await client.evaluate(
            """async count => {
              const one = async () => {
                while (count-- > 0) {
                  const messages = [{role: "user", content: "Hello"}];
                  for await (const text of chat({model: "rehearsal/fast", messages, max_tokens: 1})) ;
                }
              };
              await Promise.all([one(), one(), one(), one(), one()]);
            }""",
            count,
        )

    async def measured() -> tuple[float, float]:
        await devtools.send("HeapProfiler.collectGarbage")
        told = await devtools.send("Performance.getMetrics")
        metrics = {metric["name"]: metric["value"] for metric in told["metrics"]}
        return metrics["JSHeapUsedSize"], metrics["JSEventListeners"]

    await ask(100)
    heap, listeners = await measured()
    await ask(300)
    heap_after, listeners_after = await measured()
    assert heap_after - heap < 300 * 500
    assert listeners_after <= listeners


# The package


@pytest.mark.slow
@pytest.mark.timeout(MAKING_TIMEOUT)
async def test_the_committed_client_is_the_build_of_its_source(built_client: Path) -> None:
    for name in ("client.js", "client.d.ts"):
        assert (built_client / name).read_text() == (CLIENT / name).read_text()


@pytest.mark.slow
@pytest.mark.timeout(MAKING_TIMEOUT)
async def test_the_package_holds_code_types_and_maps(project: Path) -> None:
    package = project / "node_modules" / "session-broker-client"
    files = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    sources = {f"src/{name}.ts" for name in ("ai-sdk", "client", "react", "tool-calls")}
    built = {
        source.replace("src/", "dist/").replace(".ts", f".{kind}")
        for source in sources
        for kind in ("js", "js.map", "d.ts")
    }
    assert files == {"LICENSE", "README.md", "package.json"} | sources | built
    assert (CLIENT / "LICENSE").read_text() == (README.parent / "LICENSE").read_text()
    map_of_code = json.loads((package / "dist/client.js.map").read_text())
    assert map_of_code["sourcesContent"] == [(CLIENT / "src/client.ts").read_text()]


@pytest.mark.slow
@pytest.mark.timeout(MAKING_TIMEOUT)
async def test_the_types_are_strict_typescript(project: Path) -> None:
    """Resolved as Node does it; the recipes resolve them as bundlers do."""
    (lines,) = re.findall(r"^```ts\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    name = '"session-broker-client"'
    (project / "lines.ts").write_text(AROUND + lines.replace('"https://broker.example/client.js"', name))
    (project / "typed.ts").write_text(TYPED.replace('"./client.js"', name))
    sources = [str(project / each) for each in ("lines.ts", "typed.ts")]
    exact = ("--exactOptionalPropertyTypes", "--module", "nodenext", "--moduleResolution", "nodenext")
    compiler = str(project.parent / "node_modules" / ".bin" / "tsc")
    status, told = await ran(compiler, *STRICT, *BROWSER, *exact, *sources)
    assert (status, told) == (0, "")


@pytest.mark.slow
@pytest.mark.timeout(MAKING_TIMEOUT)
async def test_the_client_runs_in_node(project: Path, broker: RunningBroker) -> None:
    (project / "page.mjs").write_text(IN_NODE)
    node = shutil.which("node") or "node"
    assert await ran(node, str(project / "page.mjs"), broker.url) == (
        0,
        "From Node stop\nupstream_error\ncancelled\n",
    )
