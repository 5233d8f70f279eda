"""The files in `deploy/` for systemd, Kubernetes and hosted platforms, read by the programs that read them there."""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker.core.identity import Proxies
from broker.settings import Settings, setting_name
from tests.system.proxy import program, tool

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "session-broker.service"
BASE = DEPLOY / "kubernetes"
FIELDS = {setting_name(field): field for field in Settings.model_fields}
NEEDED = Settings().drain_timeout + 5
EXPOSURE = 1.2
METRIC = "broker_sessions_running"


def valid(environment: dict[str, str]) -> Settings:
    """Return the settings of these variables, of which each must be one."""
    given: dict[str, Any] = {FIELDS[name]: value for name, value in environment.items()}
    return Settings(**given)


# systemd


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            found.setdefault(line.split("=", 1)[0], []).append(line.split("=", 1)[1])
    return found


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/opt/session-broker/bin/broker", "/bin/true"))
    command = [program("systemd-analyze"), "verify", "--man=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_is_hardly_exposed() -> None:
    options = ["--offline=true", f"--threshold={round(EXPOSURE * 10)}", "--no-pager"]
    command = [program("systemd-analyze"), "security", *options, str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= EXPOSURE
    assert done.returncode == 0


def test_the_unit_drains_and_sets_nothing_but_settings() -> None:
    [seconds] = unit()["TimeoutStopSec"]
    assert float(seconds) >= NEEDED
    names = {pair.split("=")[0] for line in unit()["Environment"] for pair in line.split()}
    assert names == {"OPENROUTER_API_KEY_FILE", "PYTHONDONTWRITEBYTECODE"}
    assert unit()["ExecStart"] == ["/opt/session-broker/bin/broker serve"]


# Kubernetes


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    """Everything that the base makes, by its kind."""
    built = subprocess.run([tool("kubectl"), "kustomize", BASE], check=True, capture_output=True, text=True)
    return {each["kind"]: each for each in yaml.safe_load_all(built.stdout)}


@pytest.fixture(scope="module")
def pod(manifests: dict[str, Any]) -> Any:
    return manifests["Deployment"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", ["1.30.0", "1.37.0"])
def test_every_manifest_fits_its_schema(manifests: dict[str, Any], tmp_path: Path, version: str) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump_all(manifests.values()))
    command = [tool("kubernetes-validate"), "--strict", "--kubernetes-version", version, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count(" passed ") == len(manifests) == 6


def test_the_pods_have_valid_settings_and_secrets_in_files(manifests: dict[str, Any], pod: Any) -> None:
    [container] = pod["containers"]
    given = valid(manifests["ConfigMap"]["data"])
    assert given.total_daily_cost == 5
    assert given.trusted_proxies
    files = {each["name"]: each["value"] for each in container["env"]}
    assert {name.removesuffix("_FILE") for name in files} <= set(FIELDS)
    [mount] = container["volumeMounts"]
    assert all(path.startswith(mount["mountPath"] + "/") for path in files.values())
    assert pod["volumes"][0]["secret"]["secretName"] == "session-broker"
    asked = (BASE / "kustomization.yaml").read_text()
    assert all(f"--from-file={Path(path).name}" in asked for path in files.values())


def test_the_pods_have_no_rights(pod: Any) -> None:
    [container] = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    context = container["securityContext"]
    assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
    assert context["capabilities"] == {"drop": ["ALL"]}


def test_a_pod_has_the_time_to_drain(pod: Any) -> None:
    [container] = pod["containers"]
    command, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod["terminationGracePeriodSeconds"] >= float(pause) + NEEDED
    probe = container["readinessProbe"]
    assert probe["httpGet"]["path"] == "/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"


def test_the_manifests_mean_the_same_pods(manifests: dict[str, Any]) -> None:
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        manifests["Service"]["spec"]["selector"],
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifests["Deployment"]["metadata"]["name"])


def test_pods_are_added_by_a_metric_that_exists(manifests: dict[str, Any]) -> None:
    scaler = manifests["HorizontalPodAutoscaler"]["spec"]
    [metric] = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] == METRIC
    assert METRIC in (Path(__file__).parents[2] / "broker" / "metrics.py").read_text()
    assert 0 < float(metric["pods"]["target"]["averageValue"]) < Settings().max_streams
    assert scaler["minReplicas"] >= 2


# Hosted platforms


def test_the_hosted_platforms_get_valid_settings() -> None:
    render = yaml.safe_load((DEPLOY / "render.yaml").read_text())["services"]
    web = next(service for service in render if service["type"] == "web")
    values = {each["key"]: each["value"] for each in web["envVars"] if "value" in each}
    assert valid(values).total_daily_cost == 5
    assert {each["key"] for each in web["envVars"]} <= set(FIELDS)
    store = next(service for service in render if service["type"] == "keyvalue")
    assert store["maxmemoryPolicy"] == "noeviction"
    assert {each["fromService"]["name"] for each in web["envVars"] if "fromService" in each} == {
        store["name"]
    }
    fly = tomllib.loads((DEPLOY / "fly.toml").read_text())
    assert valid(fly["env"]).total_daily_cost == 5
    assert fly["http_service"]["internal_port"] == 3000
    railway = json.loads((DEPLOY / "railway.json").read_text())
    root = DEPLOY.parent
    for path in (root / web["dockerfilePath"], root / railway["build"]["dockerfilePath"]):
        assert path == DEPLOY / "Dockerfile"
    assert (DEPLOY / fly["build"]["dockerfile"]).is_file()


def proxies_of_render() -> Proxies:
    web = yaml.safe_load((DEPLOY / "render.yaml").read_text())["services"][0]
    [trusted] = [each["value"] for each in web["envVars"] if each["key"] == "BROKER_TRUSTED_PROXIES"]
    return Proxies(valid({"BROKER_TRUSTED_PROXIES": trusted}).trusted_proxies)


def proxies_of_fly() -> Proxies:
    fly = tomllib.loads((DEPLOY / "fly.toml").read_text())
    trusted = fly["env"]["BROKER_TRUSTED_PROXIES"]
    return Proxies(valid({"BROKER_TRUSTED_PROXIES": trusted}).trusted_proxies)


# Chains as these platforms were seen to send them, with the caller 198.51.100.7.
@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded"),
    [
        (proxies_of_render(), "10.21.157.68", "198.51.100.7, 172.70.247.28, 10.19.6.53"),
        (proxies_of_render(), "10.21.157.68", "198.51.100.7, 104.22.17.40"),
        (proxies_of_fly(), "172.16.8.2", "198.51.100.7, 66.241.125.180"),
        (proxies_of_fly(), "172.16.8.2", "198.51.100.7, 2a09:8280:1::af:1aa1:0"),
    ],
)
def test_each_caller_of_a_hosted_platform_has_its_address(
    proxies: Proxies, peer: str, forwarded: str
) -> None:
    caller = ipaddress.ip_address("198.51.100.7")
    assert proxies.caller(peer, [forwarded]) == caller
    assert proxies.caller(peer, [f"203.0.113.9, {forwarded}"]) == caller  # the first one is invented


def test_a_program_at_cloudflare_cannot_invent_an_address() -> None:
    at_cloudflare = "2a06:98c0:3600::103"
    caller = proxies_of_render().caller("10.0.0.1", [f"203.0.113.9, {at_cloudflare}, 172.70.247.28"])
    assert caller == ipaddress.ip_address(at_cloudflare)


def test_the_hosted_platforms_let_a_broker_drain() -> None:
    render = yaml.safe_load((DEPLOY / "render.yaml").read_text())["services"]
    fly = tomllib.loads((DEPLOY / "fly.toml").read_text())
    railway = json.loads((DEPLOY / "railway.json").read_text())
    for seconds in (
        render[0]["maxShutdownDelaySeconds"],
        fly["kill_timeout"],
        railway["deploy"]["drainingSeconds"],
    ):
        assert seconds >= NEEDED
