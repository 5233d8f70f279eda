"""`broker chat`: one turn of a conversation through a running broker, printed as it streams.

What to do with what arrives is decided in `broker/cli/turn.py`.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp.hdrs import RETRY_AFTER
from rich.console import Console

from broker.cli.output import Output, OutputError, require_output, write
from broker.cli.pieces import Piece
from broker.cli.talk import NO_BROKER, Broker, TalkError, broker_at, refusal, whole
from broker.cli.turn import End, Turn
from broker.cli.words import BAD_USE, complain, printable, tell
from broker.core.sse import Decoder, EventTooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


LONGEST_TEXT = 16 * 1024 * 1024
LARGEST_EVENT = 64 * 1024 * 1024
# A broker breaks every silence with a comment, every 15 s by default.
LONGEST_SILENCE = 120.0
CANCEL_TIMEOUT = 3.0


class _UnusableTextError(Exception):
    """What standard input holds cannot be said; the text is a sentence for a person."""


def chat(text: str, *, model: str | None, url: str, token: str | None = None) -> int:
    """Say `text` (`-`: what standard input holds), print the answer, and return the exit status.

    Raises:
        KeyboardInterrupt: Ctrl-C; the session is cancelled.
        OutputError: there is nowhere to print any more; likewise.
    """
    require_output()
    try:
        said = _standard_input() if text == "-" else text
        if not said.strip():
            return complain("there is nothing to say.", BAD_USE)
        return asyncio.run(_chat(said, model, url, token))
    except _UnusableTextError as error:
        return complain(error, BAD_USE)
    except TalkError as error:
        return complain(error)


def _standard_input() -> str:
    if sys.stdin is None:
        return ""
    try:
        said = sys.stdin.buffer.read(LONGEST_TEXT + 1)
        if len(said) > LONGEST_TEXT:
            raise _UnusableTextError(f"standard input is longer than {LONGEST_TEXT} bytes.")
        return said.decode()
    except UnicodeDecodeError:
        raise _UnusableTextError("standard input is not UTF-8 text.") from None
    except OSError as error:
        raise _UnusableTextError(f"standard input cannot be read ({error.strerror}).") from None


async def _chat(text: str, model: str | None, url: str, token: str | None) -> int:
    show = Show()
    async with broker_at(url, token) as broker:
        session_id = await _prepare(broker, text, model)
        try:
            end = await _follow(broker, session_id, Turn(), show)
        except asyncio.CancelledError:
            show.note(await _cancel(broker, session_id))
            raise
        except OutputError:
            await _cancel(broker, session_id)
            raise
    show.end(end)
    return end.status


async def _prepare(broker: Broker, text: str, model: str | None) -> str:
    request: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    if model is not None:
        request["model"] = model
    try:
        answer = await broker.ask("POST", "/prepare", body=request)
    except TalkError as error:
        if model is not None or not _lacks_model(error):
            raise
        answer = await broker.ask("POST", "/prepare", body={**request, "model": await _first_model(broker)})
    return str(_field(answer, "sessionId"))


def _lacks_model(error: TalkError) -> bool:
    details = error.document.get("details")
    return isinstance(details, list) and any(
        at.get("field") == "model" for at in details if isinstance(at, dict)
    )


async def _first_model(broker: Broker) -> str:
    models = _field(await broker.ask("GET", "/models"), "data")
    if not models:
        raise TalkError("This broker has no models to ask.")
    try:
        return str(models[0]["id"])
    except (LookupError, TypeError):
        raise TalkError(NO_BROKER) from None


def _field(answer: bytes, name: str) -> Any:
    try:
        return orjson.loads(answer)[name]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise TalkError(NO_BROKER) from None


async def _follow(broker: Broker, session_id: str, turn: Turn, show: Show) -> End:
    """Follow the session, line after line, to its end."""
    while turn.end is None:
        # A line that breaks is like one that ends: the turn knows how often that may happen.
        with suppress(TalkError):
            await _follow_line(broker, session_id, turn, show)
        if turn.end is None:
            if turn.waits_for:
                show.note(f"{turn.waits_for} Waiting.")
            await asyncio.sleep(turn.line_over())
    return turn.end


async def _follow_line(broker: Broker, session_id: str, turn: Turn, show: Show) -> None:
    """Follow one line until it is over or the turn is.

    Raises:
        TalkError: it broke, or the broker is out of order for now.
    """
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
    if turn.cursor:
        headers["Last-Event-ID"] = turn.cursor
    path = f"/stream/{session_id}"
    async with broker.open("GET", path, headers=headers, wait=LONGEST_SILENCE) as answer:
        if answer.status == HTTPStatus.NO_CONTENT:
            turn.gone()
        elif answer.content_type == "text/event-stream":
            await _read(answer.content.iter_any(), turn, show)
        else:
            error = refusal(answer.status, await whole(answer), answer.headers.get(RETRY_AFTER))
            if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise error
            turn.end = End(1, str(error))


async def _read(content: AsyncIterator[bytes], turn: Turn, show: Show) -> None:
    decoder = Decoder(max_event_bytes=LARGEST_EVENT)
    async for data in content:
        try:
            frames = decoder.feed(data)
        except EventTooLarge as error:
            turn.end = End(1, f"The broker sent {error}.")
            return
        if decoder.retry is not None:
            turn.come_back_in(decoder.retry)
        for frame in frames:
            for piece in turn.take(frame):
                show.piece(piece)
            if turn.end is not None:
                return


async def _cancel(broker: Broker, session_id: str) -> str:
    """Stop the session at the broker, and say in words how that went."""
    try:
        async with asyncio.timeout(CANCEL_TIMEOUT):
            await broker.ask("DELETE", f"/stream/{session_id}")
    except (TalkError, TimeoutError):
        return "It could not be cancelled; it will stop by itself, since nobody watches."
    return "Cancelled."


class Show:
    """Where the answer is printed: text to standard output, everything else to standard error."""

    def __init__(self) -> None:
        output = Output()
        self._terminal = Console(file=output) if output.isatty() else None
        self._last = Piece("\n")
        self._last_note = ""

    def piece(self, piece: Piece) -> None:
        """Print some of the answer. Thoughts are for a person to see, and no part of what a program reads."""
        if self._terminal is None:
            if not piece.thought:
                write(piece.text)
                self._last = piece
            return
        if piece.thought != self._last.thought:
            self._end_line()
        shown = printable(piece.text)
        self._terminal.out(shown, style="dim" if piece.thought else None, highlight=False, end="")
        self._last = piece

    def note(self, words: str) -> None:
        """Say something beside the answer, once."""
        if words != self._last_note:
            self._end_line()
            tell(words)
        self._last_note = words

    def end(self, end: End) -> None:
        """Say how it ended."""
        self.note(end.note if end.status == 0 else f"broker: {end.note}")

    def _end_line(self) -> None:
        if not self._last.text.endswith("\n"):
            self.piece(Piece("\n", thought=self._last.thought))
