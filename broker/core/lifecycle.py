"""The life of a generation, and of its session in Redis, as two tables. No I/O, no clock, no randomness.

`GENERATION` says what a worker does when something happens to a generation that it runs. `SESSION` says what each step
in Redis does to a session in each state. A step that is not in a table is a bug: it raises, and changes nothing.

    RELAYING ──grace over──► ABANDONING ──watched elsewhere──► CONFIRMING ──confirmed──► RELAYING
       │  ▲                     │    └─stopped─► ABANDONING_STOPPED
       │  └──confirmed── CONFIRMING ◄──froze── RELAYING │
       └──────────── stopped ──┴───────► ENDING ◄───────┘ ──stored or unreachable──► ENDED
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from broker.core.session import State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.core.errors import SessionError
    from broker.core.session import Terminal


class Phase(StrEnum):
    """The phase of a generation in its worker.

    New events are shown to viewers only in `RELAYING`. In all phases before `ENDING` events are still read and
    journaled, except in `ABANDONING_STOPPED`, in which nothing is read any more.
    """

    RELAYING = "relaying"
    CONFIRMING = "confirming"
    """The process was frozen, or may have been. Redis is asked whether the session is still this worker's."""
    ABANDONING = "abandoning"
    """Nobody watches. Redis is asked to end the session, which it refuses while somebody watches elsewhere."""
    ABANDONING_STOPPED = "abandoning, stopped"
    """Like `ABANDONING`, but another reason to end has come before Redis answered."""
    ENDING = "ending"
    """An end is proposed. Redis decides which end stands."""
    ENDED = "ended"


class Event(StrEnum):
    """What can happen to a generation."""

    UPSTREAM_ENDED = "upstream ended"
    """The answer is complete, or the upstream failed."""
    TIMED_OUT = "timed out"
    """The deadline has come, or no data came in time."""
    CANCEL = "cancel"
    SHUTDOWN = "shutdown"
    FENCED = "fenced"
    """The session has ended in Redis, or belongs to another worker."""
    FROZE = "froze"
    """The process was frozen for so long that other workers may have taken it for dead."""
    CONFIRMED = "confirmed"
    """The session is still this worker's; or Redis did not answer in time, and then it counts as confirmed."""
    GRACE_OVER = "grace over"
    WATCHED = "watched"
    """Redis refuses to abandon: somebody watches on another worker."""
    CANCEL_FOUND = "cancel found"
    """Redis refuses another end: a cancel was accepted."""
    ABANDON_STORED = "abandon stored"
    """Redis has ended the session as abandoned, or has another end already."""
    ABANDON_REFUSED = "abandon refused"
    """Redis refuses for another reason."""
    ABANDON_UNREACHABLE = "abandon unreachable"
    """Redis did not answer in time. It may still write that end, so no other one may be proposed."""
    END_STORED = "end stored"
    END_UNREACHABLE = "end unreachable"
    """Redis did not answer in time: the end that the owner proposes stands, and is written later."""
    BROKE = "broke"
    """An unexpected exception in a task of the generation: a bug."""


class Action(StrEnum):
    """What a generation has to do after an event, in this order."""

    HIDE = "hide"
    """Show viewers nothing new."""
    SHOW = "show"
    """Show viewers the hidden events, and new ones."""
    STOP_READING = "stop reading"
    EXTEND_TIMERS = "extend timers"
    """Move the timers by the time of the freeze."""
    CONFIRM = "confirm"
    """Ask Redis whether the session is still this worker's."""
    ABANDON = "abandon"
    """Ask Redis to end the session unless somebody watches it."""
    DECIDE = "decide"
    """Count the usage, and have Redis decide the end."""
    SETTLE = "settle"
    """Settle the reservation with the usage."""
    SEND_END = "send end"
    """Send every viewer the end that stands."""
    WRITE_LATER = "write later"
    """Write end and settlement when Redis can be reached again."""


class Row(NamedTuple):
    """One entry of the table: the next phase, and the actions."""

    phase: Phase
    actions: tuple[Action, ...] = ()


_BROKEN = Row(Phase.ENDED, (Action.WRITE_LATER, Action.SEND_END))
_BROKEN_READING = Row(Phase.ENDED, (Action.HIDE, Action.STOP_READING, Action.WRITE_LATER, Action.SEND_END))
_STOPPED = Row(Phase.ENDING, (Action.HIDE, Action.STOP_READING, Action.DECIDE))
_STOPS = (Event.UPSTREAM_ENDED, Event.TIMED_OUT, Event.CANCEL, Event.SHUTDOWN, Event.FENCED)

