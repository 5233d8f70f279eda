from __future__ import annotations

import copy
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.chat import ChatRequest, parse_chat
from broker.core.checking import MAX_DETAILS, RequestRules, refuse_fetched_images
from broker.core.errors import BrokerError, InvalidRequest, ModelNotAllowed

RULES = RequestRules(default_model=None, extra_parameters=(), allowed_models=("*",), max_messages=200)
USER = {"role": "user", "content": "Hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "auto"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "tool", "tool_call_id": "call_1", "content": "seen"}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks", "parameters": {"type": "object"}, "strict": True},
}


def rules(
    *extra: str, models: tuple[str, ...] = ("*",), default: str | None = None, most: int = 200
) -> RequestRules:
    return RequestRules(
        default_model=default, extra_parameters=extra, allowed_models=models, max_messages=most
    )


def chat(*messages: Any, **parameters: Any) -> dict[str, Any]:
    return {"model": "a/b", "messages": list(messages) or [USER], **parameters}


def accept(document: Any, using: RequestRules = RULES) -> ChatRequest:
    before = copy.deepcopy(document)
    request = parse_chat(document, using)
    assert document == before
    return request


def details(document: Any, using: RequestRules = RULES) -> list[dict[str, str]]:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(document, using)
    found: list[dict[str, str]] = caught.value.details
    assert 0 < len(found) <= MAX_DETAILS
    for detail in found:
        assert detail.keys() == {"field", "message"}
        assert all(text and text.isprintable() for text in detail.values())
    return found


def fields(document: Any, using: RequestRules = RULES) -> list[str]:
    return [detail["field"] for detail in details(document, using)]


EVERYTHING: dict[str, Any] = {
    "models": ["a/b", "c/d:free"],
    "route": "fallback",
    "provider": {
        "allow_fallbacks": True,
        "require_parameters": None,
        "data_collection": "deny",
        "zdr": True,
        "enforce_distillable_text": False,
        "order": ["openai"],
        "only": ["Amazon-Bedrock"],
        "ignore": [],
        "quantizations": ["fp8"],
        "sort": {"by": "price", "partition": "none"},
        "max_price": {"prompt": 5, "completion": "20.5", "image": 0.01, "audio": "0", "request": 0},
        "preferred_min_throughput": {"p50": 100, "p90": None},
        "preferred_max_latency": 2.5,
    },
    "stream": True,
    "stream_options": {"include_usage": False},
    "usage": {"include": True},
    "max_tokens": 800,
    "max_completion_tokens": 900,
    "n": 1,
    "stop": ["\n\n###", "END"],
    "seed": 2**63 - 1,
    "temperature": 0,
    "top_p": 1,
    "top_k": 40,
    "top_a": 0.5,
    "min_p": 0.0,
    "frequency_penalty": -2,
    "presence_penalty": 2.0,
    "repetition_penalty": 1.1,
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "top_logprobs": 20,
    "reasoning": {"effort": "xhigh", "max_tokens": 100, "exclude": False, "enabled": True, "summary": "auto"},
    "reasoning_effort": "xhigh",
    "include_reasoning": True,
    "verbosity": "low",
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True},
    },
    "structured_outputs": True,
    "prediction": {"type": "content", "content": [{"type": "text", "text": "so"}]},
    "modalities": ["text"],
    "tools": [TOOL, {"type": "function", "function": {"name": "n"}, "cache_control": {"type": "ephemeral"}}],
    "tool_choice": {"type": "function", "function": {"name": "look"}},
    "parallel_tool_calls": False,
    "cache_control": {"type": "ephemeral", "ttl": "1h"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
    "service_tier": "flex",
    "user": "u_1",
    "session_id": "c_1",
    "metadata": {"page": "help"},
    "trace": {"trace_id": "t", "mine": {"any": 1}},
}


