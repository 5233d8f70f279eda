"""Compute what an answer costs, from the prices of the list of models. No I/O.

Money is an integer count of nano-USD (1e-9 USD), always rounded up, so that sums in Redis and here agree and no
rounding favours the spender. Prices are exact decimals in nano-USD per token, since many are below one nano-USD.

Rules of the price list, see https://openrouter.ai/docs/client-sdks/typescript/models/pricingoverride:
prices are decimal strings in USD per token (``request``: per request); a negative one means that the price depends on
where the request is routed. An entry of ``overrides`` applies when all its conditions hold: a prompt strictly longer
than ``min_prompt_tokens``, and a UTC time within [``utc_start``, ``utc_end``), clock numbers such as 1030 that may
wrap past midnight. Among those that apply, later entries win key by key, and keys that an entry lacks stay as they
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, NamedTuple

from broker.core.tokens import AUDIO_TOKENS, IMAGE_TOKENS

NANO = 1_000_000_000

# A call that costs more is a wrong number, not a bill. The bound also keeps every sum of such amounts below 2^53, up to
# which Lua's numbers are exact.
MAX_COST = 1_000_000 * NANO

_MAX_TOKENS = 2**31
_MAX_DIGITS = 40
_NANO = Decimal(NANO)
_ZERO = Decimal(0)
_MONEY = Context(prec=60, rounding=ROUND_CEILING)

# The prices that the cost of a text answer needs, and other prices that a list may have.
_PRICES = (
    "prompt",
    "completion",
    "request",
    "internal_reasoning",
    "input_cache_read",
    "input_cache_write",
    "input_cache_write_1h",
)
_OTHER_PRICES = (
    "image",
    "image_token",
    "image_output",
    "audio",
    "audio_output",
    "input_audio_cache",
    "web_search",
)
_OVERRIDE_KEYS = frozenset({"min_prompt_tokens", "utc_start", "utc_end", *_PRICES, *_OTHER_PRICES})

# A tick of xAI's ``cost_in_usd_ticks`` is 1e-10 USD.
_TICKS = Decimal(10) ** 10

Listed = Mapping[str, Decimal]
"""Prices by the upstream's own keys, in nano-USD. A missing key has no price of its own."""


class Rates(NamedTuple):
    """The prices of one request, with all rules applied: nano-USD per token; ``request`` once."""

    prompt: Decimal
    completion: Decimal
    request: Decimal
    cache_read: Decimal
    cache_write: Decimal
    cache_write_1h: Decimal
    reasoning: Decimal


class Demand(NamedTuple):
    """What a request can make an upstream charge besides its text tokens.

    Attributes:
        images: pictures in the prompt.
        sounds: recordings in the prompt.
        searches: searches of the web.
        draws, speaks: the answer may hold pictures, or sounds.
    """

    images: int = 0
    sounds: int = 0
    searches: int = 0
    draws: bool = False
    speaks: bool = False


TEXT_ONLY = Demand()


@dataclass(frozen=True, slots=True)
class Override:
    """Prices that apply under conditions.

    Attributes:
        changes: the prices that it sets.
        min_prompt_tokens: applies to prompts strictly longer than this.
        window: minutes of the UTC day, the end excluded; may wrap past midnight.
        certain: False where a condition cannot be checked here (week days, or an unknown one).
    """

    changes: Listed
    min_prompt_tokens: int | None = None
    window: tuple[int, int] | None = None
    certain: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """The price list of one model. Two of them are equal only if they are the same object.

    Attributes:
        listed: its prices.
        overrides: prices that apply under conditions.
        free: every price in the list is zero.
        unreadable: keys other than those of text with a negative price, or with something that is not a price.
    """

    listed: Listed
    overrides: tuple[Override, ...] = ()
    free: bool = False
    unreadable: frozenset[str] = frozenset()


