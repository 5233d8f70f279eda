"""All settings. This is the only module that reads the environment.

A setting is given as a flag, else as an environment variable, else in `.env` of the working directory. An empty one
counts as unset. `load_settings` reads all three once, for the command line. `Settings(...)` itself reads nothing: it is
a value and has only what it was given.

The forms of values are in `broker/setting_kinds.py`.
"""

from __future__ import annotations

import difflib
import io
import ipaddress
import os
import re
import urllib.request
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args
from urllib.parse import unquote, unquote_plus, urlsplit

from dotenv.parser import parse_stream
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from broker import setting_kinds as kinds
from broker.core.rates import Rate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pydantic.fields import FieldInfo
    from pydantic_settings import PydanticBaseSettingsSource

DOTENV = Path(".env")
_WITHOUT_PREFIX = frozenset({"openrouter_api_key", "referer", "x_title", "redis_url", "port"})
_SECRETS = frozenset(
    {"openrouter_api_key", "redis_url", "api_keys", "jwt_secret", "metrics_token", "name_secret"}
)
# URLs may hold a password, in a wrong place too.
_NEVER_SHOWN = _SECRETS | {"upstream_url", "jwks_url"}
# Without one of these, the broker would allow more people or more. So a blank value is an error there, and not unset.
_NEVER_BLANK = frozenset(
    {
        *("api_keys", "jwt_secret", "jwks_url", "jwt_audience", "jwt_issuer"),
        *("allowed_models", "system_file", "clients_file"),
        *("daily_tokens", "daily_cost", "monthly_cost", "total_daily_cost"),
    }
)
_LARGEST_FILE = 64 * 1024
_LONGEST_DOTENV = 1024 * 1024
_LONGEST_SHOWN = 60
_TIMES_RETRY = 1.5  # browsers wait up to a fifth longer than asked, and then connect


class SettingsError(Exception):
    """A setting cannot be used. The text is one line that names it and never shows a secret."""