def test_the_smallest_request_is_a_model_and_a_message() -> None:
    request = accept({"model": "openai/gpt-4o-mini", "messages": [USER]})
    assert request == ChatRequest(model="openai/gpt-4o-mini", messages=[USER], parameters={})
    assert request.reachable_models == ("openai/gpt-4o-mini",)


def test_every_documented_parameter_comes_through_as_it_came() -> None:
    assert accept(chat(**EVERYTHING)).parameters == EVERYTHING


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_parameter_of_another_type_is_refused_at_its_name(name: str) -> None:
    wrong: list[Any] = [[[]], [{"x": {}}]]
    wrong += [] if name == "trace" else [{"x": {}}]
    wrong += [] if isinstance(EVERYTHING[name], bool) else [True, False]
    for value in wrong:
        assert fields(chat(**{name: value}))[0].split(".")[0] == name


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_null_parameter_is_as_good_as_none(name: str) -> None:
    assert accept(chat(**{name: None})).parameters == {}


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("temperature", 2.01, ""),
        ("temperature", True, ""),
        ("temperature", "1", ""),
        ("temperature", float("nan"), ""),
        ("temperature", float("inf"), ""),
        ("top_p", 1.1, ""),
        ("top_p", -0.1, ""),
        ("top_k", -1, ""),
        ("top_k", 1.0, ""),
        ("top_logprobs", 21, ""),
        ("frequency_penalty", -2.1, ""),
        ("repetition_penalty", 2.5, ""),
        ("max_tokens", 0, ""),
        ("max_tokens", True, ""),
        ("max_tokens", "100", ""),
        ("max_completion_tokens", 10.0, ""),
        ("seed", 2**63, ""),
        ("seed", 2**70, ""),
        ("stop", ["a"] * 5, ""),
        ("stop", ["a", 1], ".1"),
        ("logit_bias", {"1": 101}, ".1"),
        ("logit_bias", {str(n): 0 for n in range(1025)}, ""),
        ("metadata", {"k": 1}, ".k"),
        ("metadata", {"k": "v" * 513}, ".k"),
        ("metadata", {"k" * 65: "v"}, "." + "k" * 64),
        ("metadata", {str(n): "v" for n in range(17)}, ""),
        ("models", ["a/b"] * 17, ""),
        ("models", ["a b"], ".0"),
        ("session_id", "s" * 257, ""),
        ("reasoning", {"effort": "huge"}, ".effort"),
        ("reasoning", {"max_tokens": 0}, ".max_tokens"),
        ("reasoning", {"mode": "pro"}, ".mode"),
        ("provider", {"sort": "price", "colour": 1}, ".colour"),
        ("provider", {"sort": {"by": "age"}}, ".sort.by"),
        ("provider", {"max_price": {"prompt": -1}}, ".max_price.prompt"),
        ("provider", {"max_price": {"prompt": "cheap"}}, ".max_price.prompt"),
        ("provider", {"max_price": {"prompt": True}}, ".max_price.prompt"),
        ("provider", {"max_price": {"prompt": float("nan")}}, ".max_price.prompt"),
        ("provider", {"preferred_max_latency": {"p51": 1}}, ".preferred_max_latency.p51"),
        ("response_format", {"type": "xml"}, ".type"),
        ("response_format", {"type": "json_schema"}, ".json_schema"),
        ("response_format", {}, ".type"),
        ("tools", [TOOL] * 129, ""),
        ("tools", [{"type": "function", "function": {"name": "n" * 65}}], ".0.function.name"),
        ("tools", [{"type": "function", "function": {"name": "n", "strict": 1}}], ".0.function.strict"),
        ("tool_choice", "always", ""),
        ("tool_choice", {"type": "function", "function": {}}, ".function.name"),
        ("prediction", {"type": "content", "content": [{"type": "image_url"}]}, ".content.0.type"),
    ],
)
def test_values_out_of_range_are_refused_at_their_place(name: str, value: Any, field: str) -> None:
    assert fields(chat(**{name: value}))[0] == name + field


