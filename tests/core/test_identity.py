from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.identity import MAX_HOPS, ClientNamer, Proxies, bearer, parse_hop

PRIVATE = Proxies(["private"])
TRUSTED = ["10.0.0.1", "192.168.7.8", "127.0.0.1", "::1", "fd00::5", "::ffff:10.9.8.7", "172.31.255.255:4711"]
STRANGERS = [
    "203.0.113.9",
    "8.8.8.8:53",
    "2001:db8::1",
    "[2001:db8::2]:443",
    "172.32.0.1",
    "::ffff:192.0.2.1",
]
GARBAGE = [
    "",
    "unknown",
    "_hidden",
    "for=1.2.3.4",
    "1.2.3",
    "1.2.3.4:",
    "[::1",
    "::1]",
    "%",
    "1.2.3.4%eth0",
    "é",
]


def caller(peer: str, *forwarded: str, proxies: Proxies = PRIVATE) -> str | None:
    found = proxies.caller(peer, forwarded)
    return None if found is None else str(found)


# Addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("1.2.3.4:567", "1.2.3.4"),
        ("[1.2.3.4]:567", "1.2.3.4"),
        (" \t1.2.3.4\t ", "1.2.3.4"),
        ("2001:DB8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:567", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%eth0]:567", "fe80::1"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("[::ffff:102:304]:80", "1.2.3.4"),
        ("::ffff:0.0.0.0", "0.0.0.0"),
    ],
)
def test_an_address_is_read_in_every_form_that_proxies_write(text: str, address: str) -> None:
    assert str(parse_hop(text)) == address


@pytest.mark.parametrize(
    "text",
    [
        *GARBAGE,
        "1.2.3.4:567890",
        "1.2.3.4:٣",
        "01.2.3.4",
        "1.2.3.4/32",
        "[1.2.3.4]567",
        "2001:db8::1:",
        '"[::1]:567"',
        "1.2.3.4 5.6.7.8",
        "1.2.3.4\n",
        "localhost",
        "16909060",
    ],
)
def test_other_texts_are_not_addresses(text: str) -> None:
    assert parse_hop(text) is None


# Behind proxies


def test_without_proxies_only_the_peer_counts() -> None:
    assert caller("10.0.0.1", "8.8.8.8", proxies=Proxies([])) == "10.0.0.1"


def test_a_stranger_is_not_believed() -> None:
    assert caller("203.0.113.9", "8.8.8.8, 10.0.0.2") == "203.0.113.9"


def test_behind_a_proxy_the_last_entry_counts() -> None:
    assert caller("10.0.0.1", "1.1.1.1, 8.8.8.8") == "8.8.8.8"


def test_the_right_most_untrusted_hop_is_the_caller() -> None:
    assert caller("10.0.0.1", "1.1.1.1, 8.8.8.8:4711, 192.168.0.1, 10.0.0.2") == "8.8.8.8"


def test_several_header_lines_are_one_list() -> None:
    assert caller("10.0.0.1", "1.1.1.1", "8.8.8.8, 10.0.0.3", "10.0.0.2") == "8.8.8.8"


def test_where_all_are_trusted_the_first_counts() -> None:
    assert caller("10.0.0.1", "10.0.0.3, 10.0.0.2") == "10.0.0.3"
    assert caller("10.0.0.1") == "10.0.0.1"


@pytest.mark.parametrize("garbage", [*GARBAGE, "x" * 5000, f"2001:db8::1%{'x' * 5000}"])
def test_garbage_ends_the_list_at_the_hop_that_wrote_it(garbage: str) -> None:
    assert caller("10.0.0.1", f"8.8.8.8,{garbage},10.0.0.2") == "10.0.0.2"
    assert caller("10.0.0.1", f"8.8.8.8,{garbage}") == "10.0.0.1"


def test_a_very_long_chain_of_proxies_is_cut() -> None:
    hops = [f"10.1.0.{number}" for number in range(MAX_HOPS + 30)]
    assert caller("10.0.0.1", ",".join(hops)) == hops[-MAX_HOPS]
    assert caller("10.0.0.1", *hops) == hops[-MAX_HOPS]


