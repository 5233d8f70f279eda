"""`broker chat` as a process, against a broker that ends, breaks and refuses on request."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import pty
import signal
import ssl
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.cli.fake_broker import answers, chunk, done, fake_broker, refused, run, run_shell, sends, start
from tests.system.harness import clean_environment, free_port

FIGURES = "5 + 7 tokens · $0.001\n"


def no_model() -> web.Response:
    detail = {"field": "model", "message": "is missing"}
    return web.json_response(
        {"error": {"code": "invalid_request", "message": "Not valid.", "details": [detail]}}, status=422
    )


def certified_by_nobody(directory: Path) -> ssl.SSLContext:
    """The context of a server with a self-made certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path = directory / "pem"
    path.write_bytes(
        certificate.public_bytes(Encoding.PEM)
        + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


async def test_only_the_text_goes_to_standard_output() -> None:
    async with fake_broker(sends(chunk(1, "Hello"), chunk(2, ", you."), done(3))) as broker:
        assert await run("chat", "hi", "--url", broker.url) == (0, "Hello, you.\n", FIGURES)
        assert broker.prepared == [{"messages": [{"role": "user", "content": "hi"}]}]
        assert broker.asked == []


async def test_the_model_that_is_named_is_asked() -> None:
    async with fake_broker(sends(done(1))) as broker:
        status, _, _ = await run("chat", "hi", "--model", "a/b", "--url", f"{broker.url}/")
        assert status == 0
        assert broker.prepared[0]["model"] == "a/b"


async def test_chat_asks_the_first_model_where_there_is_no_default() -> None:
    async with fake_broker(
        sends(done(1)), prepare=[no_model()], models=[{"id": "a/b"}, {"id": "a/c"}]
    ) as broker:
        status, _, _ = await run("chat", "hi", "--url", broker.url)
        assert status == 0
        assert [request.get("model") for request in broker.prepared] == [None, "a/b"]


async def test_without_a_default_and_a_list_there_is_nobody_to_ask() -> None:
    async with fake_broker(prepare=[no_model()]) as broker:
        assert await run("chat", "hi", "--url", broker.url) == (
            1,
            "",
            "broker: This broker has no models to ask.\n",
        )


async def test_a_model_that_is_refused_is_not_replaced() -> None:
    async with fake_broker(prepare=[no_model()], models=[{"id": "a/b"}]) as broker:
        told = "broker: Not valid.\n  model: is missing\n"
        assert await run("chat", "hi", "--model", "x", "--url", broker.url) == (1, "", told)


async def test_chat_resumes_after_a_broken_connection() -> None:
    lines = [
        sends(chunk(1, "one "), chunk(2, "two "), breaks=True),
        sends(chunk(3, "three "), "id: 1-4\nevent: chunk\ndata: half", breaks=True),
        answers(503),
        sends(chunk(5, "four"), done(6)),
    ]
    async with fake_broker(*lines) as broker:
        assert await run("chat", "hi", "--url", broker.url) == (0, "one two three four\n", FIGURES)
        assert broker.cursors == [None, "1-2", "1-4", "1-4"]


async def test_chat_resumes_after_a_connection_that_ends_early() -> None:
    async with fake_broker(sends(), sends(chunk(1, "one")), sends(done(2))) as broker:
        assert await run("chat", "hi", "--url", broker.url) == (0, "one\n", FIGURES)
        assert broker.cursors == [None, None, "1-1"]


async def test_an_error_is_printed_after_the_text_before_it() -> None:
    async with fake_broker(sends(chunk(1, "one"), refused("upstream_error", "It failed."))) as broker:
        assert await run("chat", "hi", "--url", broker.url) == (1, "one\n", "broker: It failed.\n")


async def test_chat_waits_for_a_full_broker_and_says_so_once() -> None:
    full = sends(refused("too_many_streams", "Too many.", final=False))
    async with fake_broker(full, full, sends(chunk(1, "one"), done(2))) as broker:
        assert await run("chat", "hi", "--url", broker.url) == (0, "one\n", f"Too many. Waiting.\n{FIGURES}")
        assert broker.cursors == [None, None, None]


async def test_chat_says_its_place_in_line() -> None:
    line = [sends(f'event: queued\ndata: {{"position":{place},"of":9}}') for place in (2, 1)]
    async with fake_broker(*line, sends(chunk(1, "one"), done(2))) as broker:
        status, shown, notes = await run("chat", "hi", "--url", broker.url)
        assert (status, shown) == (0, "one\n")
        assert [word for word in ("number 2", "number 1") if word in notes] == ["number 2", "number 1"]


async def test_204_ends_it() -> None:
    async with fake_broker(sends(chunk(1, "one"), breaks=True), answers(204)) as broker:
        told = "broker: The answer is over; there is nothing more to show.\n"
        assert await run("chat", "hi", "--url", broker.url) == (1, "one\n", told)


async def test_a_refused_stream_is_reported_and_final() -> None:
    body = {"error": {"code": "host_not_allowed", "message": "Not that host."}}
    async with fake_broker(answers(403, body)) as broker:
        assert await run("chat", "hi", "--url", broker.url) == (1, "", "broker: Not that host.\n")
        assert len(broker.cursors) == 1


async def test_a_broker_that_brings_nothing_is_given_up() -> None:
    async with fake_broker(sends()) as broker:
        status, out, err = await run("chat", "hi", "--url", broker.url)
        assert (status, out) == (1, "")
        assert err == "broker: The broker cannot be reached any more; the answer is not complete.\n"
        assert len(broker.cursors) == 10


async def test_thoughts_are_not_for_programs() -> None:
    async with fake_broker(sends(chunk(1, "", "Hm."), chunk(2, "Yes."), done(3))) as broker:
        assert await run("chat", "hi", "--url", broker.url) == (0, "Yes.\n", FIGURES)


async def test_a_terminal_shows_thoughts_dim_and_obeys_no_text() -> None:
    async with fake_broker(sends(chunk(1, "", "Hm."), chunk(2, "Y\x1b[2Jes."), done(3))) as broker:
        ours, theirs = pty.openpty()
        try:
            env = clean_environment({"TERM": "xterm-256color"})
            env.pop("NO_COLOR", None)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "broker", "chat", "hi", "--url", broker.url, stdout=theirs, env=env
            )
            assert await process.wait() == 0
            assert os.read(ours, 1000) == b"\x1b[2mHm.\x1b[0m\r\nY[2Jes.\r\n"
        finally:
            os.close(ours)
            os.close(theirs)