@pytest.mark.parametrize("value", [False, 1, 1.0, "true", 0])
def test_a_request_that_is_not_to_be_streamed_is_refused(value: Any) -> None:
    assert fields(chat(stream=value)) == ["stream"]


CLOSED: dict[str, Any] = {
    "plugins": [{"id": "web"}],
    "transforms": ["middle-out"],
    "stop_server_tools_when": {"cost": 1},
    "debug": {"echo_upstream_body": True},
    "image_config": {},
    "service_tier": "priority",
    "n": 2,
    "modalities": ["text", "image"],
    "tools": [{"type": "openrouter:web_search"}],
    "tool_choice": {"type": "openrouter:web_search"},
    "prompt": "Once upon a time",
    "preset": "email-copywriter",
    "web_search_options": {"search_context_size": "high"},
    "frobnicate": [1, {"a": None}],
}


@pytest.mark.parametrize("name", CLOSED)
def test_parameters_that_raise_cost_or_reach_are_refused(name: str) -> None:
    assert fields(chat(**{name: CLOSED[name]}))[0].split(".")[0] == name
    assert fields(chat(**{name: CLOSED[name]}), rules("x" + name))[0].split(".")[0] == name


@pytest.mark.parametrize("name", CLOSED)
def test_an_operator_opens_a_parameter_by_its_name(name: str) -> None:
    for glob in (name, name[:-2] + "*", "*"):
        assert accept(chat(**{name: CLOSED[name]}), rules("unrelated", glob)).parameters == {
            name: CLOSED[name]
        }


def test_globs_are_case_sensitive() -> None:
    assert fields(chat(plugins=[]), rules("PLUGINS")) == ["plugins"]


def test_opening_everything_opens_no_documented_range() -> None:
    open_rules = rules("*")
    assert fields(chat(temperature=3), open_rules) == ["temperature"]
    assert fields(chat(stream=False), open_rules) == ["stream"]
    assert fields({"model": "a/b", "messages": []}, open_rules) == ["messages"]


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [("plugins", {"id": "web"}, ""), ("plugins", [1], ".0"), ("n", 0, ""), ("n", 129, ""), ("n", True, "")],
)
def test_opened_parameters_that_the_broker_reads_are_checked(name: str, value: Any, field: str) -> None:
    assert fields(chat(**{name: value}), rules("*")) == [name + field]


def test_opened_and_other_faults_are_reported_together() -> None:
    assert fields(chat(temperature=3, plugins=1, frobnicate=1), rules("plugins")) == [
        "temperature",
        "frobnicate",
        "plugins",
    ]


@pytest.mark.parametrize("model", ["a/b:online", "a/b:free:online", "a/b:Online", "a/b:online:free"])
def test_models_that_search_the_web_are_refused_unless_opened(model: str) -> None:
    assert fields({**chat(), "model": model}) == ["model"]
    assert fields(chat(models=["c/d", model])) == ["models.1"]
    assert accept({**chat(), "model": model}, rules(":online")).model == model
    assert accept(chat(models=[model]), rules("*")).reachable_models == ("a/b", model)


@pytest.mark.parametrize(
    ("form", "model"),
    [
        (":batch", "x/y:batch"),
        (":batch", "x/y:free:BATCH"),
        ("@preset", "x/y@preset/z"),
        ("@preset", "@preset/z"),
        ("@preset", "X/Y@Preset/z"),
        ("@preset", "x/y:free@preset/z"),
        (":online", "x/y:online@preset/z"),
        (":batch", "x/y@preset/z:batch"),
    ],
)
def test_special_forms_of_a_model_are_refused_unless_opened(form: str, model: str) -> None:
    others = tuple(name for name in (":online", ":batch", "@preset") if name != form)
    narrow = rules(*others, models=("x/*", "X/*", "@preset/*", "a/b"))
    assert fields({**chat(), "model": model}, narrow) == ["model"]
    assert fields(chat(models=["x/y", model]), narrow) == ["models.1"]
    assert accept({**chat(), "model": model}, rules(*others, form)).model == model


