"""The items of a Responses request: messages, function calls with their outputs, and reasoning.

A page sends back the items of `response.output_item.done`, so an item may have ids, a status, encrypted reasoning and
annotations, which only the upstream reads. Items that refer to something stored upstream are refused, and so are the
items of tools that the upstream runs, until the operator opens them by their type.

Shapes: https://platform.openai.com/docs/api-reference/responses/create.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Required, get_args

import orjson
from pydantic import Discriminator, Field
from typing_extensions import TypedDict  # typing's own gives pydantic too little before Python 3.12

from broker.core.messages import (
    INNER,
    MAX_COLLECTED,
    MAX_EXTRA_CONTENT,
    MAX_PARTS,
    PLAIN,
    TAG_MARK,
    UNKNOWN,
    Address,
    CacheBreakpoint,
    CacheControl,
    CallId,
    ExtraContent,
    Name,
    by_key,
    by_kind,
    tagged,
)
from broker.core.parameters import is_open
from broker.core.tokens import AUDIO_TOKENS, FILE_TOKENS, IMAGE_TOKENS, MESSAGE_TOKENS, VIDEO_TOKENS, Size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PART_TOKENS: Mapping[str, int] = {
    "input_image": IMAGE_TOKENS,
    "input_audio": AUDIO_TOKENS,
    "input_file": FILE_TOKENS,
    "input_video": VIDEO_TOKENS,
}

READ_BY_ALL = frozenset(
    {"type", "role", "content", "id", "status", "phase", "call_id", "name", "arguments", "output"}
)
"""Keys of an item that every model reads or no model reads, so that an item without others can be measured exactly."""

_NOT_READ = frozenset({"type", "role", "id", "status", "phase"})

PartType = Literal["input_text", "input_image", "input_audio", "input_file", "input_video"]
Id = Annotated[str, Field(max_length=MAX_EXTRA_CONTENT)]
Status = Literal["in_progress", "completed", "incomplete"]
Phase = Literal["commentary", "final_answer"]
Detail = Literal["auto", "low", "high", "original"]
Detached = Annotated[list[dict[str, Any]], Field(max_length=MAX_COLLECTED, fail_fast=True)]


class InputText(TypedDict, total=False):
    """Text."""

    type: Required[Literal["input_text"]]
    text: Required[str]
    cache_control: CacheControl | None
    prompt_cache_breakpoint: CacheBreakpoint | None


class InputImage(TypedDict, total=False):
    """The address of a picture, or the picture itself as a data URL."""

    type: Required[Literal["input_image"]]
    image_url: Required[Address]
    detail: Detail | None
    cache_control: CacheControl | None
    prompt_cache_breakpoint: CacheBreakpoint | None


class Sound(TypedDict):
    """Base64 and its format."""

    data: str
    format: Annotated[str, Field(min_length=1, max_length=32)]


class InputAudio(TypedDict):
    """A sound."""

    type: Literal["input_audio"]
    input_audio: Sound


class InputFile(TypedDict, total=False):
    """A document: an address, a data URL, or the id of one that was uploaded before."""

    type: Required[Literal["input_file"]]
    file_data: Address | None
    file_url: Address | None
    file_id: Name | None
    filename: Annotated[str, Field(max_length=512)] | None
    detail: Detail | None


class InputVideo(TypedDict):
    """The address of a film, or the film itself as a data URL."""

    type: Literal["input_video"]
    video_url: Address


class UnknownPart(TypedDict):
    """Refuses any other part, at its type."""

    type: PartType


Part = Annotated[
    Annotated[InputText, tagged("input_text")]
    | Annotated[InputImage, tagged("input_image")]
    | Annotated[InputAudio, tagged("input_audio")]
    | Annotated[InputFile, tagged("input_file")]
    | Annotated[InputVideo, tagged("input_video")]
    | Annotated[UnknownPart, UNKNOWN],
    by_key("type", PartType),
]
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[Annotated[str, PLAIN] | Annotated[Parts, INNER], by_kind(list)]

# The output of a function may be empty.
OutputParts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]
Output = Annotated[Annotated[str, PLAIN] | Annotated[OutputParts, INNER], by_kind(list)]


class InputMessage(TypedDict, total=False):
    """A message of the user, or instructions."""

    role: Required[Literal["user", "system", "developer"]]
    content: Required[Content]
    type: Literal["message"]
    id: Id | None
    status: Status | None


AnswerPartType = Literal["output_text", "refusal", "input_text"]


class OutputText(TypedDict, total=False):
    """Text of a model."""

    type: Required[Literal["output_text", "input_text"]]
    text: Required[str]
    annotations: Detached | None
    logprobs: Detached | None
    cache_control: CacheControl | None


class Refusal(TypedDict):
    """A model's refusal."""

    type: Literal["refusal"]
    refusal: str


class UnknownAnswerPart(TypedDict):
    """Refuses a part that no answer has, at its type."""

    type: AnswerPartType


