"""One worker of several: what it hears from its parent (`broker/supervisor.py`) and tells it.

Two pipes connect them. On standard input comes one line, the `Order`; the end of the input says that the worker has to
leave: another one has taken its place, or the parent has died, in whatever way. On standard output the worker writes
one line, when it serves. Everything else that is printed goes to standard error.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from pydantic import BaseModel

from broker.cli.serve import require
from broker.cli.words import BAD_USE, complain
from broker.logs import configure_logs
from broker.settings import SettingsError, load_secrets, load_settings, pass_on_otel_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.settings import Settings

READY = b"ready\n"


class Order(BaseModel):
    """What a parent tells a new worker, as a line of JSON.

    Attributes:
        number: of the worker, from 1.
        sockets: file numbers of the listening sockets.
        flags: settings that were given as flags; those that all workers share are always among them.
        redis_url: of the embedded Valkey, if there is one.
        upstream_url: of the rehearsal upstream, if there is one.
        metrics_directory: where the workers add up their metrics, if there is a place.
        replaces: another worker serves until this one is ready.
    """

    number: int
    sockets: list[int]
    flags: dict[str, str | None]
    redis_url: str | None
    upstream_url: str | None
    metrics_directory: Path | None
    replaces: bool


def main() -> int:
    """Run the worker until its end, and return the exit status."""
    # Until the service can reload its secrets at this signal, the signal must not end it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    parent = os.getppid()
    line = sys.stdin.buffer.readline()
    if not line:  # the parent has died
        return 0
    order = Order.model_validate_json(line)
    report = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        settings = load_settings(**order.flags)
        pass_on_otel_settings()
        require(settings, rehearsal=order.upstream_url is not None, embedded=order.redis_url is not None)
    except SettingsError as error:
        return complain(error, BAD_USE)
    if settings.redis_url is None and order.redis_url is None:
        return complain("REDIS_URL must be set, as it was at the start", BAD_USE)
    configure_logs(settings.log_level, settings.log_format, secrets=settings.secrets, worker=order.number)
    status = _run(settings, order, report)
    if order.metrics_directory is not None and os.getppid() != parent:  # it could not remove it itself
        shutil.rmtree(order.metrics_directory, ignore_errors=True)
    return status


def _run(settings: Settings, order: Order, report: int) -> int:
    # The service with all its libraries is imported only when it is certain to run.
    from broker import service  # noqa: PLC0415 - see above

    if order.upstream_url is not None:
        settings = service.rehearsed(settings, order.upstream_url)
    parent = service.Parent(
        number=order.number,
        sockets=[socket.socket(fileno=number) for number in order.sockets],
        redis_url=order.redis_url,
        metrics_directory=order.metrics_directory,
        replaces=order.replaces,
        report_ready=lambda: _write(report, READY),
        watch=_watch_parent,
    )
    try:
        return service.serve_for_parent(settings, parent, load=partial(load_secrets, **order.flags))
    except SettingsError as error:  # of the clients file
        return complain(error, BAD_USE)
    except Exception:  # noqa: BLE001 - a bug's traceback goes through the logs, which remove secrets
        structlog.get_logger(__name__).exception("the worker failed")
        return 1


def _write(number: int, data: bytes) -> None:
    with suppress(BrokenPipeError):  # the parent has died, which the other pipe says too
        os.write(number, data)


def _watch_parent(leave: Callable[[], None]) -> None:
    loop, number = asyncio.get_running_loop(), sys.stdin.fileno()

    def read() -> None:
        if not os.read(number, 1):
            loop.remove_reader(number)
            leave()

    loop.add_reader(number, read)
