"""The schema of the parameters of a chat request, and which parameters only an operator can open.

Every page may send `Parameters`. Parameters that would let a page raise its own cost or reach are missing there
(plugins, transforms, image_config, …) or have a smaller range than upstream (`CLOSABLE`).

Names and ranges: https://openrouter.ai/docs/api-reference/parameters and the schema of its chat completions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, Required

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    WithJsonSchema,
    with_config,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from broker.core.messages import (
    INNER,
    PLAIN,
    UNKNOWN,
    CacheControl,
    Message,
    Name,
    TextContent,
    by_key,
    by_kind,
    tagged,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_MODELS = 16
MAX_TOOLS = 128
MAX_CHOICES = 128

_PRICE = re.compile(r"[0-9]{1,12}(\.[0-9]{1,18})?")
_LARGEST_EXACT = 2**53  # a browser cannot write every whole number beyond it


def only_true(value: bool) -> bool:
    """Validate ``stream``: refuse false."""
    if not value:
        raise PydanticCustomError("stream", "Every answer is streamed here: leave this out or set it to true")
    return value


def _price(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and math.isfinite(value) and value >= 0:
        return value
    if isinstance(value, str) and _PRICE.fullmatch(value):
        return value
    raise PydanticCustomError("price", "Input should be a price: a number or a decimal string, not negative")


Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Positive = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=_LARGEST_EXACT)]
Price = Annotated[
    Any,
    BeforeValidator(_price),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": f"^{_PRICE.pattern}$"}]}
    ),
]
OnlyTrue = Annotated[bool, AfterValidator(only_true), WithJsonSchema({"type": "boolean", "const": True})]
ClientNamer = Annotated[list[Name], Field(max_length=64, fail_fast=True)]
FunctionName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[!-~]+$")]
Effort = Literal["max", "xhigh", "high", "medium", "low", "minimal", "none"]
SortBy = Literal["price", "throughput", "latency", "exacto"]


class StreamOptions(TypedDict, total=False):
    """Accepted because some clients always send it. The broker sends its own."""

    include_usage: bool | None
    include_obfuscation: bool | None


class Usage(TypedDict, total=False):
    """Deprecated: the usage is always sent."""

    include: bool | None


class Reasoning(TypedDict, total=False):
    """How much the model may think."""

    effort: Effort | None
    max_tokens: Count | None
    exclude: bool | None
    enabled: bool | None
    summary: Literal["auto", "concise", "detailed"] | None


class Sorting(TypedDict, total=False):
    """How providers are sorted, and whether within a model or across models."""

    by: SortBy | None
    partition: Literal["model", "none"] | None


class Percentiles(TypedDict, total=False):
    """A threshold for each percentile."""

    p50: Positive | None
    p75: Positive | None
    p90: Positive | None
    p99: Positive | None


class MaxPrice(TypedDict, total=False):
    """USD per million tokens, per picture and per request."""

    prompt: Price
    completion: Price
    image: Price
    audio: Price
    request: Price


Threshold = Annotated[Annotated[Positive, PLAIN] | Annotated[Percentiles, INNER], by_kind(dict)]


class Provider(TypedDict, total=False):
    """The providers that may serve the request, and their order."""

    allow_fallbacks: bool | None
    require_parameters: bool | None
    data_collection: Literal["allow", "deny"] | None
    zdr: bool | None
    enforce_distillable_text: bool | None
    order: ClientNamer | None
    only: ClientNamer | None
    ignore: ClientNamer | None
    quantizations: ClientNamer | None
    sort: Annotated[Annotated[SortBy, PLAIN] | Annotated[Sorting, INNER], by_kind(dict)] | None
    max_price: MaxPrice | None
    preferred_min_throughput: Threshold | None
    preferred_max_latency: Threshold | None


class Function(TypedDict, total=False):
    """A function that a model may call; the parameters are a JSON schema."""

    name: Required[FunctionName]
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class FunctionTool(TypedDict, total=False):
    """A tool that the caller runs, unlike tools that the upstream runs and bills."""

    type: Required[Literal["function"]]
    function: Required[Function]
    cache_control: CacheControl | None


class ChosenFunction(TypedDict):
    """The name of a function."""

    name: FunctionName


class ToolChoice(TypedDict):
    """Makes the model call this function."""

    type: Literal["function"]
    function: ChosenFunction


class PlainFormat(TypedDict):
    """A format without settings."""

    type: Literal["text", "json_object", "python"]


class JsonSchema(TypedDict, total=False):
    """A JSON schema for the answer."""

    name: Required[FunctionName]
    description: str | None
    schema: dict[str, Any] | None
    strict: bool | None


class JsonSchemaFormat(TypedDict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class GrammarFormat(TypedDict):
    """Text that follows a grammar."""

    type: Literal["grammar"]
    grammar: str


FormatType = Literal["text", "json_object", "json_schema", "grammar", "python"]


class UnknownFormat(TypedDict):
    """Refuses an unknown format at its type."""

    type: FormatType


ResponseFormat = Annotated[
    Annotated[PlainFormat, tagged("text")]
    | Annotated[PlainFormat, tagged("json_object")]
    | Annotated[PlainFormat, tagged("python")]
    | Annotated[JsonSchemaFormat, tagged("json_schema")]
    | Annotated[GrammarFormat, tagged("grammar")]
    | Annotated[UnknownFormat, UNKNOWN],
    by_key("type", FormatType),
]


class Prediction(TypedDict):
    """Text that much of the answer is expected to repeat."""

    type: Literal["content"]
    content: TextContent


class CacheOptions(TypedDict, total=False):
    """Whether only marked prefixes are cached, and for how long."""

    mode: Required[Literal["explicit"]]
    ttl: Annotated[str, Field(max_length=16)] | None


@with_config(ConfigDict(extra="allow"))
class Trace(TypedDict, total=False):
    """Names for the operator's tracing. Free keys are part of the format."""

    trace_id: str
    trace_name: str
    span_name: str
    generation_name: str
    parent_span_id: str


