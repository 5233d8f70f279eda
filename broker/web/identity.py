"""Who a request is from, as a stable name that reveals nothing: addresses are personal data and never stored."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web


class Identifier:
    """Names clients.

    Args:
        secret: known to every worker of the service and to nobody else, so that all give a client the same name and
            nobody can try out addresses.
    """

    def __init__(self, secret: str) -> None:
        self._key = hashlib.sha256(f"session broker client names\0{secret}".encode()).digest()

    def client_of(self, request: web.Request) -> str:
        """The client's name, such as ``u_5f3c9e12ab34cd56``."""
        return self.name(request.remote or "")

    def name(self, address: str) -> str:
        """The name of whoever uses ``address``; a household has a whole IPv6 /64."""
        digest = hmac.new(self._key, _network(address).encode(), hashlib.sha256).hexdigest()
        return f"u_{digest[:16]}"


def _network(address: str) -> str:
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((ip, 64), strict=False))
