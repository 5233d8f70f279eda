"""Find out whether the upstream is OpenRouter, which has fields and headers of its own. No I/O.

Strict services refuse a request with any unknown field, so fields that only OpenRouter understands (`plugins`,
`provider`, its attribution headers, our own `user`) are sent to no other service.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from broker.core.model_entry import Models

Kind = Literal["auto", "openrouter", "openai"]

OPENROUTER_HOST = "openrouter.ai"


class UpstreamKind:
    """The kind of the upstream: by the setting, else by its host name, else by its list of models.

    Args:
        kind: ``BROKER_UPSTREAM_KIND``.
        url: the upstream's base URL.
    """

    def __init__(self, kind: Kind, url: str) -> None:
        host = (urlsplit(url).hostname or "").lower()
        self._told: bool | None = None
        if kind != "auto":
            self._told = kind == "openrouter"
        elif host == OPENROUTER_HOST or host.endswith(f".{OPENROUTER_HOST}"):
            self._told = True
        self._by_list = False

    def learn(self, models: Models) -> None:
        """Read a new list of models, whose prices show whether it is OpenRouter's."""
        self._by_list = models.openrouter

    @property
    def openrouter(self) -> bool:
        """True if it is OpenRouter, as far as is known now. Without a list, an unknown host is not."""
        return self._by_list if self._told is None else self._told
