"""Which servers a URL means, and that its secrets can be replaced while a worker runs."""

from __future__ import annotations

import pytest

from broker.settings import Settings
from broker.store.servers import Address, Credentials

SENTINELS = "redis+sentinel://ann:one@a:1,b:2/main/3?sentinel_username=eve&sentinel_password=two"
CLUSTER = "redis+cluster://ann:one@a:1,b:2"


def shown(credentials: Credentials) -> tuple[str, str]:
    return credentials.username, credentials.password


@pytest.mark.parametrize("url", ["redis://ann:one@a:1/3", SENTINELS, CLUSTER])
def test_new_passwords_are_taken(url: str) -> None:
    address = Address.parse(url)
    assert address.take_credentials(Address.parse(url.replace("one", "new").replace("two", "newer")))
    assert shown(address.credentials) == ("ann", "new")
    if url is SENTINELS:
        assert shown(address.of_sentinels) == ("eve", "newer")


@pytest.mark.parametrize(
    ("url", "old", "new"),
    [
        (SENTINELS, "b:2", "c:2"),
        (SENTINELS, "/main", "/other"),
        (SENTINELS, "/3", "/4"),
        (SENTINELS, "sentinel_username=eve&sentinel_password=two", ""),
        (SENTINELS, "ann:one@", ""),
        (SENTINELS, "redis+", "rediss+"),
        (CLUSTER, "b:2", "c:2"),
        (CLUSTER, "ann:one@", ""),
        (CLUSTER, "redis+cluster://ann:one@a:1,b:2", "redis://ann:one@a:1"),
    ],
)
def test_whatever_else_has_changed_needs_a_restart(url: str, old: str, new: str) -> None:
    address = Address.parse(url)
    assert not address.take_credentials(Address.parse(url.replace(old, new)))
    assert shown(address.credentials) == ("ann", "one")


def test_the_password_of_the_sentinels_is_a_secret() -> None:
    url = SENTINELS.replace("two", "a%2Fb%20c+d")
    secrets = Settings(redis_url=url).secrets
    assert {"one", "a/b c d", "a%2Fb%20c+d"} <= set(secrets)
