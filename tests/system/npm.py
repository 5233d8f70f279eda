"""npm for the tests: packages of the registry in a folder of a test, and programs run to their end."""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from pathlib import Path

TYPESCRIPT = "typescript@5.9"
NO_NPM = "there is no npm on this machine"
NOT_INSTALLED = "npm could not install"

STRICT = ("--strict", "--noEmit", "--noUnusedLocals", "--noImplicitReturns", "--noUncheckedIndexedAccess")
BROWSER = ("--target", "es2022", "--module", "esnext", "--lib", "es2022,dom,dom.asynciterable")


async def installed(folder: Path, *packages: str) -> Path:
    """Install packages into a folder and return where their programs are.

    Where that cannot be, the test is skipped, but fails in CI.
    """
    quietly = ("--no-audit", "--no-fund", "--no-save", "--prefer-offline", "--prefix", str(folder))
    status, told = await ran(npm(), "install", *quietly, *packages)
    if status != 0:
        missing(f"{NOT_INSTALLED} {', '.join(packages)}: {told[-500:]}")
    return folder / "node_modules" / ".bin"


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
