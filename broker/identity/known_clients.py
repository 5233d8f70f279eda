"""The clients that have keys: those of `BROKER_API_KEYS` and those of the clients file."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from broker.core.errors import Unauthorized
from broker.core.identity import KEY_PREFIX
from broker.identity.api_keys import ApiKeys
from broker.identity.clients_file import ClientsFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from broker.core.client_limits import ClientLimits
    from broker.setting_kinds import ApiKey
    from broker.settings import Settings

REVOKED = "The key of this client is no longer valid."


class Known(NamedTuple):
    """The owner of a key, and its own limits, if it has any."""

    name: str
    limits: ClientLimits | None


class KnownClients:
    """Finds the owners of keys, and what they may do now.

    Without keys and without a file it knows nobody, and `limits_now` refuses nobody.

    Args:
        keys: the API keys at the start.
        keys_file: the file that they are from, or None.
        clients_file: the clients file, or None.
        clock: seconds that only go forward.
        now: seconds since 1970.

    Raises:
        SettingsError: the clients file cannot be used.
    """

    def __init__(
        self,
        keys: Iterable[ApiKey] = (),
        keys_file: Path | None = None,
        clients_file: Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        keys = tuple(keys)
        self._api_keys = ApiKeys(keys, keys_file, clock=clock)
        self.file = ClientsFile(clients_file, clock=clock) if clients_file is not None else None
        self._knows = bool(keys) or keys_file is not None or clients_file is not None
        self._now = now

    @classmethod
    def of_settings(cls, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> KnownClients:
        """Return the clients of these settings."""
        return cls(settings.api_keys, settings.api_keys_file, settings.clients_file, clock=clock)

    def owner_of(self, key: str) -> Known | None:
        """Return the owner of a key, None for an unknown key.

        Raises:
            Unauthorized: its owner is disabled, or its time is over.
        """
        name = self._api_keys.owner_of(key)
        if name is None and self.file is not None:
            name = self.file.owner_of(key)
        if name is None:
            return None
        limits = self._limits_of(name)
        self.check(limits)
        return Known(name, limits)

    def check(self, limits: ClientLimits | None) -> None:
        """Check that a client with these limits may ask now.

        Raises:
            Unauthorized: it is disabled, or its time is over.
        """
        if limits is not None:
            limits.check(self._now())

    def limits_now(self, client: str, stored: ClientLimits | None) -> ClientLimits | None:
        """Return the limits that a client has now, for a session that it prepared before.

        Args:
            client: its name.
            stored: the limits that were stored with the session: those of a JWT, which is not known any more.

        Raises:
            Unauthorized: it was removed or disabled since, or its time is over.
        """
        limits = stored
        if self._knows and client.startswith(KEY_PREFIX):
            name = client.removeprefix(KEY_PREFIX)
            limits = self._limits_of(name)
            if limits is None and not self._api_keys.has_owner(name):
                raise Unauthorized(REVOKED)
        self.check(limits)
        return limits

    def _limits_of(self, name: str) -> ClientLimits | None:
        return self.file.limits_of(name) if self.file is not None else None

    def replace_api_keys(self, keys: Iterable[ApiKey], path: Path | None) -> bool:
        """Replace the API keys. Returns True if they differ from those before."""
        return self._api_keys.replace(keys, path)
