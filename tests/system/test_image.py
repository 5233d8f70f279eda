"""The image as its Dockerfile builds it: built here step by step, and run as it would be in a container."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from packaging.requirements import Requirement

from tests.system.harness import free_port, running_program, running_valkey
from tests.system.image import DEPLOY, ROOT, build, instructions, sandboxed
from tests.system.proxy import prepared, program

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

USER = 10001
CAP_SYS_ADMIN = 21  # the bit, by capabilities(7)


def named(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """The built `/opt/broker`, in a folder that everybody can read."""
    folder = Path(tempfile.mkdtemp(prefix="broker-image-"))
    folder.chmod(0o755)
    try:
        yield build(folder)
    finally:
        shutil.rmtree(folder)


def installed(image: Path) -> dict[str, str]:
    asked = [sys.executable, "-m", "pip", "--python", str(image / "bin" / "python"), "list", "--format=json"]
    listed = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)
    return {named(package["name"]): package["version"] for package in listed}


@pytest.fixture(scope="module")
def parts(image: Path) -> dict[str, Any]:
    return {named(part["name"]): part for part in json.loads((image / "sbom.json").read_text())["components"]}


def test_the_image_has_what_is_locked_and_nothing_else(image: Path) -> None:
    lines = re.findall(r"^(\w\S*==[^\\]*?) \\$", (DEPLOY / "requirements.lock").read_text(), re.MULTILINE)
    wanted = [Requirement(line) for line in lines]
    python = subprocess.run(
        [image / "bin" / "python", "-c", "import platform; print(platform.python_version())"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    here = [
        one for one in wanted if one.marker is None or one.marker.evaluate({"python_full_version": python})
    ]
    locked = {named(one.name): str(one.specifier).removeprefix("==") for one in here}
    found = installed(image)
    assert found.pop("session-broker")
    assert found == locked


def test_the_list_of_parts_has_every_package(image: Path, parts: dict[str, Any]) -> None:
    listed = json.loads((image / "sbom.json").read_text())
    assert listed["bomFormat"] == "CycloneDX"
    assert listed["metadata"]["component"]["name"] == "session-broker"
    found = installed(image)
    assert {name: part["version"] for name, part in parts.items() if name != "session-broker"} == {
        name: version for name, version in found.items() if name != "session-broker"
    }
    assert all(part["purl"].startswith("pkg:") for part in parts.values())


def test_every_licence_is_listed(image: Path) -> None:
    listed = (DEPLOY / "licenses.md").read_text().splitlines()
    rows = (image / "licenses.md").read_text().splitlines()
    assert len(rows) > 40
    assert "not declared" not in "".join(rows)
    assert [row for row in rows if row not in listed] == []


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


@pytest.fixture
def _sandbox() -> None:
    """Skip a test where no sandbox can be made, and check that nothing can be written in it."""
    for name in ("unshare", "setpriv", "mountpoint"):
        program(name)
    capabilities = int(status_of(os.getpid()).partition("CapEff:")[2].split()[0], 16)
    if not capabilities >> CAP_SYS_ADMIN & 1:  # in CI, too: a container without it cannot get it
        pytest.skip("only root with CAP_SYS_ADMIN can make a read-only view of this machine")
    refused = subprocess.run(
        sandboxed(["touch", "/tmp/broker-writes"], USER), capture_output=True, check=False
    )
    assert b"Read-only file system" in refused.stderr


@pytest.mark.usefixtures("_sandbox")
async def test_the_image_runs_with_no_rights_and_no_writable_file(image: Path) -> None:
    port = free_port()
    given = dict(
        pair.split("=", 1) for keyword, rest in instructions() if keyword == "ENV" for pair in rest.split()
    )
    assert ("USER", f"{USER}:{USER}") in instructions()
    command = sandboxed([str(image / "bin" / "broker"), "serve", "--rehearsal"], USER)
    execute = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    async with running_valkey() as valkey:
        env = {
            **{name: value for name, value in given.items() if name != "PATH"},
            "PORT": str(port),
            "REDIS_URL": valkey.url,
            "BROKER_TOTAL_DAILY_COST": "5",
            "PYTHONPATH": "",
        }
        async with running_program(
            ["-c", execute, *command], port, env=env, cwd=ROOT, ready="/health/ready"
        ) as broker:
            status = status_of(broker.process.pid)
            assert re.search(rf"^Uid:\s+{USER}\s+{USER}\s+{USER}", status, re.MULTILINE)
            assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
            assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
            async with aiohttp.ClientSession(broker.url) as page:
                session = await prepared(page, "rehearsal/fast")
                async with page.get(f"/stream/{session}", headers={"Accept": "text/event-stream"}) as answer:
                    assert "event: done" in await answer.text()
            broker.process.terminate()
            assert await broker.ended() == 0
            assert "Traceback" not in broker.log()
