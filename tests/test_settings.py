"""Where settings come from, what they may be, and what is said when one is wrong."""

from __future__ import annotations

import itertools
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from broker.core.pricing import to_nano
from broker.core.rates import Rate
from broker.setting_kinds import ApiKey
from broker.settings import (
    Settings,
    SettingsError,
    contradictions,
    load_settings,
    not_yet_served,
    otlp_protocols,
    pass_on_otel_settings,
    setting_name,
    unknown_settings,
)

EXAMPLE = Path(__file__).parents[1] / ".env.example"
SECRET = "s3cret-value"


@pytest.fixture(autouse=True)
def _nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BROKER_") or name in {setting_name(field) for field in Settings.model_fields}:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def complaint(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> str:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as error:
        load_settings()
    return str(error.value)


def loaded(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> Settings:
    monkeypatch.setenv(name, value)
    return load_settings()


# Where they come from


def test_without_anything_the_defaults_stand() -> None:
    settings = load_settings()
    assert settings == Settings()
    assert settings.model_fields_set == set()
    assert (settings.port, settings.host, settings.session_ttl) == (3000, "127.0.0.1", 600)
    assert settings.openrouter_api_key is None


def test_a_flag_wins_over_the_environment_and_that_over_dotenv(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("PORT=1\nBROKER_HEARTBEAT=1\nBROKER_RETRY_MS=1\n")
    monkeypatch.setenv("PORT", "2")
    monkeypatch.setenv("BROKER_HEARTBEAT", "2")
    settings = load_settings(port=3, host=None)
    assert (settings.port, settings.heartbeat, settings.retry_ms) == (3, 2.0, 1)


def test_empty_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("PORT=1\nREDIS_URL=\n")
    monkeypatch.setenv("PORT", "")
    monkeypatch.setenv("BROKER_HEARTBEAT", "  ")
    settings = load_settings()
    assert settings.model_fields_set == {"port"}
    assert settings.port == 1


@pytest.mark.parametrize(
    "name",
    [
        "BROKER_API_KEYS",
        "BROKER_API_KEYS_FILE",
        "BROKER_JWT_SECRET",
        "BROKER_JWT_SECRET_FILE",
        "BROKER_JWKS_URL",
        "BROKER_JWT_AUDIENCE",
        "BROKER_JWT_ISSUER",
        "BROKER_ALLOWED_MODELS",
        "BROKER_CLIENTS_FILE",
        "BROKER_DAILY_TOKENS",
        "BROKER_DAILY_COST",
        "BROKER_MONTHLY_COST",
        "BROKER_TOTAL_DAILY_COST",
    ],
)
def test_spaces_do_not_unset_protecting_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaint(monkeypatch, name, " \t") == f"{name} must not be blank"
    monkeypatch.setenv(name, "")
    assert load_settings().model_fields_set == set()
    Path(".env").write_text(f"{name}='  '\n")
    with pytest.raises(SettingsError, match=rf"^{name} in \.env must not be blank$"):
        load_settings()


def test_an_empty_line_of_dotenv_does_not_undo_another() -> None:
    Path(".env").write_text(
        "BROKER_JWT_ISSUER=a\nBROKER_JWT_ISSUER=b\nBROKER_JWT_ISSUER=\nBROKER_JWT_ISSUER\n"
    )
    assert load_settings().jwt_issuer == "b"


def test_a_dotenv_is_read_to_its_end_or_not_at_all() -> None:
    Path(".env").write_text("#" * (1 << 20) + "\nBROKER_API_KEYS=a:one\n")
    with pytest.raises(SettingsError, match=r"^\.env must have at most 1048576 characters$"):
        load_settings()


def test_other_names_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOST", "WORKERS", "HEARTBEAT", "broker_heartbeat", "port", "BROKER_PORT", "BROKER_REFERER"):
        monkeypatch.setenv(name, "7")
    assert load_settings().model_fields_set == set()


def test_a_value_built_in_code_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("PORT=1\n")
    monkeypatch.setenv("BROKER_HEARTBEAT", "2")
    assert Settings(retry_ms=5).model_fields_set == {"retry_ms"}


def test_an_unknown_name_is_refused_in_code() -> None:
    with pytest.raises(ValidationError):
        Settings(hartbeat=5)  # type: ignore[call-arg] # that is the test
    with pytest.raises(SettingsError, match=r"^hartbeat is not a setting$"):
        load_settings(hartbeat=5)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 5  # type: ignore[misc] # that is the test


def test_dotenv_takes_quotes_comments_export_and_dollars(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "elsewhere")
    Path(".env").write_text(
        "\ufeff# a comment\nexport X_TITLE='My chat' # said so\r\nOPENROUTER_API_KEY=a${HOME}$b\nREFERER\n",
        encoding="utf-8",
    )
    settings = load_settings()
    assert settings.x_title == "My chat"
    assert settings.openrouter_api_key == SecretStr("a${HOME}$b")
    assert settings.referer is None


def test_an_invalid_line_of_dotenv_is_named_without_its_text() -> None:
    Path(".env").write_text(f"PORT=1\nX_TITLE='{SECRET}\n")
    with pytest.raises(SettingsError, match=r"^\.env must have NAME=value lines; line 2 is not one$"):
        load_settings()


def test_a_dotenv_that_is_not_text_is_reported() -> None:
    Path(".env").write_bytes(b"PORT=\xff\n")
    with pytest.raises(SettingsError, match=r"^\.env must be UTF-8 text$"):
        load_settings()


def test_a_dotenv_that_cannot_be_read_is_reported() -> None:
    Path(".env").mkdir()
    with pytest.raises(SettingsError, match=r"^\.env cannot be read: Is a directory$"):
        load_settings()


# Secrets in files


@pytest.mark.parametrize("name", ["OPENROUTER_API_KEY", "BROKER_JWT_SECRET"])
def test_a_secret_can_come_from_a_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("secret").write_text(f"  {SECRET}\n")
    settings = loaded(monkeypatch, f"{name}_FILE", "secret")
    field = name.removeprefix("BROKER_").lower()
    value = getattr(settings, field)
    [secret] = value if isinstance(value, tuple) else [value]
    assert secret.get_secret_value() == SECRET


def test_a_redis_url_and_keys_can_come_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("url").write_text(f"redis://:{SECRET}@host/1\n")
    Path("keys").write_text("a:one-key,\n b:other-key\n")
    monkeypatch.setenv("REDIS_URL_FILE", "url")
    monkeypatch.setenv("BROKER_API_KEYS_FILE", "keys")
    settings = load_settings()
    assert settings.redis_url == f"redis://:{SECRET}@host/1"
    assert settings.api_keys == (ApiKey("a", SecretStr("one-key")), ApiKey("b", SecretStr("other-key")))


def test_dotenv_can_name_a_file_too() -> None:
    Path("secret").write_text(SECRET)
    Path(".env").write_text("OPENROUTER_API_KEY_FILE=secret\n")
    assert load_settings().openrouter_api_key == SecretStr(SECRET)


def test_a_file_in_the_environment_wins_over_a_value_in_dotenv(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("secret").write_text(SECRET)
    Path(".env").write_text("OPENROUTER_API_KEY=other\n")
    assert loaded(monkeypatch, "OPENROUTER_API_KEY_FILE", "secret").secrets == (SECRET,)


def test_a_secret_and_its_file_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", SECRET)
    assert complaint(monkeypatch, "OPENROUTER_API_KEY_FILE", "secret") == (
        "OPENROUTER_API_KEY and OPENROUTER_API_KEY_FILE are both given; leave one out"
    )


def test_only_secrets_come_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("port").write_text("5")
    assert loaded(monkeypatch, "PORT_FILE", "port").port == 3000


@pytest.mark.parametrize("name", ["OPENROUTER_API_KEY_FILE", "REDIS_URL_FILE", "BROKER_JWT_SECRET_FILE"])
@pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf\r\n"])
def test_an_empty_secret_file_ends_the_start(
    name: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("secret").write_bytes(content)
    assert complaint(monkeypatch, name, "secret") == f"{name} must name a file that is not empty"


def test_an_empty_secret_file_of_dotenv_ends_the_start_too() -> None:
    Path("secret").touch()
    Path(".env").write_text("BROKER_JWT_SECRET_FILE=secret\n")
    with pytest.raises(
        SettingsError, match=r"^BROKER_JWT_SECRET_FILE in \.env must name a file that is not "
    ):
        load_settings()


def test_a_secret_has_no_byte_order_mark_and_line_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("secret").write_bytes(b"\xef\xbb\xbf" + SECRET.encode() + b"\r\n")
    assert loaded(monkeypatch, "BROKER_JWT_SECRET_FILE", "secret").jwt_secret == (SecretStr(SECRET),)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "a file that can be read: No such file or directory"),
        (b"\xff", "a file of UTF-8 text"),
        (b"x" * 65_537, "a file of at most 65536 bytes"),
    ],
)
def test_an_unusable_file_is_reported(
    content: bytes | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        Path("secret").write_bytes(content)
    assert complaint(monkeypatch, "REDIS_URL_FILE", "secret") == f"REDIS_URL_FILE must name {told}"


# Values


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("BROKER_MAX_BODY", "65536", 65536),
        ("BROKER_MAX_BODY", "512KiB", 524288),
        ("BROKER_MAX_BODY", "2 mib", 2097152),
        ("BROKER_MAX_RESPONSE", "1GiB", 1 << 30),
        ("BROKER_ALLOWED_MODELS", " openai/*, ,anthropic/claude-*,", ("openai/*", "anthropic/claude-*")),
        ("BROKER_RATE_LIMIT", "30/minute", Rate(30, 60)),
        ("BROKER_RATE_LIMIT", "5 / 10 seconds", Rate(5, 10)),
        ("BROKER_RATE_LIMIT", "1000/2days", Rate(1000, 172_800)),
        ("BROKER_DAILY_COST", "2.50", Decimal("2.50")),
        ("BROKER_MONTHLY_COST", "20", Decimal(20)),
        ("BROKER_TOTAL_DAILY_COST", "0.000001", Decimal("0.000001")),
        ("BROKER_PING_EVENTS", "yes", True),
        ("BROKER_PAGE", "0", False),
        ("BROKER_HEARTBEAT", "0.5", 0.5),
        ("BROKER_RESUME_TTL", "0", 0),
        ("BROKER_DISCONNECT_GRACE", "0", 0.0),
        ("PORT", "0", 0),
        ("BROKER_HOST", "[::1]", "::1"),
        ("BROKER_HOST", "broker.internal", "broker.internal"),
        ("BROKER_UPSTREAM_URL", "http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("REDIS_URL", "unix:///run/valkey.sock", "unix:///run/valkey.sock"),
        ("REDIS_URL", "rediss://host/?ssl_ca_certs=/etc/passwd", "rediss://host/?ssl_ca_certs=/etc/passwd"),
        ("REDIS_URL", "rediss://user:pw@host:6380/2", "rediss://user:pw@host:6380/2"),
        ("REDIS_URL", "redis+sentinel://a:1,b:2/main/0", "redis+sentinel://a:1,b:2/main/0"),
        ("REDIS_URL", "rediss+cluster://u:p@a:1,b", "rediss+cluster://u:p@a:1,b"),
        (
            "BROKER_CORS_ORIGINS",
            "https://A.example:443/,http://b:8080",
            ("https://a.example", "http://b:8080"),
        ),
        ("BROKER_CORS_ORIGINS", "*", ("*",)),
        ("BROKER_TRUSTED_PROXIES", "private,10.1.2.3/8,::1", ("private", "10.0.0.0/8", "::1/128")),
        ("BROKER_LOG_LEVEL", "DEBUG", "debug"),
        ("BROKER_LOG_FORMAT", "Text", "text"),
    ],
)
def test_a_value_is_understood(name: str, value: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = loaded(monkeypatch, name, value)
    assert getattr(settings, name.removeprefix("BROKER_").lower()) == expected


@pytest.mark.parametrize("amount", ["1000000", "0.000000001", f"0.{'0' * 40}1", f"1.{'1' * 60}"])
def test_no_budget_that_is_taken_comes_to_none(amount: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_DAILY_COST", amount)
    try:
        settings = load_settings()
    except SettingsError:
        return
    assert to_nano(settings.daily_cost)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("PORT", "65536", "a port from 0 to 65535, not '65536'"),
        ("PORT", "http", "a port from 0 to 65535, not 'http'"),
        ("PORT", "-1", "a port from 0 to 65535, not '-1'"),
        ("BROKER_WORKERS", "0", "a whole number from 1 to 256, not '0'"),
        ("BROKER_SESSION_TTL", "0", "a whole number of seconds, 1 or more, not '0'"),
        ("BROKER_RESUME_TTL", "-1", "a whole number of seconds, 0 or more, not '-1'"),
        ("BROKER_SESSION_TTL", "1.5", "a whole number of seconds, 1 or more, not '1.5'"),
        ("BROKER_HEARTBEAT", "0", "a number of seconds above 0, not '0'"),
        ("BROKER_HEARTBEAT", "inf", "a number of seconds above 0, not 'inf'"),
        ("BROKER_DEADLINE", "nan", "a number of seconds above 0, not 'nan'"),
        ("BROKER_DISCONNECT_GRACE", "soon", "a number of seconds, 0 or more, not 'soon'"),
        ("BROKER_RETRY_MS", "0", "milliseconds from 1 to 600000, not '0'"),
        ("BROKER_MAX_RETRIES", "11", "a whole number from 0 to 10, not '11'"),
        ("BROKER_MAX_BODY", "1MB", "a size such as 65536, 512KiB or 1MiB, not '1MB'"),
        ("BROKER_MAX_BODY", "0", "a size such as 65536, 512KiB or 1MiB, not '0'"),
        ("BROKER_RATE_LIMIT", "30", "a rate such as 30/minute, not '30'"),
        ("BROKER_RATE_LIMIT", "0/minute", "a rate such as 30/minute, not '0/minute'"),
        ("BROKER_RATE_LIMIT", "3/0 minutes", "a rate such as 30/minute, not '3/0 minutes'"),
        ("BROKER_RATE_LIMIT", "3/367 days", "a rate such as 30/minute, not '3/367 days'"),
        ("BROKER_DAILY_COST", "-1", "an amount in USD such as 2.50, from 0 to 1000000, not '-1'"),
        ("BROKER_DAILY_COST", "NaN", "an amount in USD such as 2.50, from 0 to 1000000, not 'NaN'"),
        (
            "BROKER_TOTAL_DAILY_COST",
            "1000001",
            "an amount in USD such as 2.50, from 0 to 1000000, not '1000001'",
        ),
        ("BROKER_ALLOWED_MODELS", " , ", "a comma list of names, not ','"),
        (
            "BROKER_CORS_ORIGINS",
            ",,",
            "a comma list of origins such as https://example.com, null, or *, not ',,'",
        ),
        ("BROKER_PAGE", "perhaps", "true or false, not 'perhaps'"),
        ("BROKER_HOST", "http://x", "an address or a host name, not 'http://x'"),
        ("X_TITLE", "a\nb", r"printable ASCII characters, not 'a\nb'"),
        ("X_TITLE", "Grüße", "printable ASCII characters, not 'Grüße'"),
        ("BROKER_KEY_PREFIX", "{a}", "1 to 64 letters, digits or any of . _ : -, not '{a}'"),
        ("BROKER_LOG_LEVEL", "loud", "debug, info, warning, error or critical, not 'loud'"),
        ("BROKER_LOG_FORMAT", "xml", "text or json, not 'xml'"),
        (
            "BROKER_CORS_ORIGINS",
            "https://a/b",
            "a comma list of origins such as https://example.com, null, or *, not 'https://a/b'",
        ),
        (
            "BROKER_TRUSTED_PROXIES",
            "10.0.0.0/40",
            "a comma list of addresses, networks, or the word private, not '10.0.0.0/40'",
        ),
    ],
)
def test_a_bad_value_is_named_with_what_is_expected(
    name: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert complaint(monkeypatch, name, value) == f"{name} must be {told}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPENROUTER_API_KEY", f"{SECRET} {SECRET}"),
        ("BROKER_API_KEYS", SECRET),
        ("BROKER_API_KEYS", f"{SECRET}:"),
        ("BROKER_API_KEYS", f"a:one,{SECRET}: ,"),
        ("BROKER_API_KEYS", ","),
        ("BROKER_API_KEYS", " ,, ,"),
        ("BROKER_API_KEYS", "\ufeff"),
        ("REDIS_URL", f"redis://:{SECRET}@host/main"),
        ("REDIS_URL", f"redis://:{SECRET}@host?db=1"),
        ("REDIS_URL", f"redis://:{SECRET}@host?ssl_ca_certs=/etc/hostname"),
        ("REDIS_URL", f"rediss://:{SECRET}@host?ssl_ca_certs=/nowhere/ca.crt"),
        ("REDIS_URL", f"rediss://:{SECRET}@host?ssl_cert_reqs=none"),
        ("REDIS_URL", f"unix:///run/valkey.sock?password={SECRET}&db=main"),
        ("REDIS_URL", f"unix://:{SECRET}@/run/valkey.sock?max_connections=1"),
        ("REDIS_URL", f"http://:{SECRET}@host"),
        ("REDIS_URL", f"redis://:{SECRET}@host:99999"),
        ("BROKER_UPSTREAM_URL", f"https://user:{SECRET}@host"),
        ("BROKER_UPSTREAM_URL", f"https://host/?key={SECRET}"),
        ("BROKER_JWKS_URL", f"ftp://{SECRET}"),
    ],
)
def test_a_bad_secret_is_named_but_not_shown(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = complaint(monkeypatch, name, value)
    assert told.startswith(f"{name} must be ")
    assert SECRET not in told
    assert "\n" not in told


def test_a_long_bad_value_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaint(monkeypatch, "PORT", "9" * 500).endswith(f"not '{'9' * 60}…'")


def test_a_bad_value_is_named_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"^--log-level must be"):
        load_settings(log_level="loud")
    Path(".env").write_text("PORT=x\n")
    with pytest.raises(SettingsError, match=r"^PORT in \.env must be"):
        load_settings()
    Path("secret").write_text("http://x")
    assert complaint(monkeypatch, "REDIS_URL_FILE", "secret").startswith("REDIS_URL_FILE must be")