StopText = Annotated[str, Field(max_length=1024)]
StopTexts = Annotated[list[StopText], Field(max_length=4)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Pairs = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


@with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))  # also for all types within
class Parameters(TypedDict, total=False):
    """The parameters that every page may send. A null at this level counts as absent and is removed before."""

    messages: Required[Annotated[list[Message], Field(min_length=1)]]
    model: Name
    models: Annotated[list[Name], Field(max_length=MAX_MODELS, fail_fast=True)]
    route: Literal["fallback", "sort"]
    provider: Provider

    stream: OnlyTrue
    stream_options: StreamOptions
    usage: Usage

    max_tokens: Count
    max_completion_tokens: Count
    n: Annotated[int, Field(ge=1, le=1)]
    stop: Annotated[Annotated[StopText, PLAIN] | Annotated[StopTexts, INNER], by_kind(list)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]

    temperature: Annotated[float, Field(ge=0, le=2)]
    top_p: Share
    top_k: Annotated[int, Field(ge=0, le=_LARGEST_EXACT)]
    top_a: Share
    min_p: Share
    frequency_penalty: Penalty
    presence_penalty: Penalty
    repetition_penalty: Annotated[float, Field(ge=0, le=2)]
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024, fail_fast=True)]
    logprobs: bool
    top_logprobs: Annotated[int, Field(ge=0, le=20)]

    reasoning: Reasoning
    reasoning_effort: Effort
    include_reasoning: bool
    verbosity: Literal["low", "medium", "high", "xhigh", "max"]

    response_format: ResponseFormat
    structured_outputs: bool
    prediction: Prediction
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)]

    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)]
    tool_choice: Annotated[
        Annotated[Literal["none", "auto", "required"], PLAIN] | Annotated[ToolChoice, INNER], by_kind(dict)
    ]
    parallel_tool_calls: bool

    cache_control: CacheControl
    prompt_cache_key: Annotated[str, Field(max_length=256)]
    prompt_cache_options: CacheOptions
    service_tier: Literal["auto", "default", "flex"]

    user: Annotated[str, Field(min_length=1, max_length=256)]
    session_id: Annotated[str, Field(min_length=1, max_length=256)]
    metadata: Annotated[Pairs, Field(max_length=16)]
    trace: Trace


@with_config(ConfigDict(strict=True, extra="allow"))
class OpenedParameters(TypedDict, total=False):
    """The part of the opened parameters that the broker itself must be able to read."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)]
    plugins: Annotated[list[dict[str, Any]], Field(max_length=64, fail_fast=True)]


PARAMETERS: TypeAdapter[Parameters] = TypeAdapter(Parameters)
OPENED_PARAMETERS: TypeAdapter[OpenedParameters] = TypeAdapter(OpenedParameters)

# Every page may send them in the narrow form above. Opened by name, they are passed through unchanged.
CLOSABLE = frozenset({"n", "modalities", "service_tier", "tools", "tool_choice"})

# The name that opens models with this suffix, which search the web at an extra price.
ONLINE = ":online"

# Suffixes and forms of a model's name that bring more than the model: a web search, another way of serving, or a preset
# with its own system prompt, models and tools. Each can be opened by this name.
PRESET = "@preset"
CLOSED_MODEL_FORMS: Mapping[str, str] = {
    ONLINE: "Models that search the web are not open here",
    ":batch": "Models with the suffix :batch are not open here",
    PRESET: "Presets are not open here",
}

# Types of parts whose cost is not in the list of prices. Each can be opened by this name.
CLOSED_PARTS: Mapping[str, str] = {
    "file": "file",
    "input_file": "file",
    "input_audio": "input_audio",
    "video_url": "video_url",
    "input_video": "video_url",
}

# The name that lets an upstream other than OpenRouter fetch pictures from addresses.
FETCHED_IMAGES = "image_url.http"

# The broker sets these, whatever a page sends: usage is always asked for, in one way.
OURS_IN_STREAM_OPTIONS = frozenset({"include_usage", "include_obfuscation"})


def is_open(name: str, extra_parameters: Iterable[str]) -> bool:
    """Return True if an operator's globs (case-sensitive) open this name."""
    return any(fnmatchcase(name, glob) for glob in extra_parameters)
