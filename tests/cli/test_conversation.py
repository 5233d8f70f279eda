"""`broker chat` without a text: a conversation on a real terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from broker.cli.conversation import MAX_SENT, Conversation
from tests.cli.fake_broker import FakeBroker, fake_broker, run
from tests.system.harness import clean_environment, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

UP = b"\x1b[A"
CTRL_D = b"\x04"
CTRL_C = b"\x03"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# What is sent


def test_a_turn_is_sent_with_all_before_it() -> None:
    conversation = Conversation()
    assert conversation.say("One?") == [user("One?")]
    conversation.answered("1")
    assert conversation.say("Two?") == [user("One?"), assistant("1"), user("Two?")]


def test_a_question_without_an_answer_is_not_repeated() -> None:
    conversation = Conversation()
    conversation.say("One?")
    conversation.answered("")
    assert conversation.say("Two?") == [user("Two?")]


def test_a_long_conversation_is_sent_from_a_question_on() -> None:
    conversation = Conversation()
    for n in range(MAX_SENT):
        sent = conversation.say(str(n))
        conversation.answered(f"answer {n}")
    assert len(sent) <= MAX_SENT
    assert sent[0]["role"] == "user"
    assert sent[-1] == user(str(MAX_SENT - 1))


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("/model a/b", "The next answer is from a/b. The conversation goes on."),
        ("/model", "The model is the choice of the broker; `broker models` lists others."),
        ("/new", "A new conversation."),
        ("/quit", ""),
    ],
)
def test_a_command_says_what_it_did(line: str, note: str) -> None:
    assert Conversation().command(line) == note


def test_commands_change_the_conversation() -> None:
    conversation = Conversation("x/y")
    conversation.say("One?")
    conversation.command("  /model   a/b ")
    assert (conversation.model, len(conversation.messages)) == ("a/b", 1)
    conversation.command("/new")
    assert (conversation.model, conversation.messages, conversation.over) == ("a/b", [], False)
    assert "There is no command /nwe." in conversation.command("/nwe")
    conversation.command("/exit")
    assert conversation.over


# On a terminal


class Terminal:
    """A terminal with the command on it."""

    def __init__(self, url: str) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "broker", "chat", "--url", url],
            env=clean_environment({"TERM": "xterm", "COLUMNS": "200"}),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._shown = ""

    async def until(self, words: str) -> None:
        """Read until the words have been shown, after those of the last call."""
        async with asyncio.timeout(30):
            while words not in self._shown:
                self._shown += (await asyncio.to_thread(os.read, self.ours, 4096)).decode()
        self._shown = self._shown.partition(words)[2]

    async def until_it_waits(self) -> None:
        """Wait until the command sleeps. A signal between its prompt and its wait for a key counts at the next key."""
        await eventually(self._sleeps)

    def _sleeps(self) -> bool:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"

    def keys(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


@asynccontextmanager
async def conversation(*lines: Any, **told: Any) -> AsyncIterator[tuple[Terminal, FakeBroker]]:
    async with fake_broker(*lines, **told) as broker:
        terminal = Terminal(broker.url)
        try:
            await terminal.until("> ")
            yield terminal, broker
        finally:
            terminal.close()


def answering(text: str) -> Any:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chunk = f'{{"choices": [{{"delta": {{"content": "{text}"}}}}]}}'
        done = '{"finishReason": "stop", "model": "a/b"}'
        for number, (event, data) in enumerate((("chunk", chunk), ("done", done)), 1):
            await response.write(f"id: 1-{number}\nevent: {event}\ndata: {data}\n\n".encode())
        return response

    return answer


async def hanging(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    chunk = '{"choices": [{"delta": {"content": "Half an"}}]}'
    await response.write(f"id: 1-1\nevent: chunk\ndata: {chunk}\n\n".encode())
    await asyncio.Event().wait()
    return response


async def test_a_conversation_remembers_and_edits() -> None:
    async with conversation(answering("1."), answering("2."), answering("3.")) as (terminal, broker):
        terminal.keys(b"One?\r")
        await terminal.until("1.")
        await terminal.until("> ")
        terminal.keys(UP + b"?\r")  # the line before, with another question mark
        await terminal.until("2.")
        await terminal.until("> ")
        terminal.keys(b"/new\r")
        await terminal.until("A new conversation.")
        terminal.keys(b"/model x/y\r")
        await terminal.until("The next answer is from x/y.")
        terminal.keys(b"Three?\r")
        await terminal.until("3.")
        await terminal.until("> ")
        terminal.keys(CTRL_D)
        assert await asyncio.to_thread(terminal.process.wait, 20) == 0
    assert [each["messages"] for each in broker.prepared] == [
        [user("One?")],
        [user("One?"), assistant("1."), user("One??")],
        [user("Three?")],
    ]
    assert broker.prepared[-1]["model"] == "x/y"


async def test_ctrl_c_stops_the_answer_and_keeps_the_conversation() -> None:
    async with conversation(hanging, answering("2.")) as (terminal, broker):
        terminal.keys(b"One?\r")
        await terminal.until("Half an")
        terminal.process.send_signal(signal.SIGINT)
        await terminal.until("Cancelled.")
        await terminal.until("> ")
        terminal.keys(b"Two?\r")
        await terminal.until("2.")
        await terminal.until("> ")
        assert broker.asked == ["cancel"]
        assert broker.prepared[1]["messages"] == [user("One?"), assistant("Half an"), user("Two?")]
        await terminal.until_it_waits()
        terminal.process.send_signal(signal.SIGINT)  # drops the line
        await terminal.until("> ")
        terminal.keys(b"/quit\r")
        assert await asyncio.to_thread(terminal.process.wait, 20) == 0


async def test_a_refusal_does_not_end_the_conversation() -> None:
    refused = web.json_response({"error": {"code": "rate_limited", "message": "Wait."}}, status=429)
    async with conversation(answering("1."), prepare=[refused]) as (terminal, broker):
        terminal.keys(b"One?\r")
        await terminal.until("broker: Wait.")
        await terminal.until("> ")
        terminal.keys(b"Again?\r")
        await terminal.until("1.")
        await eventually(lambda: len(broker.prepared) == 2)
        assert broker.prepared[1]["messages"] == [user("Again?")]


async def test_a_pipe_is_no_place_for_a_conversation() -> None:
    told = "broker: TEXT is missing: a conversation without it needs a terminal\n"
    assert await run("chat", typed="Hello\n") == (2, "", told)
