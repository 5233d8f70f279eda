#!/usr/bin/env python3
"""Print the licences of everything in a CycloneDX list of parts, as the table of `licenses.md`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_CLASSIFIER = "License :: OSI Approved :: "


def licences(component: dict[str, Any]) -> str:
    """Return the licences that a part declares: an SPDX expression, ids, or what its classifiers say."""
    found = []
    for entry in component.get("licenses", []):
        licence = entry.get("license", {})
        name = entry.get("expression") or licence.get("id") or licence.get("name") or ""
        found.append(name.removeprefix(_CLASSIFIER))
    return ", ".join(found) or "not declared"


def main(path: str) -> None:
    """Print the table of a list of parts."""
    parts = json.loads(Path(path).read_text(encoding="utf-8"))["components"]
    rows = sorted((part["name"].lower().replace("_", "-"), licences(part)) for part in parts)
    print("| package | licence |\n| --- | --- |")
    for name, licence in rows:
        print(f"| {name} | {licence} |")


if __name__ == "__main__":
    main(sys.argv[1])
