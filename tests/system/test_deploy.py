"""The image and the composed service: what they name exists, and fits what the broker is."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker.settings import Settings, setting_name
from tests.system.harness import running_broker
from tests.system.proxy import SHIPPED, program

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
COMPOSE = ROOT / "deploy" / "compose.yaml"
SETTINGS = {setting_name(field) for field in Settings.model_fields}
AFTER_DRAIN = 5.0  # seconds that a broker may take to stop when its drain is over


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile as pairs of a keyword and the rest, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(keyword, " ".join(rest.split())) for keyword, _, rest in (line.partition(" ") for line in lines)]


def rests_of(keyword: str) -> list[str]:
    return [rest for name, rest in instructions() if name == keyword]


def only(keyword: str) -> str:
    """Return the rest of an instruction that may be in the final image once."""
    (rest,) = rests_of(keyword)
    return rest


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load(COMPOSE.read_text())


def brokers(compose: Any) -> dict[str, Any]:
    return {name: service for name, service in compose["services"].items() if name.startswith("broker-")}


def seconds(duration: str) -> float:
    found = re.fullmatch(r"(\d+)s", duration)
    assert found is not None, duration
    return float(found[1])


# The image


def test_the_image_copies_the_sources_of_the_package() -> None:
    copied = [source for rest in rests_of("COPY") if "--from" not in rest for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied), copied
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, wheel = package["project"], package["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"], *wheel["packages"]}
    assert needed == set(copied)


def test_the_image_sets_nothing_but_settings() -> None:
    named = dict(pair.partition("=")[::2] for pair in shlex.split(only("ENV")))
    ours = {name: value for name, value in named.items() if name in SETTINGS}
    assert set(named) - set(ours) == {"PATH", "PYTHONUNBUFFERED"}
    given = Settings(host=ours["BROKER_HOST"], port=ours["PORT"])
    assert not given.listens_on_loopback
    assert only("EXPOSE") == str(given.port)


def test_the_image_has_a_numbered_user_and_a_drain_signal() -> None:
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", only("USER"))
    assert only("STOPSIGNAL") == "SIGTERM"


def test_both_stages_use_one_supported_python() -> None:
    bases = {rest.split()[0] for rest in rests_of("FROM")}
    assert len(bases) == 1
    found = re.fullmatch(r"python:3\.(\d+)-slim", bases.pop())
    assert found is not None
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert f"Programming Language :: Python :: 3.{found[1]}" in package["project"]["classifiers"]


def test_the_image_runs_a_command_of_the_broker() -> None:
    entry, arguments = yaml.safe_load(only("ENTRYPOINT")), yaml.safe_load(only("CMD"))
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert entry == list(package["project"]["scripts"])
    asked = [sys.executable, "-m", "broker", *arguments, "--help"]
    subprocess.run(asked, cwd=ROOT, check=True, capture_output=True)


async def test_the_health_check_recognises_a_broker() -> None:
    found = re.fullmatch(r".* CMD (\[.*\])", only("HEALTHCHECK"))
    assert found is not None
    (python, *arguments) = yaml.safe_load(found[1])
    assert python == "python"

    def check(port: int) -> int:
        asked = [sys.executable, *arguments]
        return subprocess.run(asked, env={"PORT": str(port)}, capture_output=True, check=False).returncode

    async with running_broker() as broker:
        assert check(broker.port) == 0
    assert check(broker.port) == 1


# The composed service


def test_the_brokers_get_valid_settings_only(compose: Any) -> None:
    fields = {setting_name(field): field for field in Settings.model_fields}
    assert len(brokers(compose)) == 2
    for service in brokers(compose).values():
        environment = dict(service["environment"])
        assert environment.pop("OPENROUTER_API_KEY").startswith("${OPENROUTER_API_KEY:?")
        given = Settings(**{fields[name]: value for name, value in environment.items()})
        assert not given.listens_on_loopback
        assert given.trusted_proxies


def test_a_broker_has_the_time_to_drain(compose: Any) -> None:
    for service in brokers(compose).values():
        assert seconds(service["stop_grace_period"]) > Settings().drain_timeout + AFTER_DRAIN


def test_only_the_proxy_can_be_reached(compose: Any) -> None:
    services = compose["services"]
    assert [name for name, service in services.items() if "ports" in service] == ["proxy"]
    assert [
        service["networks"] for service in services.values() if "valkey" in str(service.get("image"))
    ] == [["store"]]
    assert compose["networks"]["store"]["internal"] is True
    assert "store" not in services["proxy"]["networks"]


def test_the_proxy_has_the_addresses_of_the_brokers(compose: Any) -> None:
    conf = (SHIPPED / "nginx.conf").read_text()
    places = {f"{name}:{service['environment']['PORT']}" for name, service in brokers(compose).items()}
    assert set(re.findall(r"^ *server (\S+) resolve", conf, re.MULTILINE)) == places
    found = re.search(r"listen (\d+) ssl", conf)
    assert found is not None
    assert [port.rpartition(":")[2] for port in compose["services"]["proxy"]["ports"]] == [found[1]]


def test_the_proxy_finds_its_files_and_may_write_where_it_does(compose: Any) -> None:
    proxy = compose["services"]["proxy"]
    mounts = {target: source for source, target, *_ in (volume.split(":") for volume in proxy["volumes"])}
    entry = proxy["entrypoint"]
    configured = Path(entry[entry.index("-c") + 1])
    assert (COMPOSE.parent / mounts[str(configured.parent)] / configured.name).is_file()
    assert entry[entry.index("-p") + 1].rstrip("/") in proxy["tmpfs"]
    conf = (SHIPPED / "nginx.conf").read_text()
    certificates = re.findall(r"^ *ssl_certificate\S* (/\S+);$", conf, re.MULTILINE)
    assert len(certificates) == 2
    assert {str(Path(path).parent) for path in certificates} <= set(mounts)
    found = re.search(r"^worker_shutdown_timeout (\w+);", conf, re.MULTILINE)
    assert found is not None
    assert seconds(proxy["stop_grace_period"]) > seconds(found[1])


def test_everything_that_is_named_is_there(compose: Any) -> None:
    services = compose["services"]
    build = services["broker-1"]["build"]
    context = COMPOSE.parent / build["context"]
    assert (context / build["dockerfile"]).resolve() == DOCKERFILE.resolve()
    assert [name for name, service in services.items() if "build" in service] == ["broker-1"]
    for service in services.values():
        assert set(service.get("networks", [])) <= set(compose["networks"])
        assert set(service.get("depends_on", {})) <= set(services)
        named = {volume.split(":")[0] for volume in service.get("volumes", [])}
        assert {name for name in named if not name.startswith(".")} <= set(compose["volumes"])
    for service in brokers(compose).values():
        assert service["depends_on"]["valkey"]["condition"] == "service_healthy"
    assert services["valkey"]["healthcheck"]["test"] == ["CMD", "valkey-cli", "ping"]


def test_valkey_refuses_when_full_and_writes_no_files(compose: Any) -> None:
    name, *options = compose["services"]["valkey"]["command"]
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert name == "valkey-server"
    assert given.pop("--maxmemory").endswith("mb")
    assert given == {"--maxmemory-policy": "noeviction", "--save": "", "--appendonly": "no"}


def test_a_certificate_is_made_once(compose: Any, tmp_path: Path) -> None:
    service = compose["services"]["certificate"]
    (script,) = service["command"]
    program("openssl")
    # The shell command as it is, but for the place and for the owner, whom only root can name.
    script = script.replace("cd /tls", f"cd {shlex.quote(str(tmp_path))}").replace("chown 101:101", "test -s")
    made = []
    for _ in range(2):
        subprocess.run([*service["entrypoint"], script], check=True, capture_output=True)
        made.append([(tmp_path / name).read_bytes() for name in ("tls.crt", "tls.key")])
    assert made[0] == made[1]
    assert (tmp_path / "tls.key").stat().st_mode & 0o077 == 0
