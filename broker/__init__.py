"""The session broker: between a web page and a language model.

Here are the names that an aiohttp application needs to have the service under a prefix; see the README, "Embedding".
Importing this starts, reads and opens nothing, and loads the service only when one of the names is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.identity import Client
    from broker.core.result import Result
    from broker.mount import setup
    from broker.settings import Settings

__version__ = "0.1.0"
"""The release. It is written only here; the package and `broker --version` take it from here."""

__all__ = ["Client", "Result", "Settings", "setup"]

_MODULES = {
    "Client": "broker.core.identity",
    "Result": "broker.core.result",
    "Settings": "broker.settings",
    "setup": "broker.mount",
}


if not TYPE_CHECKING:  # for a type checker, there are no other names

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return __all__
