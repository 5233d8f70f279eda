"""The contents of a chunk of any dialect, for people: text, reasoning, calls. No I/O.

The rules are in `chat_said` and `responses_said`; `dialect.said_in` knows both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Said(NamedTuple):
    """The contents of a chunk.

    Attributes:
        text: text of the answer, including refusals.
        reasoning: reasoning of the model, or a summary of it, where it is readable.
        calls: function calls as the upstream sent them: pieces of calls in a chat, whole ``function_call`` items
            otherwise.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()


NOTHING = Said()