# Meanings


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST"])
def test_the_loopback_is_known(host: str) -> None:
    assert Settings(host=host).listens_on_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "broker.internal"])
def test_other_addresses_are_not_the_loopback(host: str) -> None:
    assert not Settings(host=host).listens_on_loopback


def test_without_resuming_there_is_no_grace() -> None:
    assert Settings(disconnect_grace=7).grace == 7
    assert Settings(disconnect_grace=7, resume_ttl=0).grace == 0
    assert not Settings(resume_ttl=0).resuming


def test_all_secrets_are_known_and_none_is_in_the_representation() -> None:
    settings = Settings(
        openrouter_api_key="the-key",
        jwt_secret="the signing secret",
        api_keys="me:my-key",
        redis_url="redis://:p%40ss@host",
    )
    assert set(settings.secrets) == {"the-key", "the signing secret", "my-key", "p%40ss", "p@ss"}
    assert not [secret for secret in settings.secrets if secret in repr(settings)]
    settings = Settings(redis_url="unix://:one@/run/valkey.sock?db=1&password=t%40o")
    assert set(settings.secrets) == {"one", "t%40o", "t@o"}


def test_an_unknown_name_is_reported_with_the_nearest_setting() -> None:
    Path(".env").write_text("BROKER_DEADLIN=5\nOTHER=1\n")
    environ = {
        "BROKER_HEARTBEET": "5",
        "BROKER_XYZZY": "1",
        "BROKER_PORT": "1",
        "BROKER_API_KEYS_FILE": "f",
        "PORT": "1",
    }
    assert unknown_settings(environ) == [
        "BROKER_DEADLIN (did you mean BROKER_DEADLINE?)",
        "BROKER_HEARTBEET (did you mean BROKER_HEARTBEAT?)",
        "BROKER_PORT (did you mean PORT?)",
        "BROKER_XYZZY",
    ]


