"""The list of models: reading, looking up, narrowing, writing out."""

from __future__ import annotations

import time
from typing import Any

import orjson
import pytest

from broker.core.model_entry import (
    MAX_ENTRY,
    MAX_ID,
    MAX_LIST_BYTES,
    MAX_LIST_VALUES,
    MAX_MODELS,
    Model,
    Models,
    allows,
    narrow,
    parse_models,
    search,
    write_listing,
)

MINI = {
    "id": "openai/gpt-4o-mini",
    "canonical_slug": "openai/gpt-4o-mini-2024-07-18",
    "name": "OpenAI: GPT-4o-mini",
    "context_length": 128000,
    "pricing": {"prompt": "0.00000015", "completion": "0.0000006"},
    "top_provider": {"context_length": 100000, "max_completion_tokens": 16384, "is_moderated": True},
}
LLAMA = {
    "id": "meta-llama/llama-3.3",
    "canonical_slug": "meta-llama/llama-3.3-70b",
    "name": "Meta: Llama 3.3",
    "context_length": 131072,
    "pricing": {"prompt": "0.0000001", "completion": "0.0000003"},
}
LLAMA_FREE = {
    **LLAMA,
    "id": "meta-llama/llama-3.3:free",
    "name": "Meta: Llama 3.3 (free)",
    "context_length": 65536,
    "pricing": {"prompt": "0", "completion": "0"},
}


def read(*entries: Any) -> Models:
    return parse_models(orjson.dumps({"data": entries}))


def the(model: Model | None) -> Model:
    assert model is not None
    return model


def only(entry: dict[str, Any]) -> Model:
    return the(read(entry).find(entry["id"]))


def ids(models: list[Model]) -> list[str]:
    return [model.id for model in models]


def test_an_entry_has_id_name_limits_and_prices() -> None:
    model = only(MINI)
    assert (model.id, model.name) == ("openai/gpt-4o-mini", "OpenAI: GPT-4o-mini")
    assert model.max_completion_tokens == 16384
    assert model.prices is not None


def test_the_smaller_of_two_limits_counts() -> None:
    assert only(MINI).context_length == 100000
    assert only({**MINI, "context_length": 5}).context_length == 5
    assert only({**MINI, "max_completion_tokens": 7}).max_completion_tokens == 7


@pytest.mark.parametrize("odd", [None, 0, -1, "128000", True, 1.5, []])
def test_an_invalid_limit_is_unknown(odd: Any) -> None:
    assert only({"id": "m", "context_length": odd}).context_length is None
    assert only({**MINI, "context_length": odd}).context_length == 100000
    assert only({"id": "m", "context_length": 9, "top_provider": odd}).context_length == 9


def test_an_entry_of_another_server_has_few_facts() -> None:
    model = only({"id": "llama3:8b", "object": "model", "created": 1, "owned_by": "library"})
    assert model.name == "llama3:8b"
    assert (model.context_length, model.max_completion_tokens, model.prices) == (None, None, None)


@pytest.mark.parametrize("odd", [{}, {"id": 5}, {"id": None}, {"id": ""}, [], "m", None, 7])
def test_an_entry_without_an_id_is_left_out(odd: Any) -> None:
    assert ids(list(read(odd, MINI).entries)) == ["openai/gpt-4o-mini"]


def test_the_first_of_two_entries_with_one_id_stays() -> None:
    models = read({"id": "m", "name": "first"}, {"id": "m", "name": "second"})
    assert [model.name for model in models.entries] == ["first"]


@pytest.mark.parametrize("body", [b"", b"<html>", b"null", b"{}", b'{"data":{}}', b'{"data":[]', b"\xff"])
def test_an_answer_that_is_not_a_list_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_models(body)


@pytest.mark.parametrize("body", [b"[]", b'{"data":null}', b'{"data":[]}'])
def test_a_list_may_be_empty(body: bytes) -> None:
    assert parse_models(body).entries == ()


def test_a_bare_list_is_a_list() -> None:
    assert [model.id for model in parse_models(orjson.dumps([MINI, LLAMA])).entries] == [
        MINI["id"],
        LLAMA["id"],
    ]


@pytest.mark.parametrize(
    "odd",
    [
        b'{"id":"m","x":' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"id":"m","x":' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}",
        b'{"id":"m","description":"' + b"x" * MAX_ENTRY + b'"}',
        b'{"id":"' + b"m" * (MAX_ID + 1) + b'"}',
        b'{"id":"m","x":[' + b"0," * MAX_ENTRY + b"0]}",
    ],
    ids=["deep list", "deep object", "large", "long id", "many values"],
)
def test_an_entry_that_is_too_large_is_left_out(odd: bytes) -> None:
    models = parse_models(b'{"data":[' + odd + b"," + orjson.dumps(MINI) + b"]}")
    assert [model.id for model in models.entries] == [MINI["id"]]


@pytest.mark.parametrize(
    "body",
    [
        b'{"data":[' + b'{"id":"a"},' * (MAX_LIST_VALUES + 1) + b"{}]}",
        b'{"data":["' + b"x" * MAX_LIST_BYTES + b'"]}',
    ],
    ids=["values", "bytes"],
)
def test_a_list_that_is_too_large_is_refused_at_once(body: bytes) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match="too large"):
        parse_models(body)
    assert time.process_time() - started < 0.05


def test_the_first_of_too_many_models_stay() -> None:
    body = orjson.dumps({"data": [{"id": f"m{n}"} for n in range(MAX_MODELS + 5)]})
    assert len(parse_models(body).entries) == MAX_MODELS