class Settings(BaseSettings):
    """All settings, checked. Times are seconds and sizes are bytes, unless the name says otherwise.

    The properties below combine several settings.
    """

    # A wrong value may be a secret that was given for the wrong setting.
    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    openrouter_api_key: kinds.Secret | None = None
    upstream_url: kinds.HttpUrl = "https://openrouter.ai/api/v1"
    upstream_kind: kinds.UpstreamKind = "auto"
    upstream_proxy: kinds.ProxyUrl | None = Field(default=None, repr=False)
    referer: kinds.Text | None = None
    x_title: kinds.Text = "Session Broker"

    redis_url: kinds.RedisUrl | None = Field(default=None, repr=False)
    key_prefix: kinds.Prefix = "broker"
    redis_wait: kinds.CountOrNone = 0

    port: kinds.Port = 3000
    host: kinds.Host = "127.0.0.1"
    workers: kinds.Processes = 1

    session_ttl: kinds.WholeSeconds = 600
    resume_ttl: kinds.WholeSecondsOrNone = 300
    disconnect_grace: kinds.SecondsOrNone = 20.0
    journal_interval_ms: kinds.Milliseconds = 500
    heartbeat: kinds.Seconds = 15.0
    ping_events: kinds.Flag = False
    retry_ms: kinds.Milliseconds = 2000
    send_timeout: kinds.Seconds = 30.0

    connect_timeout: kinds.Seconds = 5.0
    first_data_timeout: kinds.Seconds = 120.0
    idle_timeout: kinds.Seconds = 60.0
    deadline: kinds.Seconds = 600.0
    max_retries: kinds.Retries = 2

    max_body: kinds.Size = 1024 * 1024
    max_messages: kinds.Count = 200
    max_response: kinds.Size = 8 * 1024 * 1024
    max_prompt_tokens: kinds.CountOrNone = 0
    max_output_tokens: kinds.Count = 4096

    allowed_models: kinds.ClientNamer = ("*",)
    default_model: kinds.Text | None = None
    extra_parameters: kinds.ClientNamer = ()
    system_file: kinds.FilePath | None = None
    cors_origins: kinds.Origins = ()

    name_secret: kinds.NamingSecret | None = None
    api_keys: kinds.ApiKeys = ()
    api_keys_file: kinds.FilePath | None = None
    clients_file: kinds.FilePath | None = None
    jwt_secret: kinds.SigningSecrets = ()
    jwks_url: kinds.WebUrl | None = None
    jwt_audience: kinds.Text | None = None
    jwt_issuer: kinds.Text | None = None
    trusted_proxies: kinds.Proxies = ()

    rate_limit: kinds.RatePerTime = Rate(30, 60)
    max_prepared: kinds.Count = 50
    max_prepared_bytes: kinds.Size = 8 * 1024 * 1024
    total_prepared_bytes: kinds.Size = 256 * 1024 * 1024
    max_concurrent_streams: kinds.Count = 5
    max_streams: kinds.Count = 2000
    daily_tokens: kinds.CountOrNone = 0
    daily_cost: kinds.Money = Decimal(0)
    monthly_cost: kinds.Money = Decimal(0)
    total_daily_cost: kinds.Money = Decimal(0)
    unpriced_models: kinds.Flag = False

    metrics_token: kinds.Secret | None = None
    models_ttl: kinds.WholeSeconds = 600
    drain_timeout: kinds.SecondsOrNone = 25.0
    page: kinds.Flag = True
    log_level: kinds.LogLevel = "info"
    log_format: kinds.LogFormat | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the library's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - as above
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - as above
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - as above
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take only the values that were passed; `load_settings` gathers the others."""
        return (init_settings,)

    @classmethod
    def from_environment(cls, **given: Any) -> Settings:
        """Load the settings as `broker serve` does: given values, else the environment, else `.env`.

        Raises:
            SettingsError: one of them is wrong.
        """
        return load_settings(**given)

    @property
    def listens_on_loopback(self) -> bool:
        """True if only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    @property
    def told_of_loopback(self) -> bool:
        """True if the operator says that only this machine can connect. The default says nothing of other listeners."""
        return "host" in self.model_fields_set and self.listens_on_loopback

    @property
    def resuming(self) -> bool:
        """True if sessions can be resumed; else each streams once."""
        return self.resume_ttl > 0

    @property
    def grace(self) -> float:
        """Seconds that a generation continues without a viewer."""
        return self.disconnect_grace if self.resuming else 0.0

    def proxy_for(self, url: str) -> str | None:
        """Return the proxy for a URL; None for no proxy.

        It is ``BROKER_UPSTREAM_PROXY``, else, for an ``https`` URL, the environment's ``HTTPS_PROXY`` where
        ``NO_PROXY`` does not name the host. The rules are those of `urllib.request`.
        """
        if self.upstream_proxy is not None:
            return self.upstream_proxy
        parts = urlsplit(url)
        proxies = urllib.request.getproxies_environment()
        bypass = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]  # not in the stubs
        if parts.scheme != "https" or bypass(parts.netloc, proxies):
            return None
        return proxies.get("https")

    @property
    def takes_tokens(self) -> bool:
        """True if callers may send a JWT."""
        return bool(self.jwt_secret) or self.jwks_url is not None

    @property
    def has_api_keys(self) -> bool:
        """True if there are API keys of ``BROKER_API_KEYS``. With an empty file there is none yet."""
        return bool(self.api_keys) or self.api_keys_file is not None

    @property
    def has_keys(self) -> bool:
        """True if callers may send an API key."""
        return self.has_api_keys or self.clients_file is not None

    @property
    def needs_identity(self) -> bool:
        """True if callers must send an API key or a JWT. With an empty file of keys, nobody gets in."""
        return self.has_keys or self.takes_tokens

    @property
    def secrets(self) -> tuple[str, ...]:
        """All texts that must never be shown."""
        secrets = [
            self.openrouter_api_key,
            *self.jwt_secret,
            self.name_secret,
            self.metrics_token,
            *(key for _, key in self.api_keys),
        ]
        found = [secret.get_secret_value() for secret in secrets if secret is not None]
        if self.upstream_proxy is not None and (password := urlsplit(self.upstream_proxy).password):
            found += [password, unquote(password)]
        if self.redis_url is not None:
            parts = urlsplit(self.redis_url)
            in_query = re.findall(
                r"(?:^|&)(?:sentinel_)?password=([^&]+)", parts.query
            )  # of unix://, of sentinels
            for password in (parts.password, *in_query):
                if password:
                    found += [password, unquote(password), unquote_plus(password)]
        return tuple(dict.fromkeys(found))


