"""Tokens (JWT, RFC 7519): check them and return their subject."""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import jwt
import structlog

from broker.core.errors import Unauthorized
from broker.identity.jwks import ALGORITHMS
from broker.identity.limit_values import LimitsError, read_claim

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.core.client_limits import ClientLimits
    from broker.identity.jwks import PublishedKeys

LEEWAY = 10.0
"""Seconds by which the issuer's clock may differ from ours."""

MAX_TOKEN = 8192
MAX_SUBJECT = 255
"""Characters; OpenID Connect Core allows no longer subject."""

_FORM: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_HMAC_BLOCK: Final = 64

INVALID = "This API key or token is not valid."
EXPIRED = "This token has expired."

CLAIM: Final = "broker"
"""The claim with limits of the caller."""

log = structlog.get_logger(__name__)


class Subject(NamedTuple):
    """The subject of a token; `issuer` is empty where it names none. `limits` are those of its claim ``broker``."""

    issuer: str
    subject: str
    limits: ClientLimits | None = None


class Tokens:
    """Checks tokens.

    HS256 is checked with the secret; RS256, ES256 and EdDSA with the published keys. Other algorithms are refused: a
    token only chooses among the algorithms for which there are keys, and each key has its own (RFC 8725, 3.1).

    Args:
        secrets: for HS256; each of them is accepted.
        published: for the others.
        audience: the required audience; None accepts any.
        issuer: the required issuer; None accepts any.
    """

    def __init__(
        self,
        *,
        secrets: Sequence[str],
        published: PublishedKeys | None,
        audience: str | None,
        issuer: str | None,
    ) -> None:
        self._shared = tuple(map(shared_key, secrets))
        self._published = published
        self._audience = audience
        self._issuer = issuer

    def replace_secrets(self, secrets: Sequence[str]) -> None:
        """Check HS256 tokens with these secrets from now on."""
        self._shared = tuple(map(shared_key, secrets))

    async def subject_of(self, token: str) -> Subject:
        """Return the subject of a valid token.

        Raises:
            Unauthorized: the token is not valid.
            Overloaded: it cannot be checked now.
        """
        if len(token) > MAX_TOKEN or _FORM.fullmatch(token) is None:
            raise Unauthorized(INVALID)
        try:
            header = jwt.get_unverified_header(token)
            claims = self._claims(token, await self._keys(header.get("alg"), header.get("kid")))
        except jwt.PyJWTError as error:
            log.info("token refused", reason=type(error).__name__)
            expired = isinstance(error, jwt.ExpiredSignatureError)
            raise Unauthorized(EXPIRED if expired else INVALID) from None
        return _subject(claims)

    async def _keys(self, algorithm: Any, kid: str | None) -> tuple[jwt.PyJWK, ...]:
        """Return the keys that a token may be signed with, at least one."""
        if algorithm == "HS256":
            keys = self._shared
        elif algorithm in ALGORITHMS and self._published is not None:
            key = await self._published.find(algorithm, kid)
            keys = (key,) if key is not None else ()
        else:
            keys = ()
        if not keys:
            raise jwt.InvalidKeyError
        return keys

    def _claims(self, token: str, keys: Sequence[jwt.PyJWK]) -> dict[str, Any]:
        for key in keys[:-1]:
            with suppress(jwt.InvalidSignatureError):
                return self._claims_by(token, key)
        return self._claims_by(token, keys[-1])

    def _claims_by(self, token: str, key: jwt.PyJWK) -> dict[str, Any]:
        return jwt.decode(
            token,
            key,
            algorithms=[key.algorithm_name],
            audience=self._audience,
            issuer=self._issuer,
            leeway=LEEWAY,
            options={"require": ["exp", "sub"], "verify_aud": self._audience is not None},
        )


def shared_key(secret: str) -> jwt.PyJWK:
    """Return the key for HS256.

    HMAC fills a key with zeros up to its block (RFC 2104). A short secret is filled here already, which is the same
    key; otherwise the library would warn about it at each token.
    """
    filled = base64.urlsafe_b64encode(secret.encode().ljust(_HMAC_BLOCK, b"\0"))
    return jwt.PyJWK({"kty": "oct", "k": filled.decode()}, "HS256")


def _subject(claims: dict[str, Any]) -> Subject:
    subject, issuer = claims["sub"], claims.get("iss")
    if not 0 < len(subject) <= MAX_SUBJECT:
        raise Unauthorized(INVALID)
    return Subject(issuer if isinstance(issuer, str) else "", subject, _limits(claims))


def _limits(claims: dict[str, Any]) -> ClientLimits | None:
    if CLAIM not in claims:
        return None
    try:
        return read_claim(claims[CLAIM])
    except LimitsError as error:
        raise Unauthorized(f"The claim {CLAIM} of this token is not valid: {error}.") from None
