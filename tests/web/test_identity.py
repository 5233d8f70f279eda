"""The client of a request, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from broker.core.errors import BrokerError
from broker.core.identity import ClientNamer
from broker.identity.jwks import PAUSE, PAUSE_WITHOUT_KEYS
from broker.settings import Settings
from broker.watched_file import LOOK_EVERY
from broker.web.errors import error_response, json_response
from broker.web.identity import ClientResolver
from tests.clock import Clock
from tests.identity.issuer import SECRET, hs256, key_server, key_set, member, signed

NAME_SECRET = "0123456789abcdef"
NEEDED = "This needs an API key or a token."
INVALID = "This API key or token is not valid."


class Fixed:
    """Names clients with its own secret."""

    async def names(self) -> ClientNamer:
        return ClientNamer(NAME_SECRET)


class Asker:
    """Asks a server who it takes us for."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url

    async def client(self, *headers: tuple[str, str]) -> dict[str, Any]:
        status, body = await self._ask(headers)
        assert status == 200, body
        return dict(body)

    async def name(self, *headers: tuple[str, str]) -> str:
        return str((await self.client(*headers))["name"])

    async def forwarded(self, *lines: str) -> str:
        return await self.name(*(("X-Forwarded-For", line) for line in lines))

    async def shown(self, token: str) -> str:
        return await self.name(("Authorization", f"Bearer {token}"))

    async def refusal(self, *headers: tuple[str, str]) -> str:
        status, body = await self._ask(headers)
        assert status == 401, body
        assert body["error"]["code"] == "unauthorized"
        return str(body["error"]["message"])

    async def refused(self, token: str) -> str:
        return await self.refusal(("Authorization", f"Bearer {token}"))

    async def answer(self, token: str) -> tuple[int, str, dict[str, str | None]]:
        """Status, code, and the headers that say what to do next."""
        async with self._http.get(self._url, headers={"Authorization": f"Bearer {token}"}) as response:
            code = (await response.json()).get("error", {}).get("code", "")
            names = ("Retry-After", "WWW-Authenticate")
            return response.status, code, {name: response.headers.get(name) for name in names}

    async def _ask(self, headers: tuple[tuple[str, str], ...]) -> tuple[int, Any]:
        async with self._http.get(self._url, headers=headers) as response:
            return response.status, await response.json()


@asynccontextmanager
async def asking(
    *, host: str = "127.0.0.1", socket: Path | None = None, clock: Clock | None = None, **settings: Any
) -> AsyncIterator[Asker]:
    """A server that answers with the client it takes one for."""
    chosen = Settings(**settings)
    async with ClientResolver(chosen, Fixed(), clock=clock or Clock()) as resolver:

        async def who(request: web.Request) -> web.Response:
            try:
                return json_response(asdict(await resolver.identify(request)))
            except BrokerError as error:
                return error_response(error)

        app = web.Application()
        app.router.add_get("/", who)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, 0) if socket is None else web.UnixSite(runner, str(socket))
            await site.start()
            shown = f"[{host}]" if ":" in host else host
            url = f"http://{shown}:{runner.addresses[0][1]}/" if socket is None else "http://broker/"
            connector = aiohttp.TCPConnector() if socket is None else aiohttp.UnixConnector(str(socket))
            async with aiohttp.ClientSession(connector=connector) as http:
                yield Asker(http, url)
        finally:
            await runner.cleanup()


# By address


async def test_without_keys_the_address_counts_and_is_hidden() -> None:
    async with asking() as asker:
        client = await asker.client()
    assert client["name"].startswith("addr:")
    assert client["user"].startswith("u_")
    assert client["authenticated"] is False
    assert "127.0.0.1" not in str(client)


@pytest.mark.parametrize("line", ["Bearer anything", "Basic YTpi", "nonsense"])
async def test_without_keys_authorization_is_ignored(line: str) -> None:
    async with asking() as asker:
        assert await asker.client(("Authorization", line)) == await asker.client()


async def test_all_workers_give_an_address_the_same_name() -> None:
    async with asking() as one, asking() as other:
        assert await one.name() == await other.name()


async def test_forwarded_addresses_are_ignored_without_a_proxy() -> None:
    async with asking() as asker:
        assert await asker.forwarded("8.8.8.8") == await asker.name()


async def test_a_proxy_that_is_not_named_is_not_believed() -> None:
    async with asking(trusted_proxies="10.0.0.0/8") as asker:
        assert await asker.forwarded("8.8.8.8") == await asker.name()


async def test_invented_addresses_change_nothing_behind_a_proxy() -> None:
    async with asking(trusted_proxies="private") as asker:
        honest = await asker.forwarded("8.8.8.8")
        assert honest != await asker.name()
        assert honest != await asker.forwarded("8.8.8.9")
        for invented in ("1.1.1.1", "127.0.0.1", "10.0.0.1", "garbage", "", ",,,", "[::1"):
            assert await asker.forwarded(f"{invented}, 8.8.8.8") == honest
            assert await asker.forwarded(invented, "8.8.8.8:4711") == honest
            assert await asker.forwarded(f"{invented}, 8.8.8.8, 10.0.0.1") == honest
        for header in ("Forwarded", "X-Real-IP", "Client-IP", "CF-Connecting-IP"):
            assert await asker.name((header, "for=1.1.1.1"), ("X-Forwarded-For", "8.8.8.8")) == honest


async def test_a_household_behind_a_proxy_is_one_client() -> None:
    async with asking(trusted_proxies="127.0.0.1") as asker:
        assert await asker.forwarded("2001:db8::1") == await asker.forwarded("[2001:db8::ffff]:443")
        assert await asker.forwarded("2001:db8::1") != await asker.forwarded("2001:db8:0:1::1")