def parse_prices(entry: Mapping[str, Any]) -> Prices | None:
    """Return the prices of a model's entry; None where they are not known.

    Also None where a price that every cost needs is negative or unreadable, in the list or in an override.
    """
    pricing = entry.get("pricing")
    if not isinstance(pricing, Mapping):
        return None
    listed = _listed(pricing)
    if listed is None or "prompt" not in listed or "completion" not in listed:
        return None
    raw_overrides = pricing.get("overrides") or ()
    if not isinstance(raw_overrides, list | tuple):
        return None
    overrides = [_override(raw) for raw in raw_overrides]
    known = tuple(override for override in overrides if override is not None)
    if len(known) < len(overrides):
        return None
    return Prices(
        listed,
        known,
        free=all(map(_all_zero, (pricing, *raw_overrides))),
        unreadable=frozenset(key for raw in (pricing, *raw_overrides) for key in _unreadable(raw)),
    )


def is_free(prices: Prices | None) -> bool:
    """Return True if every price is known and zero."""
    return prices is not None and prices.free


def cost_of(
    usage: Mapping[str, Any] | None,
    prices: Prices | None,
    *,
    minute_of_day: int | None = None,
    images: int = 0,
) -> int | None:
    """Return what an answer cost, in nano-USD; None where that is unknown. Never raises, whatever `usage` holds.

    The cost that the upstream reports comes first. Without one, the token counts are multiplied by the prices: cached
    and cache-written tokens are part of ``prompt_tokens`` and reasoning tokens are part of ``completion_tokens``, each
    at its own price where it has one.

    Args:
        usage: the usage object of the upstream.
        prices: the model's prices.
        minute_of_day: of the UTC day; None takes the higher price where the price depends on the time.
        images: pictures in the prompt, for models with a price per picture besides that of the tokens.
    """
    if not isinstance(usage, Mapping):
        return None
    reported = reported_cost(usage)
    if reported is not None:
        return reported
    prompt, completion = count_of(usage.get("prompt_tokens")), completion_of(usage)
    if prices is None or prompt is None or completion is None:
        return None
    rates = rates_for(prices, prompt, minute_of_day)
    read = min(detail_of(usage, "prompt_tokens_details", "cached_tokens"), prompt)
    written = min(detail_of(usage, "prompt_tokens_details", "cache_write_tokens"), prompt - read)
    thought = min(detail_of(usage, "completion_tokens_details", "reasoning_tokens"), completion)
    return _total(
        rates.request,
        (prompt - read - written, rates.prompt),
        (read, rates.cache_read),
        (written, rates.cache_write),
        (completion - thought, rates.completion),
        (thought, rates.reasoning),
        (images, prices.listed.get("image", _ZERO)),
    )


def reported_cost(usage: Mapping[str, Any]) -> int | None:
    """Return the cost that the upstream reports, in nano-USD; None where it reports none that can be read.

    ``cost`` is a number, or Perplexity's object with ``total_cost``; xAI counts ``cost_in_usd_ticks``. With the user's
    own key at the provider (``is_byok``), ``cost`` is only OpenRouter's fee, and the provider's bill is added.
    """
    cost = usage.get("cost")
    amount = _number(cost.get("total_cost") if isinstance(cost, Mapping) else cost)
    if amount is None and (ticks := _ticks(usage.get("cost_in_usd_ticks"))) is not None:
        amount = _MONEY.divide(ticks, _TICKS)
    if amount is None:
        return None
    details = usage.get("cost_details")
    if usage.get("is_byok") is True and isinstance(details, Mapping):
        amount = _MONEY.add(amount, _number(details.get("upstream_inference_cost")) or _ZERO)
    return _nano(amount)


def _number(value: object) -> Decimal | None:
    """Return a cost, which must be a JSON number and not a text."""
    return None if isinstance(value, str) else _decimal(value)


def reported_cost_of_record(record: Mapping[str, Any]) -> int | None:
    """Return the cost in OpenRouter's record of a generation, which has other names for it."""
    return reported_cost(
        {
            "cost": record.get("total_cost"),
            "is_byok": record.get("is_byok"),
            "cost_details": {"upstream_inference_cost": record.get("upstream_inference_cost")},
        }
    )


