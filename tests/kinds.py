"""The kinds of servers that the broker promises to work on, and the servers of a test by the kind of this run.

``pytest --servers sentinel`` or ``--servers cluster`` runs tests on such servers instead of a plain one.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Final, Self

import pytest

from tests.sentinels import SentinelSet, sentinel_set
from tests.servers import ServerSockets
from tests.system import harness
from tests.system.harness import ValkeyProcess, running_valkey
from tests.valkey_cluster import ValkeyCluster, valkey_cluster

KINDS: Final = ("plain", "sentinel", "cluster")
"""One server; a primary with a replica and three sentinels; three primaries with a replica each."""

DOWN_AFTER_MS = 5000
"""Milliseconds of silence after which a primary is replaced: so many that a loaded machine is no failover."""

ONE_SERVER: Final = "needs one server: "
"""How the reason begins for which a test is skipped on every other kind."""

Servers = ValkeyProcess | SentinelSet | ValkeyCluster
"""What all of them can do: `freeze`, `thaw`, `kill` and `start` mean all servers of the kind at once."""


def running_servers(
    kind: str = "", *, keeps: bool = False, down_after_ms: int = DOWN_AFTER_MS
) -> AbstractAsyncContextManager[Servers]:
    """Run servers during a block.

    Args:
        kind: one of `KINDS`; by default this run's.
        keeps: they survive a power cut.
        down_after_ms: milliseconds of silence after which a primary is replaced, where there is another.
    """
    kind = kind or harness.KIND
    if kind == "plain":
        return running_valkey(keeps=keeps)
    return _several(kind, keeps=keeps, down_after_ms=down_after_ms)


def _several(
    kind: str, *, keeps: bool = False, down_after_ms: int = DOWN_AFTER_MS
) -> AbstractAsyncContextManager[SentinelSet | ValkeyCluster]:
    start = sentinel_set if kind == "sentinel" else valkey_cluster
    return start(keeps=keeps, down_after_ms=down_after_ms)


def needs_one_server(reason: str) -> None:
    """Skip a test on every other kind."""
    if harness.KIND != "plain":
        pytest.skip(ONE_SERVER + reason)


class SharedServers:
    """Servers that all tests of this process share. They are started when they are first needed."""

    def __init__(self) -> None:
        self._sockets = ServerSockets()
        self._sets: dict[str, SentinelSet | ValkeyCluster] = {}
        self._stack = AsyncExitStack()
        self._runner = asyncio.Runner()  # its loop stays, and with it what has begun there

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sockets.__exit__()
        self._runner.run(self._stack.aclose())
        self._runner.close()

    def socket_of(self, program: str) -> str:
        """Return the path of the socket of one plain server."""
        return self._sockets.of(program)

    def emptied(self, program: str) -> str:
        """Remove all keys from several servers of this run's kind, and return their URL."""
        return self._runner.run(self._emptied(program))

    async def _emptied(self, program: str) -> str:
        if program not in self._sets:
            self._sets[program] = await self._stack.enter_async_context(_several(harness.KIND))
        await self._sets[program].empty()
        return self._sets[program].url