GENERATION: Mapping[Phase, Mapping[Event, Row]] = {
    Phase.RELAYING: {
        **dict.fromkeys(_STOPS, _STOPPED),
        Event.FROZE: Row(Phase.CONFIRMING, (Action.HIDE, Action.EXTEND_TIMERS, Action.CONFIRM)),
        Event.CONFIRMED: Row(Phase.RELAYING),
        Event.GRACE_OVER: Row(Phase.ABANDONING, (Action.HIDE, Action.ABANDON)),
        Event.BROKE: _BROKEN_READING,
    },
    Phase.CONFIRMING: {
        **dict.fromkeys(_STOPS, _STOPPED),
        Event.FROZE: Row(Phase.CONFIRMING, (Action.EXTEND_TIMERS, Action.CONFIRM)),
        Event.CONFIRMED: Row(Phase.RELAYING, (Action.SHOW,)),
        # Just after a freeze it is not certain whether anybody watches. The timer will find out again.
        Event.GRACE_OVER: Row(Phase.CONFIRMING),
        Event.BROKE: _BROKEN_READING,
    },
    Phase.ABANDONING: {
        **dict.fromkeys(_STOPS, Row(Phase.ABANDONING_STOPPED, (Action.STOP_READING,))),
        Event.FROZE: Row(Phase.ABANDONING, (Action.EXTEND_TIMERS,)),
        Event.CONFIRMED: Row(Phase.ABANDONING),
        Event.GRACE_OVER: Row(Phase.ABANDONING),
        # The answer may be older than a freeze, so nothing is shown before the session is known to be ours.
        Event.WATCHED: Row(Phase.CONFIRMING, (Action.CONFIRM,)),
        Event.CANCEL_FOUND: Row(Phase.ENDING, (Action.STOP_READING, Action.DECIDE)),
        Event.ABANDON_STORED: Row(Phase.ENDING, (Action.STOP_READING, Action.DECIDE)),
        Event.ABANDON_REFUSED: Row(Phase.ENDING, (Action.STOP_READING, Action.DECIDE)),
        Event.ABANDON_UNREACHABLE: Row(
            Phase.ENDING, (Action.STOP_READING, Action.WRITE_LATER, Action.DECIDE)
        ),
        Event.BROKE: _BROKEN_READING,
    },
    Phase.ABANDONING_STOPPED: {
        # The first reason counts, unless Redis has another.
        **dict.fromkeys(_STOPS, Row(Phase.ABANDONING_STOPPED)),
        Event.FROZE: Row(Phase.ABANDONING_STOPPED),
        Event.CONFIRMED: Row(Phase.ABANDONING_STOPPED),
        Event.GRACE_OVER: Row(Phase.ABANDONING_STOPPED),
        Event.WATCHED: Row(Phase.ENDING, (Action.DECIDE,)),
        Event.CANCEL_FOUND: Row(Phase.ENDING, (Action.DECIDE,)),
        Event.ABANDON_STORED: Row(Phase.ENDING, (Action.DECIDE,)),
        Event.ABANDON_REFUSED: Row(Phase.ENDING, (Action.DECIDE,)),
        Event.ABANDON_UNREACHABLE: Row(Phase.ENDING, (Action.WRITE_LATER, Action.DECIDE)),
        Event.BROKE: _BROKEN,
    },
    Phase.ENDING: {
        # The end is on its way to Redis, which knows of a fence and of cancels accepted elsewhere.
        **dict.fromkeys(_STOPS, Row(Phase.ENDING)),
        Event.FROZE: Row(Phase.ENDING),
        Event.CONFIRMED: Row(Phase.ENDING),
        Event.GRACE_OVER: Row(Phase.ENDING),
        Event.CANCEL_FOUND: Row(Phase.ENDING, (Action.DECIDE,)),
        Event.END_STORED: Row(Phase.ENDED, (Action.SETTLE, Action.SEND_END)),
        Event.END_UNREACHABLE: Row(Phase.ENDED, (Action.WRITE_LATER, Action.SEND_END)),
        Event.BROKE: _BROKEN,
    },
    Phase.ENDED: dict.fromkeys(
        (*_STOPS, Event.FROZE, Event.CONFIRMED, Event.GRACE_OVER, Event.BROKE), Row(Phase.ENDED)
    ),
}


class Step(StrEnum):
    """What can happen to a session in Redis. Each is a Lua script, or a script with one kind of argument."""

    PREPARE = "prepare"
    CLAIM = "claim"
    CANCEL = "cancel"
    FINISH = "finish"
    FAIL = "fail"
    END_CANCELLED = "end as cancelled"
    ABANDON = "abandon"
    MARK_LOST = "mark lost"
    RESTORE = "restore"
    """The owner of a running session writes it again, after Redis has lost it or its claim."""
    RESTORE_DONE = "restore done"
    """The same for a session that has ended as done; likewise for every other end."""
    REFUSE = "refuse"
    JOURNAL = "journal"
    FOLLOW = "follow"
    EXPIRE = "expire"


