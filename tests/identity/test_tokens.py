"""Whom a token is about, and each way in which one can be no good."""

from __future__ import annotations

import asyncio
import io
import json
import time
from contextlib import suppress
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from broker.core.client_limits import ClientLimits
from broker.core.errors import Unauthorized
from broker.core.identity import ClientNamer
from broker.identity.jwks import PAUSE, PublishedKeys
from broker.identity.tokens import EXPIRED, INVALID, LEEWAY, MAX_SUBJECT, MAX_TOKEN, Subject, Tokens
from tests.clock import Clock
from tests.identity.issuer import SECRET, claims, hs256, key_server, member, part, private_key, signed

RSA, EC, ED = member("RSA", kid="rsa"), member("P-256", kid="ec"), member("Ed25519", kid="ed")
NOW = int(time.time())


def tokens(*, secret: str | None = SECRET, **rules: Any) -> Tokens:
    secrets = (secret,) if secret is not None else ()
    return Tokens(**{"secrets": secrets, "published": None, "audience": None, "issuer": None, **rules})


async def refusal(token: str, checks: Tokens | None = None) -> str:
    with pytest.raises(Unauthorized) as error:
        await (checks or tokens()).subject_of(token)
    assert error.value.__cause__ is None
    return error.value.message


async def published(token: str, *members: object, **rules: Any) -> Subject:
    """Check a token against a key set."""
    async with (
        key_server(*(members or (RSA, EC, ED))) as server,
        PublishedKeys(server.url) as keys,
    ):
        return await tokens(**{"secret": None, "published": keys, **rules}).subject_of(token)


async def unpublished(token: str, *members: object, **rules: Any) -> str:
    with pytest.raises(Unauthorized) as error:
        await published(token, *members, **rules)
    return error.value.message


# Good ones


async def test_a_token_names_its_subject_and_issuer() -> None:
    assert await tokens().subject_of(hs256(SECRET)) == Subject("", "ann")
    assert await tokens().subject_of(hs256(SECRET, iss="https://i")) == Subject("https://i", "ann")


@pytest.mark.parametrize("secret", ["short", "x" * 64, "x" * 65, "x" * 200, "schlüssel"])
async def test_a_secret_may_be_of_any_length(secret: str) -> None:
    checks = tokens(secret=secret)
    assert await checks.subject_of(hs256(secret)) == Subject("", "ann")
    assert await refusal(hs256(secret + "x"), checks) == INVALID


@pytest.mark.parametrize(
    ("kind", "algorithm", "kid"),
    [("RSA", "RS256", "rsa"), ("P-256", "ES256", "ec"), ("Ed25519", "EdDSA", "ed")],
)
async def test_a_token_can_be_signed_with_a_published_key(kind: str, algorithm: str, kid: str) -> None:
    assert await published(signed(kind, algorithm, kid)) == Subject("", "ann")
    assert await published(signed(kind, algorithm)) == Subject("", "ann")


async def test_a_secret_and_published_keys_are_good_beside_each_other() -> None:
    assert await published(hs256(SECRET), secret=SECRET) == Subject("", "ann")
    assert await published(signed("RSA", "RS256", "rsa"), secret=SECRET) == Subject("", "ann")


@pytest.mark.parametrize("seconds", [-LEEWAY / 2, 0.0])
async def test_clocks_may_differ_a_little(seconds: float) -> None:
    token = hs256(SECRET, exp=time.time() + seconds, nbf=time.time() - seconds, iat=time.time() - seconds)
    assert await tokens().subject_of(token) == Subject("", "ann")


@pytest.mark.parametrize("aud", ["chat", ["other", "chat"]])
async def test_a_token_for_us_is_good(aud: object) -> None:
    assert await tokens(audience="chat").subject_of(hs256(SECRET, aud=aud)) == Subject("", "ann")


@pytest.mark.parametrize("aud", [..., "other", ["a", "b"], []])
async def test_where_no_audience_is_set_a_token_for_anybody_is_good(aud: object) -> None:
    assert await tokens().subject_of(hs256(SECRET, aud=aud)) == Subject("", "ann")


