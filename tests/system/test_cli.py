"""The command line against the service, all of them real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
import redis

from tests.cli.fake_broker import run, run_shell, start
from tests.kinds import running_servers
from tests.system.harness import clean_environment, eventually, free_port, running_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


def serve(tmp_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A start of the service that is expected to end at once."""
    return subprocess.run(
        [sys.executable, "-m", "broker", "serve", *args],
        cwd=tmp_path,
        env=clean_environment(env),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for temporary files whose path leaves room for that of a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="b-") as name:
        yield Path(name)


def directories(path: Path) -> list[Path]:
    return list(path.glob("broker-*"))


def events(log: str) -> list[dict[str, object]]:
    found = []
    for line in log.splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


@asynccontextmanager
async def cutting_proxy(port: int, after: int) -> AsyncIterator[int]:
    """A port that leads to the broker's and breaks each connection after so many bytes of an answer."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, back))
                group.create_task(_pump(there, writer, after))
        except* (ConnectionError, _CutError):
            pass
        finally:
            writer.transport.abort()
            back.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


class _CutError(Exception):
    pass


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int | None = None) -> None:
    sent = 0
    while data := await reader.read(4096):
        writer.write(data)
        await writer.drain()
        sent += len(data)
        if most is not None and sent >= most:
            raise _CutError
    raise _CutError


# serve: a start that cannot be


@pytest.mark.parametrize(
    ("args", "env", "told"),
    [
        ([], {}, "OPENROUTER_API_KEY must be set, or start with --rehearsal, which needs no key"),
        (["--rehearsal"], {"PORT": "70000"}, "PORT must be a port from 0 to 65535, not '70000'"),
        (["--port", "x"], {}, "--port must be a port from 0 to 65535, not 'x'"),
        (
            ["--rehearsal", "--host", "0.0.0.0"],
            {},
            (
                "REDIS_URL must be set to listen on 0.0.0.0, or start with --embedded to keep sessions in this"
                " process's own Valkey"
            ),
        ),
        (
            ["--rehearsal"],
            {"OPENROUTER_API_KEY": "a", "OPENROUTER_API_KEY_FILE": "b"},
            "OPENROUTER_API_KEY and OPENROUTER_API_KEY_FILE are both given; leave one out",
        ),
    ],
)
def test_a_wrong_setting_ends_the_start_with_one_line(
    args: list[str], env: dict[str, str], told: str, tmp_path: Path
) -> None:
    ended = serve(tmp_path, *args, **env)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"broker: {told}\n")


def test_dotenv_of_the_working_directory_is_read(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("OPENROUTER_API_KEY=sk-test\nBROKER_LOG_LEVEL=loud\n")
    ended = serve(tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("broker: BROKER_LOG_LEVEL in .env must be")


def test_a_port_in_use_is_reported_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = serve(tmp_path, "--rehearsal", "--port", str(port))
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"broker: cannot listen on 127.0.0.1:{port}: ")
    assert "Traceback" not in ended.stderr


def test_a_closed_standard_error_does_not_end_it(tmp_path: Path) -> None:
    # A socket that took its number would be written to, or closed, as standard error.
    script = f'exec "{sys.executable}" -m broker rehearse --port 0 2>&-'
    with subprocess.Popen(["bash", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


# serve: a start


def test_both_names_of_the_program_are_the_same(tmp_path: Path) -> None:
    installed = Path(sys.executable).with_name("broker")
    for program in ([str(installed)], [sys.executable, "-m", "broker"]):
        told = subprocess.run([*program, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "Usage: broker" in told.stdout
        for command in ("serve", "rehearse", "chat", "models"):
            assert command in told.stdout


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_the_first_line_has_the_address_to_open(log_format: str, host: str, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "broker", "serve", "--rehearsal", "--port", "0", "--host", host),
        cwd=tmp_path,
        env=clean_environment({"BROKER_LOG_FORMAT": log_format}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            first = (await process.stdout.readline()).decode()
        shown = f"[{host}]" if ":" in host else host
        assert first.startswith(f"Open http://{shown}:")
        url = first.removeprefix("Open ").strip()
        async with aiohttp.ClientSession() as page, page.get(url) as answer:
            assert "<title>Session Broker</title>" in await answer.text()
    finally:
        process.terminate()
        await process.wait()
    assert process.returncode == 0


async def test_the_service_needs_no_standard_output(tmp_path: Path) -> None:
    for nowhere in (">&-", ">/dev/full"):
        port = free_port()
        (tmp_path / "err").write_text("")
        script = f'exec "{sys.executable}" -m broker serve --rehearsal --port {port} {nowhere} 2>err'
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", script, cwd=tmp_path, env=clean_environment({})
        )
        try:
            await eventually(lambda: "listening" in (tmp_path / "err").read_text(), 30)
        finally:
            process.terminate()
            await process.wait()
        assert process.returncode == 0


async def test_the_version_is_printed() -> None:
    assert await run("--version") == (0, f"broker {metadata.version('session-broker')}\n", "")


async def test_a_shell_completes_its_commands(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    status, _, err = await run("--install-completion", "bash", env=env)
    assert (status, err) == (0, "")
    assert (tmp_path / ".bash_completions" / "broker.sh").read_text()
    asked = {"_BROKER_COMPLETE": "complete_bash", "COMP_WORDS": "broker mo", "COMP_CWORD": "1"}
    assert await run(env=asked) == (0, "models\n", "")


async def test_rehearsal_needs_no_key() -> None:
    async with running_broker(env={"OPENROUTER_API_KEY": ""}) as broker:
        assert (await run("chat", "hi", "--model", "rehearsal/fast", "--url", broker.url))[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_well(number: signal.Signals) -> None:
    async with running_broker() as broker:
        broker.process.send_signal(number)
        assert await broker.ended() == 0
        assert "Traceback" not in broker.log()


@pytest.mark.slow
async def test_ctrl_c_at_its_terminal_lets_a_stream_finish() -> None:
    async with running_broker() as broker:
        process = await start("chat", "hi", "--model", "rehearsal/plain", "--url", broker.url)
        assert process.stdout is not None
        await process.stdout.readexactly(20)
        os.killpg(broker.process.pid, signal.SIGINT)
        assert await process.wait() == 0
        assert await broker.ended() == 0


async def test_flags_win_over_the_environment() -> None:
    port = free_port()
    async with running_broker(
        env={"PORT": str(port), "BROKER_LOG_LEVEL": "debug"}, args=["--log-level", "error"]
    ) as broker:
        assert broker.port == port
        assert broker.log() == f"Open {broker.url}\n"


async def test_unknown_and_ineffective_settings_cause_warnings() -> None:
    async with running_broker(env={"BROKER_JWT_ISSUER": "us", "BROKER_HEARTBEET": "5"}) as broker:
        warned = [
            (line["event"], line["name"]) for line in events(broker.log()) if line["level"] == "warning"
        ]
    assert ("unknown setting", "BROKER_HEARTBEET (did you mean BROKER_HEARTBEAT?)") in warned
    ineffective = "BROKER_JWT_ISSUER without BROKER_JWT_SECRET or BROKER_JWKS_URL"
    assert ("setting has no effect in this release", ineffective) in warned


async def test_sessions_are_stored_in_the_given_redis() -> None:
    async with running_servers() as valkey, running_broker(env={"REDIS_URL": valkey.url}) as broker:
        assert (await run("models", "--url", broker.url))[0] == 0
        async with valkey.client() as client:
            assert await client.keys("broker:*")


async def test_no_secret_and_no_session_id_is_in_the_log() -> None:
    async with running_servers() as valkey:
        env = {"REDIS_URL": valkey.url, "OPENROUTER_API_KEY": "sk-very-secret", "BROKER_LOG_LEVEL": "debug"}
        async with running_broker(env=env) as broker, aiohttp.ClientSession() as page:
            request = {
                "model": "rehearsal/unauthorized",
                "messages": [{"role": "user", "content": "wherefore"}],
            }
            async with page.post(f"{broker.url}/prepare", json=request) as answer:
                session = (await answer.json())["sessionId"]
            async with page.get(
                f"{broker.url}/stream/{session}", headers={"Accept": "text/event-stream"}
            ) as stream:
                await stream.read()
            log = broker.log()
    assert session[:8] in log
    assert session not in log
    assert "sk-very-secret" not in log
    assert "wherefore" not in log


@pytest.mark.one_server("the Valkey that a broker brings along")
async def test_the_embedded_valkey_goes_with_a_broker_that_is_killed(short_path: Path) -> None:
    async with running_broker(env={"TMPDIR": str(short_path)}) as broker:
        (directory,) = directories(short_path)
        with redis.Redis(unix_socket_path=str(directory / "valkey.sock")) as client:
            assert client.ping()
        broker.process.kill()
        assert await broker.ended() == -signal.SIGKILL
        await eventually(lambda: not directory.exists())


def waited_for_a_core(pid: int) -> float:
    """Return the seconds that a process was ready to run while others ran; 0 where the system has no such number."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


