"""Every log line is one line, in one form, without secrets."""

from __future__ import annotations

import io
import json
import logging
import uuid
from typing import TYPE_CHECKING, Any, Literal

import pytest
import structlog
from opentelemetry.util.re import parse_env_headers

from broker.logs import Repetitions, censor, configure_logs, log_into_application
from tests.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "sk-or-v1-0123456789"
SESSION = "3f2b8c1e-9a4d-4e6f-8b7a-1c2d3e4f5a6b"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def logger() -> Any:
    return structlog.get_logger(f"broker.test.{uuid.uuid4().hex}")


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def fail(told: str) -> None:
    prompt = "".join(reversed("llet ton od"))
    raise LookupError(f"{len(prompt)} of {told}")


def clean(value: Any, *secrets: str) -> Any:
    return censor(secrets)(None, "info", {"value": value})["value"]


def test_a_line_is_json_with_its_time_level_logger_and_values() -> None:
    out = io.StringIO()
    configure_logs("info", "json", out=out)
    logger().info("session prepared", model="some/model", messages=3)
    (line,) = lines(out)
    assert line["event"] == "session prepared"
    assert line["level"] == "info"
    assert line["logger"].startswith("broker.test.")
    assert line["timestamp"].endswith("Z")
    assert (line["model"], line["messages"]) == ("some/model", 3)
    assert list(line) == ["timestamp", "level", "event", "logger", "model", "messages"]


def test_a_line_of_one_worker_of_several_has_its_number() -> None:
    out = io.StringIO()
    configure_logs("info", "json", worker=2, out=out)
    logger().info("session prepared")
    logging.getLogger("aiohttp").warning("from a library")
    assert [line["worker_number"] for line in lines(out)] == [2, 2]


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\x0b", "\x1b[2K", "\x85", "\u2028"])
def test_a_value_never_begins_a_line_of_its_own(form: Literal["json", "text"], end: str) -> None:
    out = io.StringIO()
    configure_logs("info", form, out=out)
    logger().info("request", path=f"/a{end}2026-01-01 [info] all is well", status=404)
    assert len(out.getvalue().splitlines()) == 1
    assert "\x1b[2K" not in out.getvalue()


def test_away_from_a_terminal_the_form_is_json() -> None:
    out = io.StringIO()
    configure_logs("info", None, out=out)
    logger().info("ready")
    assert lines(out)[0]["event"] == "ready"


def test_on_a_terminal_the_form_is_coloured_text() -> None:
    out = Terminal()
    configure_logs("info", None, out=out)
    logger().info("ready", port=3000)
    assert "ready" in out.getvalue()
    assert "\x1b[" in out.getvalue()


def test_text_away_from_a_terminal_has_no_colours() -> None:
    out = io.StringIO()
    configure_logs("info", "text", out=out)
    logger().info("ready", port=3000)
    assert "ready" in out.getvalue()
    assert "port=3000" in out.getvalue()
    assert "\x1b[" not in out.getvalue()


def test_lower_levels_are_not_logged() -> None:
    out = io.StringIO()
    configure_logs("warning", "json", out=out)
    logger().info("ours")
    logging.getLogger("aiohttp.server").info("theirs")
    logger().warning("told")
    assert [line["event"] for line in lines(out)] == ["told"]


@pytest.mark.parametrize("name", ["aiohttp.server", "redis.connection", "asyncio", "openai", "httpx2"])
def test_a_librarys_warning_comes_in_the_same_form(name: str) -> None:
    out = io.StringIO()
    configure_logs("info", "json", out=out)
    logging.getLogger(name).warning("lost %s", "contact")
    (line,) = lines(out)
    assert (line["event"], line["level"], line["logger"]) == ("lost contact", "warning", name)


@pytest.mark.parametrize("name", ["openai", "openai._base_client", "httpx2", "httpcore2.http11"])
def test_requests_of_the_upstream_client_are_never_logged(name: str) -> None:
    out = io.StringIO()
    configure_logs("debug", "json", out=out)
    talkative = logging.getLogger(name)
    talkative.setLevel(logging.DEBUG)
    try:
        talkative.debug("POST with body %s", "prompt")
        talkative.info("HTTP Request: POST")
    finally:
        talkative.setLevel(logging.NOTSET)
    assert out.getvalue() == ""


def test_values_bound_to_the_context_are_in_the_line() -> None:
    out = io.StringIO()
    configure_logs("info", "json", out=out)
    with structlog.contextvars.bound_contextvars(request="r-1"):
        logger().info("answered")
    assert lines(out)[0]["request"] == "r-1"


def test_an_exception_is_one_field_without_local_variables() -> None:
    out = io.StringIO()
    configure_logs("info", "json", out=out)
    try:
        fail("ours")
    except LookupError:
        logger().exception("that failed")
    (line,) = lines(out)
    assert "LookupError: 11 of ours" in line["exception"]
    assert "test_logs.py" in line["exception"]
    assert "do not tell" not in line["exception"]


def test_text_shows_a_traceback_without_local_variables() -> None:
    out = Terminal()
    configure_logs("info", None, out=out)
    try:
        fail("ours")
    except LookupError:
        logger().exception("that failed")
    assert "LookupError: 11 of ours" in out.getvalue()
    assert "do not tell" not in out.getvalue()


@pytest.mark.parametrize("form", ["json", "text"])
def test_secrets_in_an_exception_are_replaced(form: Literal["json", "text"]) -> None:
    out = io.StringIO()
    configure_logs("info", form, secrets=[KEY], out=out)
    try:
        fail(KEY)
    except LookupError:
        logger().exception("that failed")
        logging.getLogger("aiohttp.server").exception("so did %s", KEY)
    assert out.getvalue().count("LookupError: 11 of ***") == 2
    assert KEY not in out.getvalue()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f"Bearer {KEY}!", "Bearer ***!"),
        ({"headers": {"Authorization": KEY}}, {"headers": {"Authorization": "***"}}),
        ([KEY, ("a", KEY)], ["***", ["a", "***"]]),
        ({KEY: 1}, {"***": 1}),
        (KEY.encode(), "b'***'"),
        (ValueError(KEY), "ValueError('***')"),
        (12, 12),
        (None, None),
        (True, True),
        (0.5, 0.5),
    ],
)
def test_a_secret_is_replaced_wherever_it_lies(value: Any, expected: Any) -> None:
    assert clean(value, KEY) == expected


