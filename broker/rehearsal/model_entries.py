"""The models of the rehearsal, and their entries in GET /models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from broker.rehearsal.answer import Play, Prices

CREATED = 1_767_225_600
USUAL = Prices("0.0000004", "0.0000016")
DEAR = Prices("0.000003", "0.000015")
FREE = Prices("0", "0")
UNKNOWN = Prices("-1", "-1")

PARAMETERS = ("max_tokens", "max_completion_tokens", "stop", "temperature", "top_p", "seed")


@dataclass(frozen=True, slots=True)
class Model:
    """One model.

    Attributes:
        id: the name in requests.
        name: the name in a list.
        description: one sentence on what a page will see.
        script: the script of its answers.
        routes_to: the model that answers in its place, and whose prices apply.
    """

    id: str
    name: str
    description: str
    script: Play
    prices: Prices = USUAL
    context_length: int = 32_768
    max_completion_tokens: int | None = 8192
    parameters: tuple[str, ...] = PARAMETERS
    is_moderated: bool = False
    routes_to: str | None = None


def catalog_entry(model: Model) -> dict[str, Any]:
    """Return the model's entry in GET /models."""
    return {
        "id": model.id,
        "canonical_slug": model.id.removesuffix(":free"),
        "hugging_face_id": None,
        "name": model.name,
        "created": CREATED,
        "description": model.description,
        "context_length": model.context_length,
        "architecture": {
            "modality": "text->text",
            "input_modalities": ["text"],
            "output_modalities": ["text"],
            "tokenizer": "Other",
            "instruct_type": None,
        },
        "pricing": {"prompt": model.prices.prompt, "completion": model.prices.completion, "request": "0"},
        "top_provider": {
            "context_length": model.context_length,
            "max_completion_tokens": model.max_completion_tokens,
            "is_moderated": model.is_moderated,
        },
        "per_request_limits": None,
        "supported_parameters": list(model.parameters),
        "default_parameters": None,
        "supported_voices": None,
        "expiration_date": None,
        "links": {"details": f"/api/v1/models/{model.id}/endpoints"},
    }
