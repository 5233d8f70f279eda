"""The accounts in Redis: slots and budgets of every client, and of all clients together.

A client's keys are in one of `BUCKETS` buckets, and share its tag, so that one script can change all of them and a
Redis Cluster can spread the buckets. The total budget is an account like any other, with keys of its own: the same
scripts run on it. It is asked second, and what was taken from the first is given back where it refuses. No script
touches both, so every step can be asked for again, and happens once in each.

A reservation is named after the claim of its generation. While it is open it is a lease: its worker renews it, and once
that is dead others find it among the open ones of its bucket and settle it.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import orjson
import structlog

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.errors import BeingClaimed, BudgetExceeded, Overloaded, Queued, StoreRefused, TooManyStreams
from broker.core.session import State
from broker.store.buckets import BUCKETS, Account, account_of, bucket_prefix, total_account
from broker.store.connection import Store, bounded_call
from broker.store.usage_ledger import LEDGER_S, UsageLedger

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from broker.store.connection import Script

log = structlog.get_logger(__name__)

LEASE = 8.0
"""Seconds after which an open reservation that nobody renews is taken for a dead worker's."""

RECORD = 6 * 3600
"""Seconds that a closed reservation is remembered, so that late repeats change nothing."""

ACCOUNT_TTL = 3 * 86_400
"""Seconds that an account is kept after its last change."""

ASKED_AFTER = 16.0
"""Seconds by which a worker may be late in asking for the final usage behind an estimate; then any worker asks."""

UNREADABLE_MS = 600_000
"""Milliseconds after which a record that cannot be read is looked at again."""

BUDGET_RETRY = 30.0
"""Seconds after which a page that waits for a budget comes again."""

STREAMS_RETRY = 5.0
"""Seconds after which a caller that cannot wait in line may try again for a slot."""

LINE = {
    "PLACE_MS": 15_000,
    "LATE_MS": 500,
    "MIN_RETRY_MS": 2000,
    "MAX_RETRY_MS": 10_000,
    "RETRY_STEP_MS": 200,
    "NEAR": 10,
}
"""How pages wait for a slot: in milliseconds, for how long a place is kept for a page that has not come back in time,
how late a page may be before it is overdue, and when pages come back: the first `NEAR` of the line after the shortest
time, each further one a step later."""

UNLIMITED = 10**9
"""More streams than there can be."""

RESERVE_AT_ONCE = 200
"""Reservations that one round trip makes again at most."""

ESTIMATE_BUCKETS = 16
"""Buckets that one look for estimates covers; the next look covers the next ones."""


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
    """

    claim_id: str
    session_id: str
    client: str
    model: str
    worst: WorstCase
    day: int = 0


class Estimate(NamedTuple):
    """A settlement whose final usage the upstream may still tell.

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


class _Booked(NamedTuple):
    """What counts in an account: the cost in nano-USD, and the upstream's id of the generation behind an estimate."""

    cost: int
    generation_id: str


