"""The dialects in which an upstream is asked and answers.

A dialect says where a request goes, and what each event of the answer means. All else is the same for every dialect:
the relay, the journal and the books do not know which one an answer is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.core.answer import parse_chunk
from broker.core.chat_answer import ChatAnswer
from broker.core.chat_said import said_in_chunk
from broker.core.errors import UpstreamInvalid
from broker.core.responses_answer import ResponsesAnswer, is_response
from broker.core.responses_said import is_event, said_in_event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from broker.core.answer import Answer
    from broker.core.said import Said


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to ask and to answer.

    Attributes:
        path: below the upstream's base URL.
        answer: makes what reads one answer.
        is_whole: returns True for a JSON document that is a whole answer, sent in place of a stream.
        has_two_caps: the cap on the output has two names, of which a service may know only one.
        picture: what each picture in a request as we write it holds once; within a text its quotes would be escaped.
    """

    path: str
    answer: Callable[..., Answer]
    is_whole: Callable[[Mapping[str, Any]], bool]
    has_two_caps: bool
    picture: bytes

    def count_pictures(self, request: bytes) -> int:
        """The pictures in a request that we wrote."""
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

DIALECTS = (CHAT, RESPONSES)


def dialect_of_request(request: bytes) -> Dialect:
    """The dialect of a request that we wrote: one of Responses begins with its input."""
    return RESPONSES if request.startswith(b'{"input":') else CHAT


def dialect_of_chunk(data: bytes) -> Dialect:
    """The dialect of an answer by its first chunk as it was relayed: events of a response tell their type."""
    try:
        _, chunk = parse_chunk(data)
    except UpstreamInvalid:
        return CHAT
    return RESPONSES if is_event(chunk) else CHAT


def said_in(chunk: Mapping[str, Any], deltas: bool | None) -> tuple[Said, bool | None]:
    """Return what a chunk of any dialect says, and the `deltas` for the chunk behind it.

    Args:
        chunk: parsed.
        deltas: as for `chat_said.said_in_chunk`; False for the first chunk of an answer.

    Raises:
        DeltasUnknown: `deltas` is None, and has to be known.
    """
    return (said_in_event(chunk), True) if is_event(chunk) else said_in_chunk(chunk, deltas)