def test_an_opened_form_still_has_to_pass_the_allowed_models() -> None:
    opened = rules("@preset", ":batch", models=("x/*",))
    assert accept({**chat(), "model": "x/y:batch"}, opened).model == "x/y:batch"
    for document in ({**chat(), "model": "@preset/z"}, {**chat(models=["e/y:batch"]), "model": "x/y"}):
        with pytest.raises(ModelNotAllowed):
            parse_chat(document, opened)


def test_two_efforts_must_be_equal() -> None:
    for told in ({"effort": "low"}, {"effort": None}, {"max_tokens": 100}, {"enabled": False}):
        accept(chat(reasoning=told, reasoning_effort="low"))
    assert fields(chat(reasoning={"effort": "high"}, reasoning_effort="low")) == ["reasoning_effort"]
    accept(chat(reasoning={"effort": "high"}))
    accept(chat(reasoning_effort="low", reasoning=None))


@pytest.mark.parametrize(
    ("name", "document", "field"),
    [
        (
            "stream_options.continuous_usage_stats",
            chat(stream_options={"continuous_usage_stats": True}),
            "stream_options.continuous_usage_stats",
        ),
        (
            "messages.cache_control",
            chat(USER, {**USER, "cache_control": {"type": "x"}}),
            "messages.1.cache_control",
        ),
        ("provider.colour", chat(provider={"colour": 1}), "provider.colour"),
        (
            "messages.content.image_url.format",
            chat({"role": "user", "content": [{**IMAGE, "image_url": {"url": "data:,", "format": "x"}}]}),
            "messages.0.content.0.image_url.format",
        ),
        (
            "tools.function.mine",
            chat(tools=[{**TOOL, "function": {"name": "n", "mine": 1}}]),
            "tools.0.function.mine",
        ),
        (
            "response_format.strict",
            chat(response_format={"type": "text", "strict": 1}),
            "response_format.strict",
        ),
    ],
)
def test_a_dotted_name_opens_a_nested_key(name: str, document: Any, field: str) -> None:
    head = name.partition(".")[0]
    for closed in ((), ("*",), (head,), (f"x{name}",), (f"{name}.deeper",)):
        if head in CLOSED and closed in (("*",), (head,)):
            continue
        assert fields(document, rules(*closed)) == [field]
    for opened in ((name,), ("unrelated", f"{head}.*"), (f"{name[:-1]}?",)):
        request = accept(document, rules(*opened))
        assert request.messages == document["messages"]


@pytest.mark.parametrize("glob", ["provider.*", "*.*", "provider.k?*"])
def test_globs_open_no_object_of_very_many_keys(glob: str) -> None:
    for count, accepted in ((1000, True), (1001, False), (49_000, False)):
        document = chat(provider={f"k{n}{'x' * 10}": 0 for n in range(count)})
        started = time.process_time()
        if accepted:
            accept(document, rules(glob))
        else:
            assert fields(document, rules(glob)) == ["body"]
        assert time.process_time() - started < 0.2


def test_a_dotted_name_opens_only_unknown_keys() -> None:
    opened = rules("messages.*", "stream_options.*", "reasoning.effort", "messages.content.x")
    assert fields(chat(reasoning={"effort": "huge"}), opened) == ["reasoning.effort"]
    assert fields(chat({"role": "user", "content": 7}), opened) == ["messages.0.content"]
    assert fields(chat({"role": "user", "mine": 1}), opened) == ["messages.0.content"]
    parts = [{"type": "text", "text": "a", "x": 1}, {"type": "text", "text": 5}]
    assert fields(chat({"role": "user", "content": parts}), opened) == ["messages.0.content.1.text"]
    assert fields(chat(USER, "x"), opened) == ["messages.1"]


