"""The dialects in which an upstream is asked and answers.

A dialect says where a request goes, and what each event of the answer means. All else is the same for every dialect:
the relay, the journal and the books do not know which one an answer is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.core.chat_answer import ChatAnswer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from broker.core.answer import Answer


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to ask and to answer.

    Attributes:
        path: below the upstream's base URL.
        answer: makes what reads one answer.
        is_whole: returns True for a JSON document that is a whole answer, sent in place of a stream.
        picture: what each picture in a request as we write it holds once; within a text its quotes would be escaped.
    """

    path: str
    answer: Callable[..., Answer]
    is_whole: Callable[[Mapping[str, Any]], bool]
    picture: bytes

    def count_pictures(self, request: bytes) -> int:
        """The pictures in a request that we wrote."""
        return request.count(self.picture)


CHAT = Dialect(
    path="chat/completions",
    answer=ChatAnswer,
    is_whole=lambda document: bool(document.get("choices")),
    picture=b'"type":"image_url"',
)

DIALECTS = (CHAT,)
