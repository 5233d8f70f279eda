"""The recipes for a site's own backend, run as programs, and their tokens used with a real broker."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest

from tests.events import opened
from tests.scripted import PATIENCE
from tests.system.harness import running_broker
from tests.system.npm import missing, ran

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
SECRET = "the secret that signs the tokens of the site"
SITE = "https://www.example.com"
OLD = "the secret before it that is going to be removed"


def program(name: str) -> list[str]:
    """The command that runs a recipe. Without Node, the test is skipped, but fails in CI."""
    if name.endswith(".py"):
        return [sys.executable, str(RECIPES / name)]
    return [shutil.which("node") or missing("there is no node on this machine"), str(RECIPES / name)]


async def token(name: str, *args: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CHAT_TOKEN_SECRET", SECRET)
    status, printed = await ran(*program(name), *args)
    assert status == 0, printed
    return printed.strip()


def asked(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hello"}], **fields}


@pytest.mark.parametrize("name", ["chat_token.py", "chat_token.mjs"])
async def test_a_token_of_a_recipe_narrows_what_a_page_may_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = await token(name, "ann", SITE, monkeypatch=monkeypatch)
    claims = jwt.decode(shown, SECRET, algorithms=["HS256"])
    assert claims["sub"] == "ann"
    assert 590 <= claims["exp"] - time.time() <= 600
    env = {"BROKER_JWT_SECRET": f"{OLD},{SECRET}", "BROKER_CORS_ORIGINS": f"{SITE},https://other.example"}
    async with (
        running_broker(env=env) as broker,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http,
    ):

        async def prepare(body: dict[str, Any], origin: str = SITE) -> tuple[int, Any]:
            headers = {"Authorization": f"Bearer {shown}", "Origin": origin}
            async with http.post(f"{broker.url}/prepare", json=body, headers=headers) as answer:
                return answer.status, await answer.json()

        status, body = await prepare(asked("rehearsal/plain", max_tokens=100_000))
        assert (status, body["maxOutputTokens"]) == (201, 1000)
        async with opened(broker.url, f"/stream/{body['sessionId']}") as line:
            assert (await line.rest())[-1].kind == "done"
        status, body = await prepare(asked("openai/o3"))
        assert (status, body["error"]["code"]) == (403, "model_not_allowed")
        status, body = await prepare(asked("rehearsal/plain"), "https://other.example")
        assert (status, body["error"]["code"]) == (403, "origin_not_allowed")
        async with http.get(f"{broker.url}/usage", headers={"Authorization": f"Bearer {shown}"}) as answer:
            assert (await answer.json())["limits"]["cost"]["limit"] == 0.5


async def test_both_recipes_make_the_same_token(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("chat_token.py", "chat_token.mjs"):
        claims = jwt.decode(await token(name, "ann", monkeypatch=monkeypatch), SECRET, algorithms=["HS256"])
        assert claims.pop("exp") - claims.pop("iat") == 600
        found.append(claims)
    assert found[0] == found[1]
    assert "origins" not in found[0]["broker"]