async def test_a_token_of_the_issuer_that_is_set_is_good() -> None:
    token = hs256(SECRET, iss="https://i", aud="chat")
    assert await tokens(issuer="https://i", audience="chat").subject_of(token) == Subject("https://i", "ann")


async def test_the_longest_subject_is_good() -> None:
    assert (await tokens().subject_of(hs256(SECRET, sub="x" * MAX_SUBJECT))).subject == "x" * MAX_SUBJECT


# Claims


@pytest.mark.parametrize(
    "changes",
    [
        {"sub": ...},
        {"sub": None},
        {"sub": ""},
        {"sub": 5},
        {"sub": ["ann"]},
        {"sub": "x" * (MAX_SUBJECT + 1)},
        {"exp": ...},
        {"exp": None},
        {"exp": "soon"},
        {"exp": []},
        {"exp": float("nan")},
        {"exp": float("inf")},
        {"nbf": NOW + 3600},
        {"nbf": "now"},
        {"iat": NOW + 3600},
    ],
)
async def test_a_claim_that_is_missing_or_wrong_is_refused(changes: dict[str, Any]) -> None:
    assert await refusal(hs256(SECRET, **changes)) == INVALID


@pytest.mark.parametrize("exp", [NOW - 3600, 0, -1, True], ids=["an hour ago", "0", "-1", "True"])
async def test_an_expired_token_is_reported_as_expired(exp: int) -> None:
    assert await refusal(hs256(SECRET, exp=exp)) == EXPIRED


async def test_only_a_valid_token_is_reported_as_expired() -> None:
    assert await refusal(hs256("another secret", exp=NOW - 3600)) == INVALID


@pytest.mark.parametrize("aud", [..., None, "", "other", ["other"], [], ["chat", 5], {"chat": 1}, "chatter"])
async def test_a_token_for_others_is_refused(aud: object) -> None:
    assert await refusal(hs256(SECRET, aud=aud), tokens(audience="chat")) == INVALID


@pytest.mark.parametrize("iss", [..., None, "", "https://j", "https://i/", ["https://i"], 5])
async def test_a_token_of_others_is_refused(iss: object) -> None:
    assert await refusal(hs256(SECRET, iss=iss), tokens(issuer="https://i")) == INVALID


@pytest.mark.parametrize("content", [b"[]", b'"ann"', b"{", b"\xff", b"[" * 5000, b'{"sub":"ann"}'])
async def test_contents_other_than_claims_are_refused(content: bytes) -> None:
    key = jwt.PyJWS()
    assert await refusal(key.encode(content, SECRET, "HS256")) == INVALID


# Signatures


def with_signature(header: object, signature: str) -> str:
    return f"{part(header)}.{part(claims())}.{signature}"


@pytest.mark.parametrize(
    "algorithm", ["none", "None", "NONE", "", None, 5, ["HS256"], {"HS256": 1}, "hs256", "HS512"]
)
@pytest.mark.parametrize("signature", ["", "AAAA"])
async def test_a_token_that_is_not_signed_is_refused(algorithm: object, signature: str) -> None:
    assert await refusal(with_signature({"alg": algorithm}, signature)) == INVALID
    assert await unpublished(with_signature({"alg": algorithm}, signature)) == INVALID


async def test_the_header_must_say_how_it_is_signed() -> None:
    assert await refusal(with_signature({"typ": "JWT"}, "AAAA")) == INVALID


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
async def test_other_hashes_of_a_secret_are_refused(algorithm: str) -> None:
    assert await refusal(jwt.encode(claims(), SECRET * 2, algorithm), tokens(secret=SECRET * 2)) == INVALID


@pytest.mark.parametrize("algorithm", ["RS384", "RS512", "PS256"])
async def test_other_algorithms_of_a_published_key_are_refused(algorithm: str) -> None:
    assert await unpublished(signed("RSA", algorithm, "rsa")) == INVALID


