"""How many bytes of text a model's token holds, learned from the usage that comes back. No I/O.

Anybody's prompts teach, and some are odd: base64, one letter a thousand times, pictures that nobody can measure. So:

- An answer makes a sample only where its prompt is text that we could measure, and nearly all of it.
- The samples of one client are one voice, their median, however many they are; clients with few samples speak with
  one voice together. So one odd answer does not count, and one odd client has one voice.
- The voice in the middle is believed, and the others move it by a tenth at most, so that they may even out its errors.
  Of two that contradict each other nobody can tell which is odd: one that no language explains is not heard, and else
  the estimate stays between them, as near to the default as it can. A voice that nobody contradicts is believed.
- Until there are enough samples the default stands, and more bytes per token than that are believed step by step.

There is one estimate for all clients: one that had its own could teach it what it liked, and evade its budget.
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
"""Bounds of a sample. No tokenizer makes two tokens of a byte, and only odd text runs beyond 8 bytes a token."""

LIKELY = (1.25, 7.2)
"""What real text comes to: 1.5 (scripts that a tokenizer was not made for) to 6, with some room for noise."""

AGREEMENT = 1.25
"""Two voices that are no further apart than this factor do not contradict each other."""

ROOM = 1.1
"""The factor by which a voice may differ from the middle one and be counted as it is."""

ENOUGH = 4
"""Samples that make a voice, and without which the default stands."""

FULL = 8
"""Samples from which on a voice weighs no more."""

SURE = 12
"""Samples from which on a high estimate is believed whole."""

MIN_TEXT_BYTES = 200
MAX_FLAT_SHARE = 1 / 4
"""Of a prompt with less text, or with a larger share of what is not text, the surroundings would be measured."""

# Assistant messages may hold more, and providers differ in what of it they read: reasoning, sounds, annotations.
CHAT_TEXT = frozenset({"role", "content", "name", "model", "refusal", "tool_calls", "tool_call_id"})
"""Keys of a message whose contents every model reads."""

# With these the model reads more or other text than is sent. A prediction is not part of the prompt.
_CHANGES_THE_PROMPT = ("plugins", "transforms", "web_search_options", "prediction")


class Sample(NamedTuple):
    """What one answer taught.

    Attributes:
        model: without its variant.
        client: who asked; any stable word.
        value: bytes per token, from ``LEAST`` to ``MOST``; or what else is learned in the same way.
    """

    model: str
    client: str
    value: float


def without_variant(model: str) -> str:
    """``a/b`` of ``a/b:nitro``: variants differ in who serves them, not in their tokens."""
    return model.partition(":")[0] or model


def calibration_size(
    parameters: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    frame: Size,
    sizes: Iterable[Size],
    *,
    known: frozenset[str],
) -> Size | None:
    """The size of a whole prompt that can teach; None for one that holds what cannot be measured.

    Args:
        parameters: of the request.
        entries: the messages or items that are sent.
        frame: what the prompt measures besides them.
        sizes: what each of them measures.
        known: keys of an entry whose contents every model reads.
    """
    if any(parameters.get(name) for name in _CHANGES_THE_PROMPT):
        return None
    if not _only_functions(parameters.get("tools") or []):
        return None
    text_bytes, flat_tokens = frame
    for entry, size in zip(entries, sizes, strict=True):
        if size.flat_tokens != MESSAGE_TOKENS or any(entry[key] for key in entry.keys() - known):
            return None
        text_bytes += size.text_bytes
        flat_tokens += MESSAGE_TOKENS
    return Size(text_bytes, flat_tokens)


def _only_functions(tools: Any) -> bool:
    """False also for what an operator's opened ``tools`` may hold, which nobody has checked."""
    return isinstance(tools, list) and all(
        isinstance(tool, dict) and tool.get("type") == "function" for tool in tools
    )


def sample_of(
    *, model: str, answered: str | None, client: str, size: Size | None, usage: Mapping[str, Any] | None
) -> Sample | None:
    """What an answer teaches; None for nothing.

    Half of what is not text is taken off the bill: our flat rates are generous, and whatever is left in makes the
    text look denser than it is, which is the safe side. Cached tokens are part of ``prompt_tokens`` and count.

    Args:
        model: the one that was asked first.
        answered: the one that answered, as the upstream names it, where it does.
        client: who asked.
        size: of the prompt, as ``calibration_size`` gives it.
        usage: the upstream's own object.
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
    """False where a fallback or the choice of a router answered: ``c/d`` for ``a/b``.

    Within an author the names tell nothing, for the one that answers has a date or an order of its own.
    """
    authors = {model.partition("/")[0] for model in (asked, answered) if "/" in model}
    return len(authors) < 2


def estimate(samples: Iterable[Sample]) -> float | None:
    """Bytes per token of the model that these samples are of; None while there are too few."""
    voices = [_ClientSample(median(values), len(values)) for values in _speakers(samples)]
    heard = [voice for voice in voices if LIKELY[0] <= voice.says <= LIKELY[1]] or voices
    if not heard:
        return None
    agreed = _agreed(heard)
    trust = min(1.0, sum(voice.samples for voice in heard) / SURE)
    return min(agreed, DEFAULT_BYTES_PER_TOKEN + (agreed - DEFAULT_BYTES_PER_TOKEN) * trust)


class _ClientSample(NamedTuple):
    """Bytes per token, and the number of samples behind them."""

    says: float
    samples: int


def _speakers(samples: Iterable[Sample]) -> list[list[float]]:
    """The samples of each client that has enough, and those of all the others together, if they are enough."""
    by_client: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        by_client[sample.client].append(sample.value)
    alone = [values for values in by_client.values() if len(values) >= ENOUGH]
    together = [value for values in by_client.values() if len(values) < ENOUGH for value in values]
    return [*alone, together] if len(together) >= ENOUGH else alone


def _agreed(voices: Sequence[_ClientSample]) -> float:
    """The mean of the voices, each brought as near to the middle one as ``ROOM`` asks.

    Where two are in the middle and contradict each other, it is what lies between them and nearest to the default.
    """
    ordered = sorted(voice.says for voice in voices)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    if high > low * AGREEMENT:
        return min(max(DEFAULT_BYTES_PER_TOKEN, low), high)
    said = [min(high * ROOM, max(low / ROOM, voice.says)) for voice in voices]
    return fmean(said, [min(voice.samples, FULL) for voice in voices])
