"""Fixtures of many tests: a real Valkey or Redis, a scripted upstream, and a broker between them."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import pytest
import pytest_asyncio
import redis
import structlog
from hypothesis import settings

from broker.logs import configure_logs
from broker.store.connection import Store
from tests import broker as brokers
from tests.broker import Broker, running
from tests.clock import Clock
from tests.kinds import KINDS, ONE_SERVER, Servers, SharedServers, running_servers
from tests.redis_client import SeenStore
from tests.scripted import PATIENCE, ScriptedUpstream, scripted_upstream
from tests.servers import SERVERS, server_binary
from tests.system import harness
from tests.system.npm import axe_core, built_client, node_modules, project

__all__ = ["axe_core", "built_client", "node_modules", "project"]  # fixtures of tests with packages of npm

# A shell that starts the tests in the background has them ignore Ctrl-C, and so every program that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Brokers of tests send their traces only where the test says so.
for name in [name for name in os.environ if name.startswith("OTEL_")]:
    del os.environ[name]

# A test says what is right, a benchmark what is fast: on a loaded machine an example may take as long as it likes.
settings.register_profile("broker", deadline=None)
settings.load_profile("broker")

ON_EVERY_SERVER = "tests/store/"
"""Tests that run once on each server of `tests.servers.SERVERS`, which they ask for by the fixture `redis_server`,
`valkey_url`, `store` or `broker`."""

ON_THE_OLDEST = ("tests/relay/", "tests/web/test_limits.py", "tests/web/test_usage.py")
"""Tests that run on Valkey and on the oldest Redis that is served; all others run on Valkey."""


ON_SEVERAL = ("valkey", "redis")
"""The programs of which Sentinel sets and clusters are made."""

IN_BOTH_FORMS = tuple(
    f"tests/web/test_{name}.py"
    for name in ("stream", "states", "cancel", "prepare", "done", "token_events", "not_served")
)
"""Tests that run against the service and against a broker that is a part of somebody else's application."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that choose the servers of a run."""
    parser.addoption(
        "--servers", choices=KINDS, default="plain", help="the kind of servers that tests run on"
    )
    parser.addoption("--redis-program", choices=SERVERS, help="run all tests on this program alone")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the servers of this run."""
    harness.KIND = config.getoption("--servers")
    harness.SERVER = config.getoption("--redis-program") or harness.SERVER


def _programs(config: pytest.Config, usual: Sequence[str]) -> Sequence[str]:
    """Return the servers on which a test is run that usually runs on these."""
    chosen = config.getoption("--redis-program")
    if chosen:
        return [chosen]
    return usual if harness.KIND == "plain" else [name for name in usual if name in ON_SEVERAL]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of what is stored on every server."""
    path = metafunc.definition.path.relative_to(metafunc.config.rootpath).as_posix()
    if "form" in metafunc.fixturenames and path in IN_BOTH_FORMS:
        metafunc.parametrize("form", ["", "/ai"], ids=["service", "embedded"], indirect=True)
    if "redis_server" in metafunc.fixturenames and path.startswith(ON_EVERY_SERVER):
        metafunc.parametrize("redis_server", _programs(metafunc.config, SERVERS), indirect=True)
    elif "redis_server" in metafunc.fixturenames and path.startswith(ON_THE_OLDEST):
        metafunc.parametrize("redis_server", _programs(metafunc.config, ("valkey", "redis")), indirect=True)


def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes run tests: two for each core, for most of the time of the long ones is waiting."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 * cores


LONGEST = [
    f"test_{name}.py"
    for name in (
        "money",
        "silence",
        "dead_workers",
        "walk",
        "page",
        "quality",
        "money_law",
        "client",
        "client_recipes",
        "browser",
        "openapi",
    )
]
"""The files that take longest; `test_quality.py` has the type checker."""


