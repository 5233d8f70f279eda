"""The number and bytes of pending sessions, which are prepared and not yet claimed, in the accounts.

Like a budget, they are counted in the client's account and in the total of all clients, by the same script with
different keys. A session that one of them refuses is not stored, or removed at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.core.errors import BrokerError, BudgetExceeded, Overloaded, StoreRefused, TooManyStreams
from broker.store.accounts import MONTH, STREAMS_RETRY, UNLIMITED, budgets_of_all, budgets_of_client
from broker.store.buckets import Account, account_of, total_account

if TYPE_CHECKING:
    from broker.core.accounts import Quotas, WorstCase
    from broker.store.call import Call
    from broker.store.connection import Store


class PendingStore:
    """Admits pending sessions. Every method raises `StoreUnavailable` if Redis cannot be reached.

    Args:
        store: the connection.
        quotas: the limits of one client, and of all together.
        session_ttl: seconds that a session is pending.
    """

    def __init__(self, store: Store, quotas: Quotas, *, session_ttl: int) -> None:
        self._store = store
        self._total = total_account(store)
        self._quotas = quotas
        own = {
            "MAX_PENDING": quotas.pending,
            "MAX_BYTES": quotas.pending_bytes,
            "FAIR_FROM": quotas.pending_bytes,
        }
        total = {
            "MAX_PENDING": UNLIMITED,
            "MAX_BYTES": quotas.total_pending_bytes,
            "FAIR_FROM": quotas.total_pending_bytes // 2,
        }
        self._admit = store.script("admit", {"SESSION_S": session_ttl, **own})
        self._admit_in_total = store.script("admit", {"SESSION_S": session_ttl, **total})
        self._forget = store.script("forget")

    async def admit(
        self,
        client: str,
        session_id: str,
        worst: WorstCase,
        *,
        stored: int = 0,
        quotas: Quotas | None = None,
    ) -> None:
        """Count a session that is about to be stored and takes ``stored`` bytes.

        ``quotas`` are the limits of its client, where they differ from those of the service.

        Raises:
            TooManyStreams: the client has too many pending sessions, or they are too large together.
            Overloaded: the pending sessions of all clients are too large together.
            BudgetExceeded: the usage of the day or the month leaves no room for it.
        """
        replies = await self._store.run(
            self.admitting(client, session_id, worst, stored=stored, quotas=quotas)
        )
        try:
            self.check(replies)
        except BrokerError:
            await self.forget(client, session_id)  # one of the two may have admitted it
            raise

    def admitting(
        self,
        client: str,
        session_id: str,
        worst: WorstCase,
        *,
        stored: int,
        quotas: Quotas | None = None,
        before_ms: int = 0,
    ) -> list[Call]:
        """Return the calls of `admit`, to be run together with others. Pass their replies to `check`.

        From ``before_ms`` on, by the clock of Redis, they do nothing; 0 is no such time.
        """
        request = {
            "session": session_id,
            "client": client,
            "size": stored,
            "tokens": worst.tokens,
            "cost": worst.cost,
            "before_ms": before_ms,
        }
        account = account_of(self._store, client)
        return [
            self._admit.call(
                account=account.key("account"),
                **_keys(account),
                **request,
                **budgets_of_client(quotas or self._quotas),
            ),
            self._admit_in_total.call(
                account=self._total.key("account"),
                **_keys(self._total),
                **request,
                **budgets_of_all(self._quotas),
            ),
        ]

    @staticmethod
    def check(replies: list[Any]) -> None:
        """Check the replies to the calls of `admitting`.

        Raises:
            StoreRefused: they came too late, and did nothing.
            TooManyStreams, Overloaded, BudgetExceeded: as `admit`.
        """
        own, total = replies
        if b"late" in (own[0], total[0]):
            raise StoreRefused
        if own[0] in (b"pending", b"full"):
            message = "Too many of your sessions wait to be started."
            raise TooManyStreams(message, retry_after=min(float(own[1]), STREAMS_RETRY))
        if own[0] != b"ok":
            raise BudgetExceeded(MONTH if own[0] == b"month" else "", retry_after=float(own[1]))
        if total[0] == b"full":
            message = "Too many requests wait to be started; try again in a moment."
            raise Overloaded(message, retry_after=float(total[1]))
        if total[0] != b"ok":
            message = "The budget of this service for today is used up."
            raise BudgetExceeded(message, retry_after=float(total[1]))

    async def forget(self, client: str, session_id: str) -> None:
        """Stop counting a session as pending."""
        await self._store.run(self.forgetting(client, session_id))

    def forgetting(self, client: str, session_id: str) -> list[Call]:
        """Return the calls of `forget`, to be run together with others."""
        accounts = (account_of(self._store, client), self._total)
        return [
            self._forget.call(**_keys(account), **account.line_keys(), session=session_id)
            for account in accounts
        ]


def _keys(account: Account) -> dict[str, str]:
    return {"pending": account.key("pending"), "sizes": account.key("pending_sizes")}
