"""The kinds of setting values: how each is written, and the message for a wrong value.

The settings themselves are in `broker/settings.py`.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_core import PydanticCustomError

from broker.core.rates import Rate
from broker.core.redis_url import servers_in

_A_YEAR = 366 * 24 * 3600
_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 24 * 3600}
CLIENT_NAME = re.compile(r"[A-Za-z0-9._@+-]{1,64}")
"""The names of clients with keys. They are part of Redis keys and tables, where other characters have a meaning."""

CLIENT_NAME_FORM = "1 to 64 letters, digits or any of . _ @ + -"

_MOST_SECRETS = 8
SHORTEST_SECRET = 32
"""Bytes of a secret for HS256: as many as its hash has (RFC 7518, section 3.2)."""

OWN_MESSAGE = "own_message"
"""The type of an error whose text says what is wrong, in place of what the value must be. It shows no value."""

_SIZES = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
# A public key is not a secret: anybody who knows it could sign tokens with it. Public keys are published in PEM
# armour, as one line, as JSON, or as bare base64 of DER: a long one for RSA, else those of curves.
_PUBLIC = re.compile(
    r"""-----BEGIN\ | ^(ssh|ecdsa)- | "kty" | ^https?://
    | ^MI[IG][A-Za-z0-9+/=\s]{180,}$ | ^M(FkwEwYHKoZIzj|HYwEAYHKoZIzj|CowBQYDK2Vw)""",
    re.VERBOSE,
)
# The form in which browsers write the header. They send no origin of another form.
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://[a-z0-9._~:\[\]-]+")
REDIS_SCHEMES = ("redis", "rediss", "unix")
_TLS_FILES = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})


@dataclass(frozen=True, slots=True)
class Expects:
    """What a value must be: the text behind "must be" in the message."""

    what: str


class ApiKey(NamedTuple):
    """The name of a key's owner, and the key."""

    name: str
    key: SecretStr


def _listed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    items = tuple(item for item in (part.strip() for part in value.split(",")) if item)
    if value and not items:
        # The operator meant to list something. An empty list would count as unset, and so allow more.
        raise ValueError(value)
    return items


def _size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,15})\s*([kmg]ib)?", value.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(value)
    return int(match[1]) * _SIZES[(match[2] or "").lower()]


def _rate(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,9})\s*/\s*(\d{1,5})?\s*(second|minute|hour|day)s?", value.strip(), re.ASCII)
    if match is None:
        raise ValueError(value)
    return Rate(int(match[1]), int(match[2] or 1) * _UNITS[match[3]])


def _positive_rate(rate: Rate) -> Rate:
    if rate.count < 1 or not 1 <= rate.seconds <= _A_YEAR:
        raise ValueError(rate)
    return rate


