"""The upstream behind a proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from broker.settings import Settings, load_settings
from tests.broker import running
from tests.replies import plain
from tests.scripted import ScriptedUpstream

ENVIRONMENT = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@asynccontextmanager
async def proxy() -> AsyncIterator[tuple[str, list[bytes]]]:
    """A proxy that notes the first line of each request and forwards nothing."""
    lines: list[bytes] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.append(await reader.readline())
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", lines
    finally:
        server.close()


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "BROKER_UPSTREAM_PROXY"])
async def test_an_https_upstream_is_asked_through_the_proxy(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async with proxy() as (url, lines):
        monkeypatch.setenv(name, url)
        settings = {"upstream_proxy": url} if name.startswith("BROKER") else {}
        async with running(valkey_url, "https://127.0.0.9:9/api/v1", max_retries=0, **settings) as broker:
            [event] = await broker.read(await broker.prepare())
            assert event.json["code"] == "upstream_unavailable"
            assert url not in event.json["message"]
    assert {line.split()[0] for line in lines} == {b"CONNECT"}
    assert {line.split()[1] for line in lines} == {b"127.0.0.9:9"}


async def test_a_plain_upstream_does_not_use_the_https_proxy(
    valkey_url: str, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.replies = [plain]
    async with proxy() as (url, lines):
        monkeypatch.setenv("HTTPS_PROXY", url)
        async with running(valkey_url, upstream) as broker:
            assert (await broker.read(await broker.prepare()))[-1].kind == "done"
    assert lines == []


@pytest.mark.parametrize(
    ("no_proxy", "through"),
    [
        ("", True),
        ("example.com", False),
        (".example.com", False),
        ("other.example", True),
        ("*", False),
        ("api.example.com:8443", False),
    ],
)
def test_no_proxy_names_hosts_to_reach_directly(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, *, through: bool
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    found = Settings().proxy_for("https://api.example.com:8443/v1")
    assert found == ("http://proxy.example:3128" if through else None)


def test_the_setting_comes_first_and_its_password_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("BROKER_UPSTREAM_PROXY", "http://me:s3cr%2Ft@own.example:3128")
    settings = load_settings()
    assert settings.proxy_for("http://plain.example/v1") == "http://me:s3cr%2Ft@own.example:3128"
    assert {"s3cr%2Ft", "s3cr/t"} <= set(settings.secrets)
    assert "s3cr" not in repr(settings)