class _Given(NamedTuple):
    """A given value, and the words that say where it was given."""

    value: Any
    name: str


def setting_name(field: str) -> str:
    """Return the environment variable of an attribute of `Settings`."""
    return field.upper() if field in _WITHOUT_PREFIX else f"BROKER_{field.upper()}"


def load_settings(**flags: Any) -> Settings:
    """Load the settings from flags (None is not given), the environment and `.env`.

    Raises:
        SettingsError: one of them is wrong.
    """
    given = {
        **_from_variables(_read_dotenv(), " in .env"),
        **_from_variables(os.environ),
        **_from_flags(flags),
    }
    return _checked(given)


class LoadedSecrets(NamedTuple):
    """The secrets that are given now.

    Attributes:
        values: by their attributes in `Settings`; ``api_keys_file`` comes with the API keys.
        faults: for each that cannot be used, a line that names it and never shows a secret.
    """

    values: dict[str, Any]
    faults: list[str]


def load_secrets(**flags: Any) -> LoadedSecrets:
    """Load the secrets again, each by itself, so that one that cannot be used does not stop the others."""
    found: dict[str, Any] = {}
    faults: list[str] = []
    variables: list[tuple[Mapping[str, str], str]] = [(os.environ, "")]
    try:
        variables.insert(0, (_read_dotenv(), " in .env"))
    except SettingsError as error:
        faults.append(str(error))
    for field in sorted(_SECRETS):
        given: dict[str, _Given] = {}
        try:
            for written, where in variables:
                given |= _from_variables(written, where, [field])
            given |= _from_flags({field: flags.get(field)})
            settings = _checked(given)
        except SettingsError as error:
            faults.append(str(error))
        else:
            found |= {name: getattr(settings, name) for name in given}
    return LoadedSecrets(found, faults)


def read_api_keys(path: Path) -> tuple[kinds.ApiKey, ...]:
    """Read the file of `BROKER_API_KEYS_FILE` again.

    Raises:
        SettingsError: it cannot be read, or something in it is wrong.
    """
    name = f"{setting_name('api_keys')}_FILE"
    return _checked({"api_keys": _Given(_read_text(path, name), name)}).api_keys


def read_system_file(path: Path) -> str:
    """Read the file of `BROKER_SYSTEM_FILE`, without the spaces around its text.

    Raises:
        SettingsError: it cannot be read, is empty or too large, or is no UTF-8.
    """
    name = setting_name("system_file")
    text = _read_text(path, name)
    if not text:
        raise SettingsError(f"{name} must name a file that is not empty")
    return text


def read_bytes(path: Path, name: str, *, largest: int) -> bytes:
    """Read a file that a setting names.

    Raises:
        SettingsError: it cannot be read, or has more than ``largest`` bytes.
    """
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise SettingsError(f"{name} must name a file that can be read: {error.strerror}") from None
    if len(content) > largest:
        raise SettingsError(f"{name} must name a file of at most {largest} bytes")
    return content


def secret_files() -> list[Path]:
    """Return the files that hold secrets now. Those that a broken `.env` names are left out."""
    try:
        written = _read_dotenv()
    except SettingsError:
        written = {}
    written |= {name: value for name, value in os.environ.items() if value}
    names = (f"{setting_name(field)}_FILE" for field in sorted(_SECRETS))
    return [Path(path) for name in names if (path := written.get(name, "").strip())]


