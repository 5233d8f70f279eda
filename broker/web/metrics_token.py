"""The token that /metrics asks for. It may be replaced while the service runs."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import SecretStr


class MetricsToken:
    """The token, if there is one.

    Args:
        token: the token at the start; None where none is set.
    """

    def __init__(self, token: SecretStr | None) -> None:
        self._token = token

    @property
    def is_set(self) -> bool:
        """True if callers must have the token."""
        return self._token is not None

    def replace(self, token: SecretStr) -> None:
        """Ask for this token from now on."""
        self._token = token

    def is_shown(self, shown: str | None) -> bool:
        """Return True if a caller has shown the token. Takes the same time for every wrong one of its length."""
        return (
            self._token is not None
            and shown is not None
            and hmac.compare_digest(
                shown.encode("utf-8", "surrogateescape"), self._token.get_secret_value().encode()
            )
        )