def test_a_secret_inside_another_does_not_uncover_the_rest() -> None:
    assert clean("abcdefgh", "abcd", "abcdefgh") == "***"


def test_a_secret_with_pattern_characters_is_removed() -> None:
    assert clean("a.*b(c and axxb(c", "a.*b(c") == "*** and axxb(c"


def test_an_empty_or_tiny_secret_spoils_nothing() -> None:
    assert clean("ordinary", "", "o") == "ordinary"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (SESSION, "3f2b8c1e…"),
        (f"GET /stream/{SESSION}?lastEventId=1-2", "GET /stream/3f2b8c1e…?lastEventId=1-2"),
        (SESSION.upper(), "3F2B8C1E…"),
        (uuid.UUID(SESSION), "UUID('3f2b8c1e…')"),
        (f"{SESSION} {SESSION}", "3f2b8c1e… 3f2b8c1e…"),
        (f"broker:1:{{{SESSION}}}:events", "broker:1:{3f2b8c1e…}:events"),
    ],
)
def test_only_the_beginning_of_a_session_id_is_logged(value: Any, expected: str) -> None:
    assert clean(value) == expected


def test_only_request_ids_are_logged_whole() -> None:
    out = io.StringIO()
    configure_logs("info", "json", secrets=[KEY], out=out)
    logger().info(
        f"request {SESSION}",
        request_id=SESSION,
        session=SESSION,
        extra={"request_id": SESSION},
        request=SESSION,
    )
    (line,) = lines(out)
    assert line["request_id"] == SESSION
    assert {line["event"], line["session"], line["extra"]["request_id"], line["request"]} == {
        "request 3f2b8c1e…",
        "3f2b8c1e…",
    }


def test_secrets_are_removed_from_request_ids() -> None:
    clean_line = censor([KEY])
    assert clean_line(None, "info", {"request_id": f"{SESSION}.{KEY}"}) == {"request_id": f"{SESSION}.***"}
    assert clean_line(None, "info", {"request_id": [SESSION, KEY]}) == {"request_id": ["3f2b8c1e…", "***"]}


def test_a_uuid_of_another_version_is_not_cut() -> None:
    assert clean("3f2b8c1e-9a4d-1e6f-8b7a-1c2d3e4f5a6b") == "3f2b8c1e-9a4d-1e6f-8b7a-1c2d3e4f5a6b"


def test_a_value_that_contains_itself_ends() -> None:
    loop: list[Any] = [SESSION]
    loop.append(loop)
    assert "9a4d" not in json.dumps(clean(loop))


