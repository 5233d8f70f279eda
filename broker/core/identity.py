"""Name the clients, without personal data in the names, and find the caller's address behind proxies. No I/O.

API keys and tokens are checked in `broker/identity`.
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

    from broker.core.client_limits import ClientLimits

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PRIVATE = ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7")
"""The networks of the word ``private``: the loopback, RFC 1918 and RFC 4193."""

MAX_HOPS = 20
"""Entries of X-Forwarded-For that are read; a longer chain of one's own proxies has a loop in it."""

KEY_PREFIX = "key:"
"""The beginning of the names of clients with keys; the name of the key's owner follows."""

LONGEST_NAME = 128
"""Characters of the name of a client."""

REMEMBERED = 2048
"""Parsed addresses that are remembered; parsing an IPv6 address takes about 10 µs."""

_LONGEST_HOP = 80
_HOP = re.compile(
    r"[ \t]*(?:\[(?P<bracketed>[^\[\]]+)\](?::\d{1,5})?|(?P<with_port>[^:\[\]]+):\d{1,5}|(?P<bare>.+?))[ \t]*",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Client:
    """The client that a request is from.

    ``Client(name)`` is enough where an application identifies its clients.

    Attributes:
        name: 1 to 128 printable characters. It is part of Redis keys, of the usage ledger, of tables and of the log:
            ``key:<name of the API key>``, ``sub:<hash>`` for tokens, ``addr:<hash>`` for addresses, or the name that an
            application gives.
        user: is sent upstream where a request has no user, such as ``u_5f3c9e12ab34cd56``. Empty: a keyed hash of
            the name.
        authenticated: a key or a token was valid, or an application knows the client.
        limits: its own limits, where its key or its token sets some.

    Raises:
        ValueError: the name is not of that form.
    """

    name: str
    user: str = ""
    authenticated: bool = True
    limits: ClientLimits | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= LONGEST_NAME or not self.name.isprintable():
            raise ValueError(f"the name of a client has 1 to {LONGEST_NAME} printable characters")


class ClientNamer:
    """Names clients. Addresses and subjects are personal data, so only keyed hashes of them are stored.

    Args:
        secret: is known to all workers of the service and to nobody else. So all of them give a client the same name,
            and nobody else can test which address a name belongs to.
    """

    def __init__(self, secret: str) -> None:
        self._key = hashlib.sha256(f"session broker client names\0{secret}".encode()).digest()
        self._at_network = lru_cache(maxsize=REMEMBERED)(self._name_network)
        self._with_key = lru_cache(maxsize=REMEMBERED)(self._name_key)

    def of_key(self, owner: str) -> Client:
        """Return the client whose API key has this name."""
        return self._with_key(owner)

    def of_subject(self, issuer: str, subject: str) -> Client:
        """Return the client of a token. A subject is unique only together with its issuer: RFC 7519, section 4.1.2."""
        return self._client(f"sub:{self._hash('sub', issuer, subject)}", authenticated=True)

    def of_address(self, address: Address | None) -> Client:
        """Return the client at an address. An IPv6 /64 counts as one, and so do all unknown addresses."""
        return self._at_network(network_of(address))

    def user_of(self, name: str) -> str:
        """Return the user that is sent upstream for the client of this name."""
        return f"u_{self._hash('user', name)}"

    def _name_key(self, owner: str) -> Client:
        return self._client(f"{KEY_PREFIX}{owner}", authenticated=True)

    def _name_network(self, network: str) -> Client:
        return self._client(f"addr:{self._hash('addr', network)}", authenticated=False)

    def _client(self, name: str, *, authenticated: bool) -> Client:
        return Client(name, self.user_of(name), authenticated)

    def _hash(self, *parts: str) -> str:
        # A subject is a JSON string, which may hold half a surrogate pair.
        text = "\0".join(parts).encode("utf-8", "surrogatepass")
        return hmac.digest(self._key, text, "sha256").hex()[:16]


class Hop(NamedTuple):
    """A proxy that passed a request on, or the client that sent it.

    Attributes:
        address: its address.
        network: one word for its network, see `network_of`.
        trusted: its forwarding headers are believed.
    """

    address: Address
    network: str
    trusted: bool


class Proxies:
    """The proxies whose ``X-Forwarded-For`` is believed.

    Args:
        trusted: addresses, networks, or the word ``private``.
    """

    def __init__(self, trusted: Iterable[str]) -> None:
        listed = [network for item in trusted for network in (PRIVATE if item == "private" else (item,))]
        self._networks: tuple[Network, ...] = tuple(ipaddress.ip_network(network) for network in listed)
        self._hop = lru_cache(maxsize=REMEMBERED)(self._read_hop)

    def caller(self, peer: str, forwarded: Sequence[str]) -> Address | None:
        """Return the caller: the right-most hop that is not trusted, else the first one; None if unknown.

        A proxy appends the address of its caller, so each entry is as reliable as the hop to its right, and entries
        left of an untrusted hop may be invented. An entry that is not an address ends the list: its writer is the
        caller then.

        Args:
            peer: the address of the connection.
            forwarded: the ``X-Forwarded-For`` lines in their order.
        """
        caller = self._caller(peer, forwarded)
        return None if caller is None else caller.address

    def network(self, peer: str, forwarded: Sequence[str]) -> str:
        """Return one word for the network of the caller, see `caller` and `network_of`."""
        caller = self._caller(peer, forwarded)
        return network_of(None) if caller is None else caller.network

    def _caller(self, peer: str, forwarded: Sequence[str]) -> Hop | None:
        caller = hop = self._hop(peer) if len(peer) <= _LONGEST_HOP else None
        hops = islice(_from_the_right(forwarded), MAX_HOPS)
        while hop is not None:
            caller = hop
            entry = next(hops, None) if hop.trusted else None
            hop = None if entry is None or len(entry) > _LONGEST_HOP else self._hop(entry)
        return caller

    def trusts(self, peer: str) -> bool:
        """Return True if the forwarding headers of this peer are believed."""
        hop = self._hop(peer) if len(peer) <= _LONGEST_HOP else None
        return hop is not None and hop.trusted

    def _read_hop(self, text: str) -> Hop | None:
        address = parse_hop(text)
        if address is None:
            return None
        return Hop(address, network_of(address), any(address in network for network in self._networks))


def parse_hop(text: str) -> Address | None:
    """Parse an address, with or without a port. Returns None if it is neither.

    The zone of an IPv6 address is dropped, and an IPv4 address that is mapped to IPv6 is returned as IPv4.
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
    """Return the bearer token of the ``Authorization`` lines; None where they are not exactly one (RFC 6750)."""
    if len(authorization) != 1:  # of several lines, a proxy may have checked another one than we would
        return None
    scheme, _, shown = authorization[0].partition(" ")
    return shown.strip() or None if scheme.lower() == "bearer" else None


def _from_the_right(lines: Sequence[str]) -> Iterator[str]:
    for line in reversed(lines):
        yield from reversed(line.rsplit(",", MAX_HOPS))


def network_of(address: Address | None) -> str:
    """Return one word for all addresses that count as one: an IPv6 /64, and all unknown addresses."""
    if isinstance(address, ipaddress.IPv6Address):
        return f"6/{int(address) >> 64:x}"
    return str(address)