async def test_a_proxy_may_come_by_ipv6() -> None:
    async with asking(host="::1", trusted_proxies="::1") as asker:
        assert await asker.forwarded("8.8.8.8") != await asker.name()


async def test_a_unix_socket_counts_as_this_machine(tmp_path: Path) -> None:
    async with (
        asking() as plain,
        asking(socket=tmp_path / "s") as untrusting,
        asking(socket=tmp_path / "t", trusted_proxies="private") as trusting,
        asking(trusted_proxies="private") as tcp,
    ):
        assert await untrusting.forwarded("8.8.8.8") == await plain.name()
        assert await trusting.forwarded("8.8.8.8") == await tcp.forwarded("8.8.8.8") != await plain.name()


# By API key


async def test_a_key_names_its_owner() -> None:
    async with asking(api_keys="ann:one,bob:two") as asker:
        assert await asker.shown("one") == "key:ann"
        assert await asker.shown("two") == "key:bob"
        client = await asker.client(("authorization", "bearer one"))
    assert client["authenticated"] is True
    assert client["user"].startswith("u_")
    assert "ann" not in client["user"]


async def test_where_there_are_keys_one_is_needed() -> None:
    async with asking(api_keys="ann:one") as asker:
        assert await asker.refusal() == NEEDED
        assert await asker.refusal(("Authorization", "Basic b25lOm9uZQ==")) == NEEDED
        assert await asker.refusal(("Authorization", "Bearer one"), ("Authorization", "Bearer one")) == NEEDED
        assert await asker.refused("two") == INVALID
        assert await asker.refused("ann:one") == INVALID
        assert await asker.refused(hs256(SECRET)) == INVALID


async def test_keys_of_a_file_change_with_it(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "keys"
    path.write_text("ann:one")
    async with asking(api_keys="ann:one", api_keys_file=path, clock=clock) as asker:
        assert await asker.shown("one") == "key:ann"
        fresh = tmp_path / "fresh"
        fresh.write_text("bob:two")
        fresh.rename(path)
        clock.now += LOOK_EVERY
        assert await asker.refused("one") == INVALID
        assert await asker.shown("two") == "key:bob"


async def test_a_file_without_a_key_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("")
    async with asking(api_keys_file=path) as asker:
        assert await asker.refusal() == NEEDED
        assert await asker.refused("one") == INVALID


# By token


async def test_a_token_names_its_subject_without_telling_it() -> None:
    async with asking(jwt_secret=SECRET) as asker:
        name = await asker.shown(hs256(SECRET))
        assert name.startswith("sub:")
        assert "ann" not in name
        assert name == await asker.shown(hs256(SECRET, jti="another token"))
        assert name != await asker.shown(hs256(SECRET, sub="bob"))


async def test_where_there_are_tokens_one_is_needed() -> None:
    async with asking(jwt_secret=SECRET) as asker:
        assert await asker.refusal() == NEEDED
        assert await asker.refused("one") == INVALID
        assert await asker.refused(hs256("another secret")) == INVALID
        assert await asker.refused(hs256(SECRET, exp=1)) == "This token has expired."


async def test_keys_and_tokens_are_good_beside_each_other() -> None:
    async with asking(api_keys="ann:one", jwt_secret=SECRET) as asker:
        assert await asker.shown("one") == "key:ann"
        assert (await asker.shown(hs256(SECRET, sub="ann"))).startswith("sub:")
        assert await asker.refused("two") == INVALID


async def test_audience_and_issuer_are_those_of_the_settings() -> None:
    async with asking(jwt_secret=SECRET, jwt_audience="chat", jwt_issuer="https://i") as asker:
        assert await asker.shown(hs256(SECRET, aud="chat", iss="https://i"))
        assert await asker.refused(hs256(SECRET, aud="chat", iss="https://j")) == INVALID
        assert await asker.refused(hs256(SECRET, aud="other", iss="https://i")) == INVALID


async def test_published_keys_are_fetched_and_followed() -> None:
    clock = Clock()
    async with (
        key_server(member("P-256", kid="old")) as server,
        asking(jwks_url=server.url, clock=clock) as asker,
    ):
        name = await asker.shown(signed("P-256", "ES256", "old"))
        server.body = key_set(member("Ed25519", kid="new"))
        clock.now += PAUSE
        assert await asker.shown(signed("Ed25519", "EdDSA", "new")) == name
        assert await asker.refused(signed("P-256", "ES256", "old")) == INVALID


async def test_without_published_keys_a_token_gets_a_503() -> None:
    clock = Clock()
    token = signed("P-256", "ES256", "old")
    async with key_server() as server, asking(jwks_url=server.url, api_keys="ann:one", clock=clock) as asker:
        later = {"Retry-After": "2", "WWW-Authenticate": None}
        assert await asker.answer(token) == (503, "overloaded", later)
        assert await asker.shown("one") == "key:ann"
        assert await asker.refusal() == NEEDED
        assert await asker.refused("two") == INVALID
        server.body = key_set(member("P-256", kid="old"))
        clock.now += PAUSE_WITHOUT_KEYS
        assert (await asker.shown(token)).startswith("sub:")


async def test_a_token_of_an_unknown_key_gets_a_401() -> None:
    async with key_server(member("P-256", kid="old")) as server, asking(jwks_url=server.url) as asker:
        refused = {"Retry-After": None, "WWW-Authenticate": "Bearer"}
        assert await asker.answer(signed("P-256", "ES256", "new")) == (401, "unauthorized", refused)
