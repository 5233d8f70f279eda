"""Limit the streams of a worker: in total, of one session, and of one address.

The id of a session is enough to open streams, so without a limit one page could take all places of a worker. How many
generations a client may have is another limit, which Redis counts for all workers.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, Self

from broker.core.errors import Overloaded

if TYPE_CHECKING:
    from types import TracebackType

VIEWERS_OF_A_SESSION: Final = 16
STREAMS_OF_AN_ADDRESS: Final = 64
"""Streams of an address, or `BROKER_MAX_CONCURRENT_STREAMS` where that is more: a client without a key is its address.

``streams`` in the clients file does not count: a request for a stream shows its session, and not its client."""

OVERLOADED_RETRY: Final = 3.0
"""Seconds after which a caller may try again."""


class Occupancy:
    """Counts open streams, and those that are being opened.

    Args:
        max_streams: the limit of this worker.
        of_a_client: generations that a client may have, as `BROKER_MAX_CONCURRENT_STREAMS` says.
    """

    def __init__(self, max_streams: int, *, of_a_client: int = 0) -> None:
        self._max_streams = max_streams
        self._max_of_address = max(STREAMS_OF_AN_ADDRESS, of_a_client)
        self._streams = 0
        self._of_session: Counter[str] = Counter()
        self._of_address: Counter[str] = Counter()

    def place(self) -> Place:
        """Return a place that is not taken yet. A context manager, which gives it back."""
        return Place(self)

    def take(self, session_id: str, address: str) -> None:
        """Take a place of a session and of an address.

        Checked and taken in one step without an await, so that no more than the limit pass at the same time.

        Raises:
            Overloaded: there is no place.
        """
        if self._streams >= self._max_streams:
            raise Overloaded(retry_after=OVERLOADED_RETRY)
        if self._of_session[session_id] >= VIEWERS_OF_A_SESSION:
            raise Overloaded("This answer is watched by too many already.", retry_after=OVERLOADED_RETRY)
        if self._of_address[address] >= self._max_of_address:
            raise Overloaded("Too many streams are open from your address.", retry_after=OVERLOADED_RETRY)
        self._streams += 1
        self._of_session[session_id] += 1
        self._of_address[address] += 1

    def give_back(self, session_id: str, address: str) -> None:
        """Give a place back that was taken."""
        self._streams -= 1
        _give_back(self._of_session, session_id)
        _give_back(self._of_address, address)


class Place:
    """The place of one stream."""

    __slots__ = ("_address", "_is_taken", "_occupancy", "_session_id")

    def __init__(self, occupancy: Occupancy) -> None:
        self._occupancy = occupancy
        self._is_taken = False

    def take(self, session_id: str, address: str) -> None:
        """Take it until the end of the block.

        Raises:
            Overloaded: as `Occupancy.take`.
        """
        self._occupancy.take(session_id, address)
        self._session_id, self._address = session_id, address
        self._is_taken = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_taken:
            self._is_taken = False
            self._occupancy.give_back(self._session_id, self._address)


def _give_back(counter: Counter[str], name: str) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]