def test_the_message_names_the_first_field_that_is_wrong() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(chat(temperature=3, colour=1), RULES)
    assert caught.value.message == "temperature: " + caught.value.details[0]["message"]
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(chat(**{"col\n" + "o" * 500: 1}), RULES)
    assert caught.value.message.startswith("col?oo")
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    "address", ["http://169.254.169.254/latest", "https://example.com/a.png", "HTTPS://x/y"]
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_only_openrouter_gets_pictures_by_address(role: str, address: str) -> None:
    part = {"type": "image_url", "image_url": {"url": address}}
    data = {"type": "image_url", "image_url": {"url": "Data:image/png;base64,AA"}}
    request = accept(chat({"role": role, "content": [data, part]}))
    with pytest.raises(InvalidRequest) as caught:
        refuse_fetched_images(request.image_addresses(), ("image_url",))
    assert [detail["field"] for detail in caught.value.details] == ["messages.0.content.1.image_url.url"]
    assert address not in str(caught.value.details)
    refuse_fetched_images(request.image_addresses(), ("image_url.http",))
    refuse_fetched_images(accept(chat({"role": role, "content": [data]})).image_addresses(), ())


def test_pictures_of_the_model_are_checked_too() -> None:
    made = {"role": "assistant", "images": [{"image_url": {"url": "http://10.0.0.1/a.png"}}]}
    with pytest.raises(InvalidRequest):
        refuse_fetched_images(accept(chat(made)).image_addresses(), ())


@pytest.mark.parametrize("model", ["online/b", "a/online", "a/b:onliner", "a/b:free"])
def test_other_models_may_have_online_in_their_name(model: str) -> None:
    assert accept({**chat(), "model": model}).model == model


def test_a_default_model_serves_requests_without_one() -> None:
    assert accept({"messages": [USER]}, rules(default="c/d")).model == "c/d"
    assert accept({"messages": [USER], "model": None}, rules(default="c/d")).model == "c/d"
    assert accept(chat(), rules(default="c/d")).model == "a/b"
    assert fields({"messages": [USER]}) == ["model"]
    assert fields({"messages": [USER], "models": ["c/d"]}) == ["model"]


@pytest.mark.parametrize("model", ["", " a/b", "a b", "a/b\n", "é", "x" * 257, 7])
def test_a_model_is_visible_ascii_of_bounded_length(model: Any) -> None:
    assert fields({"messages": [USER], "model": model}) == ["model"]


def test_reachable_models_are_the_model_first_and_none_twice() -> None:
    assert accept(chat(models=["c/d", "a/b", "c/d", "e/f"])).reachable_models == ("a/b", "c/d", "e/f")


def test_every_reachable_model_must_be_allowed() -> None:
    allowed = rules(models=("openai/*", "a/b"))
    assert accept(chat(models=["openai/x:free"]), allowed).model == "a/b"
    for document in (
        chat(models=["openai/x", "evil/y"]),
        {**chat(models=["a/b"]), "model": "evil/y"},
        {**chat(), "model": "OpenAI/x"} | {"models": ["evil/y"]},
    ):
        with pytest.raises(ModelNotAllowed, match=r"evil/y|OpenAI/x"):
            parse_chat(document, allowed)
    with pytest.raises(ModelNotAllowed):
        parse_chat({"messages": [USER]}, rules(models=("a/*",), default="c/d"))


ASSISTANT: dict[str, Any] = {
    "role": "assistant",
    "content": "Look",
    "name": None,
    "model": "a/b",
    "refusal": None,
    "reasoning": "hm",
    "reasoning_content": None,
    "reasoning_details": [
        {"type": "reasoning.text", "text": "hm", "signature": None, "format": "x", "index": 0}
    ],
    "tool_calls": [{**CALL, "index": 0}],
    "function_call": None,
    "images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}, "index": 0}],
    "audio": {"id": "audio_1", "transcript": "Look"},
    "annotations": [{"type": "url_citation", "url_citation": {"url": "https://example.com"}}],
}

