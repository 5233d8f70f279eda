"""`import broker` in a fresh process: it starts, reads and opens nothing, and neither do settings written in code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import broker

WATCHED = """
import os, sys
told = []
def note(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system")):
        if event != "socket.gethostname":
            told.append((event, arguments))
    if event == "_thread.start_new_thread":
        told.append((event, None))
    if event == "open" and isinstance(arguments[0], str) and not arguments[0].startswith(ALLOWED):
        told.append((event, arguments))
ALLOWED = tuple(os.path.realpath(path) for path in (*filter(None, sys.path), sys.prefix, sys.base_prefix))
ALLOWED += (*filter(None, sys.path), "/usr/", "/etc/", "/proc/", "/dev/null")
sys.addaudithook(note)
"""
NAMES = ["Client", "Result", "Settings", "setup"]


def ran(program: str, cwd: Path, **env: str) -> str:
    """Return the output of a program in a separate process and directory."""
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_package_has_exactly_these_names() -> None:
    assert broker.__all__ == NAMES == dir(broker)
    assert broker.setup.__module__ == "broker.mount"
    with pytest.raises(AttributeError, match="nothing"):
        broker.nothing  # type: ignore[attr-defined]  # noqa: B018 - that is the point


def test_importing_loads_nothing_heavy(tmp_path: Path) -> None:
    program = "import sys, broker; print(*sys.modules)"
    loaded = ran(program, tmp_path).split()
    assert [name for name in loaded if name.startswith("broker")] == ["broker"]
    assert not {"asyncio", "aiohttp", "openai", "pydantic", "redis", "structlog"} & set(loaded)


@pytest.mark.slow
def test_nothing_is_opened_before_an_application_starts(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=nonsense\n")
    program = f"""{WATCHED}
from aiohttp import web
from broker import {", ".join(NAMES)}
setup(web.Application(), prefix="/ai", settings=Settings(host="127.0.0.1", openrouter_api_key="sk-1"))
print(told)
"""
    assert ran(program, tmp_path, BROKER_HOST="!", PORT="none", REDIS_URL="x") == "[]\n"


def test_settings_in_code_have_the_given_values(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("BROKER_MAX_MESSAGES=7\nPORT=nonsense\n")
    program = f"""{WATCHED}
from broker import Settings
settings = Settings(max_body="2MiB")
print(settings.max_body, settings.max_messages, settings.redis_url, settings.openrouter_api_key, told)
"""
    told = ran(
        program, tmp_path, REDIS_URL="redis://elsewhere", OPENROUTER_API_KEY="sk-1", BROKER_WORKERS="x"
    )
    assert told == "2097152 200 None None []\n"


def test_settings_can_be_read_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("BROKER_MAX_MESSAGES=7\n")
    program = """
from broker import Settings
settings = Settings.from_environment(max_body="2MiB")
print(settings.max_body, settings.max_messages, settings.redis_url)
"""
    assert ran(program, tmp_path, REDIS_URL="redis://elsewhere") == "2097152 7 redis://elsewhere\n"
