"""The code and the commands of the README, taken out of it and run."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING

import pytest

from broker.core.client_limits import ClientLimits
from broker.identity.clients_file import read_clients_file
from tests.system.browser import README, readme_lines
from tests.system.harness import running_broker
from tests.system.npm import BROWSER, MAKING_TIMEOUT, STRICT, ran

if TYPE_CHECKING:
    from pathlib import Path

# The code of a page around the lines, with the types of its own functions.
AROUND = """
declare const base: string;
declare const model: string;
declare const messages: {role: string; content: string}[];
declare function show(text: string): void;
declare function finish(result: {finishReason: string | null; cost: number | null}): void;
declare function fail(error: {message: string; code?: string}): void;
export {};
"""


@pytest.mark.slow
@pytest.mark.timeout(MAKING_TIMEOUT)
async def test_the_lines_of_a_page_are_strict_typescript(node_modules: Path, tmp_path: Path) -> None:
    pages = {tmp_path / "long.ts": readme_lines(), tmp_path / "short.ts": readme_lines(short=True)}
    for page, lines in pages.items():
        page.write_text(AROUND + lines)
    status, told = await ran(str(node_modules / ".bin" / "tsc"), *STRICT, *BROWSER, *map(str, pages))
    assert (status, told) == (0, "")


def blocks(kind: str) -> list[str]:
    """The fenced blocks of that kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


async def test_the_commands_for_curl_do_what_they_say() -> None:
    (script,) = blocks("bash")
    async with running_broker() as broker:
        status, told = await ran("bash", "-eu", "-c", script.replace("http://127.0.0.1:3000", broker.url))
        requests = re.findall(r'"path": "(/[a-z]*)[^"]*", "status": (\d+)', broker.log())
    assert status == 0
    assert told.count("event: chunk") > 10
    assert told.count("event: done") == 1
    assert "rehearsal/plain:free" in told
    assert re.search(r'"requests":\s*1\b', told)
    asked = [request for request in requests if not request[0].startswith("/health")]
    assert asked == [("/prepare", "201"), *[("/stream", "200")] * 2, ("/models", "200"), ("/usage", "200")]


def test_the_first_two_commands_are_the_whole_setup() -> None:
    first, second = blocks("sh")[:2]
    for command in (first, second):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q ")
        assert command.count("\n") == 1
    assert first.endswith("&& .venv/bin/broker serve --rehearsal\n")
    assert second.endswith("&& .venv/bin/python -m pytest\n")
    indented = re.findall(r"^ {4}\S.*$", README.read_text(), re.MULTILINE)
    assert not [line for line in indented if re.search(r"\b(broker|pip|curl|docker|pytest) ", line)]


def test_the_table_of_a_client_is_one_that_the_broker_takes(tmp_path: Path) -> None:
    [table] = blocks("toml")
    path = tmp_path / "clients.toml"
    path.write_text(table)
    assert read_clients_file(path).limits["acme"].monthly_cost == 300 * 10**9
    names = set(re.findall(r"^(\w+) =", table, re.MULTILINE))
    assert names == {"sha256", *(each.name for each in fields(ClientLimits))} - {"narrows"}