MESSAGES: list[list[dict[str, Any]]] = [
    [
        {"role": "system", "content": "Be terse", "name": "boss"},
        {"role": "developer", "content": [{"type": "text", "text": "x"}]},
    ],
    [{"role": "user", "content": "", "name": None}],
    [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "see", "cache_control": {"type": "ephemeral", "ttl": "5m"}},
                IMAGE,
            ],
        }
    ],
    [
        {
            "role": "user",
            "content": [{"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}],
        }
    ],
    [ASSISTANT, {"role": "tool", "tool_call_id": "call_1", "content": [IMAGE], "name": "look"}],
    [{"role": "assistant"}],
    [USER, CALLING, ANSWER, ANSWER],
    [USER, CALLING, {**ANSWER, "content": []}],
    [USER, CALLING, {**ANSWER, "content": None}],
    [USER, CALLING, {**ANSWER, "content": ""}],
    [{"role": "assistant", "content": []}],
    [{**USER, "name": "José Müller"}, {**USER, "name": "山" * 64}],
    [{"role": "assistant", "tool_calls": [{**CALL, "id": ""}]}, {**ANSWER, "tool_call_id": ""}],
    [{"role": "assistant", "tool_calls": [{**CALL, "id": None}]}, {**ANSWER, "tool_call_id": ""}],
    [{"role": "assistant", "tool_calls": [{**CALL, "type": ""}]}, ANSWER],
    [{"role": "assistant", "tool_calls": [{**CALL, "type": None}]}, ANSWER],
    [{"role": "assistant", "tool_calls": [{"id": "call_1", "function": {"name": "look"}}]}, ANSWER],
    [
        {
            "role": "assistant",
            "tool_calls": [{**CALL, "extra_content": {"google": {"thought_signature": "A" * 65_000}}}],
        },
        ANSWER,
    ],
]

CLOSED_PARTS: list[tuple[str, dict[str, Any]]] = [
    ("input_audio", {"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}}),
    ("file", {"type": "file", "file": {"filename": "a.pdf", "file_data": "DATA:application/pdf;base64,AA"}}),
    ("file", {"type": "file", "file": {"file_id": "f_1"}}),
    ("video_url", {"type": "video_url", "video_url": {"url": "http://example.com/v"}}),
    ("video_url", {"type": "input_video", "video_url": {"url": "http://example.com/v"}}),
]


@pytest.mark.parametrize(("name", "part"), CLOSED_PARTS)
def test_files_sounds_and_films_must_be_opened_first(name: str, part: dict[str, Any]) -> None:
    for message in ({"role": "user"}, {"role": "assistant"}, ANSWER):
        content = [{"type": "text", "text": "x"}, part]
        document = chat(CALLING, {**message, "content": content})
        if message["role"] != "tool":
            document = chat({**message, "content": content})
        place = f"messages.{len(document['messages']) - 1}.content.1.type"
        assert fields(document) == [place]
        assert fields(document, rules("image_url", "messages")) == [place]
        assert accept(document, rules(name)).messages == document["messages"]
        assert accept(document, rules("*")).messages == document["messages"]


def test_a_part_that_was_opened_is_still_checked() -> None:
    bad = {"role": "user", "content": [{"type": "file", "file": {"file_data": "file:///etc/passwd"}}]}
    assert fields(chat(bad), rules("file")) == ["messages.0.content.0.file.file_data"]


@pytest.mark.parametrize("messages", MESSAGES)
def test_messages_come_through_as_they_came(messages: list[dict[str, Any]]) -> None:
    assert accept(chat(*messages)).messages == messages


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([3], "messages.0"),
        ([{}], "messages.0.role"),
        ([{"role": ["user"]}], "messages.0.role"),
        ([{"role": "function", "name": "f", "content": "x"}], "messages.0.role"),
        ([USER, {"role": "user"}], "messages.1.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": {}}], "messages.0.content"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        ([{"role": "user", "content": [IMAGE] * 257}], "messages.0.content"),
        ([{"role": "user", "content": ["x"]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages.0.content.0.type"),
        (
            [{"role": "user", "content": [IMAGE, {"type": "web_page", "url": "x"}]}],
            "messages.0.content.1.type",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages.0.content.0.image_url.url",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "messages.0.content.0.image_url",
        ),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
                }
            ],
            "messages.0.content.0.image_url.url",
        ),
        ([{"role": "user", "content": "x", "user": "y"}], "messages.0.user"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages.0.tool_calls"),
        ([{"role": "system", "content": [IMAGE]}], "messages.0.content.0.type"),
        ([{"role": "assistant", "content": 1}], "messages.0.content"),
        ([{"role": "assistant", "function_call": "f"}], "messages.0.function_call"),
        ([{"role": "assistant", "content": [{"type": "web_page"}]}], "messages.0.content.0.type"),
        ([{"role": "assistant", "content": [1]}], "messages.0.content.0"),
        ([{**USER, "name": ""}], "messages.0.name"),
        ([{**USER, "name": "ü" * 65}], "messages.0.name"),
        ([{**USER, "name": 7}], "messages.0.name"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}], "messages.0.tool_calls.0.type"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "id": 7}]}], "messages.0.tool_calls.0.id"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "messages.0.tool_calls.0.function"),
        (
            [{"role": "assistant", "tool_calls": [{**CALL, "extra_content": "x"}]}],
            "messages.0.tool_calls.0.extra_content",
        ),
        (
            [{"role": "assistant", "tool_calls": [{**CALL, "extra_content": {"x": "é" * 32_768}}]}],
            "messages.0.tool_calls.0.extra_content",
        ),
        ([{"role": "assistant", "reasoning_details": [{}]}], "messages.0.reasoning_details.0.type"),
        ([CALLING, {"role": "tool", "content": "x"}], "messages.1.tool_call_id"),
        ([CALLING, {**ANSWER, "error": True}], "messages.1.error"),
    ],
)
def test_a_fault_in_a_message_is_reported_at_its_path(messages: list[Any], field: str) -> None:
    assert fields(chat(*messages))[0] == field


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([ANSWER], "messages.0.tool_call_id"),
        ([USER, ANSWER], "messages.1.tool_call_id"),
        ([{"role": "assistant", "content": "x"}, ANSWER], "messages.1.tool_call_id"),
        ([CALLING, USER, ANSWER], "messages.2.tool_call_id"),
        ([CALLING, {"role": "system", "content": "x"}, ANSWER], "messages.2.tool_call_id"),
        ([CALLING, ANSWER, {"role": "assistant", "content": "x"}, ANSWER], "messages.3.tool_call_id"),
        ([CALLING, {**ANSWER, "tool_call_id": "call_2"}], "messages.1.tool_call_id"),
        ([CALLING, {**ANSWER, "tool_call_id": ""}], "messages.1.tool_call_id"),
    ],
)
def test_a_tool_message_must_answer_a_call_right_before_it(messages: list[Any], field: str) -> None:
    assert fields(chat(*messages)) == [field]


