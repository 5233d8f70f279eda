"""Responses requests: what is taken, what is refused and where, and how they are fitted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.accounts import Quotas, WorstCase, beyond_limits
from broker.core.checking import MAX_DETAILS, RequestRules, refuse_fetched_images
from broker.core.demand import demand_of
from broker.core.errors import BrokerError, InvalidRequest, ModelNotAllowed, PromptTooLong
from broker.core.fitting import FitRules, ModelLimits, fit
from broker.core.items import measure_item
from broker.core.pricing import Demand
from broker.core.request import parse_request
from broker.core.responses import ResponsesRequest
from broker.core.tokens import IMAGE_TOKENS, MESSAGE_TOKENS, Size
from broker.core.trimming import droppable_items

RULES = RequestRules(default_model=None, extra_parameters=(), allowed_models=("*",), max_messages=20)
FIT = FitRules(max_prompt_tokens=0, max_output_tokens=4096, switch_off_compression=False, user=None)
PICTURE = {"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "low"}
TOOL = {
    "type": "function",
    "name": "look",
    "description": "Looks",
    "parameters": {"type": "object"},
    "strict": True,
}


def user(content: Any = "Hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(text: str = "Hello") -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [part]}


def call(call_id: str = "call_1") -> dict[str, Any]:
    return {"type": "function_call", "id": "fc_1", "call_id": call_id, "name": "look", "arguments": "{}"}


def output(call_id: str = "call_1", value: Any = "seen") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": value}


def thought(secret: str = "gAAAA") -> dict[str, Any]:
    summary = [{"type": "summary_text", "text": "Hm."}]
    return {
        "type": "reasoning",
        "id": "rs_1",
        "summary": summary,
        "content": None,
        "encrypted_content": secret,
    }


def asked(*items: Any, **parameters: Any) -> dict[str, Any]:
    return {"model": "a/b", "input": list(items) or [user()], **parameters}


def rules(*extra: str, models: tuple[str, ...] = ("*",)) -> RequestRules:
    return RequestRules(default_model=None, extra_parameters=extra, allowed_models=models, max_messages=20)


def accept(document: Any, using: RequestRules = RULES) -> ResponsesRequest:
    before = copy.deepcopy(document)
    request = parse_request(document, using)
    assert isinstance(request, ResponsesRequest)
    assert document == before
    return request


def fields(document: Any, using: RequestRules = RULES) -> list[str]:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(document, using)
    details: list[dict[str, str]] = caught.value.details
    assert 0 < len(details) <= MAX_DETAILS
    return [detail["field"] for detail in details]


# Accepted requests


EVERYTHING: dict[str, Any] = {
    "instructions": "Be terse.",
    "models": ["a/b", "c/d"],
    "provider": {"only": ["x"]},
    "stream": True,
    "stream_options": {"include_obfuscation": False},
    "store": True,
    "truncation": "auto",
    "include": ["reasoning.encrypted_content"],
    "max_output_tokens": 100,
    "max_tool_calls": 3,
    "temperature": 1.5,
    "top_p": 0.5,
    "top_k": 3,
    "top_logprobs": 2,
    "frequency_penalty": -1,
    "presence_penalty": 1,
    "reasoning": {"effort": "low", "summary": "auto", "max_tokens": 50},
    "text": {
        "format": {"type": "json_schema", "name": "x", "schema": {}, "strict": True},
        "verbosity": "low",
    },
    "modalities": ["text"],
    "tools": [TOOL],
    "tool_choice": {"type": "function", "name": "look"},
    "parallel_tool_calls": True,
    "cache_control": {"type": "ephemeral"},
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "explicit"},
    "service_tier": "flex",
    "user": "u",
    "safety_identifier": "s",
    "session_id": "c",
    "metadata": {"a": "b"},
    "trace": {"trace_id": "t", "own": 1},
}


def test_every_parameter_is_taken() -> None:
    request = accept(asked(**EVERYTHING))
    assert request.parameters == EVERYTHING
    assert request.reachable_models == ("a/b", "c/d")


@pytest.mark.parametrize(
    "choice",
    [
        "none",
        "auto",
        "required",
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]},
    ],
)
def test_every_tool_choice_is_taken(choice: Any) -> None:
    accept(asked(tools=[TOOL], tool_choice=choice))


@pytest.mark.parametrize(
    "items",
    [
        [{"type": "message", "role": "developer", "content": "Be terse"}, user()],
        [user([{"type": "input_text", "text": "What is this?"}, PICTURE])],
        [user(), thought(), call(), output(), said(), user()],
        [user(), call(), output(value=[{"type": "input_text", "text": "this"}, PICTURE])],
        [user(), call(), output(value=[])],
        [user(), {"role": "assistant", "content": "Hello"}, user()],
        [user(), said() | {"content": [{"type": "refusal", "refusal": "No."}]}, user()],
        [user(), said() | {"phase": "final_answer"}],
        [{"type": "reasoning", "summary": []}, said(), user()],
    ],
)
def test_items_are_taken_as_a_page_collects_them(items: list[dict[str, Any]]) -> None:
    assert accept(asked(*items)).items == items


def test_a_text_is_a_message_of_the_user() -> None:
    request = accept({"model": "a/b", "input": "Hi"})
    assert request.items == [user()]
    assert fit(request, {}, FIT).body["input"] == "Hi"


# Refusals


def test_input_and_messages_together_are_refused_at_messages() -> None:
    assert fields(asked(messages=[user()])) == ["messages"]


def test_a_null_beside_the_other_is_as_good_as_nothing() -> None:
    accept(asked(messages=None))
    assert not isinstance(
        parse_request({"model": "a/b", "messages": [user()], "input": None}, RULES), ResponsesRequest
    )


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": 3}, "input"),
        ({"input": [user()] * 21}, "input"),
        ({"input": ["Hi"]}, "input.0"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [{"content": "x"}]}, "input.0.role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0.type"),
        ({"input": [user([{"type": "text", "text": "x"}])]}, "input.0.content.0.type"),
        (
            {"input": [user([{"type": "input_image", "image_url": "file:///etc"}])]},
            "input.0.content.0.image_url",
        ),
        ({"input": [user([{"type": "input_image", "file_id": "file-1"}])]}, "input.0.content.0.image_url"),
        ({"input": [user([{"type": "input_file", "file_id": "f"}])]}, "input.0.content.0.type"),
        (
            {"input": [user([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}])]},
            "input.0.content.0.type",
        ),
        ({"input": [user(), output("call_9")]}, "input.1.call_id"),
        ({"input": [output(), call()]}, "input.0.call_id"),
        ({"input": [user() | {"colour": 1}]}, "input.0.colour"),
        ({"stream": False}, "stream"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools.0.name"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"include": ["web_search_call.results"]}, "include.0"),
        ({"modalities": ["image"]}, "modalities.0"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"model": "a/b:online"}, "model"),
        ({"models": ["a/b@preset/x"]}, "models.0"),
    ],
)
def test_faults_are_refused_at_their_place(parameters: dict[str, Any], field: str) -> None:
    assert field in fields({**asked(), **parameters})


CLOSED = {
    "previous_response_id": "resp_1",
    "conversation": "conv_1",
    "background": True,
    "prompt": {"id": "pmpt_1"},
    "tools": [{"type": "web_search"}],
    "plugins": [{"id": "web"}],
    "image_config": {},
    "debug": {},
    "stop_server_tools_when": [],
    "service_tier": "priority",
    "colour": 1,
}


@pytest.mark.parametrize(("name", "value"), CLOSED.items())
def test_parameters_that_raise_cost_must_be_opened(name: str, value: Any) -> None:
    assert all(field.startswith(name) for field in fields(asked(**{name: value})))
    assert fit(accept(asked(**{name: value}), rules(name)), {}, FIT).body[name] == value


def test_a_closed_part_is_opened_by_the_name_it_has_in_a_chat() -> None:
    document = asked(user([{"type": "input_file", "file_id": "f"}]))
    accept(document, rules("file"))
    accept(asked(user() | {"colour": 1}), rules("input.colour"))


OPENED: list[dict[str, Any]] = [
    {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"query": "x"}},
    {"type": "shell_call", "call_id": "c", "content": [3, {"type": []}, {"text": "abc"}]},
    {"type": "shell_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": 3}]},
]


@pytest.mark.parametrize("item", OPENED)
def test_an_item_of_a_server_tool_is_opened_by_its_type(item: dict[str, Any]) -> None:
    document = asked(user("x" * 600), item)
    assert fields(document)[0] == "input.1.type"
    assert fields(document, rules("web_search", "*call_id"))[0] == "input.1.type"
    fitted = fit(accept(document, rules(item["type"])), {}, FIT)
    assert fitted.body["input"] == document["input"]
    assert fitted.prompt_tokens > 215


def test_a_call_of_a_server_tool_goes_with_its_output() -> None:
    assert list(droppable_items([user(), *OPENED[1:], said(), user()])) == [[0, 1, 2, 3]]
    assert list(droppable_items([user(), OPENED[1], user(), OPENED[2]])) == []


def test_a_model_that_is_not_allowed_is_refused() -> None:
    with pytest.raises(ModelNotAllowed):
        parse_request(asked(models=["c/d"]), rules(models=("a/*",)))


def test_fetched_pictures_are_found_wherever_they_are() -> None:
    far = {"type": "input_image", "image_url": "https://example.com/a.png"}
    request = accept(asked(user([PICTURE, far]), call(), output(value=[far])))
    with pytest.raises(InvalidRequest) as caught:
        refuse_fetched_images(request.image_addresses(), ())
    assert [detail["field"] for detail in caught.value.details] == [
        "input.0.content.1.image_url",
        "input.2.output.0.image_url",
    ]


WORDS = st.sampled_from(
    [
        "user",
        "assistant",
        "system",
        "message",
        "function_call",
        "function_call_output",
        "reasoning",
        "input_text",
        "input_image",
        "a/b",
        "",
    ]
)
KEYS = st.sampled_from(
    [
        "type",
        "role",
        "content",
        "call_id",
        "name",
        "arguments",
        "output",
        "summary",
        "text",
        "image_url",
        "input",
        "model",
        *EVERYTHING,
        *CLOSED,
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=30,
)


@given(
    st.dictionaries(KEYS, VALUES, max_size=8).map(lambda v: {"input": [user()], **v})
    | st.lists(VALUES, max_size=4).map(lambda v: {"model": "a/b", "input": v}),
    st.booleans(),
)
def test_any_document_raises_only_errors_of_the_broker(document: Any, opened: bool) -> None:
    try:
        request = parse_request(document, rules("*") if opened else RULES)
        fitted = fit(request, {}, FIT)
    except BrokerError:
        return
    assert fitted.body[request.field] == document[request.field]


# Fitting


def test_the_body_is_the_request_streamed_and_not_stored() -> None:
    fitted = fit(accept(asked(**EVERYTHING)), {}, FIT)
    kept = {name: value for name, value in EVERYTHING.items() if name not in ("stream_options", "truncation")}
    assert fitted.body == {**asked(**kept), "store": False, "stream": True}
    assert fitted.dialect == "responses"


def test_the_cap_is_the_least_of_all() -> None:
    known = {"a/b": ModelLimits(1000, 300)}
    assert fit(accept(asked(max_output_tokens=500)), known, FIT).body["max_output_tokens"] == 300
    assert fit(accept(asked()), {}, FIT).body["max_output_tokens"] == 4096
    fitted = fit(accept(asked(max_output_tokens=20, reasoning={"max_tokens": 50})), {}, FIT)
    assert fitted.body["reasoning"] == {"max_tokens": 20}
    assert fitted.max_output_tokens == 20


def test_a_cap_without_room_is_refused_at_its_parameter() -> None:
    with pytest.raises(InvalidRequest) as caught:
        fit(accept(asked(max_output_tokens=1000)), {"a/b": ModelLimits(900, None)}, FIT)
    assert caught.value.details[0]["field"] == "max_output_tokens"
    quotas = Quotas(1, 1, daily_tokens=5, daily_cost=0, total_daily_cost=0)
    assert beyond_limits(WorstCase(9, 0), quotas, "max_output_tokens")[0]["field"] == "max_output_tokens"


def test_ours_is_added() -> None:
    fitted = fit(accept(asked()), {}, FitRules(0, 10, switch_off_compression=True, user="hash"))
    assert fitted.body["user"] == "hash"
    assert fitted.body["plugins"] == [{"id": "context-compression", "enabled": False}]


def test_the_system_message_is_the_head_of_the_instructions() -> None:
    request = accept(asked(instructions="Be terse."))
    assert fit(request.with_system("Ours."), {}, FIT).body["instructions"] == "Ours.\n\nBe terse."
    assert fit(accept(asked()).with_system("Ours."), {}, FIT).body["instructions"] == "Ours."
    assert "instructions" not in fit(accept(asked()).with_system(None), {}, FIT).body
    assert fit(request.with_system("x" * 3000), {}, FIT).prompt_tokens > 1000


@pytest.mark.parametrize(
    ("item", "size"),
    [
        (user("é" * 10), Size(20, MESSAGE_TOKENS)),
        (user([{"type": "input_text", "text": "x" * 10}, PICTURE]), Size(10, MESSAGE_TOKENS + IMAGE_TOKENS)),
        (said("x" * 10), Size(10, MESSAGE_TOKENS)),
        (call(), Size(6 + 4 + 2, MESSAGE_TOKENS)),
        (output(value="x" * 10), Size(6 + 10, MESSAGE_TOKENS)),
        (output(value=[PICTURE]), Size(6, MESSAGE_TOKENS + IMAGE_TOKENS)),
        (thought("x" * 10), Size(3 + 10, MESSAGE_TOKENS)),
    ],
)
def test_all_that_a_model_reads_is_measured(item: dict[str, Any], size: Size) -> None:
    assert measure_item(item) == size


def test_only_measured_text_gives_a_sample() -> None:
    assert (
        fit(accept(asked(user("x" * 600), call(), output(), said())), {}, FIT).calibration_sample is not None
    )
    for item in (thought(), user([PICTURE])):
        assert fit(accept(asked(user("x" * 600), item)), {}, FIT).calibration_sample is None


def test_pictures_and_server_tools_are_in_the_demand() -> None:
    body = asked(user([PICTURE]), call(), output(value=[PICTURE]), tools=[{"type": "image_generation"}])
    assert demand_of(body, ["a/b"]) == Demand(images=2, searches=5, draws=True)


ITEMS = {
    "s": {"role": "system"},
    "d": {"role": "developer"},
    "u": {"role": "user"},
    "a": {"type": "message", "role": "assistant"},
    "r": {"type": "reasoning"},
    **{letter: {"type": "function_call", "call_id": letter.lower()} for letter in "CKL"},
    **{letter: {"type": "function_call_output", "call_id": letter} for letter in "ckl"},
}


def units(initials: str) -> list[list[int]]:
    """The units of items by their initials; ``C`` is a call and ``c`` its output."""
    return list(droppable_items([ITEMS[initial] for initial in initials.replace(" ", "")]))


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("u", []),
        ("s ua d ua u", [[1, 2], [4, 5]]),
        ("a ua u", [[0], [1, 2]]),
        ("u rCc ra u", [[0, 1, 2, 3, 4, 5]]),  # an old turn goes whole
        ("ua u rCKck rLl ra", [[0, 1], [3, 4, 5, 6, 7], [8, 9, 10]]),  # then steps of the last turn
        ("u rCc", []),  # results in progress stay
        ("u C a c ra", [[1, 2, 3]]),  # a call and its output are not parted
        ("u CK c k L l a", [[1, 2, 3, 4], [5, 6]]),
        ("u C u c a u", [[0, 1, 2, 3, 4]]),  # not even by the next question
        ("ua u C u c", [[0, 1]]),  # nor by the last one
        ("Cc ra", [[0, 1]]),  # nobody has asked: steps only
        ("u ra ra a", [[1, 2], [3, 4]]),  # a message ends an answer
        ("u raCc a", [[1, 2, 3, 4]]),  # but what it called belongs to it
    ],
)
def test_whole_units_go_the_oldest_first(items: str, expected: list[list[int]]) -> None:
    assert units(items) == expected


def is_answer(item: dict[str, Any], call: dict[str, Any]) -> bool:
    return item.get("type") == "function_call_output" and item["call_id"] == call["call_id"]


@given(st.text(alphabet="sduarCcKkLl", max_size=30))
def test_no_unit_parts_a_call_from_its_output(initials: str) -> None:
    items = [ITEMS[initial] for initial in initials]
    found = list(droppable_items(items))
    gone: set[int] = set()
    for unit in found:
        assert unit == sorted(unit)
        assert not gone & set(unit)
        gone |= set(unit)
        for call_at in (index for index in gone if items[index].get("type") == "function_call"):
            answers = [
                index for index in range(call_at, len(items)) if is_answer(items[index], items[call_at])
            ]
            assert gone.issuperset(answers)
    assert not any(items[index].get("role") in ("system", "developer") for index in gone)
    last_user = max((index for index, item in enumerate(items) if item.get("role") == "user"), default=None)
    assert last_user not in gone


def test_trimming_drops_items_and_never_cuts_text() -> None:
    items = [user("x" * 3000), thought(), call(), output(), said("y" * 3000), user("z" * 300)]
    request = accept(asked(*items, instructions="Be terse."))
    fitted = fit(request, {"a/b": ModelLimits(600, 100)}, FIT)
    assert fitted.body["input"] == items[-1:]
    assert fitted.dropped == 5
    assert fitted.prompt_tokens < 500
    with pytest.raises(PromptTooLong) as caught:
        fit(request, {"a/b": ModelLimits(200, 100)}, FIT)
    assert caught.value.details[0]["field"] == "input"
