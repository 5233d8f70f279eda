from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.chat import ChatRequest, parse_chat
from broker.core.checking import RequestRules
from broker.core.document import parse_json
from broker.core.errors import InvalidRequest, PromptTooLong
from broker.core.fitting import FitRules, FittedRequest, ModelLimits, fit
from broker.core.tokens import estimate_prompt
from broker.core.trimming import droppable_units

CHAT_RULES = RequestRules(
    default_model=None, extra_parameters=("*",), allowed_models=("*",), max_messages=200
)
RULES = FitRules(max_prompt_tokens=0, max_output_tokens=4096, switch_off_compression=False, user=None)


def request(*messages: dict[str, Any], model: str = "a/b", **parameters: Any) -> ChatRequest:
    document = {"model": model, "messages": list(messages) or [say("Hi")], **parameters}
    return parse_chat(parse_json(orjson.dumps(document)), CHAT_RULES)


def say(text: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text}


def rules(
    *, prompt: int = 0, output: int = 4096, switch_off_compression: bool = False, user: str | None = None
) -> FitRules:
    return FitRules(prompt, output, switch_off_compression, user)


def known(context: int | None = None, completion: int | None = None) -> dict[str, ModelLimits]:
    return {"a/b": ModelLimits(context, completion)}


def test_the_body_is_the_request_and_what_streaming_needs() -> None:
    fitted = fit(
        request(say("Be terse", "system"), say("Hi"), temperature=0.5, provider={"only": ["x"]}), {}, RULES
    )
    assert fitted.body == {
        "model": "a/b",
        "messages": [say("Be terse", "system"), say("Hi")],
        "temperature": 0.5,
        "provider": {"only": ["x"]},
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 4096,
    }
    assert fitted.model == "a/b"
    assert fitted.dropped == 0
    assert fitted.answers == 1
    assert fitted.prompt_tokens == estimate_prompt(fitted.body["messages"], fitted.body)


@pytest.mark.parametrize("usage", [{"include": False}, {"include": True}, {}])
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
def test_usage_is_asked_for_in_one_way_whatever_a_page_says(usage: Any, options: Any) -> None:
    body = fit(request(usage=usage, stream_options=options), {}, RULES).body
    assert body["stream_options"] == {"include_usage": True}
    assert "usage" not in body


def test_opened_stream_options_are_passed_on() -> None:
    opened = RequestRules(None, ("stream_options.*",), ("*",), 200)
    options = {"continuous_usage_stats": True, "include_usage": False, "include_obfuscation": False}
    document = {"model": "a/b", "messages": [say("Hi")], "stream_options": options}
    body = fit(parse_chat(document, opened), {}, RULES).body
    assert body["stream_options"] == {"continuous_usage_stats": True, "include_usage": True}


def test_the_usage_is_asked_for_whatever_the_page_says() -> None:
    body = fit(request(stream=True, stream_options={"include_usage": False}), {}, RULES).body
    assert body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("asked", "ours", "context", "completion", "cap"),
    [
        (None, 4096, None, None, 4096),
        (100, 4096, None, None, 100),
        (9000, 4096, None, None, 4096),
        (None, 4096, None, 1000, 1000),
        (9000, 4096, 128_000, 1000, 1000),
        (None, 4096, 8192, None, 4096),
        (None, 4096, 6001, None, 3000),  # half of the context, as nothing was asked for
        (3500, 4096, 6001, None, 3500),  # the page knows better
        (None, 4096, 0, 0, 4096),  # nothing is known
    ],
)
def test_the_cap_is_the_lowest_known_limit(
    asked: int | None, ours: int, context: int | None, completion: int | None, cap: int
) -> None:
    fitted = fit(request(max_tokens=asked), known(context, completion), rules(output=ours))
    assert (fitted.max_output_tokens, fitted.body["max_tokens"]) == (cap, cap)