def completion_of(usage: Mapping[str, Any]) -> int | None:
    """Return the tokens that a model wrote, including its reasoning; None where the usage does not say.

    xAI leaves the reasoning out of ``completion_tokens``; only ``total_tokens`` includes it.
    """
    completion, total = count_of(usage.get("completion_tokens")), count_of(usage.get("total_tokens"))
    prompt = count_of(usage.get("prompt_tokens"))
    if total is not None and prompt is not None and total > prompt + (completion or 0):
        return total - prompt
    return completion


def worst_case(
    prompt_tokens: int, output_tokens: int, prices: Prices | None, demand: Demand = TEXT_ONLY
) -> int | None:
    """Return the most that a request can cost, in nano-USD; None where a price that may apply is unknown.

    Every token counts at the highest price that may apply: of the list and all overrides, written to the cache, or as
    reasoning. A picture costs its tokens, and its own price where one is listed.
    """
    if prices is None:
        return None
    if demand == TEXT_ONLY:  # as most: the other prices would add nothing
        request, prompt, output = _dearest_of_text(prices)
        return _total(request, (max(prompt_tokens, 0), prompt), (max(output_tokens, 0), output))
    return worst_case_of_all(prompt_tokens, output_tokens, prices, demand)


def worst_case_of_all(prompt_tokens: int, output_tokens: int, prices: Prices, demand: Demand) -> int | None:
    """Return the `worst_case` of a request with any demand."""
    if not prices.unreadable.isdisjoint(_touched(demand)):
        return None
    request, prompt, output = _dearest_of_text(prices)
    if demand.draws:
        output = max(output, _dearest_of(prices, "image_output"))
    if demand.speaks:
        output = max(output, _dearest_of(prices, "audio_output"))
    image_token = max(_ZERO, _dearest_of(prices, "image_token") - prompt)
    heard = max(_dearest_of(prices, "audio"), _dearest_of(prices, "input_audio_cache"))
    return _total(
        request,
        (max(prompt_tokens, 0), prompt),
        (max(output_tokens, 0), output),
        (demand.images, _dearest_of(prices, "image")),
        (demand.images * IMAGE_TOKENS, image_token),
        (demand.sounds * AUDIO_TOKENS, max(_ZERO, heard - prompt)),
        (demand.searches, _dearest_of(prices, "web_search")),
    )


@lru_cache(maxsize=1024)
def _dearest_of_text(prices: Prices) -> tuple[Decimal, Decimal, Decimal]:
    """Return the highest price of a request, of a token of its prompt, and of a token of its answer.

    Kept for each price list: it is needed three times at every /prepare, and changes only with the list of models.
    """
    rates = dearest(prices)
    prompt = max(rates.prompt, rates.cache_read, rates.cache_write, rates.cache_write_1h)
    return rates.request, prompt, max(rates.completion, rates.reasoning)


def _touched(demand: Demand) -> set[str]:
    """Return the keys of a price list that apply only to some requests, and to this one."""
    keys = set()
    if demand.images:
        keys |= {"image", "image_token"}
    if demand.sounds:
        keys |= {"audio", "input_audio_cache"}
    if demand.searches:
        keys.add("web_search")
    if demand.draws:
        keys.add("image_output")
    if demand.speaks:
        keys.add("audio_output")
    return keys


def _dearest_of(prices: Prices, key: str) -> Decimal:
    """Return the highest price of a key, in the list and all overrides; 0 where it is not listed."""
    lists = (prices.listed, *(override.changes for override in prices.overrides))
    return max(each.get(key, _ZERO) for each in lists)


def dearest_list(lists: Iterable[Prices]) -> Prices | None:
    """Return one price list with the highest price of all these lists under each key; None without any list."""
    known = list(lists)
    if not known:
        return None
    rates = [dearest(each) for each in known]
    listed = {key: max(_dearest_of(each, key) for each in known) for key in (*_PRICES, *_OTHER_PRICES)}
    listed["prompt"] = max(rate.prompt for rate in rates)
    listed["completion"] = max(rate.completion for rate in rates)
    return Prices(listed)


