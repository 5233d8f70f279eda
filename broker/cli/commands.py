"""The arguments and the help of the commands.

Each command imports its own module when it runs, so that none waits for the libraries of another.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from broker import __version__
from broker.cli.output import write
from broker.cli.words import CREDENTIAL

# The value is checked together with the settings, so that the message is the same wherever it was given.
Host = Annotated[str | None, typer.Option(help="Address to listen on.", metavar="ADDRESS")]
Port = Annotated[str | None, typer.Option(help="Port to listen on; 0 is any free one.", metavar="PORT")]
RedisUrl = Annotated[str | None, typer.Option(help="Redis or Valkey to keep sessions in.", metavar="URL")]
UpstreamUrl = Annotated[str | None, typer.Option(help="Base URL of the model service.", metavar="URL")]
LogLevel = Annotated[str | None, typer.Option(help="How much to log.", metavar="LEVEL")]

Url = Annotated[str, typer.Option(help="Where the broker is.", metavar="URL")]


def _no_flag(context: typer.Context, token: str | None) -> str | None:
    source = context.get_parameter_source("token")
    if source is not None and source.name == "COMMANDLINE":
        raise typer.BadParameter(f"other users of this machine can see flags; set {CREDENTIAL} instead")
    return token.strip() if token is not None else None


Token = Annotated[str | None, typer.Option(envvar=CREDENTIAL, hidden=True, callback=_no_flag)]


class By(StrEnum):
    """The keys by which the usage ledger is summed."""

    CLIENT = "client"
    MODEL = "model"
    DAY = "day"


DEFAULT_URL = "http://127.0.0.1:3000"

app = typer.Typer(
    help="Stands between a web page and a language model.",
    no_args_is_help=True,
    # A traceback of a command could show a key.
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        write(f"broker {__version__}\n")
        raise typer.Exit


@app.callback()
def _broker(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    *,
    rehearsal: Annotated[
        bool,
        typer.Option("--rehearsal", help="Answer from a scripted upstream; needs no key and no network."),
    ] = False,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Run a Valkey beside it, for this run only.")
    ] = False,
    host: Host = None,
    port: Port = None,
    redis_url: RedisUrl = None,
    upstream_url: UpstreamUrl = None,
    log_level: LogLevel = None,
) -> None:
    """Run the service. Settings come from these flags, the environment and .env, in that order."""
    from broker.cli import serve as command  # noqa: PLC0415 - see the module

    flags = {
        "host": host,
        "port": port,
        "redis_url": redis_url,
        "upstream_url": upstream_url,
        "log_level": log_level,
    }
    raise typer.Exit(command.serve(flags, rehearsal=rehearsal, embedded=embedded))


@app.command()
def rehearse(
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 is any free one.", metavar="PORT", min=0, max=65535)
    ] = 3001,
) -> None:
    """Run the scripted upstream alone, to test a page against failures that models have."""
    from broker.cli import rehearse as command  # noqa: PLC0415 - see the module

    raise typer.Exit(command.rehearse(port))


@app.command()
def chat(
    text: Annotated[
        str | None, typer.Argument(help="What to say; - reads standard input. Without it, a conversation.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Which model to ask.", metavar="MODEL")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Send a message through a running broker and print the answer as it streams. Ctrl-C cancels it.

    Without TEXT, on a terminal, it is a conversation: /model, /new and /help are its commands, Ctrl-D ends it.

    If the broker requires identity, set BROKER_TOKEN in the environment to an API key or a JWT.
    """
    from broker.cli import chat as command  # noqa: PLC0415 - see the module

    if text is not None:
        raise typer.Exit(command.chat(text, model=model, url=url, token=token))
    from broker.cli.conversation import converse  # noqa: PLC0415 - see the module

    raise typer.Exit(converse(model=model, url=url, token=token))