def test_a_model_is_found_by_id_and_by_canonical_slug() -> None:
    models = read(MINI, LLAMA)
    assert the(models.find("openai/gpt-4o-mini")).id == "openai/gpt-4o-mini"
    assert the(models.find("openai/gpt-4o-mini-2024-07-18")).id == "openai/gpt-4o-mini"
    assert models.find("openai/gpt-9") is None


def test_a_free_entry_never_stands_for_the_slug_of_a_paid_one() -> None:
    assert the(read(LLAMA_FREE, LLAMA).find("meta-llama/llama-3.3-70b")).id == "meta-llama/llama-3.3"
    assert read(LLAMA_FREE).find("meta-llama/llama-3.3-70b") is None


def test_an_alias_does_not_answer_for_a_slug() -> None:
    alias = {**MINI, "id": "~openai/mini-latest", "pricing": {"prompt": "-1", "completion": "-1"}}
    assert the(read(alias, MINI).find("openai/gpt-4o-mini-2024-07-18")).id == "openai/gpt-4o-mini"


def test_a_slug_of_two_models_finds_none() -> None:
    assert read(MINI, {**MINI, "id": "other"}).find("openai/gpt-4o-mini-2024-07-18") is None


def test_an_id_wins_over_the_slug_of_another_model() -> None:
    other = {"id": "other", "canonical_slug": "openai/gpt-4o-mini"}
    assert the(read(other, MINI).find("openai/gpt-4o-mini")).id == "openai/gpt-4o-mini"


@pytest.mark.parametrize("suffix", [":nitro", ":floor", ":exacto"])
def test_a_routing_suffix_finds_the_model_itself(suffix: str) -> None:
    models = read(MINI, LLAMA, LLAMA_FREE)
    assert the(models.find("openai/gpt-4o-mini" + suffix)).id == "openai/gpt-4o-mini"
    assert the(models.find("meta-llama/llama-3.3:free" + suffix)).id == "meta-llama/llama-3.3:free"


@pytest.mark.parametrize("suffix", [":free", ":extended", ":thinking", ":online", ":8b", ":"])
def test_any_other_suffix_is_another_model(suffix: str) -> None:
    assert read(MINI).find("openai/gpt-4o-mini" + suffix) is None


def test_a_free_variant_is_found_as_itself() -> None:
    assert the(read(LLAMA, LLAMA_FREE).find("meta-llama/llama-3.3:free")).context_length == 65536


def test_an_entry_with_a_routing_suffix_is_found_first() -> None:
    assert the(read(MINI, {"id": "openai/gpt-4o-mini:nitro"}).find("openai/gpt-4o-mini:nitro")).prices is None


@pytest.mark.parametrize(
    ("entries", "openrouter"),
    [
        ([{"id": "a"}, MINI], True),
        ([{"id": "a", "object": "model"}], False),
        ([{"id": "a", "pricing": {"input": "0.000001", "output": "0.000002"}}], False),
        ([{"id": "a", "pricing": {"prompt": 0.5, "completion": 1}}], False),
        ([{"id": "a", "pricing": None}], False),
        ([], False),
    ],
)
def test_openrouter_is_known_by_its_prices(entries: list[dict[str, Any]], *, openrouter: bool) -> None:
    assert read(*entries).openrouter is openrouter


@pytest.mark.parametrize(
    ("allowed", "passes"),
    [
        (["*"], True),
        (["openai/*"], True),
        (["meta-llama/*", "*mini"], True),
        (["openai/gpt-4o"], False),
        (["OpenAI/*"], False),
        ([], False),
    ],
)
def test_globs_allow_models(allowed: list[str], passes: bool) -> None:
    assert allows(allowed, "openai/gpt-4o-mini") is passes


def test_narrowing_keeps_the_order_of_the_list() -> None:
    models = read(MINI, LLAMA, LLAMA_FREE)
    assert ids(narrow(models.entries, ["*:free", "openai/*"])) == [
        "openai/gpt-4o-mini",
        "meta-llama/llama-3.3:free",
    ]


@pytest.mark.parametrize("q", ["4O-MINI", "gpt-4o-mini", "OpenAI: gpt"])
def test_a_search_compares_id_and_name_ignoring_case(q: str) -> None:
    assert ids(search(read(MINI, LLAMA).entries, q, free=False)) == ["openai/gpt-4o-mini"]


def test_an_empty_search_finds_everything() -> None:
    assert len(search(read(MINI, LLAMA).entries, "", free=False)) == 2


def test_a_search_for_free_models_finds_only_those() -> None:
    models = read(MINI, LLAMA, LLAMA_FREE, {"id": "unpriced"})
    assert ids(search(models.entries, "", free=True)) == ["meta-llama/llama-3.3:free"]


def test_a_listing_has_the_upstreams_own_entries() -> None:
    odd = {"id": "x", "new_field": {"deep": [1, None, "é"]}, "pricing": {"prompt": "0.10"}}
    assert orjson.loads(write_listing(read(MINI, odd).entries).body) == {"data": [MINI, odd]}
    assert write_listing([]).body == b'{"data":[]}'


def test_equal_listings_have_one_tag_and_others_another() -> None:
    tag = write_listing(read(MINI, LLAMA).entries).etag
    assert write_listing(read(MINI, LLAMA).entries).etag == tag
    assert write_listing(read(LLAMA, MINI).entries).etag != tag
