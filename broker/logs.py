"""Configure the logs: all lines of the broker and its libraries go through one chain to standard error.

Each line is cleaned before it is written: it has no secret, and only the first eight characters of a session id, which
is a bearer secret. This applies to texts, to values inside lists and mappings, and to exceptions. Only the id of a
request is written whole, though a client may make it look like a session id: the answer carries it.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO

import structlog

from broker.core.session import SESSION_ID, short

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import EventDict, Processor

# At lower levels these log URLs, headers and bodies, and openai's level can be set from outside.
_TALKATIVE: Final = ("openai", "httpx2", "httpcore2")
_QUOTES_HEADERS: Final = "opentelemetry.util.re"
"""Warns of headers for a collector that it cannot parse, and quotes them. They usually hold a key."""

_SESSION_ID: Final = re.compile(rf"\b{SESSION_ID}\b", re.IGNORECASE)
_REQUEST_ID: Final = "request_id"
_SHORTEST_SECRET: Final = 4  # replacing a shorter one would make every line unreadable and hide nothing
_DEEPEST: Final = 6
_FIRST: Final = ("timestamp", "level", "event", "logger", "worker_number")

REPEATED_AFTER: Final = 60.0
"""Seconds after a warning in which the same warning is not written again."""

CHANGED_AFTER: Final = 5.0
"""The same for the warnings in `_CHANGES`, which are about a change of Redis."""

_CHANGES: Final = frozenset(
    {"redis cannot be reached", "redis is another server than before", "redis came back empty"}
)
_MOST_WARNINGS: Final = 500
_SESSION_LINE: Final = "session ended"
# The fields that distinguish two warnings of one event. Ids of sessions and requests do not: each failure has another.
_KIND_FIELDS: Final = (
    "why",
    "code",
    "status",
    "script",
    "doing",
    "loop",
    "error",
    "reason",
    "setting",
    "name",
    "number",
)


def configure_logs(
    level: str,
    log_format: Literal["text", "json"] | None,
    *,
    secrets: Iterable[str] = (),
    worker: int | None = None,
    out: TextIO | None = None,
) -> None:
    """Configure all logs of this process. Called at the start, and again for new secrets.

    Args:
        level: `debug`, `info`, `warning`, `error` or `critical`.
        log_format: ``text`` for people, ``json`` for machines; None is text on a terminal, else JSON.
        secrets: texts that must not appear in any line.
        worker: the number of this worker, for each line, where several write to one place.
        out: standard error where it is None.
    """
    out = sys.stderr if out is None else out
    in_words = out.isatty() if log_format is None else log_format == "text"
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([] if worker is None else [partial(_add_worker, worker)]),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    handler.addFilter(_hide_headers)
    handler.addFilter(_worth_telling)
    handler.addFilter(Repetitions())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                censor(secrets),
                _in_reading_order,
                _words(colors=out.isatty()) if in_words else structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)


def log_into_application(secrets: Iterable[str]) -> None:
    """Send the lines of the broker to the `logging` of the application that it is a part of, to the loggers `broker.…`.

    The application sets levels and handlers. If it has configured structlog by itself, the lines go there.

    Args:
        secrets: texts that must not appear in a line, in addition to those of earlier calls.
    """
    if structlog.is_configured():
        for processor in structlog.get_config()["processors"]:
            if isinstance(processor, _IntoApplication):
                processor.hide(secrets)
        return
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.filter_by_level,
            _IntoApplication(secrets),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )


class Line(dict[str, Any]):
    """The fields of a line. Its text is the event and the fields."""

    def __str__(self) -> str:
        rest = (f"{name}={value}" for name, value in self.items() if name != "event")
        return " ".join((str(self.get("event", "")), *rest))


class _IntoApplication:
    """The last processor of a chain. It cleans the fields and leaves the exception to the application's handlers."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = set(secrets)
        self._clean = censor(self._secrets)

    def hide(self, secrets: Iterable[str]) -> None:
        """Remove these texts as well."""
        self._secrets.update(secrets)
        self._clean = censor(self._secrets)

    def __call__(self, logger: Any, method: str, event: EventDict) -> tuple[tuple[Line], dict[str, Any]]:
        error = {"exc_info": event.pop("exc_info")} if "exc_info" in event else {}
        return (Line(self._clean(logger, method, event)),), error