@pytest.mark.slow
async def test_it_is_ready_in_two_seconds() -> None:
    async def seconds() -> float:
        started = time.monotonic()
        async with running_broker() as broker:
            return time.monotonic() - started - waited_for_a_core(broker.process.pid)

    assert min([await seconds() for _ in range(3)]) < 2.0


# chat and models


async def test_chat_prints_a_whole_answer() -> None:
    async with running_broker() as broker:
        status, out, err = await run("chat", "hi", "--model", "rehearsal/fast", "--url", broker.url)
        assert status == 0
        assert len(out) > 1000
        assert out.endswith("\n")
        assert "tokens · $" in err


async def test_chat_without_a_model_finds_one() -> None:
    async with running_broker(env={"BROKER_ALLOWED_MODELS": "rehearsal/fast"}) as broker:
        status, _, err = await run("chat", "hi", "--url", broker.url)
        assert (status, "rehearsal/fast" in err) == (0, True)


async def test_chat_uses_the_default_model_of_the_broker() -> None:
    async with running_broker(env={"BROKER_DEFAULT_MODEL": "rehearsal/fast"}) as broker:
        status, _, err = await run("chat", "hi", "--url", broker.url)
        assert (status, "rehearsal/fast" in err) == (0, True)


async def test_chat_prints_the_message_of_a_failure() -> None:
    async with running_broker() as broker:
        status, out, err = await run("chat", "hi", "--model", "rehearsal/truncated", "--url", broker.url)
        assert (status, len(out) > 10) == (1, True)
        assert err == "broker: The model service broke off before the answer was complete.\n"


