"""The settings of keys and tokens: what they may be, and when a caller must show something."""

from __future__ import annotations

import os
import textwrap
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import SecretStr, ValidationError

from broker.setting_kinds import ApiKey
from broker.settings import Settings, SettingsError, load_settings, not_yet_served
from tests.identity.issuer import SECRET, private_key


@pytest.fixture(autouse=True)
def _nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BROKER_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_keys_of_a_file_come_with_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("keys").write_text("ann:one\n\nbob : two , ann:three\n")
    monkeypatch.setenv("BROKER_API_KEYS_FILE", "keys")
    settings = load_settings()
    assert settings.api_keys == tuple(
        ApiKey(name, SecretStr(key)) for name, key in (("ann", "one"), ("bob", "two"), ("ann", "three"))
    )
    assert settings.api_keys_file == Path("keys")
    assert settings.needs_identity


def test_an_empty_file_of_keys_still_requires_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("keys").write_text("\n")
    monkeypatch.setenv("BROKER_API_KEYS_FILE", "keys")
    settings = load_settings()
    assert settings.api_keys == ()
    assert settings.needs_identity


def test_an_empty_file_of_keys_wins_over_the_keys_of_dotenv(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("keys").touch()
    Path(".env").write_text("BROKER_API_KEYS=ann:one\n")
    monkeypatch.setenv("BROKER_API_KEYS_FILE", "keys")
    settings = load_settings()
    assert settings.api_keys == ()
    assert settings.needs_identity


def test_a_file_with_only_separators_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("keys").write_text(",\n,\n")
    monkeypatch.setenv("BROKER_API_KEYS_FILE", "keys")
    with pytest.raises(SettingsError, match=r"^BROKER_API_KEYS_FILE must be a comma list of name:key pairs"):
        load_settings()


@pytest.mark.parametrize("keys", [",", ",,", " , ", "\n", "\n,\n"])
def test_separators_without_a_pair_are_refused(keys: str) -> None:
    with pytest.raises(ValidationError):
        Settings(api_keys=keys)


def test_keys_of_the_environment_win_over_a_file_of_dotenv(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("keys").write_text("bob:two")
    Path(".env").write_text("BROKER_API_KEYS_FILE=keys\n")
    monkeypatch.setenv("BROKER_API_KEYS", "ann:one")
    settings = load_settings()
    assert [name for name, _ in settings.api_keys] == ["ann"]
    assert settings.api_keys_file is None


@pytest.mark.parametrize("key", ["one:two", "sk-or-v1-0", "a+b/c==", "~!@#$%^&*()"])
def test_a_key_may_have_any_visible_character_but_a_comma(key: str) -> None:
    assert Settings(api_keys=f"ann@example.com:{key}").api_keys == (
        ApiKey("ann@example.com", SecretStr(key)),
    )


@pytest.mark.parametrize(
    "keys",
    [
        "ann",
        ":one",
        "ann:",
        "ann: ,",
        "bob:two,ann:",
        "\ufeffann:one",
        "a b:one",
        "ann:o ne",
        "ann:é",
        "é:one",
        "{a}:one",
        f"{'a' * 65}:one",
        "a:one,b:one",
    ],
)
def test_a_pair_that_cannot_be_used_is_refused(keys: str) -> None:
    with pytest.raises(ValidationError):
        Settings(api_keys=keys)


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----",
        "-----BEGIN CERTIFICATE-----",
        "ssh-rsa AAAA",
        "ecdsa-sha2-nistp256 AAAA",
        '{"kty": "oct", "k": "AAAA"}',
        "https://login.example/.well-known/jwks.json",
    ],
)
def test_public_values_are_refused_as_the_secret(secret: str) -> None:
    with pytest.raises(ValidationError):
        Settings(jwt_secret=secret)


