"""The image and the composed service: what they name exists, and fits what the broker is."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from dotenv import dotenv_values
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from broker.process import _limits_in_force
from broker.settings import Settings, open_door, setting_name
from tests.system.harness import running_broker
from tests.system.image import DOCKERFILE, instructions, sent_to_the_builder
from tests.system.proxy import SHIPPED, program, tool

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose.yaml"
SETTINGS = {setting_name(field) for field in Settings.model_fields}
WORDS_OF_A_SERVICE = {
    *("build", "cap_drop", "command", "depends_on", "entrypoint", "env_file", "environment", "healthcheck"),
    *(
        "image",
        "network_mode",
        "networks",
        "ports",
        "read_only",
        "restart",
        "security_opt",
        "stop_grace_period",
    ),
    *("tmpfs", "ulimits", "user", "volumes"),
}
AFTER_DRAIN = 5.0  # seconds that a broker may take to stop when its drain is over


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
    assert all(sent_to_the_builder(source) for source in copied), copied
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, wheel = package["project"], package["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"], *wheel["packages"]}
    assert needed == {source for source in copied if not source.startswith("deploy/")}


@pytest.mark.parametrize(
    "path",
    [".env", ".git/config", ".venv/bin/python", "tests/broker.py", "deploy/compose.yaml", "broker/__pycache__/app.pyc"],
)  # fmt: skip
def test_secrets_and_leftovers_never_reach_the_builder(path: str) -> None:
    assert not sent_to_the_builder(path)


def test_every_package_is_installed_by_its_hash() -> None:
    installs = [part for rest in rests_of("RUN") for part in rest.split("&&") if "install" in part.split()]
    installs = [part for part in installs if "apt-get" not in part]
    assert len(installs) == 3
    for part in installs:
        assert "--no-deps" in part
        assert ("--require-hashes" in part) != ("--no-index" in part)


@pytest.mark.parametrize("name", ["requirements.lock", "build.lock"])
def test_a_lock_names_hashes_and_no_index(name: str) -> None:
    text = (ROOT / "deploy" / name).read_text()
    for requirement in re.split(r"\n(?=\w)", text.strip()):
        assert re.match(r"[\w.-]+==[\w.]+( ;.*)? \\\n", requirement), requirement[:80]
        assert "--hash=sha256:" in requirement
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text


def test_the_lock_fits_what_the_package_needs() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = re.findall(r"^(\w\S*==\S*)", (ROOT / "deploy" / "requirements.lock").read_text(), re.MULTILINE)
    locked = {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in map(Requirement, lines)
    }
    for needed in map(Requirement, package["project"]["dependencies"]):
        assert needed.specifier.contains(locked[canonicalize_name(needed.name)]), needed


def test_the_dependencies_are_those_that_are_imported() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [canonicalize_name(Requirement(each).name) for each in package["dependencies"]]
    assert needed == sorted(needed)
    optional = {
        canonicalize_name(Requirement(each).name) for each in package["optional-dependencies"]["otel"]
    }
    imported = set()
    for path in (ROOT / "broker").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    known = packages_distributions()
    for module in (
        imported - set(sys.stdlib_module_names) - {"broker", "pydantic_core"}
    ):  # pydantic pins its core
        owners = {canonicalize_name(name) for name in known[module]}
        assert owners & ({*needed} | optional), f"{module} is imported and not declared"


def test_the_image_sets_nothing_but_settings() -> None:
    named = dict(pair.partition("=")[::2] for pair in shlex.split(only("ENV")))
    ours = {name: value for name, value in named.items() if name in SETTINGS}
    assert set(named) - set(ours) == {"PATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}
    given = Settings(host=ours["BROKER_HOST"], port=ours["PORT"])
    assert not given.listens_on_loopback
    assert only("EXPOSE") == str(given.port)


def test_the_image_has_a_numbered_user_and_a_drain_signal() -> None:
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", only("USER"))
    assert only("STOPSIGNAL") == "SIGTERM"


def test_both_stages_use_one_pinned_and_supported_python() -> None:
    bases = {rest.split()[0] for rest in rests_of("FROM")}
    assert len(bases) == 1
    found = re.fullmatch(r"python:3\.(\d+)\.\d+-slim-\w+@sha256:[0-9a-f]{64}", bases.pop())
    assert found is not None
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert f"Programming Language :: Python :: 3.{found[1]}" in package["project"]["classifiers"]


def test_a_linter_has_nothing_against_the_dockerfile() -> None:
    found = subprocess.run([tool("hadolint"), DOCKERFILE], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


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


def substituted(value: str, environment: dict[str, str]) -> str:
    """Replace the variables of a value by the rules of Compose, for the forms that the file uses.

    Raises:
        ValueError: `${NAME:?message}` without that variable.
    """

    def replaced(found: re.Match[str]) -> str:
        name, form, text = found.groups()
        if environment.get(name):
            return environment[name]
        if form == ":?":
            raise ValueError(f"{name} {text}")
        return text

    assert not re.search(r"\$(?!\{\w+:[?-])", value), value
    return re.sub(r"\$\{(\w+)(:[?-])([^}]*)\}", replaced, value)


def environment_of(service: dict[str, Any], folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """Return what a service has by the rules of Compose: later files win, and `environment` over all of them."""
    found: dict[str, str] = {}
    for each in service["env_file"]:
        path = folder / "deploy" / each["path"]
        if each.get("required", True) or path.exists():
            found |= {name: value or "" for name, value in dotenv_values(path).items()}
    return found | {name: substituted(value, environment) for name, value in service["environment"].items()}


@pytest.mark.parametrize(("env", "budget"), [(None, 5), ("BROKER_TOTAL_DAILY_COST=7\n", 7)])
def test_it_starts_with_a_budget(compose: Any, tmp_path: Path, env: str | None, budget: int) -> None:
    fields = {setting_name(field): field for field in Settings.model_fields}
    shutil.copytree(COMPOSE.parent, tmp_path / "deploy")
    if env is not None:
        (tmp_path / ".env").write_text(env)
    for service in brokers(compose).values():
        environment = environment_of(service, tmp_path, {"OPENROUTER_API_KEY": "sk-test"})
        values: dict[str, Any] = {fields[name]: value for name, value in environment.items()}
        given = Settings(**values)
        assert values["openrouter_api_key"] == "sk-test"
        assert given.total_daily_cost == budget
        assert open_door(given) is None
        assert _limits_in_force(given)["total_daily_cost"] == str(budget)  # said at the start


def test_it_does_not_start_without_a_key(compose: Any) -> None:
    for service in brokers(compose).values():
        with pytest.raises(ValueError, match="OPENROUTER_API_KEY must be set"):
            environment_of(service, COMPOSE.parents[1], {})


def test_the_compose_file_uses_words_of_its_specification(compose: Any) -> None:
    assert {name for name in compose if not name.startswith("x-")} == {
        "name",
        "services",
        "networks",
        "volumes",
    }
    for service in compose["services"].values():
        assert set(service) <= WORDS_OF_A_SERVICE
        assert isinstance(service["image"], str)
        for listed in ("cap_drop", "security_opt", "tmpfs", "volumes", "ports", "networks", "entrypoint"):
            assert all(isinstance(each, str) for each in service.get(listed, []))
        for needed in service.get("depends_on", {}).values():
            assert set(needed) == {"condition"}
            assert needed["condition"] in {
                "service_healthy",
                "service_started",
                "service_completed_successfully",
            }
        environment = service.get("environment", {})
        assert all(isinstance(value, str) for value in environment.values()), "YAML reads 3000 as a number"


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


# The audit


@pytest.fixture(scope="module")
def audit() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci" / "audit.py"))


@pytest.mark.parametrize(
    ("vulns", "status", "said"),
    [
        (None, 0, "cannot be reached"),
        ([], 0, "1 packages were checked"),
        ([{"id": "PYSEC-1", "fix_versions": []}], 0, "PYSEC-1, fixed in no version"),
        ([{"id": "PYSEC-1", "fix_versions": ["1.1"]}], 1, "PYSEC-1, fixed in 1.1"),
    ],
)
def test_the_audit_fails_only_for_what_has_a_fix(
    audit: dict[str, Any], vulns: list[Any] | None, status: int, said: str
) -> None:
    package: dict[str, Any] = {"name": "x", "version": "1.0"}
    package |= {"skip_reason": "not found"} if vulns is None else {"vulns": vulns}
    found, text = audit["verdict"]({"dependencies": [package]})
    assert found == status
    assert said in text


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("echo 'requests: Failed to establish a new connection' >&2; exit 1", 0, "cannot be reached"),
        ("exec sleep 60", 0, "cannot be reached"),
        ("echo 'No module named pip_audit' >&2; exit 1", 1, "No module named pip_audit"),
        ("exit 0", 1, "failed with status 0"),
    ],
)
def test_the_audit_forgives_the_network_only(
    audit: dict[str, Any], program: str, status: int, said: str
) -> None:
    found, text = audit["audit"](["sh", "-c", program], time_limit=1.0 if "sleep" in program else 30.0)
    assert found == status
    assert said in text


def test_the_audit_is_of_what_the_image_installs(audit: dict[str, Any]) -> None:
    assert audit["python_of_image"]().startswith("3.13.")
    names = [Requirement(line).name for line in audit["locked"](audit["python_of_image"]())]
    assert len(names) == len(set(names)) > 40
    assert "uvloop" in names
    assert not {"colorama", "async-timeout"} & set(names)  # of Windows, and of Python 3.11.2