class AccountStore:
    """Takes, gives back and settles. Every method raises `StoreUnavailable` where Redis cannot be reached.

    Args:
        store: the connection.
        quotas: what a client may have.
    """

    def __init__(self, store: Store, quotas: Quotas) -> None:
        self._store = store
        self._quotas = quotas
        self._ledger = UsageLedger(store)
        self._total = total_account(store) if quotas.total_daily_cost else None
        leases = {"LEASE_MS": round(LEASE * 1000), "ACCOUNT_S": ACCOUNT_TTL}
        ask = {"ASK_MS": round(ASKED_AFTER * 1000)}
        own = {
            "ONE_CLIENT": 1,
            "MAX_STREAMS": quotas.streams,
            "MAX_TOKENS": quotas.daily_tokens,
            "MAX_COST": quotas.daily_cost,
        }
        total = {
            "ONE_CLIENT": 0,
            "MAX_STREAMS": UNLIMITED,
            "MAX_TOKENS": 0,
            "MAX_COST": quotas.total_daily_cost,
        }
        self._reserve = store.script("reserve", {**leases, **LINE, **own})
        self._reserve_total = store.script("reserve", {**leases, **LINE, **total})
        self._renew = store.script("renew", leases)
        self._release = store.script("release", {"RECORD_S": RECORD, "ONE_CLIENT": 1})
        self._release_total = store.script("release", {"RECORD_S": RECORD, "ONE_CLIENT": 0})
        settle = {**ask, "RECORD_S": RECORD, "ACCOUNT_S": ACCOUNT_TTL, "LEDGER_S": LEDGER_S}
        self._settle = store.script("settle", settle)
        self._accept = store.script("accept_estimate")
        self._take = store.script("take_estimates", ask)
        self._estimates_at = 0

    def _account(self, client: str) -> Account:
        return account_of(self._store, client)

    async def reserve(self, reservation: Reservation, *, may_wait: bool = False, ends_ms: int = 0) -> int:
        """Take a slot and the worst case, from the client's account and the total, or nothing.

        Args:
            reservation: for what.
            may_wait: where no slot is free, the session takes a place in line, or keeps the one that it has.
            ends_ms: when the session expires, by the clock of Redis; its place ends then.

        Returns:
            The day of the claim.

        Raises:
            Queued: it waits in line.
            TooManyStreams, BudgetExceeded: there is no room now; `final` where nothing could be given back for it.
            BeingClaimed: there is none because another claim of the same session has taken it.
            Overloaded: it was given back meanwhile.
        """
        day = 0
        for script, account in self._accounts(reservation):
            reply = await script(
                **account.keys_of(reservation.claim_id),
                **account.line_keys(),
                **_step(reservation),
                running_since="",
                may_wait=int(may_wait),
                ends_ms=ends_ms,
            )
            if reply[0] == b"ok":
                day = day or int(reply[1])
                continue
            is_total = account is self._total
            if is_total and await self._give_back(self._account(reservation.client), reservation):
                raise BeingClaimed
            _raise_refusal(reply, is_total=is_total)
        return day

    async def reserve_again(self, reservations: Sequence[Reservation]) -> list[Reservation]:
        """Reserve for generations that run already, whatever the limits say: Redis has lost it, or given it back.

        Returns those that Redis refused.
        """
        refused: list[Reservation] = []
        for start in range(0, len(reservations), RESERVE_AT_ONCE):
            part = reservations[start : start + RESERVE_AT_ONCE]
            steps = [(each, *where) for each in part for where in self._accounts(each)]
            calls = [
                script.call(
                    **account.keys_of(each.claim_id),
                    **account.line_keys(),
                    **_step(each),
                    running_since=each.day,
                    may_wait=0,
                    ends_ms=0,
                )
                for each, script, account in steps
            ]
            try:
                replies = await self._store.run_each(calls)
            except StoreRefused:
                refused += part
            else:
                refused += [
                    each
                    for (each, *_), reply in zip(steps, replies, strict=True)
                    if isinstance(reply, StoreRefused)
                ]
        return refused

    def _accounts(self, reservation: Reservation) -> list[tuple[Script, Account]]:
        """Return the accounts that a reservation touches, each with the script that reserves in it."""
        own = (self._reserve, self._account(reservation.client))
        return [own] if self._total is None else [own, (self._reserve_total, self._total)]

    async def release(self, reservation: Reservation) -> None:
        """Give a reservation back: its claim came to nothing."""
        # The total first: as long as the client's is open, it is found by the reaper.
        if self._total is not None:
            await self._give_back(self._total, reservation)
        await self._give_back(self._account(reservation.client), reservation)

    async def _give_back(self, account: Account, reservation: Reservation) -> bool:
        """Give back to one account. Returns True if another claim of the session has a slot of it."""
        script = self._release_total if account is self._total else self._release
        reply = await script(
            **account.keys_of(reservation.claim_id),
            claim_id=reservation.claim_id,
            session=reservation.session_id,
        )
        return bool(reply)

    async def settle(
        self,
        reservation: Reservation,
        spent: Usage,
        state: State,
        *,
        generation_id: str | None = None,
        model: str | None = None,
    ) -> None:
        """Book what a generation took, once, or put the final usage in place of an estimate.

        Args:
            reservation: which is settled.
            spent: what it took.
            state: how it ended.
            generation_id: by which the upstream can be asked for the final usage behind an estimate.
            model: the name for the usage ledger, where that is not the one of the reservation.
        """
        outcome = str(state) if state in (State.DONE, State.CANCELLED) else "failed"
        await self._book(
            reservation if model is None else replace(reservation, model=model),
            spent,
            outcome=outcome,
            generation_id=generation_id or "",
        )

    async def correct(self, reservation: Reservation, spent: Usage) -> None:
        """Put the final usage in place of an estimate, and do nothing else."""
        await self._book(reservation, spent, outcome="", generation_id="")

    async def _book(
        self, reservation: Reservation, spent: Usage, *, outcome: str, generation_id: str
    ) -> None:
        day = _date(reservation.day)
        row = await self._ledger.row_name(day, reservation.client, reservation.model)
        if self._total is not None:
            # The total first: as long as the client's is open, it is found by the reaper. What another worker has
            # booked for this claim meanwhile counts, so that both accounts tell the same, and the name by which it
            # could ask for the final usage: without that, what it left reserved in the total would stay reserved.
            booked = await self._book_in(self._total, reservation, spent, outcome, "", generation_id)
            if booked.cost != (spent.cost or 0):
                spent = spent._replace(cost=booked.cost)
            generation_id = generation_id or booked.generation_id
        await self._book_in(
            self._account(reservation.client), reservation, spent, outcome, row, generation_id
        )

    async def _book_in(
        self,
        account: Account,
        reservation: Reservation,
        spent: Usage,
        outcome: str,
        row: str,
        generation_id: str,
    ) -> _Booked:
        """Book in one account."""
        _, cost, known = await self._settle(
            **account.keys_of(reservation.claim_id),
            ledger=UsageLedger.key_in(account.tagged, _date(reservation.day)),
            estimates=account.shared("estimates"),
            claim_id=reservation.claim_id,
            day=reservation.day,
            outcome=outcome,
            row=row,
            generation=generation_id,
            prompt=spent.prompt,
            completion=spent.completion,
            cached=spent.cached,
            reasoning=spent.reasoning,
            cost=spent.cost or 0,
            estimated=int(spent.estimated),
            unpriced=int(spent.cost is None),
        )
        return _Booked(int(cost), known.decode())

    async def accept_estimate(self, reservation: Reservation) -> None:
        """Let an estimate stand: its final usage cannot be learned. What was reserved above it is given back."""
        for account in (self._total, self._account(reservation.client)):
            if account is not None:
                await self._accept(
                    reservation=account.reservation(reservation.claim_id),
                    account=account.key("account"),
                    estimates=account.shared("estimates"),
                    claim_id=reservation.claim_id,
                )

    async def ask_later(self, reservation: Reservation, seconds: float) -> None:
        """Tell other workers that this one asks for the final usage behind an estimate in so many seconds."""
        later = await self._now() + round((seconds + ASKED_AFTER) * 1000)
        estimates = self._account(reservation.client).shared("estimates")
        async with bounded_call():
            await self._store.redis.zadd(estimates, {reservation.claim_id: later}, xx=True)

    async def due_estimates(self, limit: int) -> list[Estimate]:
        """Return estimates for whose final usage nobody has asked in time, of some of the buckets.

        A worker that gets one should ask; if that comes to nothing, another gets it a while later.
        """
        if limit <= 0:
            return []
        buckets = [(self._estimates_at + n) % BUCKETS for n in range(ESTIMATE_BUCKETS)]
        self._estimates_at = (self._estimates_at + ESTIMATE_BUCKETS) % BUCKETS
        tagged = [bucket_prefix(self._store, bucket) for bucket in buckets]
        each = max(1, limit // ESTIMATE_BUCKETS)
        replies = await self._store.run(
            [self._take.call(estimates=f"{prefix}:estimates", limit=each) for prefix in tagged]
        )
        now = int(replies[0][0])
        found = [
            (prefix, claim_id)
            for prefix, (_, claims) in zip(tagged, replies, strict=True)
            for claim_id in claims
        ]
        estimates, gone = [], []
        for (prefix, claim_id), fields in zip(found, await self._records(found), strict=True):
            if not _is_readable(claim_id.decode(), fields):
                continue
            # A record that was born with its settlement, after Redis had lost it, tells too little.
            if {b"tokens", b"generation"} <= fields.keys() and _was_estimated(fields):
                age = (now - int(fields.get(b"ended", now))) / 1000
                reservation = _reservation(claim_id.decode(), fields)
                estimates.append(Estimate(reservation, fields[b"generation"].decode(), age))
            else:
                gone.append((prefix, claim_id))
        await self._remove("estimates", gone)
        return estimates

    async def renew(self, reservations: Sequence[Reservation]) -> list[Reservation]:
        """Renew the leases of generations that run here. Returns those that are not open (any more)."""
        by_bucket: dict[str, list[Reservation]] = defaultdict(list)
        for each in reservations:
            by_bucket[self._account(each.client).tagged].append(each)
        if not by_bucket:
            return []
        calls = [
            self._renew.call(
                open=f"{tagged}:open",
                reservations=[f"{tagged}:reservation:{each.claim_id}" for each in part],
                claim_ids=[each.claim_id for each in part],
            )
            for tagged, part in by_bucket.items()
        ]
        replies = await self._store.run_each(calls)
        return [
            part[number - 1]
            for part, reply in zip(by_bucket.values(), replies, strict=True)
            if not isinstance(reply, StoreRefused)
            for number in reply
        ]

    async def overdue(self, limit: int) -> list[Reservation]:
        """Return open reservations that nobody has renewed in time, of all buckets."""
        now = await self._now()
        tagged = [bucket_prefix(self._store, bucket) for bucket in range(BUCKETS)]
        replies = await self._store.commands(
            [("ZRANGEBYSCORE", f"{prefix}:open", "-inf", now, "LIMIT", 0, limit) for prefix in tagged]
        )
        found = [
            (prefix, claim_id)
            for prefix, claims in zip(tagged, replies, strict=True)
            if not isinstance(claims, Exception)
            for claim_id in claims
        ][:limit]
        reservations, closed, unreadable = [], [], []
        for (prefix, claim_id), fields in zip(found, await self._records(found), strict=True):
            if not _is_readable(claim_id.decode(), fields):
                unreadable.append((prefix, claim_id))
            elif fields.get(b"state") != b"open":
                closed.append((prefix, claim_id))
            else:
                reservations.append(_reservation(claim_id.decode(), fields))
        await self._remove("open", closed)
        if unreadable:
            log.warning("reservations cannot be read", count=len(unreadable))
            await self._look_again(unreadable, now + UNREADABLE_MS)
        return reservations

    async def put_off(self, reservations: Collection[Reservation]) -> None:
        """Let others be found before these: they could not be settled, and would be found first each time."""
        found = [(self._account(each.client).tagged, each.claim_id.encode()) for each in reservations]
        if found:
            await self._look_again(found, await self._now() + round(LEASE * 1000))

    async def day(self, client: str) -> Day:
        """Return a client's day so far."""
        async with bounded_call():
            now, _ = await self._store.redis.time()
            day = int(now) // 86_400
            names = [
                f"{day}:{name}" for name in ("requests", "prompt", "completion", "spent_cost", "estimated")
            ]
            values: Any = await self._store.redis.hmget(self._account(client).key("account"), names)
        return Day(_date(day), *(int(value or 0) for value in values))

    async def _look_again(self, found: Iterable[tuple[str, bytes]], at: int) -> None:
        await self._store.commands(
            [("ZADD", f"{tagged}:open", "XX", at, claim_id) for tagged, claim_id in found]
        )

    async def _remove(self, kind: str, found: Iterable[tuple[str, bytes]]) -> None:
        await self._store.commands([("ZREM", f"{tagged}:{kind}", claim_id) for tagged, claim_id in found])

    async def _records(self, found: Sequence[tuple[str, bytes]]) -> list[Any]:
        """Return the fields of reservations, an exception in the place of one that cannot be read."""
        replies = await self._store.commands(
            [("HGETALL", f"{tagged}:reservation:{claim_id.decode()}") for tagged, claim_id in found]
        )
        return [
            reply if isinstance(reply, Exception | dict) else dict(zip(reply[::2], reply[1::2], strict=True))
            for reply in replies
        ]

    async def _now(self) -> int:
        """Return the milliseconds since 1970, by Redis's clock."""
        async with bounded_call():
            seconds, micros = await self._store.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000


def _step(reservation: Reservation) -> dict[str, Any]:
    """Return what `reserve.lua` is told of a reservation."""
    return {
        "claim_id": reservation.claim_id,
        "session": reservation.session_id,
        "spec": orjson.dumps([reservation.client, reservation.model]),
        "tokens": reservation.worst.tokens,
        "cost": reservation.worst.cost,
    }


def _raise_refusal(reply: list[Any], *, is_total: bool) -> NoReturn:
    """Raise what the reply of `reserve.lua` says."""
    kind = reply[0]
    if kind == b"claiming":
        raise BeingClaimed
    if kind == b"closed":
        raise Overloaded("This claim was given back.")
    if kind == b"queued":
        raise Queued(int(reply[1]), int(reply[2]), int(reply[3]))
    if kind == b"streams":
        raise TooManyStreams(retry_after=min(float(reply[1]), STREAMS_RETRY))
    final = reply[2] == 1
    message = "The budget of this service for today is used up." if is_total else ""
    raise BudgetExceeded(message, retry_after=float(reply[1]) if final else BUDGET_RETRY, final=final)


def _reservation(claim_id: str, fields: dict[bytes, bytes]) -> Reservation:
    client, model = orjson.loads(fields[b"spec"])
    worst = WorstCase(int(fields[b"tokens"]), int(fields[b"cost"]))
    return Reservation(claim_id, fields[b"session"].decode(), client, model, worst, int(fields[b"day"]))


def _was_estimated(fields: dict[bytes, bytes]) -> bool:
    """Whether what is booked is an estimate: the sixth of its figures, as `settle.lua` writes them."""
    booked = fields.get(b"booked", b"").split()
    return len(booked) > 5 and booked[5] == b"1"


def _is_readable(claim_id: str, fields: dict[bytes, bytes] | Exception) -> bool:
    """Returns True if a record can be read. One that is closed or missing needs no fields."""
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