def censor(secrets: Iterable[str]) -> Callable[[Any, str, EventDict], EventDict]:
    """Return a processor that cleans all values of a line, and leaves only plain JSON values."""
    known = sorted({secret for secret in secrets if len(secret) >= _SHORTEST_SECRET}, key=len, reverse=True)
    anywhere = re.compile("|".join(map(re.escape, known))) if known else None

    def without_secrets(text: str) -> str:
        return text if anywhere is None else anywhere.sub("***", text)

    def clean_text(text: str) -> str:
        return _SESSION_ID.sub(lambda session_id: f"{short(session_id[0])}…", without_secrets(text))

    def clean(value: Any, depth: int = 0) -> Any:
        match value:
            case None | bool() | int() | float():
                return value
            case str():
                return clean_text(value)
            case Mapping() if depth < _DEEPEST:
                return {clean_text(str(key)): clean(item, depth + 1) for key, item in value.items()}
            case list() | tuple() | set() | frozenset() if depth < _DEEPEST:
                return [clean(item, depth + 1) for item in value]
        return clean_text(repr(value))

    def processor(_logger: Any, _method: str, event: EventDict) -> EventDict:
        cleaned = {key: clean(value) for key, value in event.items()}
        if isinstance(request_id := event.get(_REQUEST_ID), str):
            cleaned[_REQUEST_ID] = without_secrets(request_id)
        return cleaned

    return processor


class Repetitions:
    """Lets a warning or an error pass once a minute, with the number of times it was suppressed.

    Lines at the end of a session always pass: each is about another session. A warning about a change of Redis passes
    once in five seconds: the log must have the beginning of each outage, not only its end.

    Args:
        clock: seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: OrderedDict[tuple[object, ...], tuple[float, int]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True if the line is to be written."""
        fields = record.msg if isinstance(record.msg, dict) else {"event": record.msg}
        if record.levelno < logging.WARNING or fields.get("event") == _SESSION_LINE:
            return True
        now, kind = self._clock(), _kind_of(record, fields)
        told_at, held_back = self._told.pop(kind, (float("-inf"), 0))
        if now - told_at < (CHANGED_AFTER if fields.get("event") in _CHANGES else REPEATED_AFTER):
            self._told[kind] = (told_at, held_back + 1)
            return False
        self._told[kind] = (now, 0)
        if len(self._told) > _MOST_WARNINGS:
            self._told.popitem(last=False)
        if held_back and isinstance(record.msg, dict):
            record.msg = {**record.msg, "repeated": held_back}
        elif held_back:
            record.msg, record.args = f"{record.getMessage()} (repeated {held_back} times)", ()
        return True


def _kind_of(record: logging.LogRecord, fields: Mapping[str, Any]) -> tuple[object, ...]:
    error = record.exc_info[0] if record.exc_info else fields.get("exc_info")
    if isinstance(error, BaseException):
        error = type(error)
    texts = (str(fields.get(name, ""))[:100] for name in _KIND_FIELDS)
    return record.name, record.levelno, str(fields.get("event"))[:200], str(error)[:100], *texts


def _add_worker(number: int, _logger: Any, _method: str, event: EventDict) -> EventDict:
    event["worker_number"] = number
    return event


def _in_reading_order(_logger: Any, _method: str, event: EventDict) -> EventDict:
    first = {key: event.pop(key) for key in _FIRST if key in event}
    return {**first, **event}


def _words(*, colors: bool) -> Processor:
    # Other formatters of exceptions show local variables, which hold prompts and answers.
    return structlog.dev.ConsoleRenderer(
        colors=colors, exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
    )


def _hide_headers(record: logging.LogRecord) -> bool:
    if record.name == _QUOTES_HEADERS and isinstance(record.args, tuple):
        record.args = ("***",) * len(record.args)
    return True


def _worth_telling(record: logging.LogRecord) -> bool:
    if record.name == "aiohttp.server" and record.exc_info is not None:
        kinds = {
            kind.__name__ for kind in type(record.exc_info[1]).__mro__
        }  # aiohttp is not imported for one name
        if "HttpProcessingError" in kinds:
            # A request that is not HTTP was answered with a 400. The error quotes it, including Authorization.
            return False
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] not in _TALKATIVE
