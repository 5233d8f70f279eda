"""Fetch OpenRouter's record of one generation: GET /generation?id=."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2
import openai
import orjson

from broker.upstream.client import map_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai import AsyncOpenAI

TIMEOUT = 5.0
"""Seconds for one request."""


async def fetch_generation(client: AsyncOpenAI, generation_id: str) -> Mapping[str, Any] | None:
    """Return the record of a generation; None while there is none yet.

    An HTML page, as a proxy sends it, is not a record, and says nothing about later requests.

    Raises:
        UpstreamError: the request failed.
    """
    with map_errors():
        try:
            response = await client.get(
                "/generation",
                cast_to=httpx2.Response,
                options={"params": {"id": generation_id}, "timeout": TIMEOUT},
            )
        except openai.NotFoundError:
            return None
    try:
        data = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return None
    record = data.get("data") if isinstance(data, dict) else None
    return record if isinstance(record, dict) else None
