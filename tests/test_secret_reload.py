"""Reloading secrets: each by itself, and none that cannot be used stops the others."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from pydantic import SecretStr

from broker.identity.known_clients import KnownClients
from broker.secret_reload import SecretReload, SecretUsers
from broker.settings import Settings, load_secrets, load_settings, secret_files, setting_name
from broker.store.connection import Store
from broker.web.metrics_token import MetricsToken

if TYPE_CHECKING:
    from broker.naming import Naming
    from broker.upstream.client import UpstreamClient
    from broker.web.identity import ClientResolver

OLD = {
    "OPENROUTER_API_KEY": "the-old-key",
    "REDIS_URL": "redis://:the-old-password@127.0.0.1:1/0",
    "BROKER_API_KEYS": "acme:the-old-key-of-acme",
    "BROKER_JWT_SECRET": "the old secret of the tokens is long enough",
    "BROKER_METRICS_TOKEN": "the-old-token",
    "BROKER_NAME_SECRET": "the old secret of the names",
}
NEW = {name: value.replace("old", "new") for name, value in OLD.items()}
BROKEN = {
    "OPENROUTER_API_KEY": "",
    "REDIS_URL": "redis+ring://:hidden-value@127.0.0.1:1/service/0",
    "BROKER_API_KEYS": "hidden-value",
    "BROKER_JWT_SECRET": f"{OLD['BROKER_JWT_SECRET']}\nhidden-value",
    "BROKER_METRICS_TOKEN": "hidden value",
    "BROKER_NAME_SECRET": "\0",
}


@pytest.fixture(autouse=True)
def _secrets_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BROKER_") or name in {setting_name(field) for field in Settings.model_fields}:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    for name, value in OLD.items():
        Path(name).write_text(value)
        monkeypatch.setenv(f"{name}_FILE", name)


class SomeStore(Store):
    """A store that takes new credentials, or fails."""

    fails = False

    def use_credentials(self, url: str) -> bool:
        if self.fails:
            raise ValueError(url)
        return super().use_credentials(url)


class Users:
    """Takes the new secrets, and remembers what it was given last."""

    def __init__(self, settings: Settings) -> None:
        self.key = self.names = ""
        self.jwt: list[str] = []
        self.known = KnownClients.of_settings(settings)
        self.metrics = MetricsToken(settings.metrics_token)
        self.store = SomeStore(settings.redis_url or "", "test")

    def use_key(self, key: str) -> None:
        self.key = key

    def use_jwt_secrets(self, secrets: list[str]) -> None:
        self.jwt = secrets

    def use_secret(self, secret: str) -> None:
        self.names = secret

    def in_force(self) -> set[str]:
        """The settings whose new values are in force."""
        new = {
            "OPENROUTER_API_KEY": self.key == NEW["OPENROUTER_API_KEY"],
            "REDIS_URL": self.store._address.credentials.password == "the-new-password",
            "BROKER_API_KEYS": self.known.owner_of("the-new-key-of-acme") is not None,
            "BROKER_JWT_SECRET": NEW["BROKER_JWT_SECRET"] in self.jwt,
            "BROKER_METRICS_TOKEN": self.metrics.is_shown(NEW["BROKER_METRICS_TOKEN"]),
            "BROKER_NAME_SECRET": self.names == NEW["BROKER_NAME_SECRET"],
        }
        return {name for name, is_new in new.items() if is_new}


class Reloading:
    """A reload that runs, and its log."""

    def __init__(self, reload: SecretReload, users: Users, log: io.StringIO, hidden: list[str]) -> None:
        self.users = users
        self.hidden = hidden
        self._reload = reload
        self._log = log

    def lines(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._log.getvalue().splitlines()]
        return [line for line in lines if line["event"] == event]

    async def ask(self) -> list[str]:
        """Reload, and return the names of what has changed."""
        before = len(self.lines("secrets read again"))
        self._reload.ask()
        async with asyncio.timeout(10):
            while len(self.lines("secrets read again")) == before:  # noqa: ASYNC110 - the log has no event
                await asyncio.sleep(0.001)
        return list(self.lines("secrets read again")[-1]["changed"])


@asynccontextmanager
async def reloading(log: io.StringIO) -> AsyncIterator[Reloading]:
    settings = load_settings()
    users, hidden = Users(settings), list[str]()

    def hide(secrets: Any) -> None:
        hidden[:] = secrets

    parts = SecretUsers(
        upstream=cast("UpstreamClient", users),
        resolver=cast("ClientResolver", users),
        known=users.known,
        naming=cast("Naming", users),
        metrics=users.metrics,
        store=users.store,
    )
    reload = SecretReload(settings, load=load_secrets, users=parts, hide=hide)
    task = asyncio.create_task(reload.run())
    try:
        yield Reloading(reload, users, log, hidden)
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await users.store.close()


def write(values: dict[str, str]) -> None:
    for name, value in values.items():
        Path(name).write_text(value)


@pytest.mark.parametrize("name", OLD)
async def test_a_secret_that_cannot_be_read_stops_no_other(name: str, log: io.StringIO) -> None:
    async with reloading(log) as reload:
        others = OLD.keys() - {name}
        write({**NEW, name: BROKEN[name]})
        assert set(await reload.ask()) == reload.users.in_force() == others
        [line] = reload.lines("a secret cannot be read again, the old one stays")
        assert line["reason"].startswith((f"{name}_FILE must ", f"{name} must "))
        assert "hidden" not in log.getvalue()
        write(NEW)
        assert await reload.ask() == [name]
        assert reload.users.in_force() == OLD.keys()


async def test_an_unreadable_dotenv_stops_no_other_secret(log: io.StringIO) -> None:
    async with reloading(log) as reload:
        write({**NEW, ".env": "= no line"})
        assert set(await reload.ask()) == reload.users.in_force() == OLD.keys()
        [line] = reload.lines("a secret cannot be read again, the old one stays")
        assert line["reason"] == ".env must have NAME=value lines; line 1 is not one"


async def test_a_broken_setting_that_is_no_secret_stops_none(log: io.StringIO) -> None:
    async with reloading(log) as reload:
        write({**NEW, ".env": "PORT=none"})
        assert set(await reload.ask()) == OLD.keys()


async def test_a_store_that_fails_stops_no_other_secret(log: io.StringIO) -> None:
    async with reloading(log) as reload:
        reload.users.store.fails = True
        write(NEW)
        assert set(await reload.ask()) == OLD.keys() - {"REDIS_URL"}
        [line] = reload.lines("setting has changed and needs a restart")
        assert line["name"] == "REDIS_URL"
        assert await reload.ask() == []
        assert "password" not in log.getvalue()


async def test_a_secret_that_is_not_given_any_more_stays(log: io.StringIO) -> None:
    async with reloading(log) as reload:
        for name in OLD:
            os.environ.pop(f"{name}_FILE")
        assert await reload.ask() == []
        assert reload.users.known.owner_of("the-old-key-of-acme") is not None


async def test_all_secrets_in_force_are_hidden_however_many(log: io.StringIO) -> None:
    async with reloading(log) as reload:
        keys = [f"key-of-acme-{n}" for n in range(300)]
        write({**NEW, "BROKER_API_KEYS": ",".join(f"acme:{key}" for key in keys)})
        await reload.ask()
        secrets = {*keys, NEW["OPENROUTER_API_KEY"], "the-new-password", NEW["BROKER_NAME_SECRET"]}
        assert secrets < set(reload.hidden)
        assert {OLD["OPENROUTER_API_KEY"], "the-old-password"} < set(reload.hidden)
        write(NEW)
        await reload.ask()
        assert len(reload.hidden) < 250


def test_all_files_of_secrets_are_watched() -> None:
    """That of the API keys too, so that the logs hide a new key."""
    assert {path.name for path in secret_files()} == OLD.keys()


def test_a_flag_wins_over_a_file_of_the_secret() -> None:
    url = "redis://127.0.0.1:1/0"
    assert load_secrets(redis_url=url).values["redis_url"] == url
    assert load_secrets(redis_url=None).values["redis_url"] == OLD["REDIS_URL"]
    assert load_secrets().values["openrouter_api_key"] == SecretStr(OLD["OPENROUTER_API_KEY"])
