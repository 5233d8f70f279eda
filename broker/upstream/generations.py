"""What OpenRouter's books say of one generation: GET /generation?id=."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2
import openai
import orjson

from broker.core.errors import UpstreamError
from broker.upstream.client import map_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai import AsyncOpenAI

TIMEOUT = 5.0
"""Seconds for one look."""


class NoSuchPath(UpstreamError):  # noqa: N818 - as the other errors
    """This upstream keeps no such books."""


async def fetch_generation(client: AsyncOpenAI, generation_id: str) -> Mapping[str, Any] | None:
    """The record of a generation; None while there is none yet.

    Raises:
        NoSuchPath: a 404 without a JSON error comes from a server that does not know the path.
        UpstreamError: it could not be asked.
    """
    with map_errors():
        try:
            response = await client.get(
                "/generation",
                cast_to=httpx2.Response,
                options={"params": {"id": generation_id}, "timeout": TIMEOUT},
            )
        except openai.NotFoundError as error:
            if _tells_error(error.response.content):
                return None
            raise NoSuchPath from None
    try:
        data = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        raise NoSuchPath from None
    record = data.get("data") if isinstance(data, dict) else None
    return record if isinstance(record, dict) else None


def _tells_error(body: bytes) -> bool:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(data, dict) and "error" in data