@app.command()
def usage(
    day: Annotated[
        str | None, typer.Option(help="Which day, UTC; today if not given.", metavar="YYYY-MM-DD")
    ] = None,
    month: Annotated[
        str | None, typer.Option(help="Which month; this one with --by day.", metavar="YYYY-MM")
    ] = None,
    by: Annotated[By, typer.Option(help="What to sum by.")] = By.CLIENT,
    *,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV, for a spreadsheet.")] = False,
) -> None:
    """Print the usage ledger of a day or a month, straight from Redis: requests, tokens and cost.

    REDIS_URL and BROKER_KEY_PREFIX, in the environment or in .env, say where the ledger is.
    """
    from broker.cli import usage as command  # noqa: PLC0415 - see the module

    raise typer.Exit(command.usage(day, month, by=by.value, as_json=json, as_csv=csv))


@app.command()
def top(
    url: Annotated[
        list[str] | None, typer.Option(help="A broker whose metrics to show; may be repeated.", metavar="URL")
    ] = None,
    *,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, for a script.")] = False,
    interval: Annotated[
        float, typer.Option(help="Seconds between two frames.", metavar="SECONDS", min=0.5, max=3600)
    ] = 2.0,
) -> None:
    """Watch workers, streams, first-chunk times, errors and spending; q or Ctrl-C ends it.

    REDIS_URL and BROKER_KEY_PREFIX, in the environment or in .env, say where the workers are. Metrics come from each
    --url, by default from the broker of this machine; a broker of another machine asks for BROKER_METRICS_TOKEN.
    """
    from broker.cli import top as command  # noqa: PLC0415 - see the module

    raise typer.Exit(command.top(url or [DEFAULT_URL], once=once, interval=interval))


_sessions = typer.Typer()
app.add_typer(_sessions, name="sessions")

OfClient = Annotated[
    str | None,
    typer.Option("--client", help="A client as listed, or the name of its API key.", metavar="CLIENT"),
]


@_sessions.callback(invoke_without_command=True)
def sessions(
    context: typer.Context,
    client: OfClient = None,
    *,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")] = False,
) -> None:
    """List the sessions that run now, on all workers, straight from Redis.

    REDIS_URL and BROKER_KEY_PREFIX, in the environment or in .env, say where they are.
    """
    from broker.cli import sessions as command  # noqa: PLC0415 - see the module

    if context.invoked_subcommand is None:
        raise typer.Exit(command.sessions(client, as_json=json))
    if client is not None or json:
        raise typer.BadParameter("write the options of `cancel` after the word `cancel`")


@_sessions.command()
def cancel(
    session: Annotated[str | None, typer.Argument(help="A session, as listed.", metavar="ID")] = None,
    client: OfClient = None,
) -> None:
    """End a session, or all of a client, also those that are prepared and have not started.

    It does what the stop button of a page does: each session ends as cancelled, and what came before that is paid.
    """
    from broker.cli import sessions as command  # noqa: PLC0415 - see the module

    raise typer.Exit(command.cancel(session, client))


_keys = typer.Typer(help="Make keys for clients.", no_args_is_help=True)
app.add_typer(_keys, name="keys")


@_keys.command("new")
def new_key(
    name: Annotated[str, typer.Argument(help="The name of the client.", metavar="NAME")],
) -> None:
    """Print a new key, which is stored nowhere, and its table for BROKER_CLIENTS_FILE."""
    from broker.cli import keys as command  # noqa: PLC0415 - see the module

    raise typer.Exit(command.new(name))


@app.command()
def models(
    query: Annotated[str, typer.Argument(help="Part of a model's id or name.")] = "",
    *,
    free: Annotated[bool, typer.Option("--free", help="Only those that cost nothing.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List the models of a running broker, with context and prices.

    If the broker requires identity, set BROKER_TOKEN in the environment to an API key or a JWT.
    """
    from broker.cli import models as command  # noqa: PLC0415 - see the module

    raise typer.Exit(command.models(query, free=free, url=url, token=token))