def otlp_protocols() -> dict[str, str]:
    """Return how ``traces`` and ``metrics`` are sent to a collector: ``grpc`` or ``http/protobuf``.

    This follows the standard variables, which the SDK of OpenTelemetry reads too. A signal without an endpoint is not
    sent, and is left out here.

    Raises:
        SettingsError: a protocol is not supported.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return {}
    found = {}
    for signal in ("traces", "metrics"):
        own = f"OTEL_EXPORTER_OTLP_{signal.upper()}"
        names = [
            part.strip() for part in os.environ.get(f"OTEL_{signal.upper()}_EXPORTER", "otlp").split(",")
        ]
        if "otlp" not in names or not _first_set(f"{own}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
            continue
        name, protocol = _first_set(f"{own}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL") or ("", "grpc")
        if protocol not in {"grpc", "http/protobuf"}:
            raise SettingsError(f"{name} must be grpc or http/protobuf, not {_quoted(protocol)}")
        found[signal] = protocol
    return found


def pass_on_otel_settings() -> None:
    """Put the ``OTEL_*`` lines of `.env` into the environment of this process, where the SDK reads them.

    Raises:
        SettingsError: `.env` cannot be read.
    """
    for name, value in _read_dotenv().items():
        if name.startswith("OTEL_") and value and not os.environ.get(name):
            os.environ[name] = value


def _first_set(*names: str) -> tuple[str, str] | None:
    """Return the first of these variables that is set, and its value."""
    return next(((name, value) for name in names if (value := os.environ.get(name, "").strip())), None)


def unknown_settings(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the names of ``BROKER_*`` variables, in the environment and in `.env`, that are not settings.

    Raises:
        SettingsError: `.env` cannot be read.
    """
    known = [setting_name(field) for field in Settings.model_fields]
    known += [f"{setting_name(field)}_FILE" for field in _SECRETS]
    known.append("BROKER_TOKEN")  # read by the client commands; it may be set where the service is started
    written = {**_read_dotenv(), **(os.environ if environ is None else environ)}
    unknown = sorted(name for name in written if name.startswith("BROKER_") and name not in known)
    return [name + _suggestion(name, known) for name in unknown]


def not_yet_served(settings: Settings) -> list[str]:
    """Return the names of settings that were given but have no effect in this release."""
    if settings.takes_tokens:
        return []
    return [
        f"{setting_name(field)} without BROKER_JWT_SECRET or BROKER_JWKS_URL"
        for field in ("jwt_audience", "jwt_issuer")
        if getattr(settings, field) is not None
    ]


def open_door(settings: Settings) -> str | None:
    """Return what to warn of where anybody who can connect can spend, else None."""
    if settings.told_of_loopback or settings.needs_identity or settings.total_daily_cost:
        return None
    warning = (
        "anybody who can connect can spend:"
        " set BROKER_API_KEYS, BROKER_CLIENTS_FILE, a JWT setting or BROKER_TOTAL_DAILY_COST"
    )
    if settings.system_file is None:
        warning += (
            "; without identity and BROKER_SYSTEM_FILE anybody can use an open broker as a free model"
            " (README.md, Who may spend what, says how to close it)"
        )
    return warning


def contradictions(settings: Settings) -> list[str]:
    """Return a sentence for each pair of values that contradict each other, with the effect."""
    found = []
    if settings.resuming and settings.disconnect_grace < settings.retry_ms / 1000 * _TIMES_RETRY:
        found.append(
            "BROKER_DISCONNECT_GRACE is shorter than 1.5 times BROKER_RETRY_MS:"
            " an answer is abandoned before its page can reconnect"
        )
    if settings.max_prepared_bytes < settings.max_body:
        found.append(
            "BROKER_MAX_PREPARED_BYTES is below BROKER_MAX_BODY: the largest requests can never be stored"
        )
    if settings.total_prepared_bytes < settings.max_prepared_bytes:
        found.append(
            "BROKER_TOTAL_PREPARED_BYTES is below BROKER_MAX_PREPARED_BYTES: one client can fill all there is"
        )
    found += [
        f"{setting_name(field)} is above BROKER_DEADLINE, which ends an answer before that"
        for field in ("first_data_timeout", "idle_timeout")
        if getattr(settings, field) > settings.deadline
    ]
    return found