def test_no_setting_of_ours_is_unknown() -> None:
    assert unknown_settings({setting_name(field): "1" for field in Settings.model_fields}) == []


def test_by_default_everything_set_is_served() -> None:
    assert not_yet_served(Settings()) == []
    assert not_yet_served(Settings(max_streams=5, workers=1, redis_url="redis://host")) == []


def test_settings_without_effect_are_reported() -> None:
    settings = Settings(workers=2, daily_cost="1", rate_limit="30/minute", jwt_issuer="x")
    assert not_yet_served(settings) == ["BROKER_JWT_ISSUER without BROKER_JWT_SECRET or BROKER_JWKS_URL"]


# The example file


def test_the_example_shows_every_setting_with_its_default() -> None:
    lines = EXAMPLE.read_text().splitlines()
    names = [match[1] for line in lines if (match := re.match(r"#?([A-Z_]+)=", line))]
    assert sorted(names) == sorted(setting_name(field) for field in Settings.model_fields)
    Path(".env").write_text("\n".join(re.sub(r"^#(?=[A-Z_]+=)", "", line) for line in lines))
    assert load_settings() == Settings()


def test_the_example_describes_each_setting() -> None:
    lines = EXAMPLE.read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"#?[A-Z_]+=", line):
            assert before.startswith("# "), line


