"""The files of the browser client, which pages of other origins import."""

from __future__ import annotations

import pytest

from tests.broker import running
from tests.scripted import ScriptedUpstream

LARGEST = 6_000
PAGE = "https://chat.example"
TYPES = {"/client.js": "text/javascript", "/client.d.ts": "application/typescript"}


@pytest.mark.parametrize("form", ["", "/ai"], indirect=True)
@pytest.mark.parametrize("path", TYPES)
async def test_a_page_of_an_allowed_origin_loads_the_client(
    valkey_url: str, upstream: ScriptedUpstream, form: None, path: str
) -> None:
    async with running(valkey_url, upstream, cors_origins=(PAGE,)) as broker:
        answer = await broker.ask("GET", path, headers={"Origin": PAGE})
        assert (answer.status, len(answer.text) > 1000) == (200, True)
        assert answer.headers["Content-Type"] == f"{TYPES[path]}; charset=utf-8"
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-cache"
        tag = {"If-None-Match": answer.headers["ETag"]}
        assert (await broker.ask("GET", path, headers=tag)).status == 304
        refused = await broker.ask("GET", path, headers={"Origin": "https://evil.example"})
        assert (refused.status, refused.code) == (403, "origin_not_allowed")


async def test_the_client_is_small(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream) as broker:
        answer = await broker.ask("GET", "/client.js", headers={"Accept-Encoding": "identity"})
    assert len(answer.text.encode()) <= LARGEST