async def test_each_of_several_secrets_is_accepted() -> None:
    checks = tokens(secrets=("the old one", "the new one"))
    for secret in ("the old one", "the new one"):
        assert await checks.subject_of(hs256(secret)) == Subject("", "ann")
        assert await refusal(hs256(secret, exp=1), checks) == EXPIRED
    assert await refusal(hs256("another one"), checks) == INVALID
    checks.replace_secrets(["the new one"])
    assert await refusal(hs256("the old one"), checks) == INVALID


# Limits


async def test_a_token_has_the_limits_of_its_claim() -> None:
    subject = await tokens().subject_of(hs256(SECRET, broker={"models": ["a/*"], "daily_cost": "0.50"}))
    assert subject.limits == ClientLimits(models=("a/*",), daily_cost=500_000_000)


@pytest.mark.parametrize(
    ("claim", "told"),
    [
        (None, "it must be an object"),
        ([], "it must be an object"),
        ("x", "it must be an object"),
        ({"model": ["a/*"]}, "model is not the name of a limit"),
        ({"system": "Be kind."}, "system is not the name of a limit"),
        ({"sha256": "0" * 64}, "sha256 is not the name of a limit"),
        ({"streams": "3"}, "streams must be a whole number, 1 or more"),
        ({"models": "a/*"}, "models must be a list of 1 to 200 models, in which * stands for anything"),
    ],
)
async def test_a_token_with_a_wrong_claim_says_what_is_wrong(claim: Any, told: str) -> None:
    told = f"The claim broker of this token is not valid: {told}."
    assert await refusal(hs256(SECRET, broker=claim)) == told


async def test_an_algorithm_is_refused_where_its_key_is_not_set_up() -> None:
    assert await refusal(signed("RSA", "RS256", "rsa")) == INVALID
    assert await unpublished(hs256(SECRET)) == INVALID


@pytest.mark.parametrize("secret", [None, SECRET])
async def test_a_public_key_is_not_used_as_a_secret(secret: str | None) -> None:
    public = private_key("RSA").public_key()
    for form in (PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1):
        for encoding in (Encoding.PEM, Encoding.DER):
            token = hs256(public.public_bytes(encoding, form))
            assert await unpublished(token, secret=secret) == INVALID
    assert await unpublished(hs256(json.dumps(RSA)), secret=secret) == INVALID


async def test_a_published_secret_is_not_used_as_a_key() -> None:
    shared = {"kty": "oct", "k": part(SECRET.encode()), "kid": "rsa", "alg": "HS256"}
    assert await unpublished(hs256(SECRET), shared, RSA) == INVALID


async def test_a_key_is_used_only_for_its_own_algorithm() -> None:
    assert await unpublished(signed("RSA", "RS256", "ec")) == INVALID
    assert await unpublished(signed("P-256", "ES256", "rsa")) == INVALID
    assert await unpublished(signed("P-256", "ES256", "one"), member("RSA", kid="one")) == INVALID


async def test_the_key_of_another_issuer_is_refused() -> None:
    assert await refusal(hs256("another secret")) == INVALID
    assert await refusal(hs256("")) == INVALID
    assert await unpublished(signed("RSA other", "RS256", "rsa")) == INVALID
    assert await unpublished(signed("P-256 other", "ES256", "ec")) == INVALID
    assert await unpublished(signed("Ed25519 other", "EdDSA", "ed")) == INVALID


async def test_an_unknown_key_is_refused() -> None:
    assert await unpublished(signed("RSA", "RS256", "new")) == INVALID


async def test_a_token_that_no_key_could_sign_causes_no_fetch(clock: Clock) -> None:
    async with key_server(RSA) as server, PublishedKeys(server.url, clock=clock) as keys:
        checks = tokens(secret=None, published=keys)
        await checks.subject_of(signed("RSA", "RS256", "rsa"))
        clock.now += PAUSE
        for algorithm in ("none", "HS256", "RS512", "x", ["RS256"], None):
            assert await refusal(with_signature({"alg": algorithm, "kid": "new"}, "AAAA"), checks) == INVALID
        assert await refusal("e30.e30.e30", checks) == INVALID
        assert server.fetches == 1


async def test_without_a_key_id_there_must_be_no_choice() -> None:
    assert await unpublished(signed("RSA", "RS256"), RSA, member("RSA other", kid="other")) == INVALID


