#!/usr/bin/env python3
"""Ask pip-audit for known vulnerabilities of the image's packages, as its Python version installs them.

Fails where there is one with a fixed version, and where pip-audit itself fails. Only where the vulnerability service
cannot be reached, or does not know a single package, it says so and does not fail: the tests must not depend on it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

DEPLOY = Path(__file__).parents[1] / "deploy"
TIME_LIMIT = 60.0

UNREACHABLE = re.compile(
    "Could not connect to|Failed to establish a new connection|Name or service not known"
    "|Temporary failure in name resolution|Connection refused|Connection reset|Network is unreachable|timed out"
)
"""What a failed pip-audit says where the network is the reason."""

NOT_REACHED = "pip-audit: the vulnerability service cannot be reached; nothing was checked."


def main() -> int:
    """Run pip-audit on the locked packages of the image, and return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "requirements.txt")
        path.write_text("\n".join(locked(python_of_image())))
        status, text = audit([sys.executable, "-m", "pip_audit", "--requirement", str(path)])
    print(text)
    return status


def python_of_image() -> str:
    """Return the version of the Python that the Dockerfile names."""
    [version] = set(re.findall(r"^FROM python:([\d.]+)-", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE))
    return str(version)


def locked(python: str) -> list[str]:
    """Return the requirements of the lock that an image for Linux with this Python version installs."""
    lines = re.findall(r"^(\w\S*==[^\\]*?) \\$", (DEPLOY / "requirements.lock").read_text(), re.MULTILINE)
    of_image = {
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
        "sys_platform": "linux",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    found = [Requirement(line) for line in lines]
    return [
        f"{one.name}{one.specifier}" for one in found if one.marker is None or one.marker.evaluate(of_image)
    ]


def audit(command: list[str], *, time_limit: float = TIME_LIMIT) -> tuple[int, str]:
    """Run this command of pip-audit for at most `time_limit` seconds. Returns the exit status and what to say."""
    options = ["--disable-pip", "--no-deps", "--format=json", "--progress-spinner=off", "--timeout=10"]
    try:
        run = subprocess.run(  # noqa: S603 - fixed words, no shell
            [*command, *options], capture_output=True, text=True, check=False, timeout=time_limit
        )
    except subprocess.TimeoutExpired:
        return 0, NOT_REACHED
    try:
        report = json.loads(run.stdout)
    except ValueError:
        if UNREACHABLE.search(run.stderr):
            return 0, NOT_REACHED
        return 1, f"pip-audit: failed with status {run.returncode}:\n{run.stderr[-2000:]}"
    return verdict(report)


def verdict(report: dict[str, Any]) -> tuple[int, str]:
    """Return the exit status and what to say for a report of pip-audit."""
    packages = report["dependencies"]
    checked = [package for package in packages if "vulns" in package]
    found = [(package, vuln) for package in checked for vuln in package["vulns"]]
    lines = [
        f"{package['name']} {package['version']}: {vuln['id']},"
        f" fixed in {', '.join(vuln['fix_versions']) or 'no version'}"
        for package, vuln in found
    ]
    if not checked:  # a mirror without the service answers 404 for each
        return 0, NOT_REACHED
    if len(checked) < len(packages):
        lines.append(f"{len(packages) - len(checked)} of {len(packages)} packages could not be checked.")
    else:
        lines.append(f"{len(checked)} packages were checked.")
    return int(any(vuln["fix_versions"] for _, vuln in found)), "\n".join(
        f"pip-audit: {line}" for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
