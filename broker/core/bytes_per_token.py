"""Learn how many bytes of text one token of a model holds, from the usage that upstreams report. No I/O.

The prompts of all clients give samples, and some prompts are unusual: base64, one letter a thousand times, pictures of
unknown size. Therefore:

- An answer gives a sample only if nearly all of its prompt is text that was measured.
- All samples of one client make one estimate, their median. Clients with few samples make one estimate together. So
  one unusual answer does not count, and one unusual client has one estimate among others.
- The median of the estimates decides. The others move the result by a tenth at most. If two estimates are in the
  middle and contradict each other, nobody can know which one is wrong: one that no real text explains is left out,
  and else the result lies between them, as near to the default as possible.
- Without enough samples the result is the default. A result above the default is trusted step by step.

There is one result for all clients. With a result of its own, a client could change it and so evade its budget.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

from broker.core.parameters import ONLINE
from broker.core.tokens import DEFAULT_BYTES_PER_TOKEN, MESSAGE_TOKENS, Size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

LEAST, MOST = 1.0, 8.0
"""Bounds of a sample. No tokenizer makes two tokens of one byte, and only unusual text exceeds 8 bytes per token."""

LIKELY = (1.25, 7.2)
"""The range of real text: 1.5 (scripts that a tokenizer was not made for) to 6, with some tolerance."""

AGREEMENT = 1.25
"""Two estimates within this factor do not contradict each other."""

ROOM = 1.1
"""An estimate may differ from the middle one by this factor and still count unchanged."""

ENOUGH = 4
"""Samples that are needed for an estimate of one client."""

FULL = 8
"""Samples above which the estimate of a client gets no more weight."""

SURE = 12
"""Samples above which a high result is trusted completely."""

MIN_TEXT_BYTES = 200
MAX_FLAT_SHARE = 1 / 4
"""A prompt with less text, or a larger share of other contents, would measure the overhead and not the text."""

# Assistant messages may hold more, and providers differ in what they read of it: reasoning, sounds, annotations.
CHAT_TEXT = frozenset({"role", "content", "name", "model", "refusal", "tool_calls", "tool_call_id"})
"""Keys of a message whose contents every model reads."""

# With these the model reads more or other text than is sent. A prediction is not part of the prompt.
_CHANGES_THE_PROMPT = frozenset(
    {"plugins", "transforms", "web_search_options", "prediction"}
    | {"previous_response_id", "conversation", "prompt"}
)


class Sample(NamedTuple):
    """What one answer measured.

    Attributes:
        model: the model without its variant.
        client: the client; any stable word.
        value: bytes per token, from ``LEAST`` to ``MOST``; or another quantity that is learned in the same way.
    """

    model: str
    client: str
    value: float


def without_variant(model: str) -> str:
    """Return the model without its variant: ``a/b`` of ``a/b:nitro``. Variants have the same tokenizer."""
    return model.partition(":")[0] or model


def calibration_size(
    parameters: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    frame: Size,
    sizes: Iterable[Size],
    *,
    known: frozenset[str],
) -> Size | None:
    """Return the size of a prompt that can give a sample; None for a prompt with parts that cannot be measured.

    Args:
        parameters: the parameters of the request.
        entries: the messages or items that are sent.
        frame: the size of the prompt without them.
        sizes: the size of each entry.
        known: keys of an entry whose contents every model reads.
    """
    if any(parameters[name] for name in parameters.keys() & _CHANGES_THE_PROMPT):
        return None
    if not _only_functions(parameters.get("tools") or []):
        return None
    text_bytes, flat_tokens = frame
    for entry, size in zip(entries, sizes, strict=True):
        if size.flat_tokens != MESSAGE_TOKENS or not (
            entry.keys() <= known or all(key in known or not value for key, value in entry.items())
        ):
            return None
        text_bytes += size.text_bytes
        flat_tokens += MESSAGE_TOKENS
    return Size(text_bytes, flat_tokens)


def _only_functions(tools: Any) -> bool:
    """Return True if all tools are functions. What an operator has opened is not checked and may be anything."""
    return isinstance(tools, list) and all(
        isinstance(tool, dict) and tool.get("type") == "function" for tool in tools
    )


def sample_of(
    *, model: str, answered: str | None, client: str, size: Size | None, usage: Mapping[str, Any] | None
) -> Sample | None:
    """Return the sample that an answer gives; None where it gives none.

    Half of the flat tokens is subtracted from the bill. Our flat rates are high, and the rest makes the result lower,
    which is the safe side. Cached tokens are part of ``prompt_tokens`` and count.

    Args:
        model: the model that was asked first.
        answered: the model that answered, if the upstream names it.
        client: the client.
        size: the size of the prompt, from ``calibration_size``.
        usage: the upstream's usage object.
    """
    prompt_tokens = (usage or {}).get("prompt_tokens")
    if size is None or isinstance(prompt_tokens, bool) or not isinstance(prompt_tokens, int):
        return None
    if size.text_bytes < MIN_TEXT_BYTES or size.flat_tokens > prompt_tokens * MAX_FLAT_SHARE:
        return None
    if ONLINE in model.lower() or not _same_author(model, answered or model):
        return None
    bytes_per_token = size.text_bytes / (prompt_tokens - size.flat_tokens / 2)
    return Sample(without_variant(model), client, min(MOST, max(LEAST, bytes_per_token)))


def _same_author(asked: str, answered: str) -> bool:
    """Return False where a fallback or a router chose a model of another author: ``c/d`` for ``a/b``.

    Names of one author say nothing: the model that answers may have a date, or its words in another order.
    """
    authors = {model.partition("/")[0] for model in (asked, answered) if "/" in model}
    return len(authors) < 2


def estimate(samples: Iterable[Sample]) -> float | None:
    """Return bytes per token for the model of these samples; None while there are too few."""
    estimates = [_ClientEstimate(median(values), len(values)) for values in _samples_by_client(samples)]
    likely = [each for each in estimates if LIKELY[0] <= each.value <= LIKELY[1]] or estimates
    if not likely:
        return None
    combined = _combine(likely)
    trust = min(1.0, sum(each.samples for each in likely) / SURE)
    return min(combined, DEFAULT_BYTES_PER_TOKEN + (combined - DEFAULT_BYTES_PER_TOKEN) * trust)


class _ClientEstimate(NamedTuple):
    """An estimate of bytes per token, and the number of its samples."""

    value: float
    samples: int


def _samples_by_client(samples: Iterable[Sample]) -> list[list[float]]:
    """Return the samples of each client that has enough, and those of all other clients together if they are enough."""
    by_client: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        by_client[sample.client].append(sample.value)
    alone = [values for values in by_client.values() if len(values) >= ENOUGH]
    together = [value for values in by_client.values() if len(values) < ENOUGH for value in values]
    return [*alone, together] if len(together) >= ENOUGH else alone


def _combine(estimates: Sequence[_ClientEstimate]) -> float:
    """Return the mean of the estimates, each limited to the factor ``ROOM`` around the middle one.

    If two estimates are in the middle and contradict each other, return the value between them that is nearest to the
    default.
    """
    ordered = sorted(each.value for each in estimates)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    if high > low * AGREEMENT:
        return min(max(DEFAULT_BYTES_PER_TOKEN, low), high)
    limited = [min(high * ROOM, max(low / ROOM, each.value)) for each in estimates]
    return fmean(limited, [min(each.samples, FULL) for each in estimates])
