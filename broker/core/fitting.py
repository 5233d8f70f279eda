"""Make a valid request fit its models and our limits: build the body for the upstream and the figures of its cost.

A limit that is not known of a model does not apply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from broker.core.errors import InvalidRequest, PromptTooLong
from broker.core.tokens import DEFAULT_BYTES_PER_TOKEN, Size
from broker.core.trimming import trim

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from broker.core.dialect import DialectName

T = TypeVar("T")

# https://openrouter.ai/docs/features/message-transforms: on by default where the context is small
_COMPRESSION = "context-compression"


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The limits of a model.

    Attributes:
        context_length: tokens of prompt and answer together.
        max_completion_tokens: tokens of the longest answer.
    """

    context_length: int | None = None
    max_completion_tokens: int | None = None


UNLIMITED = ModelLimits()
"""The limits of a model of which nothing is known."""


@dataclass(frozen=True, slots=True)
class FitRules:
    """The limits that the operator sets.

    Attributes:
        max_prompt_tokens: tokens of the longest prompt; 0 uses only the limits of the models.
        max_output_tokens: tokens of the longest answer.
        switch_off_compression: tell OpenRouter not to shorten prompts, so that only the broker trims.
        user: is sent where the request has no user of its own.
    """

    max_prompt_tokens: int
    max_output_tokens: int
    switch_off_compression: bool
    user: str | None


