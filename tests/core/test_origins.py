from __future__ import annotations

import pytest

from broker.core.origins import Origins, Verdict

HOST = "127.0.0.1:3000"


def judge(origin: str, *listed: str, host: str | None = HOST) -> Verdict:
    return Origins(frozenset(listed), loopback_only=True).judge(origin, host)


def answers_to(host: str | None, *listed: str, loopback_only: bool = True) -> bool:
    return Origins(frozenset(listed), loopback_only=loopback_only).answers_to(host)


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "http://localhost:5173",
        "https://127.0.0.1:8080",
        "http://[::1]:3000",
        "http://LocalHost",
    ],
)
def test_pages_of_this_machine_are_allowed_by_default(origin: str) -> None:
    assert judge(origin) is Verdict.ALLOWED


def test_a_list_excludes_other_pages_of_this_machine() -> None:
    assert judge("http://localhost:5173", "https://a.example") is Verdict.REFUSED


@pytest.mark.parametrize(
    "origin",
    [
        *(
            "https://evil.example",
            "http://localhost.evil.example",
            "http://127.0.0.1.evil.example",
            "http://127.0.0.2",
        ),
        *(
            "null",
            "",
            "file://",
            "about:blank",
            "http://",
            "localhost",
            "http://[::1",
            "http://a:b:c",
            "http://x:99999",
        ),
    ],
)
def test_other_pages_may_not(origin: str) -> None:
    assert judge(origin) is Verdict.REFUSED


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://chat.example", "chat.example"),
        ("http://chat.example", "chat.example"),
        ("https://chat.example", "chat.example:443"),
        ("http://chat.example:8080", "chat.example:8080"),
        ("https://chat.example:8080", "chat.example:8080"),
        ("https://chat.example", "CHAT.example"),
        ("http://[2001:db8::1]:3000", "[2001:db8::1]:3000"),
    ],
)
def test_the_own_origin_is_allowed_with_any_scheme(origin: str, host: str) -> None:
    assert judge(origin, "https://other.example", host=host) is Verdict.ALLOWED


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://chat.example:8443", "chat.example"),
        ("https://chat.example", "chat.example:8443"),
        ("https://chat.example", "sub.chat.example"),
        ("https://chat.example", None),
        ("null", ""),
        ("null", "["),
    ],
)
def test_another_port_or_host_is_another_origin(origin: str, host: str | None) -> None:
    assert judge(origin, "https://other.example", host=host) is Verdict.REFUSED


def test_a_listed_origin_may_with_credentials() -> None:
    assert judge("https://a.example", "https://a.example", "https://b.example") is Verdict.CREDENTIALS
    assert judge("https://A.example", "https://a.example") is Verdict.CREDENTIALS


@pytest.mark.parametrize(
    "origin", ["https://a.example:8443", "http://a.example", "https://a.example.evil.example"]
)
def test_a_listed_origin_is_one_scheme_host_and_port(origin: str) -> None:
    assert judge(origin, "https://a.example") is Verdict.REFUSED


@pytest.mark.parametrize("origin", ["https://a.example", "null", "chrome-extension://abc"])
def test_a_star_allows_all_pages_without_credentials(origin: str) -> None:
    assert judge(origin, "*") is Verdict.ALLOWED


def test_a_star_leaves_the_listed_ones_their_credentials() -> None:
    assert judge("https://a.example", "*", "https://a.example") is Verdict.CREDENTIALS


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:3000", "127.0.0.1", "127.0.0.1:3000", "[::1]:3000", "LOCALHOST"]
)
def test_a_loopback_service_answers_to_loopback_names(host: str) -> None:
    assert answers_to(host)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:3000", "localhost.evil.example", "10.0.0.1", "", "[::1", "a:b:c"]
)
@pytest.mark.parametrize("listed", [(), ("*",), ("https://a.example",)])
def test_on_the_loopback_no_other_name_is(host: str, listed: tuple[str, ...]) -> None:
    assert not answers_to(host, *listed)


def test_the_host_of_a_listed_origin_is_accepted() -> None:
    assert answers_to("a.example:8443", "https://a.example")


def test_a_service_that_all_can_reach_answers_to_any_name() -> None:
    assert answers_to("evil.example", loopback_only=False)
