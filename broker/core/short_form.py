"""The short form of a session, ``?events=token``: only the contents of each chunk. No I/O.

It is made from the encoded events of the long form, since these are in memory and in the journal. An event keeps its
number, and a chunk without contents is left out.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from broker.core.answer import parse_relayed
from broker.core.dialect import said_in
from broker.core.sse import decode_data, encode_event

if TYPE_CHECKING:
    from collections.abc import Iterator

START = encode_event("start", b"{}")
"""The first event of a session in the short form."""

_BEFORE_DATA = b"\nevent: chunk\n"


class Short(NamedTuple):
    """Events in the short form.

    Attributes:
        events: the encoded events; empty where no chunk has contents.
        deltas: whether any chunk so far was a delta, which is needed for later ones.
    """

    events: bytes
    deltas: bool | None


def shorten(events: bytes, deltas: bool | None) -> Short:
    """Return chunk events in the short form.

    Args:
        events: encoded and complete.
        deltas: `Short.deltas` of the events before them; False at the beginning of a session, None if unknown.

    Raises:
        DeltasUnknown: their contents depend on `deltas`, which is None.
    """
    short = []
    for event in events.split(b"\n\n"):
        head, found, encoded = event.partition(_BEFORE_DATA)
        if not found:
            continue  # after the last event
        said, deltas = said_in(parse_relayed(decode_data(encoded)), deltas)
        members: dict[str, Any] = {"text": said.text, "reasoning": said.reasoning, "toolCalls": said.calls}
        members = {name: value for name, value in members.items() if value}
        if members and (written := _to_json(members)):
            short.append(b"%b\nevent: token\ndata: %b\n\n" % (head, written))
    return Short(b"".join(short), deltas)


def begins_with_deltas(events: bytes, count: int) -> bool:
    """Return True if there is a delta among the first ``count`` events of an answer that begins with these."""
    return bool(shorten(b"\n\n".join(events.split(b"\n\n", count)[:count]), False).deltas)


def portions(events: bytes, size: int) -> Iterator[bytes]:
    """Cut encoded events between two of them into parts of about ``size`` bytes, to limit the cost of one part."""
    start = 0
    while start < len(events):
        end = events.find(b"\n\n", start + size)
        end = len(events) if end < 0 else end + 2
        yield events[start:end]
        start = end


def count_events(events: bytes) -> int:
    """Return the number of encoded events."""
    return events.count(b"\n\n")


def _to_json(members: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(members)
    except orjson.JSONEncodeError:
        # Half a surrogate pair: the next chunk may have the other half, and a page joins them.
        try:
            return json.dumps(members, separators=(",", ":")).encode()
        except RecursionError:
            return b""  # a tool call that no page could read either
