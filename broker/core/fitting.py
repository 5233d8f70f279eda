"""A valid chat request made to fit its models and our limits: the body that goes upstream, and what it may cost.

What is not known of a model does not bind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from broker.core.bytes_per_token import calibration_size
from broker.core.errors import InvalidRequest, PromptTooLong
from broker.core.parameters import OURS_IN_STREAM_OPTIONS
from broker.core.tokens import DEFAULT_BYTES_PER_TOKEN, Size, measure_frame, measure_message
from broker.core.trimming import trim

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from broker.core.chat import ChatRequest

T = TypeVar("T")

_CAP_FIELDS = ("max_tokens", "max_completion_tokens")

# https://openrouter.ai/docs/features/message-transforms: on by default where the context is small
_COMPRESSION = "context-compression"


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What is known of a model.

    Attributes:
        context_length: tokens of prompt and answer together.
        max_completion_tokens: the longest answer.
    """

    context_length: int | None = None
    max_completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class FitRules:
    """What an operator allows.

    Attributes:
        max_prompt_tokens: the longest prompt; 0 leaves it to the models.
        max_output_tokens: the longest answer.
        switch_off_compression: tell OpenRouter not to shorten prompts itself, so that only one of us trims.
        user: sent where the request has none of its own.
    """

    max_prompt_tokens: int
    max_output_tokens: int
    switch_off_compression: bool
    user: str | None


@dataclass(frozen=True, slots=True)
class FittedChat:
    """A request ready to be sent.

    Attributes:
        body: for POST /chat/completions, as plain JSON.
        model: the one that is asked first.
        prompt_tokens: our estimate of what is sent.
        reserved_prompt_tokens: the same for what is reserved and owed, at no more than the default bytes a token:
            what was learned comes from the answers of clients, and may not stretch their budgets.
        max_output_tokens: the cap on each answer.
        dropped_messages: how many trimming took out.
        answers: how many answers are asked for; more than one only where ``n`` was opened.
        calibration_sample: the size of a prompt whose usage will tell the model's bytes per token; None for any other.
    """

    body: dict[str, Any]
    model: str
    prompt_tokens: int
    reserved_prompt_tokens: int
    max_output_tokens: int
    dropped_messages: int
    answers: int = 1
    calibration_sample: Size | None = None


def fit(
    request: ChatRequest,
    models: Mapping[str, ModelLimits],
    rules: FitRules,
    bytes_per_token: Mapping[str, float] | None = None,
) -> FittedChat:
    """Caps the answer, trims the conversation, and builds the body. The request is left as it is.

    Args:
        request: as it was asked.
        models: what is known, by model; of ``a/b:nitro``, what is known of ``a/b``.
        rules: ours.
        bytes_per_token: what was learned, by model; the densest of the reachable ones decides.

    Raises:
        InvalidRequest: the answer that is asked for leaves no room for a prompt.
        PromptTooLong: even after trimming; the detail has both figures, in tokens.
    """
    known = [_of_model(models, model, ModelLimits()) for model in request.reachable_models]
    contexts = [limits.context_length for limits in known if limits.context_length]
    cap = _output_cap(request.parameters, known, contexts, rules.max_output_tokens)
    if contexts and cap >= min(contexts):
        raise _no_room(request.parameters, cap, min(contexts))
    limit = _prompt_limit(contexts, cap, rules.max_prompt_tokens)
    density = min(
        _of_model(bytes_per_token or {}, m, DEFAULT_BYTES_PER_TOKEN) for m in request.reachable_models
    )

    frame = measure_frame(request.parameters)
    sizes = [measure_message(message) for message in request.messages]
    costs = [size.tokens(density) for size in sizes]
    kept = trim(request.messages, costs, limit - frame.tokens(density))
    prompt_tokens = frame.tokens(density) + sum(costs[index] for index in kept)
    if prompt_tokens > limit:
        raise _too_long(prompt_tokens, int(limit))
    messages = [request.messages[index] for index in kept]
    safe = min(density, DEFAULT_BYTES_PER_TOKEN)
    return FittedChat(
        body=_body(request, messages, cap, rules),
        model=request.model,
        prompt_tokens=prompt_tokens,
        reserved_prompt_tokens=frame.tokens(safe) + sum(sizes[index].tokens(safe) for index in kept),
        max_output_tokens=cap,
        dropped_messages=len(request.messages) - len(kept),
        answers=request.parameters.get("n", 1),
        calibration_sample=calibration_size(
            request.parameters, messages, frame, [sizes[index] for index in kept]
        ),
    )