def test_the_example_works_with_a_key_filled_in() -> None:
    Path(".env").write_text(
        EXAMPLE.read_text().replace("OPENROUTER_API_KEY=\n", f"OPENROUTER_API_KEY={SECRET}\n")
    )
    settings = load_settings()
    assert settings.model_fields_set == {"openrouter_api_key"}
    assert settings.secrets == (SECRET,)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, []),
        ({"disconnect_grace": 2.9}, ["BROKER_DISCONNECT_GRACE"]),
        ({"disconnect_grace": 0}, ["BROKER_DISCONNECT_GRACE"]),
        ({"disconnect_grace": 3}, []),
        ({"retry_ms": 20_000}, ["BROKER_DISCONNECT_GRACE"]),
        ({"retry_ms": 20_000, "resume_ttl": 0}, []),
        ({"max_body": 9 * 1024 * 1024}, ["BROKER_MAX_PREPARED_BYTES"]),
        ({"total_prepared_bytes": 1024 * 1024}, ["BROKER_TOTAL_PREPARED_BYTES"]),
        ({"deadline": 90}, ["BROKER_FIRST_DATA_TIMEOUT"]),
    ],
)
def test_contradicting_values_are_reported(values: dict[str, Any], named: list[str]) -> None:
    assert [sentence.split(" ")[0] for sentence in contradictions(Settings(**values))] == named


