"""What the relay is told of the outside: its bounds, and whom to ask about money."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from broker.core.bytes_per_token import Sample
    from broker.core.pricing import Prices


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """What one generation may take: seconds, bytes, and tries."""

    first_data_timeout: float
    idle_timeout: float
    deadline: float
    grace: float
    max_response: int
    max_retries: int


class WorkerConfig(NamedTuple):
    """What one worker keeps to.

    Attributes:
        max_streams: generations at once, and as many viewers.
        session_ttl: seconds that a prepared session waits.
        running_ttl: seconds that a claimed one is kept at most.
        resume_ttl: seconds that a finished one is kept; 0 streams each session once.
        journal_interval: seconds that a journal may lag.
    """

    max_streams: int
    session_ttl: int
    running_ttl: int
    resume_ttl: int
    journal_interval: float


PricesOf = Callable[[str], "Awaitable[Prices | None]"]
"""Looks up what a model costs; None where that is not known. Does not wait for long."""

FetchGeneration = Callable[[str], Awaitable[Mapping[str, Any] | None]]
"""Asks the upstream's books about a generation: `upstream.generations.fetch_generation`."""


class Money(NamedTuple):
    """Whom to ask about money.

    Attributes:
        prices_of: what models cost.
        name_of: the name by which the list of models knows one, empty where it does not; None without a list.
        fetch_generation: the upstream's own books.
        keeps_records: whether the upstream keeps such books at all; only OpenRouter does.
        learn: is given what an answer teaches of its model's tokenizer.
        speed_of: tokens a second that a model writes; None where that is not known. Does not wait for long.
        learn_speed: is given what an answer teaches of that.
    """

    prices_of: PricesOf
    name_of: Callable[[str], str | None]
    fetch_generation: FetchGeneration
    keeps_records: Callable[[], bool]
    learn: Callable[[Sample], Coroutine[Any, Any, None]]
    speed_of: Callable[[str], Awaitable[float | None]]
    learn_speed: Callable[[Sample], Coroutine[Any, Any, None]]