def fit_anyway(asked: ChatRequest, models: dict[str, ModelLimits], using: FitRules) -> FittedRequest | None:
    try:
        return fit(asked, models, using)
    except (InvalidRequest, PromptTooLong):
        return None


def test_the_cap_is_sent_in_the_fields_that_the_page_uses() -> None:
    newer = fit(request(max_completion_tokens=9000), {}, RULES)
    assert (newer.body["max_completion_tokens"], "max_tokens" in newer.body) == (4096, False)
    both = fit(request(max_completion_tokens=300, max_tokens=200), {}, RULES)
    assert (both.body["max_completion_tokens"], both.body["max_tokens"], both.max_output_tokens) == (
        200,
        200,
        200,
    )


def test_reasoning_is_limited_by_the_cap() -> None:
    asked = request(reasoning={"max_tokens": 9000, "effort": None}, max_tokens=500)
    assert fit(asked, {}, RULES).body["reasoning"] == {"max_tokens": 500, "effort": None}
    assert fit(request(reasoning={"max_tokens": 20}), {}, RULES).body["reasoning"] == {"max_tokens": 20}
    assert fit(request(reasoning={"effort": "low"}), {}, RULES).body["reasoning"] == {"effort": "low"}


def test_every_reachable_model_binds() -> None:
    models = {
        "a/b": ModelLimits(128_000, 9000),
        "c/d": ModelLimits(2000, None),
        "e/f": ModelLimits(None, 700),
    }
    assert fit(request(), models, RULES).max_output_tokens == 4096
    assert fit(request(models=["c/d"]), models, RULES).max_output_tokens == 1000
    assert fit(request(models=["c/d", "e/f", "not/known"]), models, RULES).max_output_tokens == 700
    with pytest.raises(PromptTooLong):
        fit(request(say("x" * 6000), models=["c/d"]), models, RULES)


def test_a_variant_of_a_model_is_bound_as_the_model() -> None:
    models = {"a/b": ModelLimits(None, 700), "a/b:free": ModelLimits(None, 300)}
    assert fit(request(model="a/b:nitro"), models, RULES).max_output_tokens == 700
    assert fit(request(model="a/b:free"), models, RULES).max_output_tokens == 300


def test_the_user_is_ours_only_where_the_page_names_none() -> None:
    assert fit(request(), {}, rules(user="hash")).body["user"] == "hash"
    assert fit(request(user="u_1"), {}, rules(user="hash")).body["user"] == "u_1"
    assert "user" not in fit(request(), {}, RULES).body


def test_the_compression_of_the_upstream_is_switched_off() -> None:
    off = {"id": "context-compression", "enabled": False}
    using = rules(switch_off_compression=True)
    assert fit(request(), {}, using).body["plugins"] == [off]
    web = {"id": "web", "max_results": 3}
    theirs = {"id": "context-compression", "enabled": True}
    assert fit(request(plugins=[web]), {}, using).body["plugins"] == [web, off]
    assert fit(request(plugins=[theirs, web, theirs]), {}, using).body["plugins"] == [web, off]
    assert fit(request(plugins=[theirs]), {}, RULES).body["plugins"] == [theirs]


def test_the_number_of_answers_is_known() -> None:
    fitted = fit(request(n=3, max_tokens=100), {}, RULES)
    assert (fitted.answers, fitted.max_output_tokens, fitted.body["n"]) == (3, 100, 3)


CONVERSATION = [
    say("Be terse", "system"),
    say("one " * 30),
    say("two " * 30, "assistant"),
    say("three " * 30),
    say("four " * 30, "assistant"),
    say("five " * 30),
]


@pytest.mark.parametrize(("limit", "dropped"), [(300, 0), (287, 0), (286, 2), (195, 2), (194, 4), (103, 4)])
def test_old_turns_go_until_the_prompt_fits(limit: int, dropped: int) -> None:
    fitted = fit(request(*CONVERSATION), {}, rules(prompt=limit))
    assert fitted.prompt_tokens <= limit
    assert fitted.dropped == dropped
    assert fitted.body["messages"] == [CONVERSATION[0], *CONVERSATION[1 + dropped :]]
    assert fitted.prompt_tokens == estimate_prompt(fitted.body["messages"], fitted.body)


