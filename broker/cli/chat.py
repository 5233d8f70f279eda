"""`broker chat`: one turn of a conversation through a running broker, printed as it streams.

`broker/cli/turn.py` decides what to do with each event; `conversation.py` has the conversation of several turns.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from aiohttp.hdrs import RETRY_AFTER
from rich.console import Console

from broker.cli.output import Output, OutputError, require_output, write
from broker.cli.pieces import Piece
from broker.cli.talk import NO_BROKER, Broker, TalkError, broker_at, refusal, whole
from broker.cli.turn import End, Turn
from broker.cli.words import BAD_USE, complain, print_note, printable
from broker.core.sse import Decoder, EventTooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence


LONGEST_TEXT = 16 * 1024 * 1024
LARGEST_EVENT = 64 * 1024 * 1024
# The broker sends a comment after each silence of 15 s (by default).
LONGEST_SILENCE = 120.0
CANCEL_TIMEOUT = 3.0


class _UnusableTextError(Exception):
    """Standard input cannot be sent; the text is a sentence for a person."""


def chat(text: str, *, model: str | None, url: str, token: str | None = None) -> int:
    """Send `text` (or standard input for `-`), print the answer, and return the exit status.

    Raises:
        KeyboardInterrupt: Ctrl-C; the session is cancelled.
        OutputError: standard output is closed; the session is cancelled.
    """
    require_output()
    show = Show()
    try:
        said = _standard_input() if text == "-" else text
        if not said.strip():
            return complain("there is nothing to say.", BAD_USE)
        answer = exchange([{"role": "user", "content": said}], model, url, token, show)
    except _UnusableTextError as error:
        return complain(error, BAD_USE)
    except TalkError as error:
        return complain(error)
    show.end(answer.end)
    return answer.end.status


class Exchange(NamedTuple):
    """An answer that was printed.

    Attributes:
        end: how it ended.
        model: the model that was asked, empty if the broker does not say.
        dropped: number of messages that the broker left out.
    """

    end: End
    model: str
    dropped: int


def exchange(
    messages: Sequence[Mapping[str, Any]], model: str | None, url: str, token: str | None, show: Show
) -> Exchange:
    """Send messages and print the answer as it streams.

    Raises:
        TalkError: the broker cannot be reached, or refuses the request.
        KeyboardInterrupt: Ctrl-C; the session is cancelled.
        OutputError: standard output is closed; the session is cancelled.
    """
    return asyncio.run(_exchange(messages, model, url, token, show))


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


async def _exchange(
    messages: Sequence[Mapping[str, Any]], model: str | None, url: str, token: str | None, show: Show
) -> Exchange:
    async with broker_at(url, token) as broker:
        prepared = await _prepare(broker, messages, model)
        session_id = str(_field(prepared, "sessionId"))
        try:
            end = await _follow(broker, session_id, Turn(), show)
        except asyncio.CancelledError:
            show.note(await _cancel(broker, session_id))
            raise
        except OutputError:
            await _cancel(broker, session_id)
            raise
    told = orjson.loads(prepared)
    dropped = told.get("droppedMessages")
    return Exchange(end, str(told.get("model") or model or ""), dropped if isinstance(dropped, int) else 0)


async def _prepare(broker: Broker, messages: Sequence[Mapping[str, Any]], model: str | None) -> bytes:
    request: dict[str, Any] = {"messages": messages}
    if model is not None:
        request["model"] = model
    try:
        return await broker.ask("POST", "/prepare", body=request)
    except TalkError as error:
        if model is not None or not _lacks_model(error):
            raise
        return await broker.ask("POST", "/prepare", body={**request, "model": await _first_model(broker)})


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
    """Follow the session over one or more connections, to its end."""
    while turn.end is None:
        # A connection that breaks counts like one that ends: the turn limits how often that may happen.
        with suppress(TalkError):
            await _follow_connection(broker, session_id, turn, show)
        if turn.end is None:
            if turn.waits_for:
                show.note(f"{turn.waits_for} Waiting.")
            await asyncio.sleep(turn.connection_over())
    return turn.end


async def _follow_connection(broker: Broker, session_id: str, turn: Turn, show: Show) -> None:
    """Follow one connection until it or the turn has ended.

    Raises:
        TalkError: it broke, or the broker is not available now.
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
    """Cancel the session at the broker, and return a sentence on the result."""
    try:
        async with asyncio.timeout(CANCEL_TIMEOUT):
            await broker.ask("DELETE", f"/stream/{session_id}")
    except (TalkError, TimeoutError):
        return "It could not be cancelled; it will stop by itself, since nobody watches."
    return "Cancelled."


class Show:
    """Prints the answer: text to standard output, everything else to standard error."""

    def __init__(self) -> None:
        output = Output()
        self._terminal = Console(file=output) if output.isatty() else None
        self._last = Piece("\n")
        self._last_note = ""
        self._said: list[str] = []

    @property
    def text(self) -> str:
        """Return the text of the answer so far, without thoughts."""
        return "".join(self._said)

    def piece(self, piece: Piece) -> None:
        """Print a part of the answer. Thoughts go to standard error, because they are not for programs."""
        if not piece.thought:
            self._said.append(piece.text)
        self._print(piece)

    def _print(self, piece: Piece) -> None:
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
        """Print a note to standard error, once."""
        if words != self._last_note:
            self._end_line()
            print_note(words)
        self._last_note = words

    def end(self, end: End) -> None:
        """Print how the answer ended."""
        self.note(end.note if end.status == 0 else f"broker: {end.note}")

    def _end_line(self) -> None:
        if not self._last.text.endswith("\n"):
            self._print(Piece("\n", thought=self._last.thought))
