"""The accounts in Redis: slots and budgets of every client, and of all clients together.

A client's keys are in one of `BUCKETS` buckets, and share its tag, so that one script can change all of them and a
Redis Cluster can spread the buckets. The total budget is an account like any other, with keys of its own: the same
scripts run on it. It is asked second, and if it refuses, what was taken from the first is given back. No script
changes both, so every step can be repeated and takes effect once in each.

A reservation is named after the claim of its generation. While it is open it is a lease, which its worker renews. If
the worker dies, other workers find the reservation among the open ones of its bucket and settle it.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import orjson
import structlog
from redis.exceptions import ResponseError

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.errors import (
    BeingClaimed,
    BudgetExceeded,
    Overloaded,
    Queued,
    StoreRefused,
    StoreUnavailable,
    TooManyStreams,
)
from broker.core.session import State
from broker.store.buckets import BUCKETS, Account, account_of, bucket_prefix, total_account
from broker.store.usage_ledger import LEDGER_S, UsageLedger

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from broker.store.call import Call
    from broker.store.connection import Script, Store

log = structlog.get_logger(__name__)

LEASE = 8.0
"""Seconds without renewal after which an open reservation counts as that of a dead worker."""

RECORD = 6 * 3600
"""Seconds that the record of a closed reservation is stored, so that late repeats change nothing."""

ACCOUNT_TTL = 3 * 86_400
"""Seconds that an account is stored after its last change; that of a client after the end of the month."""

ASKED_AFTER = 16.0
"""Seconds by which a worker may be late to ask for the final usage of an estimate. After that, any worker asks."""

UNREADABLE_MS = 600_000
"""Milliseconds after which a record that cannot be read is tried again."""

BUDGET_RETRY = 30.0
"""Seconds after which a page that waits for a budget tries again."""

MONTH = "The budget for this month does not cover this."

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
"""How pages wait for a slot. All times are in milliseconds. A place is held for `PLACE_MS` for a page that has not come
back. A page that is `LATE_MS` late is overdue. The first `NEAR` pages of the line come back after `MIN_RETRY_MS`, each
further page `RETRY_STEP_MS` later, up to `MAX_RETRY_MS`."""

UNLIMITED = 10**9
"""More streams than there can be."""

RESERVE_AT_ONCE = 200
"""Maximum number of reservations that one round trip makes again."""

ESTIMATE_BUCKETS = 16
"""Buckets that one search for estimates covers. The next search covers the next ones."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a generation has taken from the accounts.

    Attributes:
        claim_id: the id of its claim.
        session_id: the id of its session.
        client: the client that pays.
        model: the model that was asked for.
        worst: the reserved amount.
        day: the day of the claim, in days since 1970.
        waited_ms: milliseconds that its session has waited in line.
    """

    claim_id: str
    session_id: str
    client: str
    model: str
    worst: WorstCase
    day: int = 0
    waited_ms: int = field(default=0, compare=False)


class Estimate(NamedTuple):
    """A settlement whose final usage may still be asked from the upstream.

    Attributes:
        reservation: the reservation that was settled.
        generation_id: the upstream's id of the generation.
        age: seconds since it was settled.
    """

    reservation: Reservation
    generation_id: str
    age: float


class Totals(NamedTuple):
    """The usage of a client in a day or a month: requests, tokens, nano-USD, and how many of them are estimated."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    cost: int = 0
    estimated: int = 0


class Period(NamedTuple):
    """The usage of a client in the day and the calendar month of today, UTC."""

    today: dt.date
    day: Totals
    month: Totals


class _Booked(NamedTuple):
    """The booked cost in nano-USD, and for an estimate the upstream's id of the generation."""

    cost: int
    generation_id: str


