"""Decide which pages may use the broker, and to which host names it answers. No I/O.

Origins are checked because a browser lets any page of the internet send requests. Host names are checked because a
page can point its own name at the loopback (DNS rebinding) and then counts as same-origin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from urllib.parse import urlsplit

_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9._~:\[\]-]+")
"""scheme://host[:port], as a browser writes it. It is sent upstream as a header, so nothing else may pass."""

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_LONGEST_KEPT = 256
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Verdict(Enum):
    """What a page of an origin may do."""

    REFUSED = "refused"
    ALLOWED = "allowed"
    CREDENTIALS = "credentials"


@dataclass(frozen=True, slots=True)
class Origins:
    """The allowed origins and hosts.

    Args:
        listed: origins such as ``https://a.example`` or ``tauri://localhost``, ``null`` for pages without one, or
            ``*`` for all. With an empty list, pages of this machine are allowed.
        loopback_only: the service listens on the loopback, so other host names are refused.
    """

    listed: frozenset[str]
    loopback_only: bool

    def judge(self, origin: str, host: str | None) -> Verdict:
        """Return what a page of ``origin`` may do with the service that it reached as ``host``."""
        if origin == "null":
            # Any page can have this origin (in a sandboxed frame), so it never gets credentials.
            return Verdict.ALLOWED if self.listed & {"null", "*"} else Verdict.REFUSED
        if not _ORIGIN.fullmatch(origin):
            return Verdict.REFUSED
        if origin.lower() in self.listed:
            return Verdict.CREDENTIALS
        if "*" in self.listed or self._is_own(origin, host):
            return Verdict.ALLOWED
        if not self.listed and _name_and_port(origin)[0] in LOCAL_NAMES:
            return Verdict.ALLOWED
        return Verdict.REFUSED

    def answers_to(self, host: str | None) -> bool:
        """Return True if a ``Host`` header may name this service."""
        if not self.loopback_only or host is None:
            return True
        name = _split_host(host)[0]
        if name is None:
            return False
        return name in LOCAL_NAMES or any(name == _name_and_port(origin)[0] for origin in self.listed)

    @staticmethod
    def _is_own(origin: str, host: str | None) -> bool:
        name, port = _name_and_port(origin)
        if host is None or name is None:
            return False
        own_name, own_port = _split_host(host)
        # A browser leaves the default port out of both; a proxy may add it to Host.
        default = _DEFAULT_PORTS.get(urlsplit(origin).scheme)
        return name == own_name and (port or default) == (own_port or default)


def names_this_machine(host: str | None) -> bool:
    """Return True if a ``Host`` header names the loopback."""
    return host is not None and _split_host(host)[0] in LOCAL_NAMES


def _name_and_port(origin: str) -> tuple[str | None, int | None]:
    # Most requests name the same few hosts. Longer texts are not kept: anybody can send them.
    return _parse(origin) if len(origin) <= _LONGEST_KEPT else _parse.__wrapped__(origin)


@lru_cache(maxsize=256)
def _parse(origin: str) -> tuple[str | None, int | None]:
    try:
        parts = urlsplit(origin)
        return parts.hostname, parts.port
    except ValueError:
        return None, None


def _split_host(host: str) -> tuple[str | None, int | None]:
    return _name_and_port(f"//{host}")