@pytest.mark.parametrize("address", ["127.8.9.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "::1", "fdab::1"])
def test_private_means_the_loopback_and_private_networks(address: str) -> None:
    assert caller(address, "8.8.8.8") == "8.8.8.8"


@pytest.mark.parametrize("address", ["172.32.0.1", "169.254.169.254", "100.64.0.1", "fe80::1", "192.0.2.1"])
def test_private_means_no_public_address(address: str) -> None:
    assert caller(address, "8.8.8.8") == address


def test_proxies_can_be_addresses_and_networks_beside_private() -> None:
    proxies = Proxies(["203.0.113.9/32", "2001:db8::/32", "private"])
    assert caller("203.0.113.9", "8.8.8.8, 10.0.0.1, 2001:db8::7", proxies=proxies) == "8.8.8.8"
    assert caller("203.0.113.10", "8.8.8.8", proxies=proxies) == "203.0.113.10"


def test_a_proxy_is_known_when_its_ipv4_address_comes_as_ipv6() -> None:
    assert caller("::ffff:10.0.0.1", "8.8.8.8") == "8.8.8.8"


@pytest.mark.parametrize("peer", ["", "/run/broker.sock", "?"])
def test_a_peer_without_an_address_is_unknown_and_not_believed(peer: str) -> None:
    assert caller(peer, "8.8.8.8") is None


HOPS = st.sampled_from([*TRUSTED, *STRANGERS, *GARBAGE])
LINES = st.lists(st.lists(HOPS, min_size=1).map(",".join) | st.text(max_size=40), max_size=6)


@given(peer=HOPS | st.text(max_size=60), lines=LINES)
def test_a_known_peer_always_gives_a_caller(peer: str, lines: list[str]) -> None:
    assert (caller(peer, *lines) is None) == (parse_hop(peer) is None)


@given(
    left=LINES,
    stranger=st.sampled_from(STRANGERS),
    right=st.lists(st.sampled_from(TRUSTED), max_size=MAX_HOPS - 1),
    peer=st.sampled_from(TRUSTED),
    in_one_line=st.booleans(),
)
def test_entries_left_of_a_stranger_change_nothing(
    left: list[str], stranger: str, right: list[str], peer: str, *, in_one_line: bool
) -> None:
    lines = [",".join([*left, stranger, *right])] if in_one_line else [*left, stranger, *right]
    assert caller(peer, *lines) == str(parse_hop(stranger))


@given(peer=st.sampled_from(TRUSTED), entries=st.lists(HOPS, max_size=MAX_HOPS))
def test_a_proxy_is_the_caller_only_without_a_stranger(peer: str, entries: list[str]) -> None:
    hops = itertools.takewhile(lambda hop: hop is not None, map(parse_hop, reversed(entries)))
    strangers = [hop for hop in hops if hop in {parse_hop(text) for text in STRANGERS}]
    found = PRIVATE.caller(peer, [",".join(entries)])
    assert found == strangers[0] if strangers else found in {parse_hop(text) for text in TRUSTED}


# Authorization


@pytest.mark.parametrize("line", ["Bearer a.b-c_~+/=", "bearer a.b-c_~+/=", "BEARER   a.b-c_~+/= "])
def test_a_bearer_token_is_found(line: str) -> None:
    assert bearer([line]) == "a.b-c_~+/="


@pytest.mark.parametrize(
    "lines", [[], [""], ["Bearer"], ["Bearer "], ["Basic YTpi"], ["token"], ["Bearer a"] * 2]
)
def test_anything_else_shows_nothing(lines: list[str]) -> None:
    assert bearer(lines) is None


# Names


def named(address: str, secret: str = "secret") -> str:
    return ClientNamer(secret).of_address(parse_hop(address)).name


def test_names_have_a_kind_and_know_credentials() -> None:
    names = ClientNamer("secret")
    key, subject, address = (
        names.of_key("ann"),
        names.of_subject("", "ann"),
        names.of_address(parse_hop("8.8.8.8")),
    )
    assert key.name == "key:ann"
    assert re.fullmatch("sub:[0-9a-f]{16}", subject.name)
    assert re.fullmatch("addr:[0-9a-f]{16}", address.name)
    assert [key.authenticated, subject.authenticated, address.authenticated] == [True, True, False]
    assert all(re.fullmatch("u_[0-9a-f]{16}", client.user) for client in (key, subject, address))
    assert len({client.user for client in (key, subject, address)}) == 3


def test_all_workers_give_the_same_names_and_nobody_else_does() -> None:
    assert ClientNamer("one").of_key("ann") == ClientNamer("one").of_key("ann")
    assert ClientNamer("one").of_subject("i", "ann") == ClientNamer("one").of_subject("i", "ann")
    assert named("8.8.8.8", "one") == named("8.8.8.8", "one")
    assert named("8.8.8.8", "one") != named("8.8.8.8", "two")
    assert ClientNamer("one").of_key("ann").user != ClientNamer("two").of_key("ann").user
    assert ClientNamer("one").of_subject("i", "ann").name != ClientNamer("two").of_subject("i", "ann").name


def test_the_user_for_the_upstream_is_not_in_the_name() -> None:
    client = ClientNamer("secret").of_address(parse_hop("8.8.8.8"))
    assert client.user.removeprefix("u_") != client.name.removeprefix("addr:")


def test_a_household_is_one_client_and_its_neighbour_another() -> None:
    assert named("2001:db8:0:1::1") == named("2001:db8:0:1:ffff:ffff:ffff:ffff")
    assert named("2001:db8:0:1::1") != named("2001:db8:0:2::1")
    assert named("8.8.8.8") != named("8.8.8.9")


def test_an_ipv4_address_has_one_name_however_it_comes() -> None:
    assert named("8.8.8.8") == named("::ffff:8.8.8.8") == named("8.8.8.8:53")


def test_a_subject_belongs_to_its_issuer() -> None:
    names = ClientNamer("secret")
    assert names.of_subject("https://a", "ann").name != names.of_subject("https://b", "ann").name


@pytest.mark.parametrize("subject", ["ann", "\0", "é", "\ud800", "x" * 255])
def test_any_subject_can_be_named(subject: str) -> None:
    assert ClientNamer("secret").of_subject(subject, subject).authenticated