def dearest(prices: Prices) -> Rates:
    """Return the highest price of each kind, in the list and all overrides."""
    return _rates(prices, lambda _: None)


def rates_for(prices: Prices, prompt_tokens: int, minute_of_day: int | None) -> Rates:
    """Return the prices for a prompt of so many tokens at that minute of the UTC day."""
    return _rates(prices, lambda override: _applies(override, prompt_tokens, minute_of_day))


def max_price(prices: Iterable[Prices], demand: Demand = TEXT_ONLY) -> dict[str, float]:
    """Return the ``provider.max_price`` of OpenRouter with which it skips providers above the highest of these prices.

    Prompt and completion are in USD per million tokens, the others in the units of the price list:
    https://openrouter.ai/docs/client-sdks/typescript/models/maxprice. The others are included only if they are listed
    and apply to the request, so that no provider is skipped because of a price that would not be paid.

    Args:
        prices: of the models that the request can reach, at least one.
        demand: what the request uses besides text.
    """
    known = list(prices)
    rates = [dearest(each) for each in known]
    limits = {
        "prompt": float(max(rate.prompt for rate in rates) / 1000),
        "completion": float(max(rate.completion for rate in rates) / 1000),
    }
    for key in ("request", *(("image",) if demand.images else ()), *(("audio",) if demand.sounds else ())):
        price = max(_dearest_of(each, key) for each in known)
        if price > 0:
            limits[key] = float(price / NANO)
    return limits


def narrow_max_price(given: Any, ours: Mapping[str, float]) -> dict[str, Any]:
    """Return a request's ``provider.max_price`` with ours as upper bounds; its other keys stay."""
    limits = dict(given) if isinstance(given, Mapping) else {}
    for name, bound in ours.items():
        own = _decimal(limits.get(name))
        limits[name] = bound if own is None else min(float(own), bound)
    return limits


def to_usd(nano: int) -> float:
    """Return nano-USD in USD, as a number for JSON."""
    return nano / NANO


def to_nano(usd: Any) -> int | None:
    """Return USD (a number or its text) in nano-USD; None for anything negative, absurd or not a number."""
    amount = _decimal(usd)
    return None if amount is None else _nano(amount)


def _nano(usd: Decimal) -> int | None:
    return _total(_MONEY.multiply(usd, _NANO))


def _rates(prices: Prices, applies: Callable[[Override], bool | None]) -> Rates:
    """Return the prices with the overrides that apply. One that may apply counts where it is higher."""
    judged = [(override, applies(override)) for override in prices.overrides]
    listed = dict(prices.listed)
    for override, holds in judged:
        if holds:
            listed |= override.changes
    rates = _settle(listed)
    for override, holds in judged:
        if holds is None:
            rates = Rates(*map(max, rates, _settle({**listed, **override.changes})))
    return rates


def _settle(listed: Listed) -> Rates:
    """Replace missing prices by those that apply instead.

    A special price of zero next to a real price means that there is no special price: lists have
    ``"internal_reasoning": "0"`` for models whose reasoning is billed as output.
    """
    prompt, completion = listed["prompt"], listed["completion"]
    cache_write = listed.get("input_cache_write") or prompt
    return Rates(
        prompt=prompt,
        completion=completion,
        request=listed.get("request", _ZERO),
        cache_read=listed.get("input_cache_read") or prompt,
        cache_write=cache_write,
        cache_write_1h=listed.get("input_cache_write_1h") or cache_write,
        reasoning=listed.get("internal_reasoning") or completion,
    )


def _applies(override: Override, prompt_tokens: int, minute_of_day: int | None) -> bool | None:
    """Return True if all conditions hold, False if not; None where that is unknown."""
    if override.min_prompt_tokens is not None and prompt_tokens <= override.min_prompt_tokens:
        return False
    if override.window is not None:
        if minute_of_day is None:
            return None
        start, end = override.window
        inside = start <= minute_of_day < end if start <= end else not end <= minute_of_day < start
        if not inside:
            return False
    return True if override.certain else None