class AccountStore:
    """Makes, releases and settles reservations. Every method raises `StoreUnavailable` if Redis cannot be reached.

    Args:
        store: the connection.
        quotas: the limits of clients.
    """

    def __init__(self, store: Store, quotas: Quotas) -> None:
        self._store = store
        self._ledger = UsageLedger(store)
        self._total = total_account(store) if quotas.total_daily_cost else None
        leases = {"LEASE_MS": round(LEASE * 1000), "ACCOUNT_S": ACCOUNT_TTL}
        ask = {"ASK_MS": round(ASKED_AFTER * 1000)}
        self._quotas = quotas
        self._reserve = store.script("reserve", {**leases, **LINE, "ONE_CLIENT": 1})
        self._reserve_total = store.script("reserve", {**leases, **LINE, "ONE_CLIENT": 0})
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

    async def reserve(
        self,
        reservation: Reservation,
        *,
        quotas: Quotas | None = None,
        may_wait: bool = False,
        ends_ms: int = 0,
    ) -> Reservation:
        """Reserve a slot and the worst case in the client's account and in the total, or in neither.

        Args:
            reservation: the reservation.
            quotas: the limits of its client, where they differ from those of the service.
            may_wait: if no slot is free, give the session a place in line, or leave it the one that it has.
            ends_ms: when the session and its place expire, by the clock of Redis.

        Returns:
            The reservation with the day of its claim and its time in line.

        Raises:
            Queued: the session waits in line.
            TooManyStreams, BudgetExceeded: there is no room now; `final` if no release could make room for it.
            BeingClaimed: another claim of the same session has taken the room.
            Overloaded: the reservation was released meanwhile.
        """
        own = self._reserving(reservation, self._account(reservation.client), quotas, may_wait, ends_ms)
        # Day and time in line of the client's account count.
        taken = self.reserved(reservation, (await self._store.run([own]))[0])
        if self._total is not None:
            total = self._reserving(reservation, self._total, None, may_wait, ends_ms)
            [reply] = await self._store.run([total])
            if reply[0] != b"ok":
                if await self._give_back(self._account(reservation.client), reservation):
                    raise BeingClaimed
                _raise_refusal(reply, is_total=True)
        return taken

    def reserving(
        self, reservation: Reservation, *, quotas: Quotas | None, may_wait: bool, ends_ms: int
    ) -> Call | None:
        """Return the call of `reserve`, to be run together with the claim. Pass its reply to `reserved`.

        Its key is that of the reservation. None if the claim has to wait for the reply: the reservation takes several
        round trips, or Redis does not answer promptly, or is no single server.
        """
        if self._total is not None or not self._store.runs_in_order:
            return None
        return self._reserving(reservation, self._account(reservation.client), quotas, may_wait, ends_ms)

    @staticmethod
    def reserved(reservation: Reservation, reply: list[Any] | StoreUnavailable) -> Reservation:
        """Return the reservation of a reply in the account of its client.

        Raises:
            StoreUnavailable: the reply is this error.
            Queued, TooManyStreams, BudgetExceeded, BeingClaimed, Overloaded: as `reserve`.
        """
        if isinstance(reply, StoreUnavailable):
            raise reply
        if reply[0] != b"ok":
            _raise_refusal(reply, is_total=False)
        each = reservation  # `replace` takes several times as long
        return Reservation(
            each.claim_id,
            each.session_id,
            each.client,
            each.model,
            each.worst,
            day=int(reply[1]),
            waited_ms=int(reply[2]),
        )

    def _reserving(
        self, reservation: Reservation, account: Account, quotas: Quotas | None, may_wait: bool, ends_ms: int
    ) -> Call:
        script = self._reserve_total if account is self._total else self._reserve
        return script.call(
            **account.keys_of(reservation.claim_id),
            **account.line_keys(),
            **_step(reservation),
            **self._limits(account, quotas),
            running_since="",
            may_wait=int(may_wait),
            ends_ms=ends_ms,
        )

    async def reserve_again(self, reservations: Sequence[Reservation]) -> list[Reservation]:
        """Reserve again for running generations whose reservations were lost or released, despite the limits.

        Returns the reservations that Redis refused.
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
                    **self._limits(account, None),
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
                    if isinstance(reply, StoreUnavailable)
                ]
        return refused

    def _accounts(self, reservation: Reservation) -> list[tuple[Script, Account]]:
        """Return the accounts that a reservation touches, each with the script that reserves in it."""
        own = (self._reserve, self._account(reservation.client))
        return [own] if self._total is None else [own, (self._reserve_total, self._total)]

    def _limits(self, account: Account, quotas: Quotas | None) -> dict[str, int]:
        """Return the arguments of `reserve.lua` for the limits of an account."""
        if account is self._total:
            return {"max_streams": UNLIMITED, **budgets_of_all(self._quotas)}
        quotas = quotas or self._quotas
        return {"max_streams": quotas.streams, **budgets_of_client(quotas)}

    async def release(self, reservation: Reservation) -> None:
        """Release a reservation whose claim did not win."""
        # The total first: while the client's is open, the reaper finds it.
        if self._total is not None:
            await self._give_back(self._total, reservation)
        await self._give_back(self._account(reservation.client), reservation)

    async def _give_back(self, account: Account, reservation: Reservation) -> bool:
        """Release in one account. Returns True if another claim of the session has a slot there."""
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
        """Book the usage of a generation once, or replace an estimate by the final usage.

        Args:
            reservation: the reservation to settle.
            spent: the usage.
            state: the state in which the generation ended.
            generation_id: the id by which the upstream can be asked for the final usage of an estimate.
            model: the name for the usage ledger, if it differs from that of the reservation.
        """
        outcome = str(state) if state in (State.DONE, State.CANCELLED) else "failed"
        await self._book(
            reservation if model in (None, reservation.model) else replace(reservation, model=model),
            spent,
            outcome=outcome,
            generation_id=generation_id or "",
        )

    async def correct(self, reservation: Reservation, spent: Usage) -> None:
        """Replace an estimate by the final usage, and do nothing else."""
        await self._book(reservation, spent, outcome="", generation_id="")

    async def _book(
        self, reservation: Reservation, spent: Usage, *, outcome: str, generation_id: str
    ) -> None:
        day = _date(reservation.day)
        row = await self._ledger.row_name(day, reservation.client, reservation.model)
        if self._total is not None:
            # The total first: while the client's is open, the reaper finds it. If another worker has booked this claim
            # meanwhile, its cost and generation id count: both accounts must have the same cost, and without the id the
            # rest that it left reserved in the total would stay reserved.
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
        """Accept an estimate whose final usage cannot be learned, and release the rest of its reservation."""
        for account in (self._total, self._account(reservation.client)):
            if account is not None:
                await self._accept(
                    reservation=account.reservation(reservation.claim_id),
                    account=account.key("account"),
                    estimates=account.shared("estimates"),
                    claim_id=reservation.claim_id,
                )

    async def ask_later(self, reservation: Reservation, seconds: float) -> None:
        """Tell other workers that this one asks for the final usage of an estimate after ``seconds``."""
        later = await self._store.now_ms() + round((seconds + ASKED_AFTER) * 1000)
        estimates = self._account(reservation.client).shared("estimates")
        await self._store.command("ZADD", estimates, "XX", later, reservation.claim_id)

    async def due_estimates(self, limit: int) -> list[Estimate]:
        """Return the estimates in some of the buckets whose final usage was not asked for in time.

        The caller should ask for it. If the caller fails, another worker gets the estimate later.
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
            # A record that was first written by its settlement, because Redis had lost it, has too few fields.
            if {b"tokens", b"generation"} <= fields.keys() and _was_estimated(fields):
                age = (now - int(fields.get(b"ended", now))) / 1000
                reservation = _reservation(claim_id.decode(), fields)
                estimates.append(Estimate(reservation, fields[b"generation"].decode(), age))
            else:
                gone.append((prefix, claim_id))
        await self._remove("estimates", gone)
        return estimates

    async def renew(self, reservations: Sequence[Reservation]) -> list[Reservation]:
        """Renew the leases of generations that run here. Returns the reservations that are not open."""
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
            if not isinstance(reply, StoreUnavailable)
            for number in reply
        ]

    async def overdue(self, limit: int) -> list[Reservation]:
        """Return the open reservations of all buckets that were not renewed in time."""
        now = await self._store.now_ms()
        tagged = [bucket_prefix(self._store, bucket) for bucket in range(BUCKETS)]
        replies = await self._store.commands(
            [("ZRANGEBYSCORE", f"{prefix}:open", "-inf", now, "LIMIT", 0, limit) for prefix in tagged]
        )
        for reply in replies:
            # Those of a node that is away could not be renewed: they must not be overdue when it is back.
            if isinstance(reply, Exception) and not isinstance(reply, ResponseError):
                raise StoreUnavailable from reply
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
            await self._try_later(unreadable, now + UNREADABLE_MS)
        return reservations

    async def put_off(self, reservations: Collection[Reservation]) -> None:
        """Delay these, which could not be settled, so that the next search finds others first."""
        found = [(self._account(each.client).tagged, each.claim_id.encode()) for each in reservations]
        if found:
            await self._try_later(found, await self._store.now_ms() + round(LEASE * 1000))

    async def totals(self, client: str) -> Period:
        """Return the usage of a client today and in this month."""
        day = await self._store.now_ms() // 86_400_000
        today = _date(day)
        names = ("requests", "prompt", "completion", "spent_cost", "estimated")
        fields = [f"{period}:{name}" for period in (day, f"{today:%Y-%m}") for name in names]
        found = await self._store.command("HMGET", self._account(client).key("account"), *fields)
        values = [int(value or 0) for value in found]
        return Period(today, Totals(*values[: len(names)]), Totals(*values[len(names) :]))

    async def _try_later(self, found: Iterable[tuple[str, bytes]], at: int) -> None:
        await self._store.commands(
            [("ZADD", f"{tagged}:open", "XX", at, claim_id) for tagged, claim_id in found]
        )

    async def _remove(self, kind: str, found: Iterable[tuple[str, bytes]]) -> None:
        await self._store.commands([("ZREM", f"{tagged}:{kind}", claim_id) for tagged, claim_id in found])

    async def _records(self, found: Sequence[tuple[str, bytes]]) -> list[Any]:
        """Return the fields of each reservation, or an exception if it cannot be read."""
        replies = await self._store.commands(
            [("HGETALL", f"{tagged}:reservation:{claim_id.decode()}") for tagged, claim_id in found]
        )
        return [
            reply if isinstance(reply, Exception | dict) else dict(zip(reply[::2], reply[1::2], strict=True))
            for reply in replies
        ]


