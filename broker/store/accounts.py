"""The accounts in Redis: slots, budgets and books of every client, and of everyone together.

All their keys share one tag, so that one script can take from several accounts or from none. A generation's token, that
of its claim, names its reservation; every step can be asked for again with it and happens once. An open reservation
is a lease: its worker renews it, and when that dies others find it among the open ones and settle it.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.errors import BeingClaimed, BudgetExceeded, Overloaded, TooManyStreams
from broker.store.connection import Call, Store, bounded_call

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from broker.core.session import State

log = structlog.get_logger(__name__)

LEASE = 8.0
"""Seconds after which an open reservation that nobody renews is taken for a dead worker's."""

RECORD = 6 * 3600
"""Seconds that a closed reservation is remembered, so that late repeats change nothing."""

ASKED_AFTER = 16.0
"""Seconds by which a worker may be late in asking for the truth behind an estimate; then anybody asks."""

UNREADABLE_MS = 600_000
"""Milliseconds after which a record that cannot be read is looked at again."""

BUDGET_RETRY = 30.0
"""Seconds after which a page that waits for a budget comes again."""

STREAMS_RETRY = 5.0
"""Seconds after which a page that waits for a slot comes again."""

MAX_CLIENTS = 10_000
MAX_MODELS = 500
"""Names in the books of a day; the rest is `OTHER`. Clients come and go, and pages invent names of models."""

OTHER = "other"
"""What the books call clients and models that they do not name."""

METRICS = (
    *("requests", "prompt", "completion", "cached", "reasoning"),
    *("cost", "estimated", "unpriced", "cancelled", "failed"),
)
"""What the books count of each client, model and day; ``cost`` is nano-USD, all else tokens or requests."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a generation has taken from the accounts.

    Attributes:
        claim_id: of its claim.
        session_id: whose generation.
        client: who pays.
        model: which it asked for.
        worst: what is reserved.
        day: days since 1970, of the claim.
        ran: its generation was seen to run; told of those that are found.
    """

    claim_id: str
    session_id: str
    client: str
    model: str
    worst: WorstCase
    day: int = 0
    ran: bool = field(default=False, compare=False)


class Estimate(NamedTuple):
    """A settlement whose truth the upstream may still tell.

    Attributes:
        reservation: that was settled.
        generation_id: the upstream's name for its generation.
        age: seconds since it was settled.
    """

    reservation: Reservation
    generation_id: str
    age: float


class Day(NamedTuple):
    """A client's own day: totals, in tokens and nano-USD."""

    day: dt.date
    requests: int
    prompt: int
    completion: int
    cost: int
    estimated: int


class UsageRow(NamedTuple):
    """One line of the books: a client's use of a model on a day; ``counts`` has `METRICS`."""

    client: str
    model: str
    counts: dict[str, int]


