"""The dialects of requests to an upstream and of its answers.

A dialect says where a request is sent, and what each event of the answer means. All else is the same for every dialect:
the relay, the journal and the usage ledger do not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from broker.core.chat_answer import ChatAnswer
from broker.core.chat_said import said_in_chunk
from broker.core.responses_answer import ResponsesAnswer, is_response
from broker.core.responses_said import is_event, said_in_event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from broker.core.answer import Answer
    from broker.core.said import Said


DialectName = Literal["chat", "responses"]
"""What a stored session calls its dialect."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """One format of requests and answers.

    Attributes:
        path: below the upstream's base URL.
        answer: makes what reads one answer.
        is_whole: returns True for a JSON document that is a whole answer, sent in place of a stream.
        has_two_caps: the cap on the output has two names, of which a service may know only one.
        picture: bytes that each picture in a request that we wrote has once; within a text the quotes are escaped.
    """

    path: str
    answer: Callable[..., Answer]
    is_whole: Callable[[Mapping[str, Any]], bool]
    has_two_caps: bool
    picture: bytes

    def count_pictures(self, request: bytes) -> int:
        """Return the number of pictures in a request that we wrote."""
        return request.count(self.picture)


CHAT = Dialect(
    path="chat/completions",
    answer=ChatAnswer,
    is_whole=lambda document: bool(document.get("choices")),
    has_two_caps=True,
    picture=b'"type":"image_url"',
)

RESPONSES = Dialect(
    path="responses",
    answer=ResponsesAnswer,
    is_whole=is_response,
    has_two_caps=False,
    picture=b'"type":"input_image"',
)

DIALECTS: Mapping[DialectName, Dialect] = {"chat": CHAT, "responses": RESPONSES}


def said_in(chunk: Mapping[str, Any], deltas: bool | None) -> tuple[Said, bool | None]:
    """Return the contents of a chunk of any dialect, and `deltas` for the next chunk.

    Args:
        chunk: the parsed chunk.
        deltas: as for `chat_said.said_in_chunk`; False for the first chunk of an answer.

    Raises:
        DeltasUnknown: `deltas` is None, but is needed.
    """
    return (said_in_event(chunk), True) if is_event(chunk) else said_in_chunk(chunk, deltas)
