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
from rich.console import Console

from broker.cli.talk import Broker, TalkError, broker_at, refusal
from broker.cli.turn import End, Piece, Turn
from broker.cli.words import BAD_USE, complain, printable
from broker.core.sse import Decoder, EventTooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


LONGEST_TEXT = 16 * 1024 * 1024
LARGEST_EVENT = 64 * 1024 * 1024
# A broker breaks every silence with a comment, every 15 s by default.
LONGEST_SILENCE = 120.0
CANCEL_TIMEOUT = 3.0
INTERRUPTED = 130


def chat(text: str, *, model: str | None, url: str) -> int:
    """Say `text` (`-`: what standard input holds), print the answer, and return the exit status."""
    try:
        said = sys.stdin.read(LONGEST_TEXT) if text == "-" else text
        if not said.strip():
            return complain("there is nothing to say.", BAD_USE)
        return asyncio.run(_chat(said, model, url))
    except KeyboardInterrupt:
        return INTERRUPTED
    except TalkError as error:
        return complain(error)


async def _chat(text: str, model: str | None, url: str) -> int:
    show = Show()
    async with broker_at(url) as broker:
        session_id = await _prepare(broker, text, model)
        turn = Turn()
        try:
            end = await _follow(broker, session_id, turn, show)
        except (asyncio.CancelledError, BrokenPipeError):
            await _cancel(broker, session_id, show)
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
    return str(models[0]["id"])


def _field(answer: bytes, name: str) -> Any:
    try:
        return orjson.loads(answer)[name]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise TalkError("What answers there is not a session broker.") from None


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
            error = refusal(answer.status, await answer.content.read(LARGEST_EVENT))
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


async def _cancel(broker: Broker, session_id: str, show: Show) -> None:
    try:
        async with asyncio.timeout(CANCEL_TIMEOUT):
            await broker.ask("DELETE", f"/stream/{session_id}")
    except (TalkError, TimeoutError):
        show.note("It could not be cancelled; it will stop by itself, since nobody watches.")
    else:
        show.note("Cancelled.")


class Show:
    """Where the answer is printed: text to standard output, everything else to standard error."""

    def __init__(self) -> None:
        self._terminal = Console(highlight=False, markup=False, emoji=False) if sys.stdout.isatty() else None
        self._last = Piece("\n")
        self._last_note = ""

    def piece(self, piece: Piece) -> None:
        """Print some of the answer. Thoughts are for a person to see, and no part of what a program reads."""
        if self._terminal is None:
            if not piece.thought:
                self._write(piece)
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
            print(printable(words), file=sys.stderr)
        self._last_note = words

    def end(self, end: End) -> None:
        """Say how it ended."""
        self.note(end.note if end.status == 0 else f"broker: {end.note}")

    def _write(self, piece: Piece) -> None:
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        self._last = piece

    def _end_line(self) -> None:
        if not self._last.text.endswith("\n"):
            self.piece(Piece("\n", thought=self._last.thought))