SESSION: Mapping[Step, Mapping[State, State]] = {
    Step.PREPARE: {State.GONE: State.PREPARED},
    # A claim that is asked again after its session was cancelled has started nothing, and so ends it.
    Step.CLAIM: {State.PREPARED: State.RUNNING, State.CANCELLING: State.CANCELLED},
    Step.CANCEL: {State.PREPARED: State.CANCELLED, State.RUNNING: State.CANCELLING},
    Step.FINISH: {State.RUNNING: State.DONE},
    Step.FAIL: {State.RUNNING: State.FAILED},
    Step.END_CANCELLED: {State.RUNNING: State.CANCELLED, State.CANCELLING: State.CANCELLED},
    Step.ABANDON: {State.RUNNING: State.ABANDONED},
    Step.MARK_LOST: {State.RUNNING: State.LOST, State.CANCELLING: State.CANCELLED},
    Step.RESTORE: {State.GONE: State.RUNNING, State.PREPARED: State.RUNNING},
    # A cancel that Redis accepted after it had lost this end came too late.
    Step.RESTORE_DONE: dict.fromkeys(
        (State.GONE, State.PREPARED, State.RUNNING, State.CANCELLING), State.DONE
    ),
    Step.REFUSE: {},
    Step.JOURNAL: {},
    Step.FOLLOW: {},
    Step.EXPIRE: {state: State.GONE for state in State if state is not State.GONE},
}
"""What each step makes of a session in each state. In a state that is not named it leaves the session as it is.

All steps of a running session except `CANCEL` are those of its own claim. With the id of another claim they change
nothing, but `RESTORE` and `RESTORE_DONE` write a session that is not running.
"""


def after(step: Step, state: State) -> State:
    """Return the state of a session after ``step``, which may be the same."""
    return SESSION[step].get(state, state)


class Proposal(NamedTuple):
    """An end that this worker proposes.

    Attributes:
        step: `FINISH`, `FAIL`, `END_CANCELLED` or `ABANDON`.
        failure: why, where it is a failure.
    """

    step: Step
    failure: SessionError | None = None


FINISHED = Proposal(Step.FINISH)
CANCELLED = Proposal(Step.END_CANCELLED)


class IllegalTransition(RuntimeError):  # noqa: N818 - says what happened, as the tree of errors does
    """Something happened that the table does not know in this phase: a bug. The phase stays as it was."""


class Lifecycle:
    """One generation's way through `GENERATION`.

    Attributes:
        phase: where it stands.
        proposal: the end that this worker proposes. The first one counts, but an accepted cancel replaces it.
        standing: the end that stands, if it is known: Redis has it already, or may still write it.
        fence: the end by which the session was taken from this worker.
    """

    __slots__ = ("fence", "phase", "proposal", "standing")

    def __init__(self) -> None:
        self.phase = Phase.RELAYING
        self.proposal: Proposal | None = None
        self.standing: Terminal | None = None
        self.fence: Terminal | None = None

    @property
    def shows(self) -> bool:
        """True while new events are shown to viewers."""
        return self.phase is Phase.RELAYING

    @property
    def is_open(self) -> bool:
        """True until a reason to end has decided the end."""
        return self.phase in _OPEN

    @property
    def end_is_numbered(self) -> bool:
        """True while an end with a number has been sent to Redis: no event may take that number any more."""
        return self.standing is not None or self.phase in _ASKING

    def handle(
        self, event: Event, *, proposal: Proposal | None = None, standing: Terminal | None = None
    ) -> tuple[Action, ...]:
        """Take the step for ``event`` and return what has to be done.

        Args:
            event: what happened.
            proposal: with events that end the answer, the end that they ask for.
            standing: with `FENCED`, `ABANDON_STORED`, `ABANDON_UNREACHABLE` and `END_STORED`, the end that stands.

        Raises:
            IllegalTransition: the table has no such row.
        """
        row = GENERATION[self.phase].get(event)
        if row is None:
            raise IllegalTransition(f"{event} while {self.phase}")
        if event is Event.CANCEL_FOUND:
            self.proposal = CANCELLED
        elif self.proposal is None and self.phase is not Phase.ENDED:
            self.proposal = proposal
        if standing is not None and self.phase is not Phase.ENDED:
            self.standing = standing
            if event is Event.FENCED:
                self.fence = standing
        self.phase = row.phase
        return row.actions


_OPEN = frozenset({Phase.RELAYING, Phase.CONFIRMING, Phase.ABANDONING})
_ASKING = frozenset({Phase.ABANDONING, Phase.ABANDONING_STOPPED})
