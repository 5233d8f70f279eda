"""Reload secrets while the service runs: at SIGHUP, and when a file with a secret changes.

Only the secrets among the settings are reloaded, and only those that were set at the start; everything else needs a
restart. A secret that cannot be read stays as it is, whatever happens to the others. The file of API keys is also
watched by `broker/identity/api_keys.py` itself, which also works inside an application; here its keys are hidden from
the logs.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import structlog

from broker.settings import secret_files, setting_name
from broker.watched_file import LOOK_EVERY, file_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from broker.identity.known_clients import KnownClients
    from broker.naming import Naming
    from broker.settings import LoadedSecrets, Settings
    from broker.store.connection import Store
    from broker.upstream.client import UpstreamClient
    from broker.watched_file import FileState
    from broker.web.identity import ClientResolver
    from broker.web.metrics_token import MetricsToken

_MOST_HIDDEN: Final = 200  # replaced secrets that are still removed from the logs

log = structlog.get_logger(__name__)


class SecretUsers(NamedTuple):
    """The parts that get new secrets.

    Attributes:
        upstream: gets the upstream's key.
        resolver: gets the secrets of the tokens.
        known: gets the API keys.
        naming: gets the secret of the names of clients.
        metrics: gets the token of /metrics.
        store: gets the user and the password of Redis; None if it is embedded.
    """

    upstream: UpstreamClient
    resolver: ClientResolver
    known: KnownClients
    naming: Naming
    metrics: MetricsToken
    store: Store | None


class SecretReload:
    """Reloads secrets and puts them into force.

    Args:
        settings: the settings at the start.
        load: reads all secrets again, as `load_secrets` does.
        users: get the new secrets.
        hide: is called with all texts that the logs must not show, before a new secret is used.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        load: Callable[[], LoadedSecrets],
        users: SecretUsers,
        hide: Callable[[Iterable[str]], None],
    ) -> None:
        self._settings = settings
        self._load = load
        self._users = users
        self._hide = hide
        self._replaced: tuple[str, ...] = ()
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
        found, faults = self._load()
        for fault in faults:
            log.warning("a secret cannot be read again, the old one stays", reason=fault)
        old = self._settings
        update = {field: value for field, value in found.items() if getattr(old, field)}
        if old.has_api_keys and "api_keys" in found:
            update |= {field: found[field] for field in ("api_keys", "api_keys_file")}
        new = self._settings = old.model_copy(update=update)
        replaced = (secret for secret in (*old.secrets, *self._replaced) if secret not in new.secrets)
        self._replaced = tuple(dict.fromkeys(replaced))[:_MOST_HIDDEN]
        self._hide((*new.secrets, *self._replaced))
        log.info("secrets read again", changed=self._put_into_force(old, new))

    def _put_into_force(self, old: Settings, new: Settings) -> list[str]:
        """Give the changed secrets to their users. Returns the names of the secrets that are in force now."""
        users, changed = self._users, []
        # Always, because the file of API keys may have been read again meanwhile.
        if new.has_api_keys and users.known.replace_api_keys(new.api_keys, new.api_keys_file):
            changed.append(setting_name("api_keys"))
        for field, use in self._uses.items():
            value = getattr(new, field)
            if value == getattr(old, field):
                continue
            try:
                is_in_force = use(value) is not False
            except ValueError:  # such as a URL in a form that the store cannot use
                is_in_force = False
            if is_in_force:
                changed.append(setting_name(field))
            else:
                log.warning("setting has changed and needs a restart", name=setting_name(field))
        return changed

    @property
    def _uses(self) -> dict[str, Callable[[Any], bool | None]]:
        """Return for each secret the function that puts a new value into force, or returns False if it cannot."""
        users = self._users
        return {
            "openrouter_api_key": lambda key: users.upstream.use_key(key.get_secret_value()),
            "jwt_secret": lambda secrets: users.resolver.use_jwt_secrets(
                [secret.get_secret_value() for secret in secrets]
            ),
            "metrics_token": users.metrics.replace,
            "name_secret": lambda secret: users.naming.use_secret(secret.get_secret_value()),
            **({} if users.store is None else {"redis_url": users.store.use_credentials}),
        }


def _states() -> dict[Path, FileState]:
    """Return the versions of the files with secrets; a missing file has an empty one."""
    return {path: file_state(path) for path in secret_files()}
