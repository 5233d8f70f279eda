"""Reload secrets while the service runs: at SIGHUP, and when a file with a secret changes.

Only the secrets among the settings are reloaded, and only those that were set at the start; everything else needs a
restart. If something cannot be read, the old secrets stay in force. The file of API keys is also watched by
`broker/identity/api_keys.py` itself.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog

from broker.settings import SettingsError, secret_files
from broker.watched_file import LOOK_EVERY, file_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from broker.identity.known_clients import KnownClients
    from broker.settings import Settings
    from broker.upstream.client import UpstreamClient
    from broker.watched_file import FileState
    from broker.web.identity import ClientResolver

_MOST_HIDDEN: Final = 200  # old secrets that are still removed from the logs

log = structlog.get_logger(__name__)


class SecretReload:
    """Reloads secrets and puts them into force.

    Args:
        settings: the settings at the start.
        load: reads all settings again; raises `SettingsError`.
        upstream: gets the upstream's key.
        identifier: gets the secrets of the tokens.
        known: gets the API keys.
        hide: is called with all texts that the logs must not show, before a new secret is used.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        load: Callable[[], Settings],
        upstream: UpstreamClient,
        identifier: ClientResolver,
        known: KnownClients,
        hide: Callable[[Iterable[str]], None],
    ) -> None:
        self._settings = settings
        self._load = load
        self._upstream = upstream
        self._identifier = identifier
        self._known = known
        self._hide = hide
        self._hidden = settings.secrets
        self._asked = asyncio.Event()
        self._seen = _states()

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
        key, jwt_secrets = settings.openrouter_api_key, settings.jwt_secret
        update: dict[str, object] = {}
        if old.openrouter_api_key is not None and key is not None and key != old.openrouter_api_key:
            self._upstream.use_key(key.get_secret_value())
            update["openrouter_api_key"] = key
            changed.append("OPENROUTER_API_KEY")
        if old.jwt_secret and jwt_secrets and jwt_secrets != old.jwt_secret:
            self._identifier.use_jwt_secrets([secret.get_secret_value() for secret in jwt_secrets])
            update["jwt_secret"] = jwt_secrets
            changed.append("BROKER_JWT_SECRET")
        had_keys = bool(old.api_keys) or old.api_keys_file is not None
        has_keys = bool(settings.api_keys) or settings.api_keys_file is not None
        if had_keys and has_keys:
            if self._known.replace_api_keys(settings.api_keys, settings.api_keys_file):
                changed.append("BROKER_API_KEYS")
            update |= {"api_keys": settings.api_keys, "api_keys_file": settings.api_keys_file}
        self._settings = old.model_copy(update=update)
        return changed


def _states() -> dict[Path, FileState]:
    """Return the versions of the files with secrets; a missing file has an empty one."""
    try:
        return {path: file_state(path) for path in secret_files()}
    except SettingsError:
        return {}  # .env cannot be read now