async def test_ctrl_c_cancels_the_session() -> None:
    async with fake_broker(sends(chunk(1, "one"), stays=True)) as broker:
        process = await start("chat", "hi", "--url", broker.url)
        assert process.stdout is not None
        assert await process.stdout.readexactly(3) == b"one"
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
        assert (process.returncode, out, err) == (130, b"\n", b"Cancelled.\n")
        assert broker.asked == ["cancel"]


async def test_ctrl_c_before_the_first_word_cancels_too() -> None:
    async with fake_broker(sends(stays=True)) as broker:
        process = await start("chat", "hi", "--url", broker.url)
        await broker.streaming.wait()
        process.send_signal(signal.SIGINT)
        await process.communicate()
        assert process.returncode == 130
        assert broker.asked == ["cancel"]


async def test_a_second_ctrl_c_waits_for_no_broker() -> None:
    async with fake_broker(sends(chunk(1, "one\n"), stays=True), never_cancels=True) as broker:
        process = await start("chat", "hi", "--url", broker.url)
        assert process.stdout is not None
        await process.stdout.readexactly(3)
        process.send_signal(signal.SIGINT)
        await broker.cancelling.wait()
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        assert (process.returncode, err) == (130, b"")


async def test_a_cancel_without_an_answer_is_reported() -> None:
    async with fake_broker(sends(chunk(1, "one\n"), stays=True), never_cancels=True) as broker:
        process = await start("chat", "hi", "--url", broker.url)
        assert process.stdout is not None
        await process.stdout.readexactly(3)
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        told = b"It could not be cancelled; it will stop by itself, since nobody watches.\n"
        assert (process.returncode, err) == (130, told)


async def test_a_reader_that_leaves_cancels_the_session() -> None:
    async with fake_broker(sends(*(chunk(n, "word " * 1000) for n in range(1, 200)), stays=True)) as broker:
        process = await start("chat", "hi", "--url", broker.url)
        assert process.stdout is not None
        await process.stdout.readexactly(10)
        process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined] # there is no public method
        assert process.stderr is not None
        err = await process.stderr.read()
        assert await process.wait() == 1
        assert err == b""
        assert broker.asked == ["cancel"]


async def test_a_closed_pipe_cancels_without_a_message() -> None:
    async with fake_broker(sends(*(chunk(n, "word " * 1000) for n in range(1, 200)), stays=True)) as broker:
        assert await run_shell(f"broker chat hi --url {broker.url} | head -c 4") == (1, "word", "")
        assert broker.asked == ["cancel"]


async def test_a_full_disk_is_one_sentence_and_cancels() -> None:
    async with fake_broker(sends(chunk(1, "one"), stays=True)) as broker:
        told = "broker: standard output cannot be written (no space left on device).\n"
        assert await run_shell(f"broker chat hi --url {broker.url} >/dev/full") == (1, "", told)
        assert broker.asked == ["cancel"]


