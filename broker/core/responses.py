"""Parse an untrusted JSON document into a valid Responses request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from broker.core.bytes_per_token import calibration_size
from broker.core.checking import (
    RequestRules,
    Schema,
    check_models,
    fault,
    given_parameters,
    reachable_models,
    refuse,
    take_model,
    too_many,
    wrong_models,
    wrong_parameters,
    wrong_parts,
)
from broker.core.items import (
    READ_BY_ALL,
    image_addresses,
    is_item_opened,
    measure_item,
    part_types,
    stray_outputs,
)
from broker.core.responses_parameters import (
    CLOSABLE,
    OPENED_PARAMETERS,
    OURS,
    OURS_IN_STREAM_OPTIONS,
    PARAMETERS,
    ResponsesParameters,
)
from broker.core.system import with_system_instructions
from broker.core.tokens import measure_frame
from broker.core.trimming import droppable_items

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from broker.core.checking import Fault
    from broker.core.dialect import DialectName
    from broker.core.tokens import Size

_VALID = {"type": "reasoning"}

SCHEMA = Schema(ResponsesParameters, PARAMETERS, OPENED_PARAMETERS, CLOSABLE)


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """A valid request. It shares its parts with its document; neither is ever changed.

    Attributes:
        model: the model that is asked first.
        input: unchanged: a text, which is a message of the user, or at least one item.
        parameters: all other parameters for the upstream, unchanged; no value is null.
    """

    dialect: ClassVar[DialectName] = "responses"
    field: ClassVar[str] = "input"
    caps: ClassVar[tuple[str, ...]] = ("max_output_tokens",)

    model: str
    input: str | list[dict[str, Any]]
    parameters: dict[str, Any]

    @property
    def items(self) -> list[dict[str, Any]]:
        """The items; a text is one item."""
        return _items(self.input)

    @property
    def reachable_models(self) -> tuple[str, ...]:
        """Every model that may serve this request: ``model``, then the others of ``models``."""
        return reachable_models(self.model, self.parameters)

    def with_system(self, text: str | None) -> ResponsesRequest:
        """Return this request with an operator's system message at the head of its instructions, if there is one."""
        if not text:
            return self
        instructions = with_system_instructions(self.parameters.get("instructions"), text)
        return replace(self, parameters=self.parameters | {"instructions": instructions})

    def image_addresses(self) -> Iterator[tuple[str, str]]:
        """Yield the place and the URL of each picture."""
        return image_addresses(self.items)

    def measure_frame(self) -> Size:
        """Return the size of the prompt without its items."""
        return measure_frame(self.parameters)

    def measure(self) -> list[Size]:
        """Return the size of each item."""
        return [measure_item(item) for item in self.items]

    def droppable(self) -> Iterator[list[int]]:
        """Yield the places of items that can be dropped together, in the order in which they are dropped."""
        return droppable_items(self.items)

    def calibration_size(self, kept: Sequence[int], frame: Size, sizes: Sequence[Size]) -> Size | None:
        """Return the size of the prompt of these items, or None where its usage gives no calibration sample."""
        items = self.items
        return calibration_size(
            self.parameters, [items[index] for index in kept], frame, sizes, known=READ_BY_ALL
        )

    def body(self, kept: Sequence[int]) -> dict[str, Any]:
        """Return the body for the upstream, with these items and all parameters; it is streamed and not stored."""
        conversation = self.input if isinstance(self.input, str) else [self.input[index] for index in kept]
        body = {"model": self.model, "input": conversation, **self.parameters}
        for name in OURS:
            body.pop(name, None)
        # the page's options that are left were opened by the operator
        options = body.pop("stream_options", None) or {}
        options = {name: value for name, value in options.items() if name not in OURS_IN_STREAM_OPTIONS}
        return body | ({"stream_options": options} if options else {}) | {"stream": True, "store": False}


def parse_responses(document: Any, rules: RequestRules) -> ResponsesRequest:
    """Return the Responses request in this document.

    Raises:
        InvalidRequest: with at most ``MAX_DETAILS`` details, which name fields and never quote values.
        ModelNotAllowed: with the first model that the rules do not allow.
    """
    given = given_parameters(document)
    if "messages" in given:
        refuse([fault("messages", "Give either messages or input")])
    refuse(too_many(given, "input", rules.max_messages))
    refuse(wrong_parameters(_without_opened(given, rules.extra_parameters), SCHEMA, rules.extra_parameters))
    refuse(_wrong_together(given, rules.extra_parameters))
    model = take_model(given, rules)
    request = ResponsesRequest(model=model, input=given.pop("input"), parameters=given)
    check_models(request.reachable_models, rules)
    return request


def is_responses(document: Any) -> bool:
    """Return True if a document is a Responses request: it has an input."""
    return isinstance(document, dict) and document.get("input") is not None


def _without_opened(given: dict[str, Any], extra_parameters: tuple[str, ...]) -> dict[str, Any]:
    """Return the parameters with something valid in the place of each item that the operator opened by its type."""
    items = given.get("input")
    if not isinstance(items, list) or not any(is_item_opened(item, extra_parameters) for item in items):
        return given
    return given | {"input": [_VALID if is_item_opened(item, extra_parameters) else item for item in items]}


def _wrong_together(given: Mapping[str, Any], extra_parameters: tuple[str, ...]) -> list[Fault]:
    """Return what is wrong although each value has the right type."""
    items = _items(given["input"])
    faults = [
        fault(f"input.{index}.call_id", "This answers no function call before it")
        for index in stray_outputs(items)
    ]
    faults += wrong_models(given, extra_parameters)
    return faults + wrong_parts(part_types(items), extra_parameters)


def _items(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given