def _api_keys(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    keys: dict[str, str] = {}
    for pair in _listed(value.replace("\n", ",")):  # a file may have one pair per line
        name, key = (part.strip() for part in pair.partition(":")[::2])
        is_pair = CLIENT_NAME.fullmatch(name) and re.fullmatch(r"[!-~]+", key)
        if not is_pair or keys.setdefault(key, name) != name:
            raise ValueError("name:key")
    return tuple(ApiKey(name, SecretStr(key)) for key, name in keys.items())


def _signing_secrets(value: Any) -> Any:
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not isinstance(text, str):
        return value
    secrets = _listed(text.replace("\n", ","))  # a file may have one per line
    if not 1 <= len(secrets) <= _MOST_SECRETS or _PUBLIC.search(text):  # a key in several lines too
        raise ValueError("secrets")
    if secrets == (text.strip(),):
        return (SecretStr(secrets[0]),)
    for position, secret in enumerate(secrets, 1):
        # Somebody could guess the short part of a secret with a comma, and sign tokens with it.
        if len(secret.encode()) < SHORTEST_SECRET:
            raise PydanticCustomError(
                OWN_MESSAGE,
                "must have {shortest} bytes or more in each secret of a list; number {position} is shorter"
                " (a comma and a new line end a secret)",
                {"shortest": SHORTEST_SECRET, "position": position},
            )
    # A secret that has commas itself stays valid.
    whole = [line.strip() for line in (*text.split("\n"), text) if line.strip(" \t\r\n,")]
    return tuple(map(SecretStr, dict.fromkeys((*secrets, *whole))))


def _signing_secret(value: SecretStr) -> SecretStr:
    if _PUBLIC.search(value.get_secret_value()):
        raise ValueError("secret")
    return _visible(value)


def _web_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0 or "@" in parts.netloc:
        raise ValueError("http")
    if parts.fragment:
        raise ValueError("fragment")
    return value


def _http_url(value: str) -> str:
    if urlsplit(_web_url(value)).query:
        raise ValueError("query")
    return value.rstrip("/")


def _proxy_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise ValueError("proxy")
    return value


def _redis_url(value: str) -> str:
    several = servers_in(value)
    parts = urlsplit(value if several is None else several.of_one)
    if parts.scheme == "unix":
        complete = bool(parts.path) and _is_unix_query(parts.query)
    else:
        complete = parts.scheme in REDIS_SCHEMES and bool(parts.hostname) and parts.port != 0
        # The library takes what it cannot read for database 0, or fails at every connection.
        complete = complete and re.fullmatch(r"(/\d*)?", parts.path) is not None
        complete = complete and _are_tls_files(parts.query, scheme=parts.scheme)
    if not complete:
        raise ValueError("redis")
    return value


def _is_unix_query(query: str) -> bool:
    """Return True if all that stands behind the question mark is a database and a password."""
    named = parse_qsl(query, keep_blank_values=True)
    return all(
        name == "password" or (name == "db" and re.fullmatch(r"[0-9]{1,9}", value)) for name, value in named
    )


def _are_tls_files(query: str, *, scheme: str) -> bool:
    """Returns True if all that stands behind the question mark are files of certificates, which can be opened."""
    named = parse_qsl(query, keep_blank_values=True)
    return not named or (
        scheme == "rediss" and all(name in _TLS_FILES and Path(path).is_file() for name, path in named)
    )


def _host(value: str) -> str:
    host = value.removeprefix("[").removesuffix("]")
    if re.fullmatch(r"[A-Za-z0-9._-]+", host) is None:
        ipaddress.ip_address(host)
    return host


def _origin(value: str) -> str:
    value = value.lower().removesuffix("/")
    if value in {"*", "null"}:
        return value
    match = _ORIGIN.fullmatch(value)
    if match is None or urlsplit(value).port == 0:
        raise ValueError("origin")
    if match["scheme"] not in {"http", "https"}:  # of an app or a browser extension
        return value
    parts = urlsplit(_http_url(value))
    # A browser leaves the default port out of `Origin`.
    default_port = {"http": ":80", "https": ":443"}[parts.scheme]
    return f"{parts.scheme}://{parts.netloc.removesuffix(default_port)}"


def _proxy(value: str) -> str:
    return value if value == "private" else str(ipaddress.ip_network(value, strict=False))


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _without_spaces(value: SecretStr) -> SecretStr:
    if re.fullmatch(r"[!-~]+", value.get_secret_value()) is None:
        raise ValueError("spaces")
    return value


def _visible(value: SecretStr) -> SecretStr:
    secret = value.get_secret_value()
    secret.encode()  # raises ValueError for bytes of a variable that are not UTF-8: it could not be used as a key
    if not any(char.isprintable() and not char.isspace() for char in secret):
        raise ValueError("blank")
    return value


_FINITE = Field(allow_inf_nan=False, le=_A_YEAR)

Seconds = Annotated[float, _FINITE, Field(gt=0), Expects("a number of seconds above 0")]
SecondsOrNone = Annotated[float, _FINITE, Field(ge=0), Expects("a number of seconds, 0 or more")]
WholeSeconds = Annotated[int, Field(ge=1, le=_A_YEAR), Expects("a whole number of seconds, 1 or more")]
WholeSecondsOrNone = Annotated[int, Field(ge=0, le=_A_YEAR), Expects("a whole number of seconds, 0 or more")]
Milliseconds = Annotated[int, Field(ge=1, le=600_000), Expects("milliseconds from 1 to 600000")]
Count = Annotated[int, Field(ge=1, le=10**9), Expects("a whole number, 1 or more")]
CountOrNone = Annotated[int, Field(ge=0, le=10**15), Expects("a whole number, 0 or more")]
Retries = Annotated[int, Field(ge=0, le=10), Expects("a whole number from 0 to 10")]
Processes = Annotated[int, Field(ge=1, le=256), Expects("a whole number from 1 to 256")]
Port = Annotated[int, Field(ge=0, le=65535), Expects("a port from 0 to 65535")]
Size = Annotated[
    int, BeforeValidator(_size), Field(ge=1, le=1 << 40), Expects("a size such as 65536, 512KiB or 1MiB")
]
Money = Annotated[
    Decimal,
    # Amounts beyond these bounds cannot be counted in nano-USD, and would count as no budget at all.
    Field(ge=0, le=10**6, max_digits=30, allow_inf_nan=False),
    Expects("an amount in USD such as 2.50, from 0 to 1000000"),
]
Flag = Annotated[bool, Expects("true or false")]
RatePerTime = Annotated[
    Rate, BeforeValidator(_rate), AfterValidator(_positive_rate), Expects("a rate such as 30/minute")
]

Text = Annotated[str, Field(pattern=r"^[ -~]+$"), Expects("printable ASCII characters")]
Secret = Annotated[SecretStr, AfterValidator(_without_spaces), Expects("visible ASCII characters, no spaces")]
NamingSecret = Annotated[SecretStr, AfterValidator(_visible), Expects("a secret text")]
SigningSecrets = Annotated[
    tuple[Annotated[SecretStr, AfterValidator(_signing_secret)], ...],
    BeforeValidator(_signing_secrets),
    Expects(
        f"a comma list of 1 to {_MOST_SECRETS} secret texts, no public key (BROKER_JWKS_URL is for those)"
    ),
]
FilePath = Annotated[Path, Expects("the path of a file")]
Prefix = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$"), Expects("1 to 64 letters, digits or any of . _ : -")
]
Host = Annotated[str, AfterValidator(_host), Expects("an address or a host name")]
HttpUrl = Annotated[
    str,
    AfterValidator(_http_url),
    Expects("a URL such as https://host/path, without credentials, query or fragment"),
]
WebUrl = Annotated[
    str, AfterValidator(_web_url), Expects("a URL such as https://host/path, without credentials or fragment")
]
ProxyUrl = Annotated[str, AfterValidator(_proxy_url), Expects("a URL such as http://host:port")]
UpstreamKind = Annotated[
    Literal["auto", "openrouter", "openai"], BeforeValidator(_lower), Expects("auto, openrouter or openai")
]
RedisUrl = Annotated[
    str,
    AfterValidator(_redis_url),
    Expects(
        "a redis://, rediss://, unix://, redis+sentinel://host:port,host:port/service/database or"
        " redis+cluster://host:port,host:port URL; those of rediss may end in ?ssl_ca_certs=FILE, ssl_certfile=FILE"
        " and ssl_keyfile=FILE, joined by &, with files that exist; that of unix:// in ?db=NUMBER and password=TEXT;"
        " that of sentinels in ?sentinel_username=TEXT and sentinel_password=TEXT"
    ),
]
ClientNamer = Annotated[tuple[Text, ...], BeforeValidator(_listed), Expects("a comma list of names")]
Origins = Annotated[
    tuple[Annotated[str, AfterValidator(_origin)], ...],
    BeforeValidator(_listed),
    Expects("a comma list of origins such as https://example.com, null, or *"),
]
Proxies = Annotated[
    tuple[Annotated[str, AfterValidator(_proxy)], ...],
    BeforeValidator(_listed),
    Expects("a comma list of addresses, networks, or the word private"),
]
ApiKeys = Annotated[
    tuple[ApiKey, ...],
    BeforeValidator(_api_keys),
    Expects("a comma list of name:key pairs, none with spaces inside and each key once"),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error", "critical"],
    BeforeValidator(_lower),
    Expects("debug, info, warning, error or critical"),
]
LogFormat = Annotated[Literal["text", "json"], BeforeValidator(_lower), Expects("text or json")]