class Request(Protocol):
    """A valid request in any dialect. It is never changed.

    Attributes:
        dialect: in which it is.
        field: the parameter that holds the conversation.
        caps: the parameters that cap the answer; the first one is sent where a request names none.
    """

    dialect: ClassVar[DialectName]
    field: ClassVar[str]
    caps: ClassVar[tuple[str, ...]]

    @property
    def model(self) -> str:
        """The model that is asked first."""

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters for the upstream except model and conversation; no value is null."""

    @property
    def reachable_models(self) -> tuple[str, ...]:
        """Every model that may serve this request."""

    def image_addresses(self) -> Iterator[tuple[str, str]]:
        """Yield the place and the URL of each picture."""

    def measure_frame(self) -> Size:
        """Return the size of the prompt without the entries of the conversation."""

    def measure(self) -> list[Size]:
        """Return the size of each entry of the conversation."""

    def droppable(self) -> Iterator[list[int]]:
        """Yield the places of entries that can be dropped together, in the order in which they are dropped."""

    def calibration_size(self, kept: Sequence[int], frame: Size, sizes: Sequence[Size]) -> Size | None:
        """Return the size of the prompt of these entries, or None where its usage gives no calibration sample."""

    def body(self, kept: Sequence[int]) -> dict[str, Any]:
        """Return the body for the upstream, with these entries and all parameters."""


@dataclass(frozen=True, slots=True)
class FittedRequest:
    """A request that is ready to be sent.

    Attributes:
        body: what is sent, as plain JSON.
        model: the model that is asked first.
        prompt_tokens: our estimate of the prompt that is sent.
        reserved_prompt_tokens: the estimate for the reservation. It assumes at most the default bytes per token:
            learned values come from the answers of clients and must not extend their budgets.
        max_output_tokens: the cap of each answer.
        dropped: entries of the conversation that trimming removed.
        dialect: in which it is.
        answers: answers that are asked for; more than one only where ``n`` was opened.
        calibration_sample: the size of a prompt whose usage gives a sample of bytes per token; None for any other.
    """

    body: dict[str, Any]
    model: str
    prompt_tokens: int
    reserved_prompt_tokens: int
    max_output_tokens: int
    dropped: int
    dialect: DialectName
    answers: int = 1
    calibration_sample: Size | None = None


def fit(
    request: Request,
    models: Mapping[str, ModelLimits],
    rules: FitRules,
    bytes_per_token: Mapping[str, float] | None = None,
) -> FittedRequest:
    """Cap the answer, trim the conversation, and build the body. The request is not changed.

    Args:
        request: the valid request.
        models: the limits of the models; for ``a/b:nitro``, those of ``a/b``.
        rules: the limits of the operator.
        bytes_per_token: learned values by model; the lowest one of the reachable models decides.

    Raises:
        InvalidRequest: the requested answer leaves no room for a prompt.
        PromptTooLong: the prompt is too long even after trimming; the detail has both figures, in tokens.
    """
    reachable = request.reachable_models
    known = [_of_model(models, model, UNLIMITED) for model in reachable]
    contexts = [limits.context_length for limits in known if limits.context_length]
    cap = _output_cap(request, known, contexts, rules.max_output_tokens)
    if contexts and cap >= min(contexts):
        raise _no_room(request, cap, min(contexts))
    limit = _prompt_limit(contexts, cap, rules.max_prompt_tokens)
    learned = bytes_per_token or {}
    density = min([_of_model(learned, model, DEFAULT_BYTES_PER_TOKEN) for model in reachable])

    frame, sizes = request.measure_frame(), request.measure()
    costs = [size.tokens(density) for size in sizes]
    kept = trim(request.droppable(), costs, limit - frame.tokens(density))
    prompt_tokens = frame.tokens(density) + sum([costs[index] for index in kept])
    if prompt_tokens > limit:
        raise _too_long(request.field, prompt_tokens, int(limit))
    sizes_kept = [sizes[index] for index in kept]
    reserved = prompt_tokens
    if density > DEFAULT_BYTES_PER_TOKEN:
        reserved = sum([size.tokens(DEFAULT_BYTES_PER_TOKEN) for size in (frame, *sizes_kept)])
    return FittedRequest(
        body=_capped(request.body(kept), request.caps, cap) | _ours(request, rules),
        model=request.model,
        prompt_tokens=prompt_tokens,
        reserved_prompt_tokens=reserved,
        max_output_tokens=cap,
        dropped=len(sizes) - len(kept),
        dialect=request.dialect,
        answers=request.parameters.get("n", 1),
        calibration_sample=request.calibration_size(kept, frame, sizes_kept),
    )


def _of_model(known: Mapping[str, T], model: str, default: T) -> T:
    return known.get(model) or known.get(model.partition(":")[0]) or default


def _output_cap(request: Request, known: Sequence[ModelLimits], contexts: Sequence[int], most: int) -> int:
    """Return the lowest of all limits on the length of the answer."""
    asked = [length for length, _ in _asked(request)]
    if not asked and contexts:
        asked = [min(contexts) // 2]
    theirs = [limits.max_completion_tokens for limits in known if limits.max_completion_tokens]
    return min([most, *asked, *theirs])


def _prompt_limit(contexts: Sequence[int], cap: int, most: int) -> float:
    limits = [min(contexts) - cap] if contexts else []
    if most > 0:
        limits.append(most)
    return min(limits, default=math.inf)


def _asked(request: Request) -> list[tuple[int, str]]:
    """Return the longest answer that a request asks for, with each parameter that asks for it."""
    return [(request.parameters[field], field) for field in request.caps if field in request.parameters]


def _no_room(request: Request, cap: int, context: int) -> InvalidRequest:
    """Return the error for an answer as long as the context. Only a request can name such a length; no default does."""
    asked, field = min(_asked(request))
    allowed = f" ({cap} are allowed)" if cap < asked else ""
    sentence = f"An answer of up to {asked} tokens{allowed} leaves no room for the question in a context of {context}."
    return InvalidRequest(details=[{"field": field, "message": sentence}])


def _too_long(field: str, prompt_tokens: int, limit: int) -> PromptTooLong:
    sentence = f"The conversation has about {prompt_tokens} tokens after trimming, and {limit} fit."
    detail = {"field": field, "message": sentence, "promptTokens": prompt_tokens, "limit": limit}
    return PromptTooLong(details=[detail])


def _capped(body: dict[str, Any], caps: Sequence[str], cap: int) -> dict[str, Any]:
    """Return a body with this cap in each parameter that caps the answer."""
    body = body | dict.fromkeys([field for field in caps if field in body] or caps[:1], cap)
    reasoning = body.get("reasoning")
    if reasoning and reasoning.get("max_tokens"):
        body["reasoning"] = {**reasoning, "max_tokens": min(cap, reasoning["max_tokens"])}
    return body


def _ours(request: Request, rules: FitRules) -> dict[str, Any]:
    """Return the parameters that the broker adds: the user, and that nobody else shortens the prompt."""
    added: dict[str, Any] = {}
    if rules.user and "user" not in request.parameters:
        added["user"] = rules.user
    if rules.switch_off_compression:
        plugins = request.parameters.get("plugins", ())
        others = [plugin for plugin in plugins if plugin.get("id") != _COMPRESSION]
        added["plugins"] = [*others, {"id": _COMPRESSION, "enabled": False}]
    return added
