"""The document at /openapi.json: it names every address, and what it says of a request is what /prepare checks."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from broker import __version__
from broker.core import errors
from broker.web.not_served import PATHS as NOT_SERVED
from broker.web.openapi import document
from broker.web.page import page_routes
from tests.broker import running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.broker import Broker
    from tests.scripted import ScriptedUpstream


@pytest.fixture
def told() -> dict[str, Any]:
    return document()


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


async def test_it_is_served_to_everybody(broker: Broker) -> None:
    answer = await broker.ask("GET", "/openapi.json")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.json["openapi"].startswith("3.1")
    assert answer.json["info"]["version"] == __version__


async def test_who_has_it_gets_a_304(broker: Broker) -> None:
    answer = await broker.ask("GET", "/openapi.json")
    assert answer.headers["Cache-Control"] == "no-cache"
    tag = {"If-None-Match": answer.headers["ETag"]}
    again = await broker.ask("GET", "/openapi.json", headers=tag)
    assert (again.status, again.text) == (304, "")
    assert again.headers["ETag"] == answer.headers["ETag"]
    other = await broker.ask("GET", "/openapi.json", headers={"If-None-Match": '"other"'})
    assert (other.status, other.headers["ETag"]) == (200, answer.headers["ETag"])


async def test_every_address_and_method_is_in_it(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, page=True) as broker:
        served = {
            (route.resource.canonical, route.method)
            for route in broker.app.router.routes()
            if route.resource is not None
        }
        paths = (await broker.ask("GET", "/openapi.json")).json["paths"]
    told = {
        (path, method.upper())
        for path, operations in paths.items()
        for method in operations
        if method != "parameters"
    }
    files_of_the_page = {route.path for route in page_routes()} - {"/"}
    wanted = {
        (path, method)
        for path, method in served
        if path not in NOT_SERVED and path not in files_of_the_page and method != "HEAD"
    }
    assert told == wanted


async def test_a_prefix_is_where_the_service_is(valkey_url: str, upstream: ScriptedUpstream) -> None:
    assert document("/ai")["servers"] == [{"url": "/ai"}]
    assert document()["servers"] == [{"url": "/"}]
    assert "/" not in document(page=False)["paths"]


def test_every_reference_leads_to_a_schema(told: dict[str, Any]) -> None:
    schemas = told["components"]["schemas"]
    names = {each.removeprefix("#/components/schemas/") for each in references(told)}
    assert names == set(schemas)
    assert not [name for name in schemas if re.search("Unknown|broker|__", name)]


def test_every_error_that_a_request_can_get_has_its_code(told: dict[str, Any]) -> None:
    codes = told["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["code"]["enum"]
    assert {"invalid_request", "prompt_too_long", "rate_limited", "store_unavailable"} <= set(codes)
    assert errors.Abandoned.code not in codes


def test_a_stream_is_described_as_one(told: dict[str, Any]) -> None:
    answer = told["paths"]["/stream/{session_id}"]["get"]["responses"]["200"]
    assert list(answer["content"]) == ["text/event-stream"]


@pytest.mark.parametrize("name", ["ChatRequest", "ResponsesRequest"])
def test_a_request_has_the_parameters_that_are_checked(told: dict[str, Any], name: str) -> None:
    schema = told["components"]["schemas"][name]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["stream"] == {"anyOf": [{"type": "boolean", "const": True}, {"type": "null"}]}
    assert {"type": "null"} not in schema["properties"][schema["required"][0]].get("anyOf", [])
    assert "oneOf" not in json.dumps(schema)
