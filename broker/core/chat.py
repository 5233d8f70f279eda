"""Parse an untrusted JSON document into a valid chat request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from broker.core.bytes_per_token import CHAT_TEXT, calibration_size
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
from broker.core.messages import image_addresses, part_types, stray_tool_messages
from broker.core.parameters import (
    CLOSABLE,
    OPENED_PARAMETERS,
    OURS_IN_STREAM_OPTIONS,
    PARAMETERS,
    Parameters,
)
from broker.core.system import with_system_message
from broker.core.tokens import measure_frame, measure_message
from broker.core.trimming import droppable_units

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from broker.core.checking import Fault
    from broker.core.dialect import DialectName
    from broker.core.tokens import Size

SCHEMA = Schema(Parameters, PARAMETERS, OPENED_PARAMETERS, CLOSABLE)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A valid request. It shares its parts with its document; neither is ever changed.

    Attributes:
        model: the model that is asked first.
        messages: the messages, unchanged, at least one.
        parameters: all other parameters for the upstream, unchanged; no value is null.
    """

    dialect: ClassVar[DialectName] = "chat"
    field: ClassVar[str] = "messages"
    # The older name is first, because every compatible server knows it.
    caps: ClassVar[tuple[str, ...]] = ("max_tokens", "max_completion_tokens")

    model: str
    messages: list[dict[str, Any]]
    parameters: dict[str, Any]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The messages."""
        return self.messages

    @property
    def reachable_models(self) -> tuple[str, ...]:
        """Every model that may serve this request: ``model``, then the others of ``models``."""
        return reachable_models(self.model, self.parameters)

    def with_system(self, text: str | None) -> ChatRequest:
        """Return this request with an operator's system message before it, if there is one."""
        return replace(self, messages=with_system_message(self.messages, text)) if text else self

    def image_addresses(self) -> Iterator[tuple[str, str]]:
        """Yield the place and the URL of each picture."""
        return image_addresses(self.messages)

    def measure_frame(self) -> Size:
        """Return the size of the prompt without its messages."""
        return measure_frame(self.parameters)

    def measure(self) -> list[Size]:
        """Return the size of each message."""
        return [measure_message(message) for message in self.messages]

    def droppable(self) -> Iterator[list[int]]:
        """Yield the places of messages that can be dropped together, in the order in which they are dropped."""
        return droppable_units(self.messages)

    def calibration_size(self, kept: Sequence[int], frame: Size, sizes: Sequence[Size]) -> Size | None:
        """Return the size of the prompt of these messages, or None where its usage gives no calibration sample."""
        return calibration_size(
            self.parameters, [self.messages[index] for index in kept], frame, sizes, known=CHAT_TEXT
        )

    def body(self, kept: Sequence[int]) -> dict[str, Any]:
        """Return the body for the upstream, with these messages and all parameters; it is streamed, with its usage."""
        messages = [_without_gaps(self.messages[index]) for index in kept]
        body = {"model": self.model, "messages": messages, **self.parameters}
        body.pop("usage", None)
        # the page's options that are left were opened by the operator
        options = body.get("stream_options") or {}
        options = {name: value for name, value in options.items() if name not in OURS_IN_STREAM_OPTIONS}
        return body | {"stream": True, "stream_options": {**options, "include_usage": True}}


def parse_chat(document: Any, rules: RequestRules) -> ChatRequest:
    """Return the chat request in this document.

    Raises:
        InvalidRequest: with at most ``MAX_DETAILS`` details, which name fields and never quote values.
        ModelNotAllowed: with the first model that the rules do not allow.
    """
    given = given_parameters(document)
    refuse(too_many(given, "messages", rules.max_messages))
    refuse(wrong_parameters(given, SCHEMA, rules.extra_parameters))
    refuse(_wrong_together(given, rules.extra_parameters))
    model = take_model(given, rules)
    request = ChatRequest(model=model, messages=given.pop("messages"), parameters=given)
    check_models(request.reachable_models, rules)
    return request


def _wrong_together(given: Mapping[str, Any], extra_parameters: tuple[str, ...]) -> list[Fault]:
    """Return what is wrong although each value has the right type."""
    faults = [
        fault(
            f"messages.{index}.tool_call_id", "This answers no tool call of the assistant message before it"
        )
        for index in stray_tool_messages(given["messages"])
    ]
    faults += wrong_models(given, extra_parameters)
    faults += wrong_parts(part_types(given["messages"]), extra_parameters)
    effort = (given.get("reasoning") or {}).get("effort")
    if effort is not None and given.get("reasoning_effort", effort) != effort:
        faults.append(fault("reasoning_effort", "This contradicts reasoning.effort"))
    return faults


def _without_gaps(message: dict[str, Any]) -> dict[str, Any]:
    """Remove the null that a page has before the first tool call where a provider counts them from 1."""
    calls = message.get("tool_calls")
    if not calls or None not in calls:
        return message
    return {**message, "tool_calls": [call for call in calls if call is not None]}