async def test_without_an_output_nothing_is_asked() -> None:
    async with fake_broker(sends(chunk(1, "one"), done(2))) as broker:
        told = "broker: standard output cannot be written (it is closed).\n"
        assert await run_shell(f"broker chat hi --url {broker.url} >&-") == (1, "", told)
        assert broker.prepared == []


async def test_a_closed_standard_error_leaves_the_answer_clean() -> None:
    async with fake_broker(sends(chunk(1, "one"), done(2))) as broker:
        assert await run_shell(f"broker chat hi --url {broker.url} 2>&-") == (0, "one\n", "")


async def test_a_full_standard_error_changes_nothing() -> None:
    async with fake_broker(sends(chunk(1, "one"), done(2))) as broker:
        assert await run_shell(f"broker chat hi --url {broker.url} 2>/dev/full") == (0, "one\n", "")


async def test_characters_that_the_output_lacks_are_question_marks() -> None:
    async with fake_broker(sends(chunk(1, "caf\u00e9"), done(2))) as broker:
        _, out, _ = await run("chat", "hi", "--url", broker.url, env={"PYTHONIOENCODING": "ascii"})
        assert out == "caf?\n"


async def test_ctrl_c_before_the_session_ends_without_a_message() -> None:
    asked = asyncio.Event()

    async def nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(nobody, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for command in (["chat", "hi"], ["models"]):
            asked.clear()
            process = await start(*command, "--url", f"http://127.0.0.1:{port}")
            await asked.wait()
            process.send_signal(signal.SIGINT)
            out, err = await process.communicate()
            assert (process.returncode, out, err) == (130, b"", b"")


async def test_a_dash_reads_standard_input() -> None:
    async with fake_broker(sends(done(1))) as broker:
        status, _, _ = await run("chat", "-", "--url", broker.url, typed="from\nthe pipe\n")
        assert status == 0
        assert broker.prepared[0]["messages"][0]["content"] == "from\nthe pipe\n"


async def test_empty_text_is_refused_in_one_line() -> None:
    told = "broker: standard input is not UTF-8 text.\n"
    assert await run("chat", "-", typed=b"\xff\xfe") == (2, "", told)
    told = "broker: the arguments must be UTF-8 text.\n"
    assert await run("chat", b"\xff\xfe") == (2, "", told)
    assert await run("models", b"\xff\xfe") == (2, "", told)


async def test_text_that_is_too_long_is_refused_and_not_cut() -> None:
    told = "broker: standard input is longer than 16777216 bytes.\n"
    assert await run("chat", "-", typed=b"a" * (16 * 1024 * 1024 + 1)) == (2, "", told)


async def test_a_closed_standard_input_counts_as_empty() -> None:
    assert await run_shell("broker chat - <&-") == (2, "", "broker: there is nothing to say.\n")


@pytest.mark.parametrize("text", ["", "  \n"])
async def test_nothing_to_say_is_not_sent(text: str) -> None:
    assert await run("chat", text) == (2, "", "broker: there is nothing to say.\n")
    assert await run("chat", "-", typed=text) == (2, "", "broker: there is nothing to say.\n")


async def test_a_broker_that_is_not_there_is_one_sentence() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    told = f"broker: The broker at {url} cannot be reached (connection refused).\n"
    assert await run("chat", "hi", "--url", url) == (1, "", told)
    assert await run("models", "--url", url) == (1, "", told)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "localhost:3000",
            "http://[::1",
            "http://127.0.0.1:x",
            "http://127.0.0.1:99999",
            "http://127.0.0.1:0",
        ),
        *("http://:3000", "http://a b", "http://127.0.0.1:3000?a=b", "http://127.0.0.1:3000/#chat"),
    ],
)
async def test_an_invalid_url_is_reported_in_one_sentence(url: str) -> None:
    told = f"broker: {url} is not the URL of a broker; one looks like http://127.0.0.1:3000.\n"
    assert await run("chat", "hi", "--url", url) == (1, "", told)
    assert await run("models", "--url", url) == (1, "", told)


async def test_a_url_with_a_password_is_refused_without_repeating_it() -> None:
    told = "broker: The URL of a broker has no credentials; BROKER_TOKEN is for them.\n"
    assert await run("chat", "hi", "--url", "http://ann:pass@127.0.0.1:3000") == (1, "", told)


async def test_the_token_of_the_environment_is_sent() -> None:
    async with fake_broker(sends(done(1)), key="k-1", models=[{"id": "a/b"}]) as broker:
        env = {"BROKER_TOKEN": " k-1\n"}
        assert (await run("chat", "hi", "--url", broker.url, env=env))[0] == 0
        assert (await run("models", "--url", broker.url, env=env))[0] == 0
        assert broker.shown == ["Bearer k-1", "Bearer k-1"]