def test_the_context_less_the_cap_bounds_the_prompt() -> None:
    asked = request(*CONVERSATION, max_tokens=100)
    assert fit(asked, known(350), RULES).dropped == 2
    assert fit(asked, known(350), rules(prompt=150)).dropped == 4
    assert fit(asked, known(1000), rules(prompt=250)).dropped == 2
    assert fit(asked, known(None), RULES).dropped == 0


def test_tools_leave_less_room() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 300}}]
    assert fit(request(*CONVERSATION, tools=tools), {}, rules(prompt=900)).dropped == 0
    assert fit(request(*CONVERSATION, tools=tools), {}, rules(prompt=700)).dropped == 2


def test_a_prompt_that_cannot_fit_is_refused_with_both_figures() -> None:
    with pytest.raises(PromptTooLong) as caught:
        fit(request(*CONVERSATION), {}, rules(prompt=50))
    [detail] = caught.value.details
    least = estimate_prompt([CONVERSATION[0], CONVERSATION[-1]], {})
    assert detail == {
        "field": "messages",
        "message": f"The conversation has about {least} tokens after trimming, and 50 fit.",
        "promptTokens": least,
        "limit": 50,
    }


@pytest.mark.parametrize(
    ("asked", "ours", "completion", "told"),
    [
        ({"max_tokens": 4096}, 4096, None, "4096 tokens"),
        ({"max_tokens": 2048}, 4096, None, "2048 tokens"),
        ({"max_completion_tokens": 3000}, 4096, None, "3000 tokens"),
        ({"max_tokens": 3000, "max_completion_tokens": 2500}, 4096, None, "2500 tokens"),
        ({"max_tokens": 2500, "max_completion_tokens": 3000}, 4096, 9000, "2500 tokens"),
        ({"max_tokens": 9000}, 4096, None, "9000 tokens (4096 are allowed)"),
        ({"max_completion_tokens": 9000}, 4096, 2048, "9000 tokens (2048 are allowed)"),
    ],
)
def test_a_cap_as_long_as_the_context_is_refused_as_the_cap(
    asked: dict[str, Any], ours: int, completion: int | None, told: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fit(request(**asked), known(2048, completion), rules(output=ours))
    field = min(asked, key=lambda name: asked[name])
    sentence = f"An answer of up to {told} leaves no room for the question in a context of 2048."
    assert caught.value.details == [{"field": field, "message": sentence}]


def test_the_smallest_context_of_all_models_counts() -> None:
    models = {"a/b": ModelLimits(128_000, None), "c/d": ModelLimits(2048, None)}
    with pytest.raises(InvalidRequest, match="leaves no room") as caught:
        fit(request(models=["c/d"], max_tokens=2048), models, RULES)
    assert "a context of 2048" in caught.value.details[0]["message"]


def test_with_some_room_the_conversation_is_too_long() -> None:
    with pytest.raises(PromptTooLong) as caught:
        fit(request(max_tokens=2047), known(2048), RULES)
    assert caught.value.details[0]["limit"] == 1


@pytest.mark.parametrize("context", [1, 2, 3, 100, 4096])
def test_without_a_cap_the_cap_is_never_too_long(context: int) -> None:
    with suppress(PromptTooLong):
        assert fit(request(), known(context, 10**6), rules(output=10**6)).max_output_tokens <= context // 2


def test_the_densest_reachable_model_decides_the_estimate() -> None:
    asked = request(say("x" * 600), models=["c/d", "e/f:nitro"])
    by_default = fit(asked, {}, RULES).prompt_tokens
    assert fit(asked, {}, RULES, {"a/b": 4.0}).prompt_tokens == by_default
    assert fit(asked, {}, RULES, {"a/b": 4.0, "c/d": 5.0, "e/f": 6.0}).prompt_tokens == by_default - 50
    assert fit(asked, {}, RULES, {"e/f": 2.0}).prompt_tokens == by_default + 100
    assert fit(asked, {}, RULES, {"not/asked": 1.0}).prompt_tokens == by_default


STEP = [
    {
        "role": "assistant",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "c", "content": "seen " * 9},
]
TURN = st.tuples(st.integers(1, 200), st.integers(0, 3), st.booleans()).map(
    lambda turn: [say("x" * turn[0]), *STEP * turn[1], *[say("y" * turn[0], "assistant")] * turn[2]]
)
TALKS = st.tuples(st.booleans(), st.lists(TURN, min_size=1, max_size=8)).map(
    lambda talk: [*[say("s", "system")] * talk[0], *[message for turn in talk[1] for message in turn]]
)


FITS = st.fixed_dictionaries(
    {
        "asked": st.none() | st.integers(1, 3000),
        "context": st.none() | st.integers(1, 3000),
        "completion": st.none() | st.integers(1, 3000),
        "prompt": st.integers(0, 1500),
        "output": st.integers(1, 2000),
    }
)


@given(TALKS, FITS)
def test_any_request_is_sent_within_every_limit(
    messages: list[dict[str, Any]], drawn: dict[str, Any]
) -> None:
    asked, context, completion = drawn["asked"], drawn["context"], drawn["completion"]
    prompt, output = drawn["prompt"], drawn["output"]
    chat = request(*messages, max_tokens=asked)
    before = copy.deepcopy(chat)
    fitted = fit_anyway(chat, known(context, completion), rules(prompt=prompt, output=output))
    assert chat == before
    if fitted is None:
        return
    cap = fitted.max_output_tokens
    assert 1 <= cap <= min(output, asked or output, completion or output)
    assert asked or not context or cap <= context // 2
    assert fitted.body["max_tokens"] == cap
    limit = min(prompt or 10**9, context - cap if context else 10**9)
    assert fitted.prompt_tokens == estimate_prompt(fitted.body["messages"], fitted.body) <= limit
    assert fitted.dropped == len(messages) - len(fitted.body["messages"])
    assert all(any(message is own for own in chat.messages) for message in fitted.body["messages"])


@given(TALKS, st.integers(1, 1500))
def test_no_more_goes_than_must(messages: list[dict[str, Any]], limit: int) -> None:
    chat = request(*messages)
    units = list(droppable_units(messages))
    candidates = []
    for count in range(len(units) + 1):
        gone = {index for unit in units[:count] for index in unit}
        candidates.append([message for index, message in enumerate(messages) if index not in gone])
    fitting = [rest for rest in candidates if estimate_prompt(rest, {}) <= limit]
    fitted = fit_anyway(chat, {}, rules(prompt=limit))
    assert (fitted.body["messages"] if fitted else None) == (fitting[0] if fitting else None)


@given(TALKS)
def test_a_trimmed_conversation_is_still_a_valid_one(messages: list[dict[str, Any]]) -> None:
    fitted = fit_anyway(request(*messages), {}, rules(prompt=estimate_prompt(messages, {}) // 2))
    if fitted is not None:
        assert request(*fitted.body["messages"]).messages == fitted.body["messages"]


@pytest.mark.parametrize(
    ("learned", "shown", "reserved"), [(6.0, 100, 200), (2.0, 300, 300), (3.0, 200, 200)]
)
def test_learned_values_never_lower_the_reservation(learned: float, shown: int, reserved: int) -> None:
    """Bytes per token are learned from answers to clients, and none of them may stretch its budget so."""
    fitted = fit(request(say("x" * 600)), {}, RULES, {"a/b": learned})
    around = fit(request(say("")), {}, RULES).prompt_tokens
    assert fitted.prompt_tokens - around == shown
    assert fitted.reserved_prompt_tokens - around == reserved
