"""The document at /openapi.json against a real broker: generated requests, single and in sequences, find nothing.

The generator makes requests that fit the document, and such that do not. Every answer must be one of the document, in
its form; what does not fit must be refused; and what fits must be taken, but for rules that a schema cannot say.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from broker.core.errors import NotYetClaimed
from tests.kinds import running_servers
from tests.system.harness import running_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from schemathesis import Case, CheckFunction, Response
    from schemathesis.schemas import APIOperation

    AnyCase = Case[Any]

pytestmark = pytest.mark.slow

ENVIRONMENT = {
    "BROKER_DEFAULT_MODEL": "rehearsal/echo",
    "BROKER_RATE_LIMIT": "100000/minute",
    "BROKER_MAX_PREPARED": "100000",
    "BROKER_MAX_CONCURRENT_STREAMS": "100",
}

EXAMPLES = 60
SCENARIOS = 30
STEPS = 6

ANSWER_WITHIN = 20.0
"""Seconds that an answer may take: an echo, or the error of a model that there is not."""

NOT_IN_A_SCHEMA = (
    "This answers no tool call",
    "This answers no function call",
    "This contradicts reasoning.effort",
    "Parts of this kind are not open here",
    "Models that search the web are not open here",
    "Models with the suffix :batch are not open here",
    "Presets are not open here",
    "There may be at most",
    "It is nested deeper",
)
"""What may be wrong with requests that fit the document: rules that JSON Schema cannot say, or only at a length that
nobody could read."""

BOUNDED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,  # a run of all tests must not fail at random
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url() -> AsyncIterator[str]:
    """A broker before the rehearsal upstream."""
    async with running_servers() as valkey:
        async with running_broker(env={"REDIS_URL": valkey.url, **ENVIRONMENT}) as broker:
            yield broker.url


def as_pages_send_it(value: Any) -> Any:
    """Write whole numbers without a point, as JavaScript does, and none that JSON parsers cannot read."""
    if isinstance(value, dict):
        return {key: as_pages_send_it(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_pages_send_it(each) for each in value]
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        return value % 2**53
    return value


def check(case: AnyCase, response: Response) -> None:
    """Apply all checks of the library to an answer, and ours for rules that a schema cannot say."""
    excluded: list[CheckFunction] = [positive_data_acceptance]
    if case.path == "/stream/{session_id}" and case.method == "GET":
        # An EventSource is told of an error by an event, with status 200.
        excluded.append(negative_data_rejection)
        if response.status_code == 503:
            # A cursor of a session that has not begun: the caller is to come again.
            assert json.loads(response.content)["error"]["message"] == NotYetClaimed.default_message
            excluded.append(not_a_server_error)
    case.validate_response(response, excluded_checks=excluded)
    fits = case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
    if fits and response.status_code in {400, 413, 415, 422}:
        error = json.loads(response.content)["error"]
        assert error["code"] in {"prompt_too_long", "invalid_request"}, error
        unknown = [each for each in error["details"] if not each["message"].startswith(NOT_IN_A_SCHEMA)]
        assert error["code"] == "prompt_too_long" or not unknown, (unknown, case.body)


def call(case: AnyCase) -> Response:
    if case.method == "POST" and case.path == "/prepare" and case.body is not None:
        case.body = as_pages_send_it(case.body)
    return case.call(timeout=ANSWER_WITHIN)


def try_operation(operation: APIOperation[Any, Any, Any, Any]) -> None:
    """Send requests that fit the document to an address, and such that do not."""
    fitting = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    others = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @BOUNDED
    @given(case=fitting | others)
    def run(case: AnyCase) -> None:
        check(case, call(case))

    run()


async def test_generated_requests_find_nothing(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    assert len(operations) >= 12
    for operation in operations:
        await asyncio.to_thread(try_operation, operation)


async def test_generated_sequences_find_nothing(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    streamed: list[int] = []

    class Sequences(schema.as_state_machine()):  # type: ignore[misc]  # made at run time
        """Prepares sessions, and then streams and cancels them."""

        def call(self, case: AnyCase, **_: Any) -> Response:
            # What a known key answers depends on earlier sequences, which the generator takes for a fault of its own.
            case.headers.pop("Idempotency-Key", None)
            response = call(case)
            if case.method == "GET" and case.path == "/stream/{session_id}":
                streamed.append(response.content.count(b"event: done"))
            return response

        def validate_response(self, response: Response, case: AnyCase, **_: Any) -> None:
            check(case, response)

    bounded = settings(BOUNDED, max_examples=SCENARIOS, stateful_step_count=STEPS)
    await asyncio.to_thread(Sequences.run, settings=bounded)
    assert sum(streamed) > 0, "no sequence has streamed an answer to its end"
