"""`broker chat` without TEXT: a conversation on a terminal, turn after turn through a running broker.

The conversation is in this process alone, and gone with it: nothing is written to a file.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from broker.cli.chat import Show, exchange
from broker.cli.output import Output, require_output, write
from broker.cli.talk import TalkError
from broker.cli.words import BAD_USE, complain, print_note

MAX_SENT = 100
"""Messages that are sent with a turn; older ones are left out. A broker takes 200 by default."""

HELP = "/model NAME asks another model, /new begins again, Ctrl-C stops an answer, Ctrl-D or /quit ends it."

_PROMPT = "> "


class Conversation:
    """The messages of a conversation, and what its commands change.

    Attributes:
        model: the model to ask; None for the broker's own choice.
        messages: what was said and answered.
        over: True once its end was asked for.
    """

    def __init__(self, model: str | None = None) -> None:
        self.model = model
        self.messages: list[dict[str, Any]] = []
        self.over = False

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says, and return a note on it."""
        word, _, rest = line.strip().partition(" ")
        name = rest.strip()
        match word:
            case "/model" if name:
                self.model = name
                return f"The next answer is from {name}. The conversation goes on."
            case "/model":
                return (
                    f"The model is {self.model or 'the choice of the broker'}; `broker models` lists others."
                )
            case "/new":
                self.messages.clear()
                return "A new conversation."
            case "/quit" | "/exit":
                self.over = True
                return ""
            case "/help":
                return HELP
        return f"There is no command {word}. {HELP}"

    def say(self, text: str) -> list[dict[str, Any]]:
        """Add what the user says, and return the messages to send."""
        self.messages.append({"role": "user", "content": text})
        sent = self.messages[-MAX_SENT:]
        while sent[0]["role"] != "user":  # an answer without its question
            sent = sent[1:]
        return sent

    def answered(self, text: str) -> None:
        """Add an answer, or the part of it that came. Without any text, the question is as if it was not asked."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()


def converse(*, model: str | None, url: str, token: str | None = None) -> int:
    """Read lines and print answers until the end of the input, and return the exit status.

    Raises:
        OutputError: standard output is closed.
    """
    require_output()
    if sys.stdin is None or not sys.stdin.isatty() or not Output().isatty():
        return complain("TEXT is missing: a conversation without it needs a terminal", BAD_USE)
    with suppress(ImportError):  # where there is none, lines are read without editing
        import readline  # noqa: F401, PLC0415 - importing it gives `input` arrow keys and a history
    print_note(HELP)
    conversation = Conversation(model)
    while not conversation.over:
        try:
            line = input(_PROMPT)
        except EOFError:
            write("\n")
            break
        except KeyboardInterrupt:  # as in a shell: the line is dropped
            write("\n")
            continue
        except UnicodeDecodeError:
            complain("that is not UTF-8 text.")
            continue
        if line.lstrip().startswith("/"):
            if note := conversation.command(line):
                print_note(note)
        elif line.strip():
            _turn(conversation, line, url, token)
    return 0


def _turn(conversation: Conversation, text: str, url: str, token: str | None) -> None:
    """Ask, and print the answer. Whatever fails is told, and the conversation goes on."""
    show = Show()
    try:
        answer = exchange(conversation.say(text), conversation.model, url, token, show)
    except TalkError as error:
        complain(error)
    except KeyboardInterrupt:
        pass  # the session was cancelled, and a note says so
    else:
        show.end(answer.end)
        conversation.model = conversation.model or answer.model
        if answer.dropped:
            print_note(f"The {answer.dropped} oldest messages were left out, to fit the model.")
    conversation.answered(show.text)