class AccountStore:
    """Takes, gives back, settles and tells. Every method raises `StoreUnavailable` where Redis cannot be reached.

    Args:
        store: the connection.
        quotas: what one may have.
    """

    def __init__(self, store: Store, quotas: Quotas) -> None:
        self._store = store
        self._quotas = quotas
        self._admit = store.script("admit")
        self._forget = store.script("forget")
        self._reserve = store.script("reserve")
        self._release = store.script("release")
        self._settle = store.script("settle")
        self._asked = store.script("asked")
        self._take = store.script("take")
        self._hold = store.script("renew_reservations")

    async def admit(
        self, client: str, session_id: str, worst: WorstCase, *, ttl: int, stored: int = 0
    ) -> None:
        """Note a session that is prepared; it waits for ``ttl`` seconds and takes ``stored`` bytes.

        Raises:
            TooManyStreams: too many of the client's wait, or they are too large together.
        Overloaded: all that wait are too large together.
            BudgetExceeded: what is spent today leaves no room for it.
        """
        check_admitted(
            (await self._store.run([self.admitting(client, session_id, worst, ttl=ttl, stored=stored)]))[0]
        )

    def admitting(self, client: str, session_id: str, worst: WorstCase, *, ttl: int, stored: int = 0) -> Call:
        """What `admit` does, to be run together with something else; its reply is for `check_admitted`."""
        allowed = self._quotas
        own, own_bytes, all_waiting, all_bytes = self._waiting(client)
        return self._admit.call(
            [own, self._key("account", client), self._global, own_bytes, all_waiting, all_bytes],
            [
                *(session_id, ttl, worst.tokens, worst.cost),
                *(allowed.waiting, allowed.daily_tokens, allowed.daily_cost, allowed.total_daily_cost),
                *(stored, allowed.waiting_bytes, allowed.total_waiting_bytes),
            ],
        )

    async def forget(self, client: str, session_id: str) -> None:
        """A prepared session waits no more."""
        await self._forget(self._waiting(client), [session_id])

    async def reserve(self, reservation: Reservation, *, force: bool = False) -> int:
        """Take a slot and the worst case, from all accounts or from none; returns the day of the claim.

        Args:
            reservation: for what.
            force: whatever the limits say, on the day that it has, if any, for a generation that runs already.

        Raises:
            TooManyStreams, BudgetExceeded: there is no room now; `final` where nothing could be given back for it.
            BeingClaimed: there is none because another claim of the same session has taken it.
            Overloaded: it was given back meanwhile.
        """
        allowed, worst = self._quotas, reservation.worst
        reply = await self._reserve(
            [*self._keys(reservation.claim_id, reservation.client), *self._waiting(reservation.client)],
            [
                *(reservation.claim_id, reservation.session_id, reservation.client, reservation.model),
                *(worst.tokens, worst.cost, round(LEASE * 1000)),
                *(allowed.streams, allowed.daily_tokens, allowed.daily_cost, allowed.total_daily_cost),
                reservation.day if force else "",
            ],
        )
        if force and reply[0] == b"closed":
            return reservation.day  # it has just ended and is settled
        _raise_refusal(reply, BUDGET_RETRY)
        return int(reply[1])

    async def release(self, claim_id: str, client: str) -> None:
        """Give a reservation back: its claim came to nothing."""
        await self._release(self._keys(claim_id, client), [claim_id, RECORD])

    async def settle(
        self,
        reservation: Reservation,
        spent: Usage,
        state: State,
        *,
        generation_id: str | None = None,
        model: str | None = None,
    ) -> None:
        """Book what a generation took, once, or put the truth in place of an estimate.

        Args:
            reservation: which is settled.
            spent: what it took.
            state: how it ended.
            generation_id: by which the upstream can be asked for the truth behind an estimate.
            model: the name for the books, where that is not the one of the reservation.
        """
        await self._book(
            reservation if model is None else replace(reservation, model=model),
            spent,
            state=state,
            generation_id=generation_id or "",
        )

    async def correct(self, reservation: Reservation, spent: Usage) -> None:
        """Put the truth in place of an estimate, and do nothing else."""
        await self._book(reservation, spent, state="", generation_id="")

    async def _book(self, reservation: Reservation, spent: Usage, *, state: str, generation_id: str) -> None:
        keys, day = self._keys(reservation.claim_id, reservation.client), _date(reservation.day)
        await self._settle(
            [
                *keys,
                self._ledger(day),
                self._estimates,
                *(self._names(kind, day) for kind in ("clients", "models")),
            ],
            [
                *(reservation.claim_id, reservation.client, reservation.model, state),
                *(spent.prompt, spent.completion, spent.cached, spent.reasoning, spent.cost or 0),
                *(int(spent.cost is not None), int(spent.estimated), int(not state), reservation.day, RECORD),
                *(generation_id, round(ASKED_AFTER * 1000), MAX_CLIENTS, MAX_MODELS),
            ],
        )

    async def asked(self, reservation: Reservation) -> None:
        """The truth behind an estimate is not to be had: the estimate stands, and what was kept for it is free."""
        keys = self._keys(reservation.claim_id, reservation.client)
        await self._asked([keys[0], keys[2], keys[3], self._estimates], [reservation.claim_id])

    async def look_later(self, claim_id: str, seconds: float) -> None:
        """Tell others that this worker asks for the truth behind an estimate in so many seconds."""
        later = await self._now() + round((seconds + ASKED_AFTER) * 1000)
        async with bounded_call():
            await self._store.redis.zadd(self._estimates, {claim_id: later}, xx=True)

    async def unasked(self, limit: int) -> list[Estimate]:
        """Estimates for whose truth nobody has asked in time.

        Whoever gets one should ask; should that come to nothing, others get it a while later.
        """
        if limit <= 0:
            return []
        now, tokens = await self._take([self._estimates], [limit, round(ASKED_AFTER * 1000)])
        async with bounded_call():
            pipe = self._store.redis.pipeline(transaction=False)
            for claim_id in tokens:
                pipe.hgetall(self._key("reservation", claim_id.decode()))
            found: Any = await pipe.execute(raise_on_error=False)
            estimates, gone = [], []
            for claim_id, fields in zip(tokens, found, strict=True):
                if not _is_readable(claim_id.decode(), fields):
                    continue
                # A record that was born with its settlement, after Redis had lost it, tells too little.
                if fields.get(b"estimated") == b"1" and {b"tokens", b"generation"} <= fields.keys():
                    age = (now - int(fields.get(b"ended", now))) / 1000
                    reservation = _reservation(claim_id.decode(), fields)
                    estimates.append(Estimate(reservation, fields[b"generation"].decode(), age))
                else:
                    gone.append(claim_id)
            if gone:
                await self._store.redis.zrem(self._estimates, *gone)
        return estimates

    async def hold(self, reservations: Sequence[Reservation]) -> list[Reservation]:
        """Renew the leases of generations that run here; returns those that are not open (any more)."""
        if not reservations:
            return []
        keys = [self._open]
        for each in reservations:
            keys += [self._key("reservation", each.claim_id), self._key("slots", each.client)]
        closed = await self._hold(keys, [round(LEASE * 1000), *(each.claim_id for each in reservations)])
        return [reservations[number - 1] for number in closed]

    async def orphans(self, limit: int) -> list[Reservation]:
        """Open reservations that nobody has renewed in time."""
        found = await self._due(self._open, limit)
        if closed := [claim_id for claim_id, fields in found.items() if fields.get(b"state") != b"open"]:
            async with bounded_call():
                await self._store.redis.zrem(self._open, *closed)
        return [
            _reservation(claim_id, fields) for claim_id, fields in found.items() if claim_id not in closed
        ]

    async def put_off(self, tokens: Collection[str]) -> None:
        """Let others have their turn before these: they could not be settled, and would be found first each time."""
        await self._put_off(self._open, tokens, round(LEASE * 1000))

    async def _put_off(self, key: str, tokens: Collection[str], milliseconds: int) -> None:
        if tokens:
            later = await self._now() + milliseconds
            async with bounded_call():
                await self._store.redis.zadd(key, dict.fromkeys(tokens, later), xx=True)

    async def _due(self, key: str, limit: int) -> dict[str, dict[bytes, bytes]]:
        """The records of reservations in a set whose time has come, by token. One that cannot be read is put off."""
        now = await self._now()
        async with bounded_call():
            tokens: Any = await self._store.redis.zrangebyscore(key, "-inf", now, start=0, num=limit)
            pipe = self._store.redis.pipeline(transaction=False)
            for claim_id in tokens:
                pipe.hgetall(self._key("reservation", claim_id.decode()))
            records = await pipe.execute(raise_on_error=False)
        found = {claim_id.decode(): fields for claim_id, fields in zip(tokens, records, strict=True)}
        unreadable = [claim_id for claim_id, fields in found.items() if not _is_readable(claim_id, fields)]
        if unreadable:
            log.warning("reservations cannot be read", count=len(unreadable))
            await self._put_off(key, unreadable, UNREADABLE_MS)
        return {claim_id: fields for claim_id, fields in found.items() if claim_id not in unreadable}

    async def _now(self) -> int:
        """Milliseconds since 1970, by Redis's clock."""
        async with bounded_call():
            seconds, micros = await self._store.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    async def day(self, client: str) -> Day:
        """A client's day so far."""
        async with bounded_call():
            now, _ = await self._store.redis.time()
            day = int(now) // 86_400
            names = [
                f"{day}:{name}" for name in ("requests", "prompt", "completion", "spent_cost", "estimated")
            ]
            values: Any = await self._store.redis.hmget(self._key("account", client), names)
        return Day(_date(day), *(int(value or 0) for value in values))

    async def usage_rows(self, day: dt.date | None) -> tuple[dt.date, list[UsageRow]]:
        """All lines of a day's books; of today, by Redis's clock, where none is given."""
        async with bounded_call():
            if day is None:
                now, _ = await self._store.redis.time()
                day = _date(int(now) // 86_400)
            fields: Any = await self._store.redis.hgetall(self._ledger(day))
        lines: dict[tuple[str, str], dict[str, int]] = {}
        for name, value in fields.items():
            client, model, metric = name.decode().split("\x1f")
            lines.setdefault((client, model), dict.fromkeys(METRICS, 0))[metric] = int(value)
        return day, [UsageRow(client, model, counts) for (client, model), counts in sorted(lines.items())]

    def _keys(self, claim_id: str, client: str) -> list[str]:
        return [
            *(self._key("reservation", claim_id), self._key("slots", client), self._key("account", client)),
            *(self._global, self._open),
        ]

    def _waiting(self, client: str) -> list[str]:
        """The waiting sessions of a client and their bytes, then those of all."""
        prefix = f"{self._store.prefix}:{{accounts}}"
        own = [self._key("waiting", client), self._key("waiting_bytes", client)]
        return [*own, f"{prefix}:all_waiting", f"{prefix}:all_waiting_bytes"]

    def _key(self, kind: str, name: str) -> str:
        return f"{self._store.prefix}:{{accounts}}:{kind}:{name}"

    def _names(self, kind: str, day: dt.date) -> str:
        return self._key(f"named:{kind}", day.isoformat())

    def _ledger(self, day: dt.date) -> str:
        return self._key("books", day.isoformat())

    @property
    def _global(self) -> str:
        return f"{self._store.prefix}:{{accounts}}:everyone"

    @property
    def _open(self) -> str:
        return f"{self._store.prefix}:{{accounts}}:open"

    @property
    def _estimates(self) -> str:
        return f"{self._store.prefix}:{{accounts}}:estimates"


def check_admitted(reply: list[Any]) -> None:
    """Take the reply of `AccountStore.admitting`.

    Raises:
        TooManyStreams: too many of the client's wait, or they are too large together.
        Overloaded: all that wait are too large together.
        BudgetExceeded: what is spent today leaves no room for it.
    """
    _raise_refusal(reply)


def _raise_refusal(reply: list[Any], budget_retry: float | None = None) -> None:
    kind = reply[0]
    if kind == b"ok":
        return
    if kind in (b"waiting", b"streams"):
        message = "Too many of your sessions wait to be started." if kind == b"waiting" else ""
        raise TooManyStreams(message, retry_after=min(float(reply[1]), STREAMS_RETRY))
    if kind == b"full":
        message = "Too many requests wait to be started; try again in a moment."
        raise Overloaded(message, retry_after=float(reply[1]))
    if kind == b"claiming":
        raise BeingClaimed
    if kind == b"closed":
        raise Overloaded("This claim was given back.")
    everyone = kind == b"total"
    message = "The budget of this service for today is used up." if everyone else ""
    final = len(reply) > 2 and reply[2] == 1
    wait = float(reply[1]) if final or budget_retry is None else budget_retry
    raise BudgetExceeded(message, retry_after=wait, final=final)


def _reservation(claim_id: str, fields: dict[bytes, bytes]) -> Reservation:
    text = {name.decode(): value.decode() for name, value in fields.items()}
    worst = WorstCase(int(text["tokens"]), int(text["cost"]))
    day, ran = int(text["day"]), "ran" in text
    return Reservation(claim_id, text["session"], text["client"], text["model"], worst, day, ran)


def _is_readable(claim_id: str, fields: dict[bytes, bytes] | Exception) -> bool:
    """Whether a record can be read; one that is closed or missing needs no fields."""
    if isinstance(fields, Exception):
        return False
    if fields.get(b"state") != b"open" and b"tokens" not in fields:
        return True
    try:
        _reservation(claim_id, fields)
    except (KeyError, ValueError):
        return False
    return True


def _date(day: int) -> dt.date:
    return dt.date(1970, 1, 1) + dt.timedelta(days=day)