def _suggestion(name: str, known: list[str]) -> str:
    by_stem = {other.removeprefix("BROKER_"): other for other in known}
    near = difflib.get_close_matches(name.removeprefix("BROKER_"), by_stem, n=1)
    return f" (did you mean {by_stem[near[0]]}?)" if near else ""


def _checked(given: Mapping[str, _Given]) -> Settings:
    try:
        return Settings(**{field: setting.value for field, setting in given.items()})
    except ValidationError as error:
        raise SettingsError(_complaint(error, given)) from None


def _from_flags(flags: Mapping[str, Any]) -> dict[str, _Given]:
    return {
        field: _Given(value, f"--{field.replace('_', '-')}")
        for field, value in flags.items()
        if value is not None
    }


def _from_variables(
    variables: Mapping[str, str], where: str = "", fields: Iterable[str] | None = None
) -> dict[str, _Given]:
    found = {}
    for field in Settings.model_fields if fields is None else fields:
        name = setting_name(field)
        may_be_blank = field not in _NEVER_BLANK
        value = _written(variables, name, where, may_be_blank=may_be_blank)
        in_file = variables if field in _SECRETS else {}
        path = _written(in_file, f"{name}_FILE", where, may_be_blank=may_be_blank)
        if value and path:
            raise SettingsError(f"{name} and {name}_FILE are both given{where}; leave one out")
        if path:
            name = f"{name}_FILE"
            value = _read_text(Path(path), f"{name}{where}")
            if not value and field != "api_keys":  # keys may be added to their file later
                raise SettingsError(f"{name}{where} must name a file that is not empty")
        if value or path:
            found[field] = _Given(value, f"{name}{where}")
    if "api_keys" in found:
        # A file that is named in a weaker place does not add to keys that are given in a stronger one.
        found.setdefault("api_keys_file", _Given(None, "BROKER_API_KEYS_FILE"))
    return found


def _written(variables: Mapping[str, str], name: str, where: str, *, may_be_blank: bool) -> str:
    written = variables.get(name, "")
    value = written.strip()
    if written and not value and not may_be_blank:
        raise SettingsError(f"{name}{where} must not be blank")
    return value


def _read_text(path: Path, name: str) -> str:
    content = read_bytes(path, name, largest=_LARGEST_FILE)
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise SettingsError(f"{name} must name a file of UTF-8 text") from None


def _read_dotenv() -> dict[str, str]:
    """Read `.env`. A `$` has no meaning: a secret may contain one. Of several lines for one name the last counts."""
    try:
        with DOTENV.open(encoding="utf-8-sig") as file:
            text = file.read(_LONGEST_DOTENV + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError(f".env cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(".env must be UTF-8 text") from None
    if len(text) > _LONGEST_DOTENV:
        raise SettingsError(f".env must have at most {_LONGEST_DOTENV} characters")
    found: dict[str, str] = {}
    for name, value in _bindings(text):
        if value or name not in found:  # an empty one is unset, and replaces nothing
            found[name] = value
    return found


def _bindings(text: str) -> Iterator[tuple[str, str]]:
    for binding in parse_stream(io.StringIO(text)):
        if binding.error:
            raise SettingsError(f".env must have NAME=value lines; line {binding.original.line} is not one")
        if binding.key is not None:
            yield binding.key, binding.value or ""


def _complaint(error: ValidationError, given: Mapping[str, _Given]) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    field = str(first["loc"][0])
    if field not in Settings.model_fields:
        return f"{field} is not a setting"
    if first["type"] == kinds.OWN_MESSAGE:
        return f"{given[field].name} {first['msg']}"
    shown = "" if field in _NEVER_SHOWN else f", not {_quoted(given[field].value)}"
    return f"{given[field].name} must be {_expected(Settings.model_fields[field])}{shown}"


def _expected(field: FieldInfo) -> str:
    # The description of an optional kind is inside its union.
    nested = [data for kind in get_args(field.annotation) for data in getattr(kind, "__metadata__", ())]
    return next(data.what for data in (*field.metadata, *nested) if isinstance(data, kinds.Expects))


def _quoted(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")