@pytest.mark.parametrize("command", [["chat", "hi"], ["models"]])
async def test_a_401_is_reported_with_the_way_to_identify(command: list[str]) -> None:
    async with fake_broker(key="k-1") as broker:
        told = "broker: This needs an API key or a token. Put it into the environment as BROKER_TOKEN.\n"
        for env in ({}, {"BROKER_TOKEN": ""}):
            assert await run(*command, "--url", broker.url, env=env) == (1, "", told)
        assert broker.shown == [None, None]
        refused = await run(*command, "--url", broker.url, env={"BROKER_TOKEN": "k-2"})
        assert refused == (1, "", "broker: This needs an API key or a token.\n")


@pytest.mark.parametrize("token", ["a b", "a\nb: c", "caf\u00e9"])
async def test_an_invalid_token_is_refused_without_repeating_it(token: str) -> None:
    told = "broker: BROKER_TOKEN must be visible ASCII characters, no spaces.\n"
    assert await run("chat", "hi", env={"BROKER_TOKEN": token}) == (1, "", told)


async def test_a_token_cannot_be_given_as_a_flag() -> None:
    status, out, err = await run("chat", "hi", "--token", "k-1")
    assert (status, out) == (2, "")
    assert "BROKER_TOKEN" in err
    assert "k-1" not in err


@pytest.mark.parametrize("command", ["chat", "models"])
async def test_the_help_mentions_the_token(command: str) -> None:
    status, out, _ = await run(command, "--help")
    assert (status, "BROKER_TOKEN" in out, "--token" in out) == (0, True, False)


async def test_an_untrusted_certificate_is_reported(tmp_path: Path) -> None:
    async with fake_broker(tls=certified_by_nobody(tmp_path)) as broker:
        told = f"broker: The broker at {broker.url} cannot be reached (its certificate is not trusted).\n"
        assert await run("models", "--url", broker.url) == (1, "", told)


async def test_a_broker_without_tls_is_reported() -> None:
    async with fake_broker() as broker:
        url = broker.url.replace("http:", "https:")
        told = f"broker: The broker at {url} cannot be reached (it does not speak TLS).\n"
        assert await run("models", "--url", url) == (1, "", told)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (web.Response(status=502, text="<html>"), "The broker answered with status 502 and no explanation."),
        (web.Response(status=201, text="<html>"), "What answers there is not a session broker."),
        (web.json_response([], status=201), "What answers there is not a session broker."),
        (
            web.json_response({"error": "no"}, status=400),
            "The broker answered with status 400 and no explanation.",
        ),
        (web.json_response({"error": {"code": "draining", "message": "Going."}}, status=503), "Going."),
        (web.json_response({"error": {"message": "No.", "details": [5, ["field"]]}}, status=422), "No."),
    ],
)
async def test_an_odd_answer_to_prepare_is_one_sentence(answer: web.Response, told: str) -> None:
    async with fake_broker(prepare=[answer]) as broker:
        assert await run("chat", "hi", "--url", broker.url) == (1, "", f"broker: {told}\n")


async def test_models_asks_the_broker_to_search() -> None:
    async with fake_broker(models=[{"id": "a/b", "name": "B"}]) as broker:
        status, out, err = await run("models", "b c", "--free", "--url", broker.url)
        assert (status, err) == (0, "")
        assert out.splitlines()[1].split() == ["a/b", "B"]
        assert broker.asked == ["models?q=b c&free=true"]


async def test_models_says_that_there_are_none() -> None:
    async with fake_broker() as broker:
        assert await run("models", "--url", broker.url) == (1, "", "broker: no model matches.\n")


@pytest.mark.parametrize("models", [[5], [{}], {"a": 1}, 5])
async def test_an_invalid_list_of_models_is_reported_in_one_sentence(models: Any) -> None:
    async with fake_broker(prepare=[no_model()], models=models) as broker:
        told = "broker: What answers there is not a session broker.\n"
        assert await run("chat", "hi", "--url", broker.url) == (1, "", told)


async def test_a_refused_request_says_how_long_to_wait() -> None:
    error = {"error": {"code": "rate_limited", "message": "Too many requests."}}
    refusal = web.json_response(error, status=429, headers={"Retry-After": "17"})
    async with fake_broker(sends(done(1)), prepare=[refusal]) as broker:
        told = "broker: Too many requests. Try again in 17 s.\n"
        assert await run("chat", "hi", "--model", "a/b", "--url", broker.url) == (1, "", told)
