"""The limits of one client: its own, and all that are in force for it. No I/O.

A client gets its own limits from a table in the clients file, or from the claim ``broker`` of its JWT. Where they say
nothing, the settings of the service apply.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from broker.core.errors import ModelNotAllowed, OriginNotAllowed, Unauthorized
from broker.core.model_entry import allows
from broker.core.rates import Rate  # noqa: TC001 - pydantic reads it

if TYPE_CHECKING:
    from collections.abc import Iterable

    from broker.core.accounts import Quotas

EXPIRED = "The access of this client has expired."
DISABLED = "This client is disabled."

_REMEMBERED = 4096
"""Different limits of clients whose combination with those of the service is remembered."""


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """A client's own limits. For None, the service's limit applies.

    Attributes:
        narrows: each limit can only make that of the service smaller, as in a JWT; else it replaces that of the
            service, as in the clients file. Models and origins only narrow in both.
        models: globs (case-sensitive) of the models that it may use, among those that the service allows.
        rate: prepares in a window.
        streams: generations at the same time.
        max_output_tokens: tokens of the longest answer.
        daily_tokens: tokens a day; 0 is no limit.
        daily_cost: nano-USD a day; 0 is no limit.
        monthly_cost: nano-USD a calendar month; 0 is no limit.
        origins: lower-case origins of the pages that may prepare.
        system: a system message, after that of the service.
        expires: seconds since 1970 from which it is refused.
        disabled: it is refused.
    """

    narrows: bool = True
    models: tuple[str, ...] | None = None
    rate: Rate | None = None
    streams: int | None = None
    max_output_tokens: int | None = None
    daily_tokens: int | None = None
    daily_cost: int | None = None
    monthly_cost: int | None = None
    origins: tuple[str, ...] | None = None
    system: str | None = None
    expires: float | None = None
    disabled: bool = False

    def check(self, now: float) -> None:
        """Check that the client may still ask.

        Args:
            now: seconds since 1970.

        Raises:
            Unauthorized: it is disabled, or its time is over.
        """
        if self.disabled:
            raise Unauthorized(DISABLED)
        if self.expires is not None and now >= self.expires:
            raise Unauthorized(EXPIRED)


@dataclass(frozen=True, slots=True)
class LimitsInForce:
    """All limits that are in force for one client.

    Attributes:
        quotas: its slots and budgets, and what is limited for all clients together.
        rates: it must keep to each of them.
        max_output_tokens: tokens of the longest answer.
        models: lists of globs; a model must match one of each list.
        origins: origins of the pages that may prepare; None for those of the service.
        system: a system message of its own.
    """

    quotas: Quotas
    rates: tuple[Rate, ...]
    max_output_tokens: int
    models: tuple[tuple[str, ...], ...] = ()
    origins: frozenset[str] | None = None
    system: str | None = None

    def check_origin(self, origin: str | None) -> None:
        """Check that a page may prepare. A request without an origin is not that of a page of another site.

        Raises:
            OriginNotAllowed: it may not.
        """
        if self.origins is not None and origin and origin.lower() not in self.origins:
            raise OriginNotAllowed("Pages of this origin may not use this key or token.")

    def check_models(self, models: Iterable[str]) -> None:
        """Check the models that a request can reach.

        Raises:
            ModelNotAllowed: with the first one that this client may not use.
        """
        for globs in self.models:
            for model in models:
                if not allows(globs, model):
                    raise ModelNotAllowed(f"The model {model} may not be used with this key or token.")


class ServiceLimits:
    """Combines the limits of the service with those of clients.

    Args:
        service: the limits of a client that has none of its own.
    """

    def __init__(self, service: LimitsInForce) -> None:
        self.service = service
        self._combined = lru_cache(maxsize=_REMEMBERED)(partial(combine, service))

    def of(self, own: ClientLimits | None) -> LimitsInForce:
        """Return all limits of a client with these limits of its own."""
        return self.service if own is None else self._combined(own)


def combine(service: LimitsInForce, own: ClientLimits) -> LimitsInForce:
    """Return the limits of a client: those of the service, changed by its own."""
    choose = _smaller if own.narrows else _own
    quotas = service.quotas
    rates = service.rates
    if own.rate is not None:
        rates = _both(rates, own.rate) if own.narrows else (own.rate,)
    return LimitsInForce(
        quotas=replace(
            quotas,
            streams=choose(quotas.streams, own.streams),
            daily_tokens=choose(quotas.daily_tokens, own.daily_tokens),
            daily_cost=choose(quotas.daily_cost, own.daily_cost),
            monthly_cost=choose(quotas.monthly_cost, own.monthly_cost),
        ),
        rates=rates,
        max_output_tokens=choose(service.max_output_tokens, own.max_output_tokens),
        models=service.models if own.models is None else (*service.models, own.models),
        origins=_common(service.origins, own.origins),
        system=own.system,
    )


def _own(service: int, own: int | None) -> int:
    return service if own is None else own


def _smaller(service: int, own: int | None) -> int:
    """Return the smaller one of two limits; 0 is no limit."""
    return min(service or own or 0, own or service)


def _both(rates: tuple[Rate, ...], own: Rate) -> tuple[Rate, ...]:
    """Return the rates that hold where all of these and the own one hold, without those that another one implies."""
    if any(each.implies(own) for each in rates):
        return rates
    return (*(each for each in rates if not own.implies(each)), own)


def _common(service: frozenset[str] | None, own: tuple[str, ...] | None) -> frozenset[str] | None:
    if own is None or "*" in own:
        return service
    return frozenset(own) if service is None else service & frozenset(own)
