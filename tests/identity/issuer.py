"""One who issues tokens: signs them in every way, right and wrong, and publishes keys on a real server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.scripted import PATIENCE

SECRET = "a signing secret that is long enough for HS256"

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@cache
def private_key(kind: str) -> Any:
    """A key of a kind such as ``RSA``, ``P-256`` or ``Ed25519``; another word after it makes another key."""
    match kind.partition(" ")[0]:
        case "RSA":
            return rsa.generate_private_key(65537, 2048)
        case "RSA-1024":
            return rsa.generate_private_key(65537, 1024)
        case "P-256":
            return ec.generate_private_key(ec.SECP256R1())
        case "P-384":
            return ec.generate_private_key(ec.SECP384R1())
    return ed25519.Ed25519PrivateKey.generate()


def member(kind: str, **fields: Any) -> dict[str, Any]:
    """The public half as a member of a key set."""
    algorithm = {"R": "RS256", "P": "ES256", "E": "EdDSA"}[kind[0]]
    return {
        **jwt.get_algorithm_by_name(algorithm).to_jwk(private_key(kind).public_key(), as_dict=True),
        **fields,
    }


def key_set(*members: object) -> bytes:
    """The document with the keys."""
    return json.dumps({"keys": members}).encode()


def claims(**changes: Any) -> dict[str, Any]:
    """Those of a good token. A claim that is changed to `...` is left out."""
    now = int(time.time())
    return {
        name: value
        for name, value in {"sub": "ann", "iat": now, "exp": now + 600, **changes}.items()
        if value is not ...
    }


def part(data: object) -> str:
    """A part of a token."""
    content = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def hs256(key: str | bytes, **changes: Any) -> str:
    """A token that is signed with a secret, any secret: libraries refuse some that an attacker would try."""
    signed = f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part(claims(**changes))}"
    key = key.encode() if isinstance(key, str) else key
    return f"{signed}.{part(hmac.digest(key, signed.encode(), hashlib.sha256))}"


def signed(kind: str, algorithm: str, kid: str | None = None, **changes: Any) -> str:
    """A token that is signed with a private key."""
    headers = {"kid": kid} if kid is not None else None
    return jwt.encode(claims(**changes), private_key(kind), algorithm, headers)


class KeyServer:
    """Publishes a key set.

    Attributes:
        body, status: of its answers.
        fetches: how often it was asked.
        hold: while it is cleared, answers wait.
    """

    def __init__(self) -> None:
        self.url = ""
        self.body = key_set()
        self.status = 200
        self.headers: dict[str, str] = {}
        self.fetches = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self._asked = asyncio.Condition()

    async def answer(self, _: web.Request) -> web.Response:
        async with self._asked:
            self.fetches += 1
            self._asked.notify_all()
        await self.hold.wait()
        return web.Response(body=self.body, status=self.status, headers=self.headers)

    async def asked(self, times: int) -> None:
        """Wait until it was asked so often."""
        async with asyncio.timeout(PATIENCE), self._asked:
            await self._asked.wait_for(lambda: self.fetches >= times)


@asynccontextmanager
async def serving(handler: Callable[[web.Request], Any], path: str = "/keys") -> AsyncIterator[str]:
    """Answer GETs of one path until the block ends."""
    app = web.Application()
    app.router.add_get(path, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}{path}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def key_server(*members: object) -> AsyncIterator[KeyServer]:
    """A server that publishes these."""
    server = KeyServer()
    server.body = key_set(*members)
    async with serving(server.answer) as server.url:
        yield server
