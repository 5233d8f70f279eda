"""The progress of one claim, and the viewers that wait for its outcome. `claiming` says what is done with it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.accounts import Quotas
    from broker.core.errors import BrokerError
    from broker.relay.generation import Generation
    from broker.store.accounts import Reservation
    from broker.store.sessions import SessionStatus, Spec

TURNS_TO_SEND = 2
"""Turns of the event loop from the beginning of a claim until its first call is sent to Redis."""

Meanwhile = Callable[[], Awaitable[object]]
"""Work that is done while Redis decides on a claim, instead of after it."""


def new_claim_id() -> str:
    """Return the id of a new claim."""
    return secrets.token_hex(16)


class Attempt:
    """One try of a claim, and the viewers that wait for its outcome."""

    __slots__ = ("_outcome", "waiting")

    def __init__(self) -> None:
        self._outcome: asyncio.Future[Generation | SessionStatus] = asyncio.get_running_loop().create_future()
        self._outcome.add_done_callback(lambda done: done.exception())  # all viewers may have left
        self.waiting = 0

    async def wait(self, meanwhile: Meanwhile | None) -> Generation | SessionStatus:
        """Wait for the outcome and return it, or raise the error."""
        self.waiting += 1
        try:
            if meanwhile is not None:
                for _ in range(TURNS_TO_SEND):
                    await asyncio.sleep(0)
                await meanwhile()
            return await asyncio.shield(self._outcome)
        finally:
            self.waiting -= 1

    def succeed(self, outcome: Generation | SessionStatus) -> None:
        """Set the outcome."""
        self._outcome.set_result(outcome)

    def fail(self, error: BrokerError) -> None:
        """Set an error, unless there is an outcome already."""
        if not self._outcome.done():
            self._outcome.set_exception(error)


class Pursuit:
    """The progress of one claim.

    Attributes:
        sent: True if it may have reached Redis, so it may still take effect there.
        at_once: True if it was sent together with its reservation, and the outcome of both is not known.
        reservation: what was reserved, or is to be reserved; None before the session was read.
        may_wait: True if the session may wait in line for a slot.
        ends_ms: when the session expires, in ms by the clock of Redis; 0 before that is known.
        quotas: the limits of its client, where they differ from those of the service.
        spec: the values of the session; None before it was read.
        withdrawn: True if the session was cancelled, so no generation may start.
    """

    __slots__ = (
        "at_once",
        "attempt",
        "claim_id",
        "ends_ms",
        "may_wait",
        "quotas",
        "reservation",
        "reserved_at",
        "sent",
        "session_id",
        "spec",
        "withdrawn",
    )

    def __init__(self, session_id: str, claim_id: str) -> None:
        self.session_id = session_id
        self.claim_id = claim_id
        self.attempt = Attempt()
        self.reservation: Reservation | None = None
        self.reserved_at = float("-inf")
        self.sent = self.at_once = False
        self.may_wait = False
        self.ends_ms = 0
        self.quotas: Quotas | None = None
        self.spec: Spec | None = None
        self.withdrawn = False

    @property
    def wanted(self) -> Reservation:
        """The reservation, of a session that was read."""
        if self.reservation is None:
            raise TypeError("the session was not read yet")
        return self.reservation

    def rename(self, claim_id: str) -> None:
        """Go on with another claim. The one before was made void."""
        self.claim_id = claim_id
        self.reservation = replace(self.wanted, claim_id=claim_id)
        self.reserved_at = float("-inf")
