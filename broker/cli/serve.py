"""`broker serve`: load the settings, report what is wrong with them, and run the service."""

from __future__ import annotations

import errno
import os
import signal
import socket
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from broker.cli.output import OutputError, write
from broker.cli.words import BAD_USE, complain
from broker.core.errors import StoreUnavailable
from broker.logs import configure_logs
from broker.settings import (
    SettingsError,
    contradictions,
    load_secrets,
    load_settings,
    not_yet_served,
    otlp_protocols,
    pass_on_otel_settings,
    read_system_file,
    unknown_settings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from broker.settings import Settings

_CANNOT_LISTEN = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES, socket.EAI_NONAME})


def serve(flags: Mapping[str, Any], *, rehearsal: bool, embedded: bool) -> int:
    """Run the service until it is stopped, and return the exit status.

    Args:
        flags: settings by their attribute; None is not given.
        rehearsal: use the scripted upstream.
        embedded: store sessions in an embedded Valkey, whatever ``REDIS_URL`` says.
    """
    # Until the service can reload its secrets at this signal, the signal must not end it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    environment = dict(os.environ)

    def load() -> Settings:
        settings = load_settings(**flags)
        pass_on_otel_settings()
        unknown = unknown_settings()
        require(settings, rehearsal=rehearsal, embedded=embedded)
        if settings.workers > 1 and settings.clients_file is not None:  # one worker reads it itself
            from broker.identity.clients_file import read_clients_file  # noqa: PLC0415 - only where it is used

            read_clients_file(settings.clients_file)
        configure_logs(settings.log_level, settings.log_format, secrets=settings.secrets)
        _warn(settings, unknown)
        # The host is given in any case, for here it is known where the application listens.
        return settings.model_copy(update={"host": settings.host})

    try:
        settings = load()
    except SettingsError as error:
        return complain(error, BAD_USE)
    if settings.workers == 1:
        # The service with all its libraries is imported only when it is certain to run.
        from broker import service  # noqa: PLC0415 - see above

        read = partial(load_secrets, **flags)
        run = partial(service.serve, load=read, say=_say, rehearsal=rehearsal, embedded=embedded)
    else:
        from broker import supervisor  # noqa: PLC0415 - see above

        command = supervisor.Command(flags, environment, rehearsal, embedded, load=load, say=_say)
        run = partial(supervisor.serve, command=command)
    return _run(run, settings)


def require(settings: Settings, *, rehearsal: bool, embedded: bool) -> None:
    """Check the settings against this way of starting.

    Raises:
        SettingsError: a setting that is needed is not set.
    """
    if settings.openrouter_api_key is None and not rehearsal:
        raise SettingsError("OPENROUTER_API_KEY must be set, or start with --rehearsal, which needs no key")
    otlp_protocols()
    if settings.redis_url is None and not embedded and not settings.listens_on_loopback:
        raise SettingsError(
            f"REDIS_URL must be set to listen on {settings.host}, or start with --embedded to keep"
            " sessions in this process's own Valkey"
        )
    if settings.system_file is not None:
        read_system_file(settings.system_file)


def _warn(settings: Settings, unknown: list[str]) -> None:
    log = structlog.get_logger(__name__)
    for name in unknown:
        log.warning("unknown setting", name=name)
    for sentence in contradictions(settings):
        log.warning(sentence)
    for name in not_yet_served(settings):
        log.warning("setting has no effect in this release", name=name)


def _run(serve: Callable[[Settings], int], settings: Settings) -> int:
    try:
        return serve(settings)
    except SettingsError as error:  # of the clients file
        return complain(error, BAD_USE)
    except StoreUnavailable as error:
        return complain(error)
    except OSError as error:
        if error.errno not in _CANNOT_LISTEN:
            return _report_bug()
        return complain(f"cannot listen on {settings.host}:{settings.port}: {_why(error)}")
    except Exception:  # noqa: BLE001 - a bug's traceback goes through the logs, which remove secrets
        return _report_bug()


def _say(line: str) -> None:
    with suppress(OutputError):  # the service needs no standard output
        write(f"{line}\n")


def _report_bug() -> int:
    structlog.get_logger(__name__).exception("the service failed")
    return 1


def _why(error: OSError) -> str:
    # The loop's own text repeats the address; the text of a failed look-up has its own numbers.
    return str(error.strerror) if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
