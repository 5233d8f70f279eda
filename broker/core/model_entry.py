"""The list of models: parse the upstream's answer, find and filter its models, and write the answer for callers.

Nothing is fetched or stored here. Prices are in `core/pricing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import orjson

from broker.core.foreign import fits, is_too_large_to_parse
from broker.core.json_to_keep import json_to_keep
from broker.core.pricing import Prices, dearest_list, is_free, parse_prices

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Suffixes that choose among the providers of a model and do not change the model:
# https://openrouter.ai/docs/guides/routing/model-variants. All others (":free", ":extended", ":thinking") are models
# with their own prices and context, and ":online" adds the price of a web search.
ROUTING_SUFFIXES = frozenset({"nitro", "floor", "exacto"})


MAX_LIST_BYTES = 16 * 1024 * 1024
"""OpenRouter's list of some 500 models takes two or three MB."""

MAX_LIST_VALUES = 1_000_000
"""JSON values of a list; OpenRouter's has some 60 for each model."""

MAX_MODELS = 10_000
"""Entries that are kept of a list."""

MAX_ENTRY = 64 * 1024
"""Bytes of JSON of an entry; a larger one is left out."""

MAX_ID = 256
"""Characters of an id; it is compared with globs."""


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of the list. None means unknown in every field.

    Attributes:
        id: the name that requests use.
        name: the name for people; the id where the upstream gives none.
        context_length: tokens, the smaller value of model and provider.
        max_completion_tokens: tokens, likewise.
        prices: its prices.
        entry: the upstream's entry, as JSON.
    """

    id: str
    name: str
    context_length: int | None
    max_completion_tokens: int | None
    prices: Prices | None
    entry: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """One version of the whole list. Two versions are equal only if they are the same object.

    Attributes:
        entries: the models in the upstream's order.
        index: models by id and, where it is unique, by canonical slug.
        openrouter: an entry has OpenRouter's ``pricing.prompt``, a decimal string. Other services have a ``pricing``
            too.
        dearest: the highest price of the list under each key; None where no entry has prices.
    """

    entries: tuple[Model, ...]
    index: Mapping[str, Model]
    openrouter: bool
    dearest: Prices | None = None

    def find(self, model_id: str) -> Model | None:
        """Return the model for a request that names `model_id`; None where that is not certain.

        It is found by id, else by ``canonical_slug``, else without a suffix that only chooses among providers. With
        such a suffix, the list's price is right only where ``provider.max_price`` limits the request to it.
        """
        base, _, suffix = model_id.rpartition(":")
        return self.index.get(model_id) or (self.index.get(base) if suffix in ROUTING_SUFFIXES else None)


@dataclass(frozen=True, slots=True)
class Listing:
    """An answer of GET /models: ``{"data": [...]}``, and its strong entity tag without the quotes."""

    body: bytes
    etag: str


def parse_models(body: bytes) -> Models:
    """Parse the upstream's answer: an object with a list under ``data``, or a list. ``data: null`` is an empty list.

    Entries without an id, and entries that are too large, are left out. Of several with one id the first is kept.

    Raises:
        ValueError: the body is not a list of models, or is too large to be parsed.
    """
    if len(body) > MAX_LIST_BYTES or is_too_large_to_parse(body, most_values=MAX_LIST_VALUES):
        raise ValueError("too large for a list of models")
    document = orjson.loads(body)
    data = document
    if isinstance(document, dict) and "data" in document:
        data = [] if document["data"] is None else document["data"]
    if not isinstance(data, list):
        raise ValueError("no list of models")  # noqa: TRY004 - invalid data of others, like invalid JSON
    raw_by_id: dict[str, dict[str, Any]] = {}
    for raw in data:
        if len(raw_by_id) >= MAX_MODELS:
            break
        if (
            isinstance(raw, dict)
            and _is_id(raw.get("id"))
            and raw["id"] not in raw_by_id
            and fits(raw, MAX_ENTRY)
        ):
            raw_by_id[raw["id"]] = raw
    models = {model_id: _model(raw) for model_id, raw in raw_by_id.items()}
    slugs = {slug: models[model_id] for slug, model_id in _unique_slugs(raw_by_id).items()}
    openrouter = any(_has_openrouter_prices(raw) for raw in raw_by_id.values())
    dearest = dearest_list(model.prices for model in models.values() if model.prices is not None)
    return Models(tuple(models.values()), {**slugs, **models}, openrouter, dearest)


def allows(allowed: Iterable[str], model_id: str) -> bool:
    """Return True if a model matches one of these globs. Ids are compared as they are written."""
    return any(fnmatchcase(model_id, pattern) for pattern in allowed)


def narrow(models: Iterable[Model], allowed: Sequence[str]) -> list[Model]:
    """Return the models whose id matches one of the globs."""
    return [model for model in models if allows(allowed, model.id)]


def search(models: Iterable[Model], q: str, *, free: bool) -> list[Model]:
    """Return the models with `q` in id or name, ignoring case; with `free`, only those with every price zero."""
    wanted = q.casefold()
    return [
        model
        for model in models
        if (wanted in model.id.casefold() or wanted in model.name.casefold())
        and (not free or is_free(model.prices))
    ]


def write_listing(models: Iterable[Model]) -> Listing:
    """Return the answer that lists these models."""
    body = b'{"data":[' + b",".join(model.entry for model in models) + b"]}"
    return Listing(body, sha256(body).hexdigest()[:32])


def _is_id(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_ID


def _has_openrouter_prices(raw: Mapping[str, Any]) -> bool:
    pricing = raw.get("pricing")
    return isinstance(pricing, dict) and isinstance(pricing.get("prompt"), str)


def _model(raw: dict[str, Any]) -> Model:
    name = raw.get("name")
    return Model(
        id=raw["id"],
        name=name if isinstance(name, str) and name else raw["id"],
        context_length=_smaller(raw, "context_length"),
        max_completion_tokens=_smaller(raw, "max_completion_tokens"),
        prices=parse_prices(raw),
        entry=json_to_keep(raw),
    )


def _smaller(raw: Mapping[str, Any], key: str) -> int | None:
    """Return the smaller number of tokens in the entry and its ``top_provider``; None where neither has one."""
    provider = raw.get("top_provider")
    said = [raw.get(key), provider.get(key) if isinstance(provider, dict) else None]
    known = [value for value in said if isinstance(value, int) and not isinstance(value, bool) and value > 0]
    return min(known, default=None)


def _unique_slugs(raw_by_id: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return ids by canonical slug, where the slug belongs to one model only.

    ``x:free`` has the slug of the paid ``x``, and an alias (``~…``) has the slug of its present model. Neither may
    stand for the slug, or a paid request would be booked as free.
    """
    ids: dict[str, set[str]] = {}
    for model_id, raw in raw_by_id.items():
        slug = raw.get("canonical_slug")
        if isinstance(slug, str) and ":" not in model_id and not model_id.startswith("~"):
            ids.setdefault(slug, set()).add(model_id)
    return {slug: next(iter(found)) for slug, found in ids.items() if len(found) == 1}