@pytest.mark.parametrize("kind", ["RSA", "RSA-1024", "P-256", "P-384", "Ed25519"])
@pytest.mark.parametrize("width", [64, 10_000])
def test_a_bare_public_key_is_refused_as_the_secret(kind: str, width: int) -> None:
    public = private_key(kind).public_key()
    shown = b64encode(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()
    with pytest.raises(ValidationError):
        Settings(jwt_secret="\n".join(textwrap.wrap(shown, width)))


@pytest.mark.parametrize("secret", [" ", "\t\n", "\0", "\0" * 64, "\ufeff", "\u200b\u00a0"])
def test_a_secret_that_shows_nothing_is_refused(secret: str) -> None:
    with pytest.raises(ValidationError):
        Settings(jwt_secret=secret)


@pytest.mark.parametrize("setting", ["BROKER_JWT_SECRET", "BROKER_NAME_SECRET"])
def test_a_secret_that_is_not_utf_8_is_refused(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv(setting, f"{SECRET}\udcff")
    with pytest.raises(SettingsError, match=f"^{setting} must be "):
        load_settings()


@pytest.mark.parametrize("secret", ["two words", "schlüssel", "MIIBfairly-short", "M" * 300, "x\0"])
def test_any_other_text_is_a_secret(secret: str) -> None:
    assert Settings(jwt_secret=secret).secrets == (secret,)


ONE, ANOTHER = "one secret of 32 bytes or a bit more", "another secret that is as long as the first"


@pytest.mark.parametrize(
    "listed", [f"{ONE}, {ANOTHER} ,", f"{ONE}\n{ANOTHER}\n", f",{ONE},,{ANOTHER}", f"{ONE},{ANOTHER},{ONE}"]
)
def test_several_secrets_are_a_comma_list_or_lines(listed: str) -> None:
    settings = Settings(jwt_secret=listed)
    assert settings.secrets[:2] == (ONE, ANOTHER)
    assert settings.secrets[-1] == listed.strip()  # the whole text could be one secret with commas
    assert Settings(jwt_secret=SecretStr(listed)).jwt_secret == settings.jwt_secret


def test_a_secret_with_commas_is_accepted_whole() -> None:
    first, second = f"{ONE}, {ANOTHER}", f"{ANOTHER}, {ONE}"
    assert first in Settings(jwt_secret=first).secrets
    assert {first, second} < set(Settings(jwt_secret=f"{first}\n{second}\n").secrets)


@pytest.mark.parametrize(
    ("listed", "position"),
    [
        (f"{ONE},x", 2),
        (f"x,{ONE}", 1),
        (f"{ONE}\n{ANOTHER}\nx\n{ONE}", 3),
        ("x,", 1),
        (f"{ONE},{'é' * 15}", 2),
    ],
)
def test_a_short_secret_in_a_list_is_refused_with_its_position(
    monkeypatch: pytest.MonkeyPatch, listed: str, position: int
) -> None:
    """Such as the parts of one long secret that has commas, each of which could be guessed."""
    monkeypatch.setenv("BROKER_JWT_SECRET", listed)
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert str(error.value) == (
        f"BROKER_JWT_SECRET must have 32 bytes or more in each secret of a list; number {position} is shorter"
        " (a comma and a new line end a secret)"
    )


def test_sixteen_letters_of_two_bytes_are_long_enough() -> None:
    assert Settings(jwt_secret=f"{ONE},{'é' * 16}").secrets[1] == "é" * 16


@pytest.mark.parametrize("listed", [",", ",,", "a,ssh-rsa AAAA", "a,\0", ",".join("abcdefghi")])
def test_a_list_with_an_unusable_secret_is_refused(listed: str) -> None:
    with pytest.raises(ValidationError):
        Settings(jwt_secret=listed)


def test_a_refused_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_JWT_SECRET", "ssh-rsa AAAA")
    with pytest.raises(
        SettingsError, match=r"^BROKER_JWT_SECRET must be .* secret texts, no public key .*\)$"
    ):
        load_settings()


def test_the_url_of_published_keys_is_not_changed() -> None:
    url = "https://login.example/keys/?p=policy"
    assert Settings(jwks_url=url).jwks_url == url


@pytest.mark.parametrize(
    "url", ["login.example/keys", "ftp://login.example", "https://a:b@login.example", "https://a/#b"]
)
def test_another_url_is_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        Settings(jwks_url=url)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({}, False),
        ({"jwt_audience": "chat", "jwt_issuer": "https://i"}, False),
        ({"trusted_proxies": "private"}, False),
        ({"api_keys": "ann:one"}, True),
        ({"jwt_secret": SECRET}, True),
        ({"jwks_url": "https://login.example/keys"}, True),
        ({"clients_file": "clients.toml"}, True),
    ],
)
def test_something_must_be_shown_where_it_could_be_checked(given: dict[str, Any], needed: bool) -> None:
    assert Settings(**given).needs_identity is needed


def test_an_audience_without_tokens_causes_a_warning() -> None:
    assert not_yet_served(Settings(jwt_audience="chat", jwt_issuer="https://i")) == [
        "BROKER_JWT_AUDIENCE without BROKER_JWT_SECRET or BROKER_JWKS_URL",
        "BROKER_JWT_ISSUER without BROKER_JWT_SECRET or BROKER_JWKS_URL",
    ]
    assert not_yet_served(Settings(jwt_audience="chat", jwt_issuer="https://i", jwt_secret=SECRET)) == []


def test_all_settings_of_identity_are_supported() -> None:
    settings = Settings(
        api_keys="ann:one",
        jwt_secret=SECRET,
        jwks_url="https://login.example/keys",
        jwt_audience="chat",
        jwt_issuer="https://i",
        trusted_proxies="private",
    )
    assert not_yet_served(settings) == []
