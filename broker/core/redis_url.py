"""The URL of several Redis servers: a group that a Sentinel watches, or a cluster.

    redis+sentinel://user:password@host:port,host:port/service/database?sentinel_username=…&sentinel_password=…
    redis+cluster://user:password@host:port,host:port

With ``rediss`` in place of ``redis`` all connections use TLS, those to the sentinels too. What stands behind the
question mark is, but for the two names above, that of a URL of one server.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

_PORTS: Final = {"sentinel": 26379, "cluster": 6379}
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_OF_SENTINELS: Final = ("sentinel_username", "sentinel_password")
_HIGHEST_PORT: Final = 65535


class Kind(StrEnum):
    """How several servers work together."""

    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Servers(NamedTuple):
    """What the URL of several servers says.

    Attributes:
        kind: how they work together.
        hosts: names and ports, of the sentinels or of some servers of the cluster.
        of_one: the URL of one server; its host is the first of these.
        service: the name by which the sentinels know the primary; else empty.
        sentinel_username, sentinel_password: for the sentinels; else empty.
    """

    kind: Kind
    hosts: tuple[tuple[str, int], ...]
    of_one: str
    service: str = ""
    sentinel_username: str = ""
    sentinel_password: str = ""


def servers_in(url: str) -> Servers | None:
    """Read the URL of several servers. Returns None if it is that of one.

    Raises:
        ValueError: it cannot be read.
    """
    parts = urlsplit(url)
    scheme, plus, word = parts.scheme.partition("+")
    if not plus:
        return None
    if scheme not in ("redis", "rediss") or parts.fragment:
        raise ValueError("redis")
    kind = Kind(word)
    credentials, at, hosts = parts.netloc.rpartition("@")
    found = tuple(_host(each, _PORTS[kind]) for each in hosts.split(","))
    _, *path = parts.path.split("/") if parts.path else [""]
    service = unquote(path.pop(0)) if kind is Kind.SENTINEL and path else ""
    database = path[0] if path and path[0] else "0"
    if len(path) > 1 or not database.isdecimal() or (not service if kind is Kind.SENTINEL else int(database)):
        raise ValueError("path")
    query = parse_qsl(parts.query, keep_blank_values=True)
    own = {name: value for name, value in query if name in _OF_SENTINELS}
    if own and kind is not Kind.SENTINEL:
        raise ValueError("query")
    rest = urlencode([(name, value) for name, value in query if name not in _OF_SENTINELS])
    host, port = found[0]
    name = f"[{host}]" if ":" in host else host
    of_one = f"{scheme}://{credentials}{at}{name}:{port}/{database}" + (f"?{rest}" if rest else "")
    return Servers(kind, found, of_one, service, *(own.get(each, "") for each in _OF_SENTINELS))


def _host(text: str, port: int) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    if match is None or not 0 < int(match[2] or port) <= _HIGHEST_PORT:
        raise ValueError("host")
    return match[1].strip("[]"), int(match[2] or port)
