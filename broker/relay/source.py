"""The source of a viewer's events: a generation of this worker, or the mirror of a session of another worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from broker.relay.feed import Feed


class Source(Protocol):
    """The events of one session on this worker."""

    @property
    def feed(self) -> Feed:
        """The events in memory, and the end once there is one."""

    @property
    def prepared_by(self) -> str:
        """The id of the request that prepared the session; empty where this worker does not know it."""

    def add_viewer(self, *, resumed: bool = False) -> None:
        """Count a viewer, so that the session is not abandoned.

        Args:
            resumed: it came with a cursor.
        """

    def remove_viewer(self) -> None:
        """Stop counting a viewer: it has left."""