def test_the_number_of_messages_is_bounded() -> None:
    assert len(accept(chat(*[USER] * 3), rules(most=3)).messages) == 3
    [detail] = details(chat(*[{"bad": 1}] * 4), rules(most=3))
    assert detail == {"field": "messages", "message": "There may be at most 3 messages."}


@pytest.mark.parametrize("document", [None, [], "x", 1, True, [chat()]])
def test_a_request_is_an_object(document: Any) -> None:
    assert fields(document) == ["body"]


def test_many_faults_are_reported_in_few_details() -> None:
    assert len(details(chat(*[{"role": "user"}] * 200))) == MAX_DETAILS
    assert fields(chat({**USER, **{str(n): 1 for n in range(20_000)}})) == ["body"]


SECRET = "hush hush"


@pytest.mark.parametrize(
    "document",
    [
        {"model": SECRET, "messages": SECRET},
        chat(
            {"role": SECRET, "content": SECRET},
            {"role": "user", "content": [{"type": SECRET, "text": SECRET}]},
        ),
        chat(
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": SECRET, "detail": SECRET}}],
            }
        ),
        chat({**ANSWER, "content": SECRET}),
        chat(**dict.fromkeys(EVERYTHING, SECRET)),
        chat(**{name: [SECRET] for name in EVERYTHING}),
        chat(**{name: {"type": SECRET} for name in EVERYTHING}),
        chat(**dict.fromkeys(CLOSED, SECRET)),
    ],
)
def test_no_detail_quotes_a_value(document: Any) -> None:
    assert SECRET not in str(details(document))