def _of_model(known: Mapping[str, T], model: str, default: T) -> T:
    return known.get(model) or known.get(model.partition(":")[0]) or default


def _output_cap(
    parameters: Mapping[str, Any], known: Sequence[ModelLimits], contexts: Sequence[int], most: int
) -> int:
    """The least of all that is said about the length of the answer."""
    asked: list[int] = [parameters[field] for field in _CAP_FIELDS if field in parameters]
    if not asked and contexts:
        asked = [min(contexts) // 2]
    theirs = [limits.max_completion_tokens for limits in known if limits.max_completion_tokens]
    return min([most, *asked, *theirs])


def _prompt_limit(contexts: Sequence[int], cap: int, most: int) -> float:
    limits = [min(contexts) - cap] if contexts else []
    if most > 0:
        limits.append(most)
    return min(limits, default=math.inf)


def _no_room(parameters: Mapping[str, Any], cap: int, context: int) -> InvalidRequest:
    """Of an answer as long as the context. The request named such a length: no default of ours reaches it."""
    asked, field = min((parameters[field], field) for field in _CAP_FIELDS if field in parameters)
    allowed = f" ({cap} are allowed)" if cap < asked else ""
    sentence = f"An answer of up to {asked} tokens{allowed} leaves no room for the question in a context of {context}."
    return InvalidRequest(details=[{"field": field, "message": sentence}])


def _too_long(prompt_tokens: int, limit: int) -> PromptTooLong:
    sentence = f"The conversation has about {prompt_tokens} tokens after trimming, and {limit} fit."
    detail = {"field": "messages", "message": sentence, "promptTokens": prompt_tokens, "limit": limit}
    return PromptTooLong(details=[detail])


def _body(request: ChatRequest, messages: list[dict[str, Any]], cap: int, rules: FitRules) -> dict[str, Any]:
    messages = [_without_gaps(message) for message in messages]
    body = {"model": request.model, "messages": messages, **request.parameters}
    body.pop("usage", None)
    # what is left of the page's own options was opened by the operator
    options = body.get("stream_options") or {}
    options = {name: value for name, value in options.items() if name not in OURS_IN_STREAM_OPTIONS}
    body |= {"stream": True, "stream_options": {**options, "include_usage": True}}
    # the older name is the one that every compatible server knows
    body |= dict.fromkeys([field for field in _CAP_FIELDS if field in body] or ["max_tokens"], cap)
    reasoning = body.get("reasoning")
    if reasoning and reasoning.get("max_tokens"):
        body["reasoning"] = {**reasoning, "max_tokens": min(cap, reasoning["max_tokens"])}
    if rules.user:
        body.setdefault("user", rules.user)
    if rules.switch_off_compression:
        others = [plugin for plugin in body.get("plugins", ()) if plugin.get("id") != _COMPRESSION]
        body["plugins"] = [*others, {"id": _COMPRESSION, "enabled": False}]
    return body


def _without_gaps(message: dict[str, Any]) -> dict[str, Any]:
    """Leave out the null that a page has before the first tool call where a provider counts them from 1."""
    calls = message.get("tool_calls")
    if not calls or None not in calls:
        return message
    return {**message, "tool_calls": [call for call in calls if call is not None]}
