"""Who a request is from: names that reveal nothing, and what an address is worth behind proxies. No I/O.

Whether a key or a token is good is decided in `broker/identity`.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PRIVATE = ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7")
"""What the word ``private`` stands for: the loopback, and the networks of RFC 1918 and RFC 4193."""

MAX_HOPS = 20
"""Entries of X-Forwarded-For that are looked at; a longer chain of one's own proxies has a loop in it."""

LONGEST_NAME = 128
"""Characters of the name of a client."""

REMEMBERED = 2048
"""Addresses that need not be read again; reading one of IPv6 takes some 10 µs."""

_LONGEST_HOP = 80
_HOP = re.compile(
    r"[ \t]*(?:\[(?P<bracketed>[^\[\]]+)\](?::\d{1,5})?|(?P<with_port>[^:\[\]]+):\d{1,5}|(?P<bare>.+?))[ \t]*",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Client:
    """One who asks.

    ``Client(name)`` is enough where an application says who asks.

    Attributes:
        name: 1 to 128 printable characters, which stand in keys of Redis, in the books, in tables and in the log:
            ``key:<name of the API key>``, ``sub:<hash>`` for tokens, ``addr:<hash>`` for addresses, and what an
            application says, as it says it.
        user: what the upstream is told where a request does not say, such as ``u_5f3c9e12ab34cd56``. Empty: a keyed
            hash of the name.
        authenticated: a key or a token was shown, or an application knows who it is.

    Raises:
        ValueError: the name is not of that form.
    """

    name: str
    user: str = ""
    authenticated: bool = True

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= LONGEST_NAME or not self.name.isprintable():
            raise ValueError(f"the name of a client has 1 to {LONGEST_NAME} printable characters")


class ClientNamer:
    """Names clients. Addresses and subjects are personal data, so only keyed hashes of them are ever kept.

    Args:
        secret: known to every worker of the service and to nobody else, so that all give a client the same name and
            nobody can try out addresses.
    """

    def __init__(self, secret: str) -> None:
        self._key = hashlib.sha256(f"session broker client names\0{secret}".encode()).digest()
        self._at_network = lru_cache(maxsize=REMEMBERED)(self._name_network)
        self._with_key = lru_cache(maxsize=REMEMBERED)(self._name_key)

    def of_key(self, owner: str) -> Client:
        """The client whose API key has this name."""
        return self._with_key(owner)

    def of_subject(self, issuer: str, subject: str) -> Client:
        """The client of a token. A subject means something only together with its issuer: RFC 7519, section 4.1.2."""
        return self._client(f"sub:{self._hash('sub', issuer, subject)}", authenticated=True)

    def of_address(self, address: Address | None) -> Client:
        """Whoever uses an address; a household has a whole IPv6 /64. All whose address is unknown are one."""
        return self._at_network(network_of(address))

    def user_of(self, name: str) -> str:
        """Return what the upstream is told of the client of this name."""
        return f"u_{self._hash('user', name)}"

    def _name_key(self, owner: str) -> Client:
        return self._client(f"key:{owner}", authenticated=True)

    def _name_network(self, network: str) -> Client:
        return self._client(f"addr:{self._hash('addr', network)}", authenticated=False)

    def _client(self, name: str, *, authenticated: bool) -> Client:
        return Client(name, self.user_of(name), authenticated)

    def _hash(self, *parts: str) -> str:
        # A subject is a JSON string, and such a one may hold half a surrogate pair.
        text = "\0".join(parts).encode("utf-8", "surrogatepass")
        return hmac.digest(self._key, text, "sha256").hex()[:16]


class Hop(NamedTuple):
    """One that passed a request on, or the one that made it."""

    address: Address
    trusted: bool


class Proxies:
    """The proxies whose word counts.

    Args:
        trusted: addresses, networks, and the word ``private``.
    """

    def __init__(self, trusted: Iterable[str]) -> None:
        listed = [network for item in trusted for network in (PRIVATE if item == "private" else (item,))]
        self._networks: tuple[Network, ...] = tuple(ipaddress.ip_network(network) for network in listed)
        self._hop = lru_cache(maxsize=REMEMBERED)(self._read_hop)

    def caller(self, peer: str, forwarded: Sequence[str]) -> Address | None:
        """Who sent a request: the right-most hop that is not trusted, else the first of all; None if that is unknown.

        A proxy adds the address it was called from at the right, so every entry is as good as the hop to its right,
        and what stands left of one that is not trusted may be invented. An entry that is no address ends the list: the
        hop that wrote it is the caller then.

        Args:
            peer: whom the connection is from.
            forwarded: the ``X-Forwarded-For`` lines in their order.
        """
        caller = hop = self._hop(peer) if len(peer) <= _LONGEST_HOP else None
        hops = islice(_from_the_right(forwarded), MAX_HOPS)
        while hop is not None:
            caller = hop
            entry = next(hops, None) if hop.trusted else None
            hop = None if entry is None or len(entry) > _LONGEST_HOP else self._hop(entry)
        return None if caller is None else caller.address

    def trusts(self, peer: str) -> bool:
        """Return True if what this peer says of others counts."""
        hop = self._hop(peer) if len(peer) <= _LONGEST_HOP else None
        return hop is not None and hop.trusted

    def _read_hop(self, text: str) -> Hop | None:
        address = parse_hop(text)
        if address is None:
            return None
        return Hop(address, any(address in network for network in self._networks))


def parse_hop(text: str) -> Address | None:
    """Read an address, with a port where a proxy adds one; None if it is neither.

    The zone of an IPv6 address is dropped, and an IPv4 address in IPv6's clothes is IPv4.
    """
    match = _HOP.fullmatch(text)
    if match is None:
        return None
    address, zone, _ = (match["bracketed"] or match["with_port"] or match["bare"]).partition("%")
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv4Address):
        return None if zone else ip
    return ip if ip.ipv4_mapped is None else ip.ipv4_mapped


def bearer(authorization: Sequence[str]) -> str | None:
    """What the ``Authorization`` lines of a request show; None where that is not one bearer token: RFC 6750."""
    if len(authorization) != 1:  # of several, a proxy may have checked another than we would
        return None
    scheme, _, shown = authorization[0].partition(" ")
    return shown.strip() or None if scheme.lower() == "bearer" else None


def _from_the_right(lines: Sequence[str]) -> Iterator[str]:
    for line in reversed(lines):
        yield from reversed(line.rsplit(",", MAX_HOPS))


def network_of(address: Address | None) -> str:
    """Return a word for all addresses that count as one: an IPv6 /64, and those that are unknown."""
    if isinstance(address, ipaddress.IPv6Address):
        return f"6/{int(address) >> 64:x}"
    return str(address)
