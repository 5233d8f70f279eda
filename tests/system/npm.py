"""npm for the tests: packages of the registry, installed once for a run of the tests, and programs run to their end."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENT = Path(__file__).parents[2] / "broker" / "web" / "client"

# What the tests need beside the tools of the browser client.
PACKAGES = (
    "@ai-sdk/react@4",
    "@grafana/schema@13.2",
    "@microsoft/fetch-event-source@2",
    "@types/react-dom@19",
    "eventsource@5",
    "react-dom@19",
    "vite@8",
)
INSTALL_TIMEOUT = 100.0

MAKING_TIMEOUT = 300
"""Seconds, of a test that may be the first of the run to need the packages, or the client built and installed."""

NO_NPM = "there is no npm on this machine"
NOT_INSTALLED = "npm could not install"

STRICT = ("--strict", "--noEmit", "--noUnusedLocals", "--noImplicitReturns", "--noUncheckedIndexedAccess")
BROWSER = ("--target", "es2022", "--module", "esnext", "--lib", "es2022,dom,dom.asynciterable")


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all packages that tests use. A project beside it finds them.

    Where they cannot be installed, the test is skipped, but fails in CI.
    """
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "npm"
    home.mkdir(exist_ok=True)
    with _made_once(home, "packages") as needed:
        if needed:
            tools = json.loads((CLIENT / "package.json").read_text())["devDependencies"]
            _install(home, [*(f"{name}@{version}" for name, version in tools.items()), *PACKAGES])
    return home / "node_modules"


@contextmanager
def _made_once(home: Path, what: str) -> Iterator[bool]:
    """Give True to the first process of the run that needs it. The others wait until it is made."""
    with (home / f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = home / f"{what}.made"
        yield not made.exists()
        made.touch()


def _install(home: Path, packages: list[str]) -> None:
    quietly = ("--no-audit", "--no-fund", "--no-save", "--prefer-offline", "--prefix", str(home))
    try:
        done = subprocess.run(
            [npm(), "install", *quietly, *packages],
            capture_output=True,
            text=True,
            check=False,
            timeout=INSTALL_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        missing(f"{NOT_INSTALLED} within {INSTALL_TIMEOUT:.0f} s")
    if done.returncode != 0:
        missing(f"{NOT_INSTALLED}: {(done.stdout + done.stderr)[-500:]}")


@pytest.fixture(scope="session")
def axe_core(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe, which checks a page for what keeps people out. It is no part of the project."""
    home = tmp_path_factory.mktemp("axe")
    _install(home, ["axe-core@4"])
    return (home / "node_modules" / "axe-core" / "axe.min.js").read_text()


@pytest.fixture(scope="session")
def built_client(node_modules: Path) -> Path:
    """A copy of the browser client's package beside the installed packages, built there from its source."""
    folder = node_modules.parent / "client"
    with _made_once(folder.parent, "client") as needed:
        if needed:
            built = shutil.ignore_patterns("dist", "node_modules", "client.js", "client.d.ts")
            shutil.copytree(CLIENT, folder, ignore=built)
            _run("run", "build", cwd=folder)
    return folder


@pytest.fixture(scope="session")
def project(built_client: Path) -> Path:
    """A fresh project beside the installed packages, with the client's package as it would be published."""
    folder = built_client.parent / "project"
    with _made_once(folder.parent, "project") as needed:
        if needed:
            folder.mkdir()
            (folder / "package.json").write_text('{"type": "module"}')
            _run("pack", "--ignore-scripts", "--pack-destination", str(folder), cwd=built_client)
            (packed,) = folder.glob("*.tgz")
            quietly = ("--offline", "--no-audit", "--no-fund", "--prefix", str(folder))
            _run("install", *quietly, str(packed), cwd=folder)
    return folder


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run(
        [npm(), *command], cwd=cwd, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def npm() -> str:
    """The program. Where there is none, the test is skipped, but fails in CI."""
    return shutil.which("npm") or missing(NO_NPM)


def missing(what: str) -> NoReturn:
    """Skip the test for what is not there, but fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


async def ran(*command: str, cwd: Path | None = None) -> tuple[int, str]:
    """Run a program to its end and give its status and what it said."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=cwd
    )
    try:
        async with asyncio.timeout(100):
            told, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, told.decode()