MESSAGE_KEYS = [
    "role",
    "content",
    "type",
    "text",
    "tool_calls",
    "id",
    "function",
    "name",
    "tool_call_id",
    "image_url",
    "url",
]
KEYS = st.sampled_from([*MESSAGE_KEYS, "messages", "model", *EVERYTHING, *CLOSED])
WORDS = st.sampled_from(
    ["user", "assistant", "tool", "system", "text", "image_url", "a/b", "x:online", "function", ""]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=30,
)


@given(
    VALUES | st.dictionaries(KEYS, VALUES, max_size=8) | st.lists(VALUES, max_size=4).map(lambda v: chat(*v)),
    st.booleans(),
)
def test_any_document_raises_only_errors_of_the_broker(document: Any, opened: bool) -> None:
    try:
        request = parse_chat(document, rules("*") if opened else RULES)
    except BrokerError:
        return
    assert request.messages == document["messages"]
    assert request.model == document["model"]


NAMES = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=6)
TAME_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | NAMES, inner, max_size=5),
    max_leaves=30,
)


def leads_into(document: Any, path: str) -> bool:
    """Return True if each step of the path exists, or is a key that an object lacks."""
    value = document
    for step in path.split("."):
        if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, dict):
            value = value.get(step)
        else:
            return False
    return True


@given(st.dictionaries(KEYS | NAMES, TAME_VALUES) | st.lists(TAME_VALUES, max_size=4).map(lambda v: chat(*v)))
def test_every_field_of_a_detail_is_a_path_of_the_document(document: Any) -> None:
    told = []
    try:
        parse_chat(document, RULES)
    except InvalidRequest as error:
        told = [detail["field"] for detail in error.details]
    assert [field for field in told if not leads_into(document, field)] == []


TEXTS = st.text(max_size=20)
PARTS = TEXTS.map(lambda text: {"type": "text", "text": text}) | st.just(IMAGE)
CONTENTS = TEXTS | st.lists(PARTS, min_size=1, max_size=3)
GOOD_MESSAGES = st.builds(lambda content: {"role": "user", "content": content}, CONTENTS) | st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "developer", "assistant"]),
    TEXTS,
)
GOOD_PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2) | st.integers(0, 2),
        "top_p": st.floats(0, 1),
        "max_tokens": st.integers(1, 2**53),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop": TEXTS | st.lists(TEXTS, max_size=4),
        "metadata": st.dictionaries(TEXTS, TEXTS, max_size=16),
        "logit_bias": st.dictionaries(TEXTS, st.floats(-100, 100), max_size=5),
        "user": st.text(min_size=1, max_size=256),
        "trace": st.dictionaries(TEXTS, st.integers() | TEXTS, max_size=4),
    },
)


@given(st.lists(GOOD_MESSAGES, min_size=1, max_size=6), GOOD_PARAMETERS)
def test_values_in_range_are_accepted_unchanged(messages: list[Any], parameters: dict[str, Any]) -> None:
    request = accept(chat(*messages, **parameters))
    assert request.messages == messages
    assert request.parameters == parameters
