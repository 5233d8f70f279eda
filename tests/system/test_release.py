"""What is published: a wheel and an sdist that work for somebody who has only them."""

from __future__ import annotations

import asyncio
import email
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from broker import __version__
from tests.system.harness import clean_environment, free_port, running_program
from tests.system.npm import missing

if TYPE_CHECKING:
    from email.message import Message

ROOT = Path(__file__).parent.parent.parent

INSTALL_TIMEOUT = 200
UNREACHABLE = (
    "Failed to establish a new connection|Temporary failure in name resolution|Connection refused|timed out"
)


def ran(*command: str | Path, cwd: Path) -> str:
    """Run a program to its end and return what it wrote to standard output."""
    found = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment({"PYTHONPATH": ""}),
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT,
        check=False,
    )
    told = found.stdout[-2000:] + found.stderr[-2000:]
    if found.returncode != 0 and re.search(UNREACHABLE, told):
        missing(f"the package index cannot be reached: {told[-300:]}")
    assert found.returncode == 0, told
    return found.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it, as a publisher does. Returns both."""
    out = tmp_path_factory.mktemp("dist")
    # Without a network the tools for the build, which are declared for the tests, are those of this environment.
    ran(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    [wheel] = out.glob("*.whl")
    [sdist] = out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def metadata(built: tuple[Path, Path]) -> Message:
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_the_version_is_the_same_everywhere() -> None:
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    package = (ROOT / "broker/web/client/package.json").read_text()
    assert changes[0] == __version__
    assert f'"version": "{__version__}"' in package
    [image] = yaml.safe_load((ROOT / "deploy/kubernetes/kustomization.yaml").read_text())["images"]
    assert image["newTag"] == __version__


@pytest.mark.slow
def test_both_files_have_the_one_version(built: tuple[Path, Path], metadata: Message) -> None:
    wheel, sdist = built
    assert wheel.name == f"session_broker-{__version__}-py3-none-any.whl"
    assert sdist.name == f"session_broker-{__version__}.tar.gz"
    assert metadata["Version"] == __version__


@pytest.mark.slow
def test_the_metadata_is_complete(metadata: Message) -> None:
    assert metadata["Name"] == "session-broker"
    assert metadata["Author"] == "The Session Broker authors"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Summary"]
    classifiers = metadata.get_all("Classifier", [])
    assert [each for each in classifiers if each.startswith("Development Status :: ")]
    assert [each for each in classifiers if each.startswith("Programming Language :: Python :: 3.")]
    assert "# Session Broker" in str(metadata.get_payload())


@pytest.mark.slow
def test_the_files_have_all_and_nothing_of_this_machine(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for each in (
        "broker/py.typed",
        "broker/store/lua/claim.lua",
        "broker/web/page/page.js",
        "broker/web/page/vendor/marked.js",
        "broker/web/page/vendor/marked.LICENSE",
        "broker/web/client/client.js",
    ):
        assert each in names
    assert {name.partition("/")[0] for name in names} == {"broker", f"session_broker-{__version__}.dist-info"}
    with tarfile.open(sdist) as archive_of_source:
        sources = {name.partition("/")[2] for name in archive_of_source.getnames()}
    assert {
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "pyproject.toml",
        "tests/conftest.py",
        ".ci/run",
    } <= sources
    assert not [name for name in names | sources if "__pycache__" in name or "node_modules" in name]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_the_wheel_alone_serves_a_chat(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, _ = built
    home = tmp_path / "venv"
    await asyncio.to_thread(venv.create, home, with_pip=True)
    python = home / "bin" / "python"
    # With its dependencies from the index: one that is used and not declared would be missing.
    await asyncio.to_thread(ran, python, "-m", "pip", "install", "-q", str(wheel), cwd=tmp_path)
    broker = home / "bin" / "broker"
    assert ran(broker, "--version", cwd=tmp_path) == f"broker {__version__}\n"
    where = ran(python, "-c", "import broker; print(broker.__file__)", cwd=tmp_path)
    assert where.startswith(str(home)), "the code of the wheel, not that of the checkout"
    port = free_port()
    serve = ["-m", "broker", "serve", "--rehearsal"]
    env = {"PORT": str(port), "PYTHONPATH": ""}
    async with running_program(
        serve, port, env=env, cwd=tmp_path, ready="/health/ready", python=python
    ) as service:
        said = await asyncio.to_thread(
            ran, broker, "chat", "--url", service.url, "--model", "rehearsal/echo", "Hello", cwd=tmp_path
        )
    assert said.strip() == "Hello"
