"""What the URL of several Redis servers says."""

from __future__ import annotations

import pytest

from broker.core.redis_url import Kind, servers_in


@pytest.mark.parametrize("url", ["redis://a:1/0", "rediss://u:p@a", "unix:///run/valkey.sock?db=1"])
def test_the_url_of_one_server_is_left_alone(url: str) -> None:
    assert servers_in(url) is None


def test_the_url_of_sentinels_is_read() -> None:
    url = (
        "rediss+sentinel://ann:p%40ss@one:1,[::1]:2,three/main/4"
        "?sentinel_username=eve&sentinel_password=a%2Fb%20c&ssl_ca_certs=%2Fca.pem"
    )
    found = servers_in(url)
    assert found is not None
    assert found.kind is Kind.SENTINEL
    assert found.hosts == (("one", 1), ("::1", 2), ("three", 26379))
    assert (found.service, found.sentinel_username, found.sentinel_password) == ("main", "eve", "a/b c")
    assert found.of_one == "rediss://ann:p%40ss@one:1/4?ssl_ca_certs=%2Fca.pem"


@pytest.mark.parametrize("path", ["", "/", "/0"])
def test_the_url_of_a_cluster_is_read(path: str) -> None:
    found = servers_in(f"redis+cluster://:secret@[::1]:7000,two{path}")
    assert found is not None
    assert found == (Kind.CLUSTER, (("::1", 7000), ("two", 6379)), "redis://:secret@[::1]:7000/0", "", "", "")


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://one:1",
        "redis+sentinel://one:1/",
        "redis+sentinel://one:1/main/x",
        "redis+sentinel://one:1/main/0/more",
        "redis+sentinel:///main",
        "redis+sentinel://one:1,,two/main",
        "redis+sentinel://one:0/main",
        "redis+sentinel://one:70000/main",
        "redis+sentinel://one:port/main",
        "redis+sentinel://one/main#x",
        "redis+cluster://one/1",
        "redis+cluster://one/main",
        "redis+cluster://one?sentinel_password=x",
        "redis+ring://one",
        "unix+cluster:///run",
        "http+cluster://one",
    ],
)
def test_a_url_that_cannot_be_served_is_refused(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - that of what has failed is raised
        servers_in(url)
