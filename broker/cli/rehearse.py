"""`broker rehearse`: the scripted upstream alone, to test a page against failures."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from broker.cli.output import write
from broker.cli.words import complain, reason
from broker.logs import configure_logs
from broker.rehearsal.app import rehearsal_beside
from broker.rehearsal.behaviours import MODELS


def rehearse(port: int) -> int:
    """Run it until Ctrl-C and return the exit status."""
    configure_logs("warning", None)
    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(_rehearse(port))
    except OSError as error:
        return complain(f"port {port} is not available: {reason(error)}.")
    return 0


async def _rehearse(port: int) -> None:
    async with rehearsal_beside(port=port) as url:
        width = max(len(model.id) for model in MODELS)
        rows = [f"  {model.id:<{width}}  {model.description}" for model in MODELS]
        write("\n".join((url, *rows, "")))
        await asyncio.Event().wait()
