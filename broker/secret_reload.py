"""Reload secrets while the service runs: at SIGHUP, and when a file with a secret changes.

Only the secrets among the settings are reloaded, and only those that were set at the start; everything else needs a
restart. If something cannot be read, the old secrets stay in force. The file of API keys is also watched by
`broker/identity/api_keys.py` itself.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import structlog

from broker.settings import SettingsError, secret_files, setting_name
from broker.watched_file import LOOK_EVERY, file_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from broker.identity.known_clients import KnownClients
    from broker.naming import Naming
    from broker.settings import Settings
    from broker.store.connection import Store
    from broker.upstream.client import UpstreamClient
    from broker.watched_file import FileState
    from broker.web.identity import ClientResolver
    from broker.web.metrics_token import MetricsToken

_MOST_HIDDEN: Final = 200  # old secrets that are still removed from the logs

log = structlog.get_logger(__name__)


class SecretUsers(NamedTuple):
    """The parts that get new secrets.

    Attributes:
        upstream: gets the upstream's key.
        identifier: gets the secrets of the tokens.
        known: gets the API keys.
        naming: gets the secret of the names of clients.
        metrics: gets the token of /metrics.
        store: gets the user and the password of Redis; None if it is embedded.
    """

    upstream: UpstreamClient
    identifier: ClientResolver
    known: KnownClients
    naming: Naming
    metrics: MetricsToken
    store: Store | None


class SecretReload:
    """Reloads secrets and puts them into force.

    Args:
        settings: the settings at the start.
        load: reads all settings again; raises `SettingsError`.
        users: get the new secrets.
        hide: is called with all texts that the logs must not show, before a new secret is used.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        load: Callable[[], Settings],
        users: SecretUsers,
        hide: Callable[[Iterable[str]], None],
    ) -> None:
        self._settings = settings
        self._load = load
        self._users = users
        self._hide = hide
        self._hidden = settings.secrets
        self._asked = asyncio.Event()
        self._seen = _states()

    @property
    def _uses(self) -> dict[str, Callable[[Any], bool]]:
        """For each secret the function that puts a new value into force; it returns False if that is not possible."""
        users = self._users
        store = users.store
        uses: dict[str, Callable[[Any], bool]] = {
            "openrouter_api_key": _taking(lambda key: users.upstream.use_key(key.get_secret_value())),
            "jwt_secret": _taking(
                lambda secrets: users.identifier.use_jwt_secrets(
                    [each.get_secret_value() for each in secrets]
                )
            ),
            "metrics_token": _taking(users.metrics.replace),
            "name_secret": _taking(lambda secret: users.naming.use_secret(secret.get_secret_value())),
        }
        return uses if store is None else {**uses, "redis_url": store.use_credentials}

    def ask(self) -> None:
        """Reload soon, whether or not a file has changed."""
        self._asked.set()

    async def run(self) -> None:
        """Check for changes until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):
                    await self._asked.wait()
            self._look()

    def _look(self) -> None:
        asked = self._asked.is_set()
        self._asked.clear()
        seen = _states()  # before reading, so that a change meanwhile is seen at the next check
        if asked or seen != self._seen:
            self._seen = seen
            self._read_again()

    def _read_again(self) -> None:
        try:
            settings = self._load()
        except SettingsError as error:
            log.warning("the settings cannot be read again, the old secrets stay", reason=str(error))
            return
        self._hidden = tuple(dict.fromkeys((*settings.secrets, *self._hidden)))[:_MOST_HIDDEN]
        self._hide(self._hidden)
        log.info("secrets read again", changed=self._put_into_force(settings))

    def _put_into_force(self, settings: Settings) -> list[str]:
        old, changed = self._settings, []
        update: dict[str, object] = {}
        for field, use in self._uses.items():
            before, now = getattr(old, field), getattr(settings, field)
            if before and now and now != before:
                update[field] = now
                if use(now):
                    changed.append(setting_name(field))
                else:
                    log.warning("setting has changed and needs a restart", name=setting_name(field))
        had_keys = bool(old.api_keys) or old.api_keys_file is not None
        has_keys = bool(settings.api_keys) or settings.api_keys_file is not None
        if had_keys and has_keys:
            if self._users.known.replace_api_keys(settings.api_keys, settings.api_keys_file):
                changed.append("BROKER_API_KEYS")
            update |= {"api_keys": settings.api_keys, "api_keys_file": settings.api_keys_file}
        self._settings = old.model_copy(update=update)
        return changed


def _taking(use: Callable[[Any], None]) -> Callable[[Any], bool]:
    """Return a function that does this and returns True."""

    def take(value: Any) -> bool:
        use(value)
        return True

    return take


def _states() -> dict[Path, FileState]:
    """Return the versions of the files with secrets; a missing file has an empty one."""
    try:
        return {path: file_state(path) for path in secret_files()}
    except SettingsError:
        return {}  # .env cannot be read now