AnswerPart = Annotated[
    Annotated[OutputText, tagged("output_text")]
    | Annotated[OutputText, tagged("input_text")]
    | Annotated[Refusal, tagged("refusal")]
    | Annotated[UnknownAnswerPart, UNKNOWN],
    by_key("type", AnswerPartType),
]
AnswerParts = Annotated[list[AnswerPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class OutputMessage(TypedDict, total=False):
    """An earlier message of the model."""

    role: Required[Literal["assistant"]]
    content: Required[Annotated[Annotated[str, PLAIN] | Annotated[AnswerParts, INNER], by_kind(list)]]
    type: Literal["message"]
    id: Id | None
    status: Status | None
    phase: Phase | None


class FunctionCall(TypedDict, total=False):
    """A function call. The arguments are JSON in a string, which a model wrote, so it may be broken."""

    type: Required[Literal["function_call"]]
    call_id: Required[CallId]
    name: Required[Annotated[str, Field(min_length=1, max_length=256)]]
    arguments: Required[str]
    id: Id | None
    status: Status | None
    namespace: Annotated[str, Field(max_length=256)] | None
    extra_content: ExtraContent | None
    thought_signature: str | None
    provider_specific_fields: ExtraContent | None


class FunctionCallOutput(TypedDict, total=False):
    """The output of a function."""

    type: Required[Literal["function_call_output"]]
    call_id: Required[CallId]
    output: Required[Output]
    id: Id | None
    status: Status | None


class Summary(TypedDict):
    """A piece of a summary of reasoning."""

    type: Literal["summary_text"]
    text: str


class Thought(TypedDict):
    """A piece of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class Reasoning(TypedDict, total=False):
    """Reasoning of the model. It is signed or encrypted, and must be sent back unchanged."""

    type: Required[Literal["reasoning"]]
    summary: Annotated[list[Summary], Field(max_length=MAX_COLLECTED, fail_fast=True)] | None
    content: Annotated[list[Thought], Field(max_length=MAX_COLLECTED, fail_fast=True)] | None
    encrypted_content: str | None
    id: Id | None
    status: Status | None
    format: Annotated[str, Field(max_length=256)] | None
    signature: str | None


ItemType = Literal["message", "function_call", "function_call_output", "reasoning"]
Role = Literal["user", "assistant", "system", "developer"]


class UnknownItem(TypedDict):
    """Refuses an item of an unknown type, at its type."""

    type: ItemType


class UnknownRole(TypedDict, total=False):
    """Refuses a message of an unknown role, at its role."""

    role: Required[Role]


_TYPES = frozenset(get_args(ItemType))
_NO_ROLE = tagged("no role")


def _tag_of_item(value: Any) -> str:
    if not isinstance(value, dict):
        return UNKNOWN.tag
    kind, role = value.get("type", "message"), value.get("role")
    if not isinstance(kind, str) or kind not in _TYPES:
        return UNKNOWN.tag
    if kind != "message":
        return TAG_MARK + kind
    if role == "assistant":
        return TAG_MARK + "assistant"
    return TAG_MARK + "message" if role in ("user", "system", "developer") else _NO_ROLE.tag


Item = Annotated[
    Annotated[InputMessage, tagged("message")]
    | Annotated[OutputMessage, tagged("assistant")]
    | Annotated[FunctionCall, tagged("function_call")]
    | Annotated[FunctionCallOutput, tagged("function_call_output")]
    | Annotated[Reasoning, tagged("reasoning")]
    | Annotated[UnknownRole, _NO_ROLE]
    | Annotated[UnknownItem, UNKNOWN],
    Discriminator(_tag_of_item),
]


def is_item_opened(item: Any, extra_parameters: tuple[str, ...]) -> bool:
    """Return True for an item of a type that is not known here, and that the operator opened by its name."""
    kind = item.get("type") if isinstance(item, dict) else None
    return isinstance(kind, str) and kind not in _TYPES and is_open(kind, extra_parameters)


def parts_of(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place within the item (``content.1``) and the value of each part."""
    for key in ("content", "output"):
        value = item.get(key)
        if isinstance(value, list):
            yield from ((f"{key}.{n}", part) for n, part in enumerate(value) if isinstance(part, dict))


def part_types(items: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the place (``input.0.content.1``) and the type of each part of valid items."""
    for index, item in enumerate(items):
        for place, part in parts_of(item):
            if isinstance(kind := part.get("type"), str):
                yield f"input.{index}.{place}", kind


def image_addresses(items: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the place and the URL of each picture of valid items."""
    for index, item in enumerate(items):
        for place, part in parts_of(item):
            address = part.get("image_url")
            if part.get("type") == "input_image" and isinstance(address, str):
                yield f"input.{index}.{place}.image_url", address


def stray_outputs(items: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Yield the places of outputs without a call before them."""
    calls: set[str] = set()
    for index, item in enumerate(items):
        kind = item.get("type")
        if kind == "function_call":
            calls.add(item["call_id"])
        elif kind == "function_call_output" and item["call_id"] not in calls:
            yield index


def measure_item(item: Mapping[str, Any]) -> Size:
    """Return the size of an item: all that a model may read, encrypted reasoning included."""
    text_bytes, flat_tokens = 0, MESSAGE_TOKENS
    for key, value in item.items():
        if key in _NOT_READ or not value:
            continue
        if isinstance(value, str):
            text_bytes += len(value.encode())
        elif key in ("content", "output", "summary") and isinstance(value, list):
            for part in value:
                size = _measure_part(part)
                text_bytes += size.text_bytes
                flat_tokens += size.flat_tokens
        else:
            text_bytes += len(orjson.dumps(value))
    return Size(text_bytes, flat_tokens)


def _measure_part(part: Any) -> Size:
    """Return the size of a part; of an item that the operator opened it may be anything."""
    if isinstance(part, dict):
        kind, text = part.get("type"), part.get("text", part.get("refusal"))
        if isinstance(kind, str) and kind in PART_TOKENS:
            return Size(0, PART_TOKENS[kind])
        if isinstance(text, str):
            return Size(len(text.encode()), 0)
    return Size(len(orjson.dumps(part)), 0)