def _program(item: pytest.Item, usual: str) -> str:
    """Return the program that a test is made for by its parameters, `usual` if by none."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("redis_server", usual)) if callspec is not None else usual


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start files that take long first, each beside a short one.

    Most of a long test goes by in waiting, which leaves its core to others; and a long file that began last would leave
    the other cores idle. (`--no-loadscope-reorder` keeps this order: else the files with the most tests came first.)
    """
    if chosen := config.getoption("--redis-program"):
        others = [item for item in items if _program(item, chosen) != chosen]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _program(item, chosen) == chosen]
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if harness.KIND != "plain" and (one := item.get_closest_marker("one_server")) is not None:
            item.add_marker(pytest.mark.skip(reason=ONE_SERVER + one.args[0]))
        files.setdefault(item.path, []).append(item)
    slow: list[list[pytest.Item]] = []
    short: list[list[pytest.Item]] = []
    for path, file in files.items():
        is_slow = path.name in LONGEST or any(item.get_closest_marker("slow") for item in file)
        (slow if is_slow else short).append(file)
    places = {name: place for place, name in enumerate(LONGEST)}
    slow.sort(key=lambda file: places.get(file[0].path.name, len(places)))
    pairs = zip_longest(slow, short, fillvalue=list[pytest.Item]())
    items[:] = [item for pair in pairs for file in pair for item in file]


@pytest.fixture(scope="session")
def shared_servers() -> Iterator[SharedServers]:
    """The servers that tests share, of this run's kind."""
    with SharedServers() as servers:
        yield servers


@pytest.fixture(scope="session")
def server_sockets(shared_servers: SharedServers) -> Callable[[str], str]:
    """Give the unix socket of a server by its name. Each is started once for the whole run, when it is asked for."""
    return shared_servers.socket_of


@pytest.fixture(scope="session", autouse=True)
def default_servers(request: pytest.FixtureRequest) -> None:
    """Let brokers that name no server work on several ones too, if this run is about them."""
    if harness.KIND != "plain":
        servers: SharedServers = request.getfixturevalue("shared_servers")
        harness.REDIS_URL = servers.emptied(harness.SERVER)


@pytest.fixture
def redis_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the server that this test runs on. `running_valkey` starts this one as well."""
    name: str = getattr(request, "param", harness.SERVER)
    server_binary(name)  # skips the test where there is none
    monkeypatch.setattr(harness, "SERVER", name)
    return name


@pytest.fixture
def valkey_url(redis_server: str, shared_servers: SharedServers) -> str:
    """A server on a unix socket, or several servers, empty."""
    if harness.KIND != "plain":
        return shared_servers.emptied(redis_server)
    socket = shared_servers.socket_of(redis_server)
    with redis.Redis(unix_socket_path=socket) as client:
        client.flushall()
    return f"unix://{socket}"


@pytest_asyncio.fixture
async def store(valkey_url: str) -> AsyncIterator[Store]:
    """A connection to it."""
    store = SeenStore(
        valkey_url, "test", call_timeout=PATIENCE
    )  # on a loaded machine, Redis may take its time
    yield store
    await store.close()


@pytest_asyncio.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """A chat service that does what the test says."""
    async with scripted_upstream() as upstream:
        yield upstream


@pytest.fixture(autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set how `running` runs a broker: as the service, or under a prefix of an application."""
    monkeypatch.setattr(brokers, "PREFIX", getattr(request, "param", ""))


@pytest_asyncio.fixture
async def broker(valkey_url: str, upstream: ScriptedUpstream) -> AsyncIterator[Broker]:
    """A broker with the default settings."""
    async with running(valkey_url, upstream) as broker:
        yield broker


@pytest_asyncio.fixture
async def valkey(redis_server: str) -> AsyncIterator[Servers]:
    """Servers of this test's own, which the test may freeze and kill. They run again at the end of the test."""
    async with running_servers() as valkey:
        yield valkey


@pytest_asyncio.fixture
async def exposed_broker(valkey: Servers, upstream: ScriptedUpstream) -> AsyncIterator[Broker]:
    """A broker on `valkey`. Its server is back before the broker is stopped, which would wait for it."""
    async with running(valkey.url, upstream) as broker, harness.healed(valkey):
        yield broker


@pytest.fixture(autouse=True)
def _fresh_loggers() -> Iterator[None]:
    """Let no test see the logging of the one before: a configured logger keeps its configuration once it was used."""
    yield
    structlog.reset_defaults()
    for name, module in tuple(sys.modules.items()):
        if name.startswith("broker.") and (log := vars(module).get("log")) is not None:
            vars(log).pop("bind", None)


@pytest.fixture
def clock() -> Clock:
    """A clock that the test moves."""
    return Clock()


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Collect all log lines, without suppressing repetitions."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out = io.StringIO()
    configure_logs("debug", "json", out=out)
    yield out
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