@pytest.mark.parametrize("kid", [5, None, ["rsa"], {}])
async def test_a_key_id_that_is_not_a_text_is_refused(kid: object) -> None:
    assert await unpublished(with_signature({"alg": "RS256", "kid": kid}, "AAAA")) == INVALID


@pytest.mark.parametrize(
    "more", [{"crit": ["exp"]}, {"crit": []}, {"b64": False}, {"b64": False, "crit": ["b64"]}]
)
async def test_an_unsupported_header_is_refused(more: dict[str, Any]) -> None:
    signed_part = f"{part({'alg': 'HS256', **more})}.{part(claims())}"
    signature = hs256(SECRET).rpartition(".")[2]
    assert await refusal(f"{signed_part}.{signature}") == INVALID


async def test_a_key_within_the_token_is_not_used() -> None:
    mine = member("RSA other", kid="rsa")
    header = {"kid": "rsa", "jwk": mine, "jku": "http://127.0.0.1:9/keys", "x5u": "http://127.0.0.1:9/x"}
    assert await unpublished(jwt.encode(claims(), private_key("RSA other"), "RS256", header)) == INVALID


# Its form


@pytest.mark.parametrize(
    "kind", [("RSA", "RS256", "rsa"), ("P-256", "ES256", "ec"), ("Ed25519", "EdDSA", "ed")]
)
async def test_no_part_of_a_token_can_be_changed_or_cut(kind: tuple[str, str, str]) -> None:
    token = signed(*kind)
    head, body, signature = token.split(".")
    for changed in (
        token[:-3],
        token[:-30],
        f"{head}.{part(claims(sub='eve'))}.{signature}",
        f"{head}.{body}.{'A' * len(signature)}",
        f"{head}.{body}.{signature[4:]}",
        f"{head}.{body}.",
        f"{head}.{body}",
    ):
        assert await unpublished(changed) == INVALID


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a",
        "a.b",
        "a.b.c",
        "a.b.c.d",
        "é.é.é",
        "\udcff.a.b",
        "a b.c.d",
        "a.b.c\n",
        "=.=.=",
        "e30.e30.e30",
    ],
)
async def test_texts_that_are_not_tokens_are_refused(token: str) -> None:
    assert await refusal(token) == INVALID


HALF_PAIR = st.tuples(st.text(max_size=5), st.sampled_from("\ud800\udfff"), st.text(max_size=5)).map("".join)
TEXTS = HALF_PAIR | st.lists(HALF_PAIR, min_size=1, max_size=3)
REGISTERED = ("sub", "iss", "aud", "jti", "exp", "nbf", "iat", "broker")
LIMITS = ("models", "rate", "origins", "daily_cost", "expires", "\ud800")


@given(st.sampled_from(REGISTERED), st.sampled_from(LIMITS), TEXTS)
def test_half_a_surrogate_pair_is_refused_or_can_be_stored(claim: str, limit: str, value: object) -> None:
    for changes in ({claim: value}, {"broker": {limit: value}}):
        with suppress(Unauthorized):
            subject = asyncio.run(tokens().subject_of(hs256(SECRET, **changes)))
            TypeAdapter(ClientLimits | None).dump_json(subject.limits)
            assert ClientNamer("secret").of_subject(subject.issuer, subject.subject).name.isprintable()


async def test_a_huge_token_is_refused() -> None:
    assert await refusal(hs256(SECRET, more="x" * MAX_TOKEN)) == INVALID
    assert await tokens().subject_of(hs256(SECRET, more="x" * (MAX_TOKEN // 2))) == Subject("", "ann")


async def test_tokens_are_never_logged(log: io.StringIO) -> None:
    for token in (hs256("another secret"), hs256(SECRET, exp=1, sub="Quetzalcoatl"), "e30.e30.e30"):
        await refusal(token)
    told = log.getvalue()
    assert told.count("token refused") == 3
    assert "ExpiredSignatureError" in told
    for token in (hs256("another secret"), "e30.e30.e30"):
        assert token not in told
    assert "Quetzalcoatl" not in told
    assert "eyJ" not in told