# Variables of OpenTelemetry


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}


@pytest.mark.parametrize(
    ("variables", "protocols"),
    [
        ({}, {}),
        (ENDPOINT, {"traces": "grpc", "metrics": "grpc"}),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}, {"traces": "grpc"}),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c"}, {"metrics": "grpc"}),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "true"}, {}),
        ({**ENDPOINT, "OTEL_METRICS_EXPORTER": "none"}, {"traces": "grpc"}),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": " otlp , console"}, {"traces": "grpc", "metrics": "grpc"}),
        (
            {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            {"traces": "http/protobuf", "metrics": "http/protobuf"},
        ),
        (
            {**ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
            {"traces": "http/protobuf", "metrics": "grpc"},
        ),
    ],
)
def test_the_standard_variables_say_what_is_sent(
    variables: dict[str, str], protocols: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert otlp_protocols() == protocols


def test_an_unknown_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "carrier pigeon")
    with pytest.raises(
        SettingsError, match=r"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL must be .*'carrier pigeon'"
    ):
        otlp_protocols()


def test_the_environment_is_stronger_than_otel_lines_in_dotenv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("OTEL_SERVICE_NAME=file\nOTEL_TRACES_SAMPLER=always_off\nOTHER=1\n")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "environment")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "")
    monkeypatch.delenv("OTHER", raising=False)
    pass_on_otel_settings()
    assert os.environ["OTEL_SERVICE_NAME"] == "environment"
    assert os.environ["OTEL_TRACES_SAMPLER"] == "always_off"
    assert "OTHER" not in os.environ
