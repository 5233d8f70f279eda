"""The clients file: the keys and the limits of clients. It is read again when it changes.

It is TOML, with a table for each client, which has its name: `sha256`, of its key in hexadecimal digits or a list of
several, and limits (see `limit_values`).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
import tomllib
from contextlib import suppress
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import structlog

from broker.identity.limit_values import LimitsError, read_table
from broker.setting_kinds import CLIENT_NAME, CLIENT_NAME_FORM
from broker.settings import SettingsError, read_bytes
from broker.watched_file import WatchedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from broker.core.client_limits import ClientLimits

NAME: Final = "BROKER_CLIENTS_FILE"
LARGEST: Final = 2 * 1024 * 1024
"""Bytes of the file. Reading so many takes about a second, and up to two on a busy machine (measured). A revoked key
must be refused within 3 s."""

MAX_CLIENTS: Final = 8192
MAX_KEYS: Final = 32
"""Keys of one client."""

LOOK_EVERY: Final = 0.25
"""Seconds between two checks of the file. A change is read at the second check that sees it."""

_DIGEST: Final = re.compile(r"[0-9A-Fa-f]{64}")

log = structlog.get_logger(__name__)


class Tables(NamedTuple):
    """The contents of the file.

    Attributes:
        limits: of each client, by its name.
        names: the client of each key, by the SHA-256 of the key.
    """

    limits: Mapping[str, ClientLimits]
    names: Mapping[bytes, str]


class ClientsFile:
    """The clients of the file. `run` reads it again when it changes.

    Args:
        path: the path of the file.
        clock: seconds that only go forward.

    Raises:
        SettingsError: the file cannot be used. Later, an unusable file leaves the clients as they are.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = WatchedFile(
            path,
            read_clients_file,
            refusal="the clients file is unusable, the old clients stay",
            clock=clock,
            every=LOOK_EVERY,
            settles=True,
        )
        self._tables = self._file.read()
        self._asked = asyncio.Event()

    def __len__(self) -> int:
        return len(self._tables.limits)

    def owner_of(self, key: str) -> str | None:
        """Return the name of the client of a key, None for an unknown key.

        The time tells nothing of the keys: what is looked up is the hash of the whole key, which a caller cannot
        approach digit by digit.
        """
        # Bytes of a header that are not UTF-8 arrive as lone surrogates.
        return self._tables.names.get(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest())

    def limits_of(self, name: str) -> ClientLimits | None:
        """Return the limits of a client, None where the file has none of this name."""
        return self._tables.limits.get(name)

    def ask(self) -> None:
        """Read the file soon, whether or not it has changed."""
        self._asked.set()

    async def run(self) -> NoReturn:
        """Read the file when it changes, until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):
                    await self._asked.wait()
            read = self._file.read_again if self._asked.is_set() else self._file.changed
            self._asked.clear()
            # In a thread, because a file of thousands of clients takes seconds. Streams go on between its steps.
            tables = await asyncio.to_thread(self._other, read)
            if tables is not None:
                self._tables = tables
                log.info("clients changed", count=len(tables.limits))

    def _other(self, read: Callable[[], Tables | None]) -> Tables | None:
        """Return what was read, None if it is nothing or the same as before."""
        tables = read()
        return tables if tables != self._tables else None


def read_clients_file(path: Path) -> Tables:
    """Read the file of `BROKER_CLIENTS_FILE`.

    Raises:
        SettingsError: it cannot be read or is too large, is not TOML, or something in it is wrong.
    """
    try:
        text = read_bytes(path, NAME, largest=LARGEST).decode("utf-8-sig")
        # A number is taken as it is written, so that an amount of money is exact.
        document = tomllib.loads(text, parse_float=Decimal)
    except UnicodeDecodeError:
        raise SettingsError(f"{NAME} must name a file of UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{NAME} must name a TOML file: {_in_one_line(error)}") from None
    return _tables(document)


def _tables(document: Mapping[str, Any]) -> Tables:
    if len(document) > MAX_CLIENTS:
        raise SettingsError(f"{NAME} must have at most {MAX_CLIENTS} clients")
    limits: dict[str, ClientLimits] = {}
    names: dict[bytes, str] = {}
    for name, table in document.items():
        where = f"{NAME}: [{name}]" if CLIENT_NAME.fullmatch(name) else f"{NAME}: [{_in_one_line(name)}]"
        if not isinstance(table, dict):
            raise SettingsError(
                f"{where} must be a table; limits stand below the line with the name of a client"
            )
        if CLIENT_NAME.fullmatch(name) is None:
            raise SettingsError(f"{where} must be a name of {CLIENT_NAME_FORM}")
        if "sha256" not in table:
            raise SettingsError(f"{where} must have sha256{_hint_of_dots(name, table)}")
        for digest in _digests(table["sha256"], where):
            if digest in names:
                other = names[digest]
                raise SettingsError(f"{where} sha256 must be of a key of its own, not of [{other}] again")
            names[digest] = name
        try:
            limits[name] = read_table({key: value for key, value in table.items() if key != "sha256"})
        except LimitsError as error:
            raise SettingsError(f"{where} {error}") from None
    return Tables(limits, names)


def _digests(value: Any, where: str) -> list[bytes]:
    listed = value if isinstance(value, list) else [value]
    if len(listed) > MAX_KEYS or not all(
        isinstance(each, str) and _DIGEST.fullmatch(each) is not None for each in listed
    ):
        what = f"the SHA-256 of a key in 64 hexadecimal digits, or a list of at most {MAX_KEYS}"
        raise SettingsError(f"{where} sha256 must be {what}")
    return [bytes.fromhex(each) for each in listed]


def _hint_of_dots(name: str, table: Mapping[str, Any]) -> str:
    """Return what to write where somebody has forgotten the quotes around a name with dots."""
    inner = next((key for key, value in table.items() if isinstance(value, dict)), None)
    return (
        "" if inner is None else f'; a name with dots needs quotes, such as ["{name}.{_in_one_line(inner)}"]'
    )


def _in_one_line(text: object) -> str:
    return "".join(each if each.isprintable() else "?" for each in str(text)[:200])
