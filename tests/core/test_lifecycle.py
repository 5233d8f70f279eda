"""The two tables: every race of a generation is a row here, and any order of events ends once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.errors import Abandoned, DeadlineExceeded, GenerationFailed, ServerShutdown, WorkerLost
from broker.core.events import error_data
from broker.core.lifecycle import (
    CANCELLED,
    FINISHED,
    GENERATION,
    SESSION,
    Action,
    Event,
    IllegalTransition,
    Lifecycle,
    Phase,
    Proposal,
    Step,
    after,
)
from broker.core.session import ENDED, Cursor, State, Terminal

BROKEN = Proposal(Step.FAIL, GenerationFailed())
TIMED_OUT = Proposal(Step.FAIL, DeadlineExceeded())
SHUT_DOWN = Proposal(Step.FAIL, ServerShutdown())
ABANDONED = Proposal(Step.ABANDON, Abandoned())
LOST = Terminal(State.LOST, "error", Cursor(2, 4, end=True), error_data(WorkerLost()))
GONE_QUIET = Terminal(State.ABANDONED, "error", Cursor(1, 4, end=True), error_data(Abandoned()))

PROPOSALS = {
    Event.UPSTREAM_ENDED: FINISHED,
    Event.TIMED_OUT: TIMED_OUT,
    Event.CANCEL: CANCELLED,
    Event.SHUTDOWN: SHUT_DOWN,
    Event.ABANDON_REFUSED: ABANDONED,
    Event.ABANDON_UNREACHABLE: ABANDONED,
    Event.BROKE: BROKEN,
}
STANDING = {Event.FENCED: LOST, Event.ABANDON_STORED: GONE_QUIET, Event.ABANDON_UNREACHABLE: GONE_QUIET}


def live(*events: Event) -> Lifecycle:
    """A generation to which these events have happened."""
    lifecycle = Lifecycle()
    for event in events:
        lifecycle.handle(event, proposal=PROPOSALS.get(event), standing=STANDING.get(event))
    return lifecycle


@pytest.mark.parametrize(
    ("events", "phase", "proposal"),
    [
        pytest.param((Event.UPSTREAM_ENDED, Event.CANCEL), Phase.ENDING, FINISHED, id="cancel after the end"),
        pytest.param((Event.CANCEL, Event.UPSTREAM_ENDED), Phase.ENDING, CANCELLED, id="end after a cancel"),
        pytest.param(
            (Event.UPSTREAM_ENDED, Event.CANCEL_FOUND),
            Phase.ENDING,
            CANCELLED,
            id="a cancel accepted elsewhere replaces the end",
        ),
        pytest.param(
            (Event.TIMED_OUT, Event.SHUTDOWN), Phase.ENDING, TIMED_OUT, id="the first reason counts"
        ),
        pytest.param((Event.GRACE_OVER,), Phase.ABANDONING, None, id="grace ends"),
        pytest.param(
            (Event.GRACE_OVER, Event.WATCHED, Event.CONFIRMED),
            Phase.RELAYING,
            None,
            id="a viewer came in time",
        ),
        pytest.param(
            (Event.GRACE_OVER, Event.CANCEL, Event.WATCHED),
            Phase.ENDING,
            CANCELLED,
            id="cancel while Redis is asked, and somebody watches",
        ),
        pytest.param(
            (Event.GRACE_OVER, Event.UPSTREAM_ENDED, Event.WATCHED),
            Phase.ENDING,
            FINISHED,
            id="end while Redis is asked, and somebody watches",
        ),
        pytest.param(
            (Event.GRACE_OVER, Event.ABANDON_REFUSED), Phase.ENDING, ABANDONED, id="abandon without Redis"
        ),
        pytest.param(
            (Event.FROZE, Event.GRACE_OVER), Phase.CONFIRMING, None, id="no abandon before it is confirmed"
        ),
        pytest.param((Event.FROZE, Event.FROZE, Event.CONFIRMED), Phase.RELAYING, None, id="frozen twice"),
        pytest.param((Event.FROZE, Event.CANCEL), Phase.ENDING, CANCELLED, id="cancel after a freeze"),
        pytest.param((Event.BROKE,), Phase.ENDED, BROKEN, id="a bug ends at once"),
        pytest.param((Event.CANCEL, Event.BROKE), Phase.ENDED, CANCELLED, id="a bug after a cancel"),
    ],
)
def test_the_first_reason_decides(events: tuple[Event, ...], phase: Phase, proposal: Proposal | None) -> None:
    lifecycle = live(*events)
    assert (lifecycle.phase, lifecycle.proposal) == (phase, proposal)


@pytest.mark.parametrize(
    ("events", "standing"),
    [
        ((Event.FENCED,), LOST),
        ((Event.FROZE, Event.FENCED), LOST),
        ((Event.UPSTREAM_ENDED, Event.FENCED), LOST),
        ((Event.GRACE_OVER, Event.FENCED, Event.WATCHED), LOST),
        ((Event.GRACE_OVER, Event.ABANDON_STORED), GONE_QUIET),
        ((Event.GRACE_OVER, Event.CANCEL, Event.ABANDON_STORED), GONE_QUIET),
        ((Event.GRACE_OVER, Event.CANCEL, Event.ABANDON_UNREACHABLE), GONE_QUIET),
        ((Event.GRACE_OVER, Event.FENCED, Event.ABANDON_STORED), GONE_QUIET),
    ],
    ids=lambda value: " then ".join(value) if isinstance(value, tuple) and value[0] in set(Event) else "",
)
def test_an_end_that_redis_has_stands(events: tuple[Event, ...], standing: Terminal) -> None:
    lifecycle = live(*events)
    assert lifecycle.phase is Phase.ENDING
    assert lifecycle.standing == standing


def test_a_reply_that_may_be_older_than_a_freeze_shows_nothing() -> None:
    lifecycle = live(Event.GRACE_OVER, Event.FROZE)
    assert lifecycle.handle(Event.WATCHED) == (Action.CONFIRM,)
    assert not lifecycle.shows


@pytest.mark.parametrize("phase", Phase)
def test_an_unknown_event_raises_and_changes_nothing(phase: Phase) -> None:
    for event in [each for each in Event if each not in GENERATION[phase]]:
        lifecycle = Lifecycle()
        lifecycle.phase = phase
        with pytest.raises(IllegalTransition):
            lifecycle.handle(event, proposal=CANCELLED)
        assert (lifecycle.phase, lifecycle.proposal) == (phase, None)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.ENDED])
def test_events_from_outside_are_known_in_every_phase(phase: Phase) -> None:
    outside = {Event.CANCEL, Event.SHUTDOWN, Event.FENCED, Event.TIMED_OUT, Event.FROZE, Event.GRACE_OVER}
    outside.add(Event.BROKE)
    assert outside <= GENERATION[phase].keys()


@given(choices=st.lists(st.integers(min_value=0, max_value=100), max_size=60))
def test_any_order_of_events_ends_once(choices: list[int]) -> None:
    """Nothing is shown outside RELAYING, reading stops once, and end and settlement come once and last."""
    lifecycle, done = Lifecycle(), list[Action]()
    showing = True
    for choice in choices:
        possible = sorted(GENERATION[lifecycle.phase])
        event = possible[choice % len(possible)]
        actions = lifecycle.handle(event, proposal=PROPOSALS.get(event), standing=STANDING.get(event))
        done += actions
        for action in actions:
            showing = {Action.HIDE: False, Action.SHOW: True}.get(action, showing)
        assert showing is lifecycle.shows
    assert done.count(Action.STOP_READING) <= 1
    ends = [action for action in done if action in (Action.SEND_END, Action.SETTLE, Action.WRITE_LATER)]
    if lifecycle.phase is Phase.ENDED:
        assert ends[-2:] in ([Action.SETTLE, Action.SEND_END], [Action.WRITE_LATER, Action.SEND_END])
        assert done[-2:] == ends[-2:]
        # An end that Redis may write yet is written again in any case; writing and settling it twice changes nothing.
        assert ends[:-2] in ([], [Action.WRITE_LATER])
        assert lifecycle.proposal is not None or lifecycle.standing is not None
        assert done.count(Action.STOP_READING) == 1
    else:
        assert ends in ([], [Action.WRITE_LATER])


@pytest.mark.parametrize("step", Step)
def test_no_step_but_expiry_changes_an_end(step: Step) -> None:
    for state in ENDED:
        assert after(step, state) is (State.GONE if step is Step.EXPIRE else state)


def test_only_a_claim_starts_a_session() -> None:
    """A session that its owner restores is running already."""
    starts = {step for step in Step for state in State if after(step, state) is State.RUNNING is not state}
    assert starts == {Step.CLAIM, Step.RESTORE}


def test_a_cancel_that_was_accepted_is_the_end() -> None:
    """Unless the session had ended before, and Redis had lost that."""
    reached = {after(step, State.CANCELLING) for step in Step if step is not Step.RESTORE_DONE}
    assert reached == {State.CANCELLING, State.CANCELLED, State.GONE}


def test_every_step_has_its_row() -> None:
    assert set(SESSION) == set(Step)
