#!/usr/bin/env python3
"""Ask pip-audit for known vulnerabilities of the image's packages.

Fails where there is one with a fixed version. Where the vulnerability service cannot be reached, it says so in one line
and does not fail: the tests must not depend on it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parents[1] / "deploy" / "requirements.lock"
TIME_LIMIT = 60.0


def main() -> int:
    """Run pip-audit on the lock, and return the exit status."""
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--requirement",
        str(LOCK),
        "--disable-pip",
        "--format=json",
    ]
    try:
        run = subprocess.run(  # noqa: S603 - fixed words, no shell
            [*command, "--progress-spinner=off", "--timeout=10"],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIME_LIMIT,
        )
        report = json.loads(run.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        report = {"dependencies": []}
    status, text = verdict(report)
    print(text)
    return status


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
    if not checked:
        return 0, "pip-audit: the vulnerability service cannot be reached; nothing was checked."
    if len(checked) < len(packages):
        lines.append(f"{len(packages) - len(checked)} of {len(packages)} packages could not be checked.")
    else:
        lines.append(f"{len(checked)} packages were checked.")
    return int(any(vuln["fix_versions"] for _, vuln in found)), "\n".join(
        f"pip-audit: {line}" for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
