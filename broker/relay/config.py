"""The configuration of the relay: its limits, and functions that know about money."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from broker.core.bytes_per_token import Sample
    from broker.core.pricing import Prices


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """The limits of one generation: seconds, bytes, and retries."""

    first_data_timeout: float
    idle_timeout: float
    deadline: float
    grace: float
    max_response: int
    max_retries: int


class WorkerConfig(NamedTuple):
    """The limits of one worker.

    Attributes:
        max_streams: generations at the same time, and as many viewers.
        session_ttl: seconds that a prepared session can be claimed.
        running_ttl: seconds that a claimed session stays in Redis at most.
        resume_ttl: seconds that a finished session can be replayed; 0 streams each session only once.
        journal_interval: seconds that a journal may lag behind the live viewers.
    """

    max_streams: int
    session_ttl: int
    running_ttl: int
    resume_ttl: int
    journal_interval: float


PricesOf = Callable[[str], "Awaitable[Prices | None]"]
"""Returns the prices of a model; None where they are not known. Does not wait for long."""

FetchGeneration = Callable[[str], Awaitable[Mapping[str, Any] | None]]
"""Fetches the upstream's record of a generation: `upstream.generations.fetch_generation`."""


class Money(NamedTuple):
    """The functions that know about money and learn from answers.

    Attributes:
        prices_of: returns the prices of a model.
        has_prices: returns True if there is a list of prices.
        name_of: returns the name of a model in the list, empty where it is not there; None without a list.
        fetch_generation: fetches the upstream's record of a generation.
        keeps_records: returns True if the upstream has such records; only OpenRouter does.
        learn: takes a sample of bytes per token.
        speed_of: returns the tokens per second that a model writes; None where unknown. Does not wait for long.
        learn_speed: takes a sample of tokens per second.
    """

    prices_of: PricesOf
    has_prices: Callable[[], bool]
    name_of: Callable[[str], str | None]
    fetch_generation: FetchGeneration
    keeps_records: Callable[[], bool]
    learn: Callable[[Sample], Coroutine[Any, Any, None]]
    speed_of: Callable[[str], Awaitable[float | None]]
    learn_speed: Callable[[Sample], Coroutine[Any, Any, None]]