def _total(fixed: Decimal, *charges: tuple[int, Decimal]) -> int | None:
    total = fixed
    for count, price in charges:
        total = _MONEY.add(total, _MONEY.multiply(Decimal(count), price))
    nano = total.to_integral_value(rounding=ROUND_CEILING)
    return int(nano) if nano <= MAX_COST else None


def _listed(raw: Mapping[str, Any]) -> dict[str, Decimal] | None:
    """Return the prices in nano-USD; None where a price that every cost needs is not readable."""
    listed: dict[str, Decimal] = {}
    for key in _PRICES:
        if raw.get(key) is None:
            continue
        price = _price(raw[key])
        if price is None:
            return None
        listed[key] = _MONEY.multiply(price, _NANO)
    for key in _OTHER_PRICES:  # a price that applies to few requests does not make a list unreadable
        if (price := _price(raw.get(key))) is not None:
            listed[key] = _MONEY.multiply(price, _NANO)
    return listed


def _unreadable(raw: Mapping[str, Any]) -> list[str]:
    return [key for key in _OTHER_PRICES if raw.get(key) is not None and _price(raw[key]) is None]


def _override(raw: Any) -> Override | None:
    """Return one entry of ``overrides``; None where a price in it is not readable."""
    changes = _listed(raw) if isinstance(raw, Mapping) else None
    if changes is None:
        return None
    given = {key for key, value in raw.items() if value is not None}
    threshold = count_of(raw.get("min_prompt_tokens"))
    start, end = _minute(raw.get("utc_start")), _minute(raw.get("utc_end"))
    window = (start, end) if start is not None and end is not None else None
    unread = ("min_prompt_tokens" in given and threshold is None) or (
        window is None and not given.isdisjoint({"utc_start", "utc_end"})
    )
    return Override(changes, threshold, window, certain=not unread and given <= _OVERRIDE_KEYS)


def _all_zero(raw: Mapping[str, Any]) -> bool:
    given = [raw[key] for key in (*_PRICES, *_OTHER_PRICES) if raw.get(key) is not None]
    return all(_price(price) == 0 for price in given)


def _price(value: Any) -> Decimal | None:
    """Return USD from the decimal string of a price list. Numbers are refused: other lists have other units."""
    return _decimal(value) if isinstance(value, str) else None


def _decimal(value: Any) -> Decimal | None:
    """Return a finite amount of USD from 0 to a million, or None."""
    if isinstance(value, str | Decimal):
        plausible = len(str(value)) <= _MAX_DIGITS
    else:
        plausible = not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value <= MAX_COST
    try:
        amount = Decimal(str(value)) if plausible else None
    except InvalidOperation:
        return None
    if amount is None or not amount.is_finite():
        return None
    return amount if 0 <= amount <= MAX_COST // NANO else None


def _ticks(value: Any) -> Decimal | None:
    """Return a count of ticks that is worth from 0 to a million USD, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10**16:
        return None
    return Decimal(str(value))


def count_of(value: Any) -> int | None:
    """Return a number of tokens; None for any other value."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= _MAX_TOKENS else None


def detail_of(usage: Mapping[str, Any], group: str, key: str) -> int:
    """Return a number of tokens from a part of a usage object, or 0."""
    details = usage.get(group)
    return (count_of(details.get(key)) or 0) if isinstance(details, Mapping) else 0


def _minute(clock: Any) -> int | None:
    """Return the minute of the day of an HHMM clock number: 1030 is 630."""
    if isinstance(clock, str) and clock.isdecimal() and len(clock) <= len("HHMM"):
        clock = int(clock)
    number = count_of(clock)
    if number is None or number > 2400 or number % 100 > 59:
        return None
    return number // 100 * 60 + number % 100
