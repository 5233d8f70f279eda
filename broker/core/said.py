"""What a chunk says to whoever only wants the words, in whatever dialect it is: the value. No I/O.

The rules are those of the dialects: `chat_said` and `responses_said`. `dialect.said_in` knows both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Said(NamedTuple):
    """What a chunk says.

    Attributes:
        text: of the answer, a refusal included.
        reasoning: what the model thinks, or a summary of it, where it can be read.
        calls: of functions, as the upstream sent them: in a chat pieces of calls, else whole ``function_call`` items.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()


NOTHING = Said()