def budgets_of_client(quotas: Quotas) -> dict[str, int]:
    """Return the arguments of `reserve.lua` and `admit.lua` for the budgets of one client."""
    return {
        "max_tokens": quotas.daily_tokens,
        "max_cost": quotas.daily_cost,
        "max_month_cost": quotas.monthly_cost,
    }


def budgets_of_all(quotas: Quotas) -> dict[str, int]:
    """Return the same arguments for the budget of all clients together."""
    return {"max_tokens": 0, "max_cost": quotas.total_daily_cost, "max_month_cost": 0}


def _step(reservation: Reservation) -> dict[str, Any]:
    """Return the arguments of `reserve.lua` for a reservation."""
    return {
        "claim_id": reservation.claim_id,
        "session": reservation.session_id,
        "spec": orjson.dumps([reservation.client, reservation.model]),
        "tokens": reservation.worst.tokens,
        "cost": reservation.worst.cost,
    }


def _raise_refusal(reply: list[Any], *, is_total: bool) -> NoReturn:
    """Raise the error that the reply of `reserve.lua` means."""
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
    if kind == b"month":
        message = MONTH
    raise BudgetExceeded(message, retry_after=float(reply[1]) if final else BUDGET_RETRY, final=final)


def _reservation(claim_id: str, fields: dict[bytes, bytes]) -> Reservation:
    client, model = orjson.loads(fields[b"spec"])
    worst = WorstCase(int(fields[b"tokens"]), int(fields[b"cost"]))
    return Reservation(claim_id, fields[b"session"].decode(), client, model, worst, int(fields[b"day"]))


def _was_estimated(fields: dict[bytes, bytes]) -> bool:
    """Returns True if an estimate is booked. It is the sixth of the numbers that `settle.lua` writes."""
    booked = fields.get(b"booked", b"").split()
    return len(booked) > 5 and booked[5] == b"1"


def _is_readable(claim_id: str, fields: dict[bytes, bytes] | Exception) -> bool:
    """Returns True if a record can be read. A closed or missing record needs no fields."""
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