async def test_an_unknown_model_is_refused_by_its_name() -> None:
    async with running_broker(env={"OPENROUTER_API_KEY": ""}) as broker:
        status, out, err = await run("chat", "hi", "--model", "rehearsal/nosuch", "--url", broker.url)
        assert (status, out) == (1, "")
        assert err == "broker: rehearsal/nosuch is not a valid model ID\n"


async def test_chat_and_models_show_their_token() -> None:
    async with running_broker(env={"BROKER_API_KEYS": "ann:k-1234"}) as broker:
        ask = ("chat", "hi", "--model", "rehearsal/fast", "--url", broker.url)
        for command in (ask, ("models", "--url", broker.url)):
            status, out, err = await run(*command)
            assert (status, out, "BROKER_TOKEN" in err) == (1, "", True)
            assert (await run(*command, env={"BROKER_TOKEN": "k-1234"}))[0] == 0
            status, out, err = await run(*command, env={"BROKER_TOKEN": "k-9999"})
            assert (status, out, len(err.splitlines()), "k-9999" in err) == (1, "", 1, False)


async def test_a_reader_of_chat_that_leaves_is_not_a_failure() -> None:
    async with running_broker() as broker:
        line = f"broker chat hi --model rehearsal/long --url {broker.url} | head -c 20"
        status, out, err = await run_shell(line)
        assert (status, len(out), err) == (1, 20, "")
        await eventually(lambda: [line for line in events(broker.log()) if line.get("state") == "cancelled"])
        assert [line for line in events(broker.log()) if line["level"] == "error"] == []
        assert "Traceback" not in broker.log()


async def test_ctrl_c_in_chat_cancels_at_the_broker() -> None:
    async with running_broker() as broker:
        process = await start("chat", "hi", "--model", "rehearsal/long", "--url", broker.url)
        assert process.stdout is not None
        await process.stdout.readexactly(20)
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        assert (process.returncode, err.decode()) == (130, "Cancelled.\n")
        await eventually(lambda: [line for line in events(broker.log()) if line.get("state") == "cancelled"])


async def test_chat_continues_after_a_broken_connection() -> None:
    async with (
        running_broker(env={"BROKER_RETRY_MS": "50"}) as broker,
        cutting_proxy(broker.port, 20_000) as port,
    ):
        whole = await run("chat", "hi", "--model", "rehearsal/fast", "--url", broker.url)
        cut = await run("chat", "hi", "--model", "rehearsal/fast", "--url", f"http://127.0.0.1:{port}")
        assert (whole[0], cut[0]) == (0, 0)
        assert cut[1] == whole[1]
        assert broker.log().count("/stream/") > 5


async def test_models_lists_searches_and_filters() -> None:
    async with running_broker() as broker:
        _, out, _ = await run("models", "--url", broker.url)
        lines = out.splitlines()
        assert lines[0].split() == ["id", "name", "context", "prompt", "$/M", "completion", "$/M"]
        assert [
            line
            for line in lines
            if line.startswith("rehearsal/plain ") and "32,768" in line and "0.4" in line
        ]
        _, out, _ = await run("models", "REASONING", "--url", broker.url)
        assert [line.split()[0] for line in out.splitlines()[1:]] == ["rehearsal/reasoning"]
        _, out, _ = await run("models", "--free", "--url", broker.url)
        assert len(out.splitlines()) > 1
        assert all(line.split()[-2:] == ["free", "free"] for line in out.splitlines()[1:])


# rehearse


async def test_rehearse_prints_its_address_and_answers_there() -> None:
    process = await start("rehearse", "--port", "0")
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        assert url.startswith("http://127.0.0.1:")
        assert url.endswith("/api/v1")
        assert (await process.stdout.readline()).decode().split()[0].startswith("rehearsal/")
        async with aiohttp.ClientSession() as page, page.get(f"{url}/models") as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_rehearse_says_when_its_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = await run("rehearse", "--port", str(port))
    assert (status, out) == (1, "")
    assert err.startswith(f"broker: port {port} is not available: ")
    assert len(err.splitlines()) == 1


async def test_rehearse_says_when_nobody_can_read_it() -> None:
    told = "broker: standard output cannot be written (no space left on device).\n"
    assert await run_shell("broker rehearse --port 0 >/dev/full") == (1, "", told)
