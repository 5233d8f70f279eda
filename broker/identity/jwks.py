"""The public keys of an issuer of tokens (RFC 7517): fetched, stored in memory, and fetched again in time."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, Self

import aiohttp
import jwt
import orjson
import structlog

from broker.core.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

FETCH_TIMEOUT = 5.0
MAX_SIZE = 256 * 1024
MAX_KEYS = 64

RENEW_AFTER = 600.0
"""Seconds after which keys are fetched again, in the background of the request that uses them."""

OLD_AFTER = 3600.0
"""Seconds after which a request waits for newer keys: the issuer may have withdrawn one in the meantime."""

PAUSE = 30.0
"""Seconds between two fetches, whatever tokens callers send."""

PAUSE_WITHOUT_KEYS = 2.0
"""The same while there are no keys at all, so that no token can be checked."""

_MIN_RSA_BITS: Final = 2048
_ALGORITHM_OF: Final = {"RSA": "RS256", "EC P-256": "ES256", "OKP Ed25519": "EdDSA"}
"""The algorithm of each kind of key. A key is never used for another one, whatever a token says."""

ALGORITHMS: Final = tuple(_ALGORITHM_OF.values())
"""The algorithms that a token may use."""

log = structlog.get_logger(__name__)


class KeySetError(Exception):
    """An answer is not a usable key set. The text gives the reason and quotes nothing."""


class PublishedKeys:
    """The keys of one URL. An async context manager: its end stops a running fetch.

    Keys stay until newer ones are there, so the service works on while the issuer is away.

    Args:
        url: the address of the key set.
        timeout: seconds for one fetch.
        proxy: address of an HTTP proxy for the fetch.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = FETCH_TIMEOUT,
        proxy: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._timeout = timeout
        self._proxy = proxy
        self._clock = clock
        self._keys: tuple[jwt.PyJWK, ...] = ()
        self._born = 0.0
        self._next_fetch = clock()
        self._fetch: asyncio.Task[None] | None = None
        self._trouble = ""
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            proxy=self._proxy,
            auto_decompress=False,  # a small body could unpack to any size
        )
        self._renew()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        http, self._http = self._http, None
        if self._fetch is not None:
            self._fetch.cancel()
            await asyncio.wait({self._fetch})
        if http is not None:
            await http.close()

    async def find(self, algorithm: str, kid: str | None) -> jwt.PyJWK | None:
        """Return the key with this id for this algorithm; without an id, the only key for it; None where there is none.

        Waits for a fetch, for its timeout at most, where the key is unknown or all keys are old. A caller that is
        cancelled leaves the fetch running for the others.

        Raises:
            Overloaded: the key is unknown and keys cannot be fetched now, so the token cannot be checked.
        """
        key = self._match(algorithm, kid)
        age = self._clock() - self._born
        if key is not None and age < RENEW_AFTER:
            return key
        fetch = self._renew()
        if fetch is not None and (key is None or age >= OLD_AFTER):
            await asyncio.wait({fetch})
            key = self._match(algorithm, kid)
        if key is None and (self._trouble or not self._keys):
            # It is not the caller's fault. After a 401, a page would log its user out.
            raise Overloaded(
                "The keys that tokens are checked with cannot be fetched right now.",
                retry_after=max(1.0, self._next_fetch - self._clock()),
            )
        return key

    def _match(self, algorithm: str, kid: str | None) -> jwt.PyJWK | None:
        fitting = [key for key in self._keys if key.algorithm_name == algorithm and kid in (None, key.key_id)]
        return fitting[0] if len(fitting) == 1 else None

    def _renew(self) -> asyncio.Task[None] | None:
        """Return the running fetch, or start one; None while it is too early for that."""
        if self._fetch is None and self._http is not None and self._clock() >= self._next_fetch:
            self._next_fetch = self._clock() + PAUSE
            self._fetch = asyncio.create_task(self._run(self._http), name="token keys")
        return self._fetch

    async def _run(self, http: aiohttp.ClientSession) -> None:
        try:
            self._keys = parse_keys(await _get(http, self._url))
        except (KeySetError, aiohttp.ClientError, TimeoutError) as error:
            self._tell(str(error) if isinstance(error, KeySetError) else type(error).__name__)
            if not self._keys:
                self._next_fetch = self._clock() + PAUSE_WITHOUT_KEYS
        else:
            self._born = self._clock()
            self._tell("")
        finally:
            self._fetch = None

    def _tell(self, trouble: str) -> None:
        """Log once that fetches fail, and once that they work again. The URL may hold a secret."""
        if trouble and trouble != self._trouble:
            log.warning("token keys cannot be fetched", reason=trouble, kept=len(self._keys))
        elif self._trouble and not trouble:
            log.info("token keys fetched again", count=len(self._keys))
        self._trouble = trouble


def parse_keys(body: bytes) -> tuple[jwt.PyJWK, ...]:
    """Parse a key set. Members that have another use or are not supported are left out.

    Raises:
        KeySetError: it holds no usable key.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise KeySetError("not JSON") from None
    members = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(members, list):
        raise KeySetError("not a key set")
    found = (_parse_key(member) for member in members[:MAX_KEYS])
    keys = tuple(key for key in found if key is not None)
    if not keys:
        raise KeySetError("no key that can be used")
    return keys


def _parse_key(member: Any) -> jwt.PyJWK | None:
    if not isinstance(member, dict) or member.get("use", "sig") != "sig" or "d" in member:
        return None  # "d" is the private half: a key that is published with it proves nothing
    algorithm = _ALGORITHM_OF.get(f"{member.get('kty')} {member.get('crv', '')}".strip())
    if algorithm is None or member.get("alg", algorithm) != algorithm:
        return None
    try:
        key = jwt.PyJWK(member, algorithm)
    except jwt.PyJWTError:
        return None
    return None if algorithm == "RS256" and key.key.key_size < _MIN_RSA_BITS else key


async def _get(http: aiohttp.ClientSession, url: str) -> bytes:
    """Fetch a URL and return the body of a 200.

    Raises:
        KeySetError: another status, or too large.
        aiohttp.ClientError, TimeoutError: the request failed.
    """
    async with http.get(url, allow_redirects=False) as response:
        if response.status != 200:
            raise KeySetError(f"status {response.status}")
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > MAX_SIZE:
                raise KeySetError(f"more than {MAX_SIZE} bytes")
        return bytes(body)
