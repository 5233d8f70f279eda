"""The schema of the parameters of a Responses request.

As in a chat, parameters that would let a page raise its own cost or reach are missing (`previous_response_id`,
`conversation`, `background`, `prompt`, plugins, …) or have a smaller range than upstream (`CLOSABLE`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Required

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from broker.core.items import Item
from broker.core.messages import INNER, PLAIN, UNKNOWN, CacheControl, Name, by_key, by_kind, tagged
from broker.core.parameters import (
    MAX_MODELS,
    MAX_TOOLS,
    CacheOptions,
    Count,
    FunctionName,
    OnlyTrue,
    OpenedParameters,
    Pairs,
    Penalty,
    Provider,
    Reasoning,
    Share,
    Trace,
)

_LARGEST_EXACT = 2**53  # a browser cannot write every whole number beyond it


class StreamOptions(TypedDict, total=False):
    """Accepted because some clients send it. It is not sent upstream."""

    include_obfuscation: bool | None


class FunctionTool(TypedDict, total=False):
    """A tool that the caller runs; the parameters are a JSON schema."""

    type: Required[Literal["function"]]
    name: Required[FunctionName]
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None
    cache_control: CacheControl | None


class ChosenFunction(TypedDict):
    """Makes the model call this function."""

    type: Literal["function"]
    name: FunctionName


class AllowedTools(TypedDict):
    """Lets the model call only these functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenFunction], Field(max_length=MAX_TOOLS, fail_fast=True)]


ChoiceType = Literal["function", "allowed_tools"]


class UnknownChoice(TypedDict):
    """Refuses a choice of an unknown type, at its type."""

    type: ChoiceType


Choice = Annotated[
    Annotated[ChosenFunction, tagged("function")]
    | Annotated[AllowedTools, tagged("allowed_tools")]
    | Annotated[UnknownChoice, UNKNOWN],
    by_key("type", ChoiceType),
]


class PlainFormat(TypedDict):
    """A format without settings."""

    type: Literal["text", "json_object"]


class SchemaFormat(TypedDict, total=False):
    """JSON that follows a schema."""

    type: Required[Literal["json_schema"]]
    name: Required[FunctionName]
    schema: Required[dict[str, Any]]
    description: str | None
    strict: bool | None


FormatType = Literal["text", "json_object", "json_schema"]


class UnknownFormat(TypedDict):
    """Refuses an unknown format at its type."""

    type: FormatType


Format = Annotated[
    Annotated[PlainFormat, tagged("text")]
    | Annotated[PlainFormat, tagged("json_object")]
    | Annotated[SchemaFormat, tagged("json_schema")]
    | Annotated[UnknownFormat, UNKNOWN],
    by_key("type", FormatType),
]


class Text(TypedDict, total=False):
    """The form of the answer, and its verbosity."""

    format: Format | None
    verbosity: Literal["low", "medium", "high", "xhigh", "max"] | None


Included = Literal[
    "reasoning.encrypted_content", "message.output_text.logprobs", "message.input_image.image_url"
]
Items = Annotated[list[Item], Field(min_length=1)]
InputText = Annotated[str, Field(min_length=1)]


@with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))  # also for all types within
class ResponsesParameters(TypedDict, total=False):
    """The parameters that every page may send. A null at this level counts as absent and is removed before."""

    input: Required[Annotated[Annotated[InputText, PLAIN] | Annotated[Items, INNER], by_kind(list)]]
    instructions: str
    model: Name
    models: Annotated[list[Name], Field(max_length=MAX_MODELS, fail_fast=True)]
    provider: Provider

    stream: OnlyTrue
    stream_options: StreamOptions
    store: bool
    truncation: Literal["auto", "disabled"]
    include: Annotated[list[Included], Field(max_length=16, fail_fast=True)]

    max_output_tokens: Count
    max_tool_calls: Count

    temperature: Annotated[float, Field(ge=0, le=2)]
    top_p: Share
    top_k: Annotated[int, Field(ge=0, le=_LARGEST_EXACT)]
    top_logprobs: Annotated[int, Field(ge=0, le=20)]
    frequency_penalty: Penalty
    presence_penalty: Penalty

    reasoning: Reasoning
    text: Text
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)]

    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)]
    tool_choice: Annotated[
        Annotated[Literal["none", "auto", "required"], PLAIN] | Annotated[Choice, INNER], by_kind(dict)
    ]
    parallel_tool_calls: bool

    cache_control: CacheControl
    prompt_cache_key: Annotated[str, Field(max_length=256)]
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"]
    prompt_cache_options: CacheOptions
    service_tier: Literal["auto", "default", "flex"]

    user: Annotated[str, Field(min_length=1, max_length=256)]
    safety_identifier: Annotated[str, Field(min_length=1, max_length=256)]
    session_id: Annotated[str, Field(min_length=1, max_length=256)]
    metadata: Annotated[Pairs, Field(max_length=16)]
    trace: Trace


PARAMETERS: TypeAdapter[ResponsesParameters] = TypeAdapter(ResponsesParameters)
OPENED_PARAMETERS: TypeAdapter[OpenedParameters] = TypeAdapter(OpenedParameters)

# Every page may send them in the narrow form above. Opened by name, they are passed through unchanged.
CLOSABLE = frozenset({"modalities", "service_tier", "tools", "tool_choice"})

# The broker sets these, whatever a page sends: nothing is stored upstream, and only the broker trims.
OURS = ("store", "truncation")

OURS_IN_STREAM_OPTIONS = frozenset({"include_obfuscation"})