def test_odd_values_never_prevent_a_line() -> None:
    out = io.StringIO()
    configure_logs("info", "json", out=out)
    logger().info("odd", big=1 << 80, keys={(1, 2): object}, lone="\ud800", raw=b"\xff")
    assert lines(out)[0]["event"] == "odd"


def passing(
    repetitions: Repetitions, event: str = "redis refused", level: int = logging.WARNING, **fields: Any
) -> Any:
    """Return what is written of a line, or None."""
    record = logging.LogRecord("broker.x", level, "", 0, {"event": event, **fields}, (), None)
    return record.msg if repetitions.filter(record) else None


def test_a_repeated_warning_is_logged_once_a_minute() -> None:
    clock = Clock()
    repetitions = Repetitions(clock)
    assert passing(repetitions, session="a") == {"event": "redis refused", "session": "a"}
    for n in range(1000):
        clock.now += 0.05
        assert passing(repetitions, session=f"s{n}") is None
    clock.now = 1060.0
    assert passing(repetitions, session="b") == {"event": "redis refused", "session": "b", "repeated": 1000}
    assert passing(repetitions, session="c") is None


@pytest.mark.parametrize(
    "event", ["redis cannot be reached", "redis is another server than before", "redis came back empty"]
)
def test_a_change_is_logged_each_time_but_not_in_a_flood(event: str) -> None:
    clock = Clock()
    repetitions = Repetitions(clock)
    assert passing(repetitions, event=event) is not None
    clock.now += 1
    assert passing(repetitions, event=event) is None
    clock.now += 4
    assert passing(repetitions, event=event) == {"event": event, "repeated": 1}
    assert passing(repetitions, event=event, why="another reason") is not None


def test_different_warnings_are_logged() -> None:
    repetitions = Repetitions(Clock())
    assert passing(repetitions, code="a") is not None
    assert passing(repetitions, code="b") is not None
    assert passing(repetitions, event="redis cannot be reached") is not None
    assert passing(repetitions, level=logging.ERROR) is not None


def test_session_lines_and_infos_are_never_suppressed() -> None:
    repetitions = Repetitions(Clock())
    for _ in range(5):
        assert passing(repetitions, event="session ended") is not None
        assert passing(repetitions, level=logging.INFO) is not None


def test_a_line_of_a_library_is_counted_too() -> None:
    clock = Clock()
    repetitions = Repetitions(clock)

    def line(number: int) -> str | None:
        record = logging.LogRecord("aiohttp", logging.ERROR, "", 0, "failed %d", (number,), None)
        return record.getMessage() if repetitions.filter(record) else None

    assert [line(n) for n in range(3)] == ["failed 0", None, None]
    clock.now += 60
    assert line(3) == "failed 3 (repeated 2 times)"


def test_the_kinds_that_are_remembered_are_bounded() -> None:
    repetitions = Repetitions(Clock())
    for n in range(2000):
        assert passing(repetitions, code=f"c{n}") is not None
    assert len(repetitions._told) <= 500


def test_the_lines_of_a_process_pass_through_it() -> None:
    out = io.StringIO()
    configure_logs("info", "json", out=out)
    log = logger()
    for n in range(3):
        log.warning("redis refused", session=f"s{n}")
    log.info("done")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["redis refused", "done"]


# As a part of an application


def test_an_application_gets_the_lines_in_its_own_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log_into_application(["hunter2"])
    log_into_application([KEY])
    logger().info("session ended", state="done", id=SESSION, told=f"{KEY} hunter2")
    logger().debug("not of interest")
    try:
        fail("nothing")
    except LookupError:
        logger().exception("it broke", code="x")
    ended, broke = caplog.records
    assert ended.name.startswith("broker.test.")
    assert ended.getMessage() == "session ended state=done id=3f2b8c1e… told=*** ***"
    assert (broke.levelname, broke.getMessage()) == ("ERROR", "it broke code=x")
    assert broke.exc_info is not None
    assert broke.exc_info[0] is LookupError


def test_an_application_that_has_set_up_structlog_keeps_it() -> None:
    out = io.StringIO()
    structlog.configure(
        processors=[structlog.processors.KeyValueRenderer()],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.PrintLoggerFactory(out),
    )
    log_into_application([KEY])
    logger().info("session ended", state="done")
    assert out.getvalue() == "state='done' event='session ended'\n"


def test_headers_for_a_collector_are_not_quoted() -> None:
    out = io.StringIO()
    configure_logs("info", "json", out=out)
    for liberal in (False, True):
        parse_env_headers(f"Authorization: Bearer {KEY}", liberal=liberal)
    assert [line["level"] for line in lines(out)] == ["warning"] * 2
    assert KEY not in out.getvalue()
