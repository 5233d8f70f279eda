"""What OpenRouter's books say of one generation: GET /generation?id=."""

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
"""Seconds for one look."""


async def fetch_generation(client: AsyncOpenAI, generation_id: str) -> Mapping[str, Any] | None:
    """The record of a generation; None while there is none yet.

    A page of HTML, as a proxy answers it, is no record, and says nothing of the next look.

    Raises:
        UpstreamError: it could not be asked.
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
