"""The image, built here without an engine: the instructions of the Dockerfile, and a sandbox to run their result in."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "Dockerfile"
OPT = re.compile(r"(?<![\w.])/opt/")


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile as pairs of a keyword and the rest, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(keyword, " ".join(rest.split())) for keyword, _, rest in (line.partition(" ") for line in lines)]


def stages() -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage, without its FROM."""
    found: list[list[tuple[str, str]]] = []
    for keyword, rest in instructions():
        if keyword == "FROM":
            found.append([])
        else:
            found[-1].append((keyword, rest))
    return found


def sent_to_the_builder(path: str) -> bool:
    """Returns True if .dockerignore lets a path of the repository into the build. The last rule that matches counts."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        rule = line.removeprefix("!").strip()
        if not rule or rule.startswith("#"):
            continue
        parts = path.split("/")
        above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        anywhere = rule.startswith("**/") and rule.removeprefix("**/") in parts
        depth = rule.count("/")
        if anywhere or any(fnmatch.fnmatch(place, rule) for place in above if place.count("/") == depth):
            sent = line.startswith("!")
    return sent


def build(place: Path) -> Path:
    """Run the first stage below a folder that stands for ``/``, and return its ``/opt/broker``."""
    source = place / "src"
    source.mkdir()
    (place / "bin").mkdir()
    (place / "bin" / "python").symlink_to(python_for_everybody())
    for keyword, rest in stages()[0]:
        if keyword == "COPY":
            *names, target = rest.split()
            for name in names:
                _copy(name, source / target / Path(name).name if target.endswith("/") else source / target)
        elif keyword == "RUN":
            _run(OPT.sub(f"{place}/opt/", rest), source, programs=place / "bin")
    return place / "opt" / "broker"


def _copy(name: str, target: Path) -> None:
    if (ROOT / name).is_file():
        target = target / name if target.is_dir() else target
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
        return

    def unsent(folder: str, names: list[str]) -> list[str]:
        base = Path(folder).relative_to(ROOT)
        return [name for name in names if not sent_to_the_builder((base / name).as_posix())]

    shutil.copytree(ROOT / name, target, ignore=unsent)


def python_for_everybody() -> Path:
    """Return a Python that a user without rights can start: this one may be in somebody's home."""
    candidates = [
        Path(sys.executable),
        *(Path(folder, "python3") for folder in ("/usr/local/bin", "/usr/bin")),
    ]
    found = [path.resolve() for path in candidates if path.exists()]
    return next((path for path in found if all(above.stat().st_mode & 1 for above in path.parents)), found[0])


def _run(command: str, cwd: Path, *, programs: Path) -> None:
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": ""}
    done = subprocess.run(
        ["sh", "-euc", command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def sandboxed(command: list[str], user: int) -> list[str]:
    """Return a command that runs another one as this user, without any rights, where no file can be written."""
    read_only = "for m in / /tmp /var /var/tmp /dev/shm /run; do mountpoint -q $m && mount -o remount,bind,ro $m; done"
    dropped = f"setpriv --reuid={user} --regid={user} --clear-groups --no-new-privs --bounding-set=-all"
    script = f'{read_only}; exec {dropped} --inh-caps=-all -- "$@"'
    return ["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sandbox", *command]
