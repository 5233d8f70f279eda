"""The schema of the messages of a chat request, by role.

Unknown keys are refused, as at the top of the request: a key that nobody measures may cost money, and a misspelt key
would be ignored without notice. An assistant message may come back as a page has collected it from the stream of any
provider: tool calls with an empty id or type, content as a list of parts and plain strings, signatures of reasoning,
images, annotations. The names of such parts are known here; their contents belong to the provider.

Shapes: https://openrouter.ai/docs/api-reference/chat-completion. The types are typed dicts, because the document
itself is sent upstream; a validated copy would have to be written again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Required, get_args

import orjson
from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # typing's own gives pydantic too little before Python 3.12

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# The tag of a union's member is part of pydantic's path to an error, though it is not a key of the document. Tags have
# this mark, so that they can be removed from a path.
TAG_MARK = "\0"

MAX_PARTS = 256
MAX_TOOL_CALLS = 128

MAX_COLLECTED = 10_000
"""Entries of a list that a page collects from a stream, where each chunk may add one."""

MAX_EXTRA_CONTENT = 64 * 1024
"""Bytes of an object that only the provider reads, such as Gemini's signature of a thought."""


def by_key(key: str, names: Any) -> Discriminator:
    """Return a discriminator that selects the member of a union by ``value[key]``, one of the literal type ``names``.

    A value with another key selects the member tagged ``UNKNOWN``, whose type refuses it at that key.
    """
    return Discriminator(_tag_by_key(key, names))


def _tag_by_key(key: str, names: Any) -> Callable[[Any], str]:
    tags = {name: TAG_MARK + name for name in get_args(names)}

    def tag_of(value: Any) -> str:
        name = value.get(key) if isinstance(value, dict) else None
        return tags.get(name, UNKNOWN.tag) if isinstance(name, str) else UNKNOWN.tag

    return tag_of


def by_kind(kind: type) -> Discriminator:
    """Return a discriminator between an array or object (tag ``INNER``) and anything else (tag ``PLAIN``)."""
    return Discriminator(lambda value: INNER.tag if isinstance(value, kind) else PLAIN.tag)


def tagged(name: str) -> Tag:
    """Return the tag by which ``by_key`` finds a member of a union."""
    return Tag(TAG_MARK + name)


UNKNOWN, INNER, PLAIN = tagged("unknown"), tagged("inner"), tagged("plain")


def _address(value: str) -> str:
    # other schemes, such as file:, may mean something on the machine of a self-hosted model
    if not value[:8].lower().startswith(("https://", "http://", "data:")):
        raise PydanticCustomError("address", "Input should be an http, https or data address")
    return value


def _bounded_object(value: dict[str, Any]) -> dict[str, Any]:
    if len(orjson.dumps(value)) > MAX_EXTRA_CONTENT:
        raise PydanticCustomError(
            "too_large", f"Input should be an object of at most {MAX_EXTRA_CONTENT} bytes"
        )
    return value


Role = Literal["system", "developer", "user", "assistant", "tool"]
PartType = Literal["text", "image_url", "input_audio", "file", "video_url", "input_video"]

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[!-~]+$")]
MessageName = Annotated[str, Field(min_length=1, max_length=64)]
Address = Annotated[
    str,
    AfterValidator(_address),
    WithJsonSchema({"type": "string", "pattern": "^([hH][tT][tT][pP][sS]?://|[dD][aA][tT][aA]:)"}),
]
ExtraContent = Annotated[dict[str, Any], AfterValidator(_bounded_object)]


class CacheControl(TypedDict):
    """Marks the end of a prefix that should be cached, in Anthropic's form."""

    type: Literal["ephemeral"]
    ttl: NotRequired[Literal["5m", "1h"] | None]


class CacheBreakpoint(TypedDict):
    """The same mark, in OpenAI's form."""

    mode: Literal["explicit"]


class TextPart(TypedDict):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: NotRequired[CacheControl | None]
    prompt_cache_breakpoint: NotRequired[CacheBreakpoint | None]


class Image(TypedDict):
    """The address of a picture, or the picture itself as a data URL."""

    url: Address
    detail: NotRequired[Literal["auto", "low", "high", "original"] | None]


class ImagePart(TypedDict):
    """A picture."""

    type: Literal["image_url"]
    image_url: Image


class Audio(TypedDict):
    """Base64 and its format. Formats differ too much between providers to be listed."""

    data: str
    format: Annotated[str, Field(min_length=1, max_length=32)]


class AudioPart(TypedDict):
    """A sound."""

    type: Literal["input_audio"]
    input_audio: Audio


class File(TypedDict, total=False):
    """A document: an address, a data URL, or the id of one that was uploaded before."""

    file_data: Address
    file_id: Name
    filename: Annotated[str, Field(max_length=512)]


class FilePart(TypedDict):
    """A document, such as a PDF."""

    type: Literal["file"]
    file: File


class Video(TypedDict):
    """The address of a film, or the film itself as a data URL."""

    url: Address


class VideoPart(TypedDict):
    """A film; ``input_video`` is the older name."""

    type: Literal["video_url", "input_video"]
    video_url: Video


class UnknownPart(TypedDict):
    """Refuses an unknown part at its type."""

    type: PartType


Part = Annotated[
    Annotated[TextPart, tagged("text")]
    | Annotated[ImagePart, tagged("image_url")]
    | Annotated[AudioPart, tagged("input_audio")]
    | Annotated[FilePart, tagged("file")]
    | Annotated[VideoPart, tagged("video_url")]
    | Annotated[VideoPart, tagged("input_video")]
    | Annotated[UnknownPart, UNKNOWN],
    by_key("type", PartType),
]

# Only the first fault of a list of parts is reported, so that a long list cannot produce as many faults.
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[Annotated[str, PLAIN] | Annotated[Parts, INNER], by_kind(list)]

# The result of a tool may be empty.
ToolParts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]
ToolContent = Annotated[Annotated[str, PLAIN] | Annotated[ToolParts, INNER], by_kind(list)]
TextContent = Annotated[Annotated[str, PLAIN] | Annotated[TextParts, INNER], by_kind(list)]


class SystemMessage(TypedDict):
    """Instructions. A developer message is the same under OpenAI's newer name."""

    role: Literal["system", "developer"]
    content: TextContent
    name: NotRequired[MessageName | None]


class UserMessage(TypedDict):
    """A message of the person."""

    role: Literal["user"]
    content: Content
    name: NotRequired[MessageName | None]


class FunctionCall(TypedDict, total=False):
    """The function and its arguments: JSON in a string, which may be invalid because a model wrote it."""

    name: Annotated[str, Field(max_length=256)] | None
    arguments: Annotated[Annotated[str | None, PLAIN] | Annotated[dict[str, Any], INNER], by_kind(dict)]


CallId = Annotated[str, Field(max_length=MAX_EXTRA_CONTENT)]  # some providers put a signature into it


class ToolCall(TypedDict, total=False):
    """One call of a tool, as a model made it. Some providers leave its id and type empty."""

    id: CallId | None
    type: Literal["function", ""] | None
    function: Required[FunctionCall]
    index: int | None
    extra_content: ExtraContent | None
    thought_signature: str | None
    provider_specific_fields: ExtraContent | None


class AssistantImage(TypedDict):
    """A picture that a model made."""

    image_url: Image
    type: NotRequired[Literal["image_url"]]
    index: NotRequired[int | None]


class AssistantAudio(TypedDict, total=False):
    """A sound that a model made."""

    id: str | None
    data: str | None
    expires_at: int | None
    transcript: str | None


@with_config(ConfigDict(extra="allow"))
class ReasoningDetail(TypedDict):
    """A piece of reasoning. Providers sign or encrypt it, so it must go back unchanged."""

    type: Annotated[str, Field(min_length=1, max_length=1024)]


CollectedPartType = Literal[
    "text",
    "image_url",
    "thinking",
    "redacted_thinking",
    "reasoning",
    "refusal",
    "reference",
    "output_text",
    "input_audio",
    "file",
    "video_url",
    "input_video",
]


@with_config(ConfigDict(extra="allow"))
class CollectedPart(TypedDict):
    """A part of an answer that is neither text nor a picture, with keys of the provider."""

    type: Literal["thinking", "redacted_thinking", "reasoning", "refusal", "reference", "output_text"]


class UnknownCollectedPart(TypedDict):
    """Refuses a part that no answer has, at its type."""

    type: CollectedPartType


_tag_of_object = _tag_by_key("type", CollectedPartType)


def _tag_of_collected(value: Any) -> str:
    return PLAIN.tag if isinstance(value, str) else _tag_of_object(value)


AnswerPart = Annotated[
    Annotated[str, PLAIN]
    | Annotated[TextPart, tagged("text")]
    | Annotated[ImagePart, tagged("image_url")]
    | Annotated[CollectedPart, tagged("thinking")]
    | Annotated[CollectedPart, tagged("redacted_thinking")]
    | Annotated[CollectedPart, tagged("reasoning")]
    | Annotated[CollectedPart, tagged("refusal")]
    | Annotated[CollectedPart, tagged("reference")]
    | Annotated[CollectedPart, tagged("output_text")]
    | Annotated[AudioPart, tagged("input_audio")]
    | Annotated[FilePart, tagged("file")]
    | Annotated[VideoPart, tagged("video_url")]
    | Annotated[VideoPart, tagged("input_video")]
    | Annotated[UnknownCollectedPart, UNKNOWN],
    Discriminator(_tag_of_collected),
]
AnswerParts = Annotated[list[AnswerPart], Field(max_length=MAX_COLLECTED, fail_fast=True)]
AnswerContent = Annotated[Annotated[str, PLAIN] | Annotated[AnswerParts, INNER], by_kind(list)]
AnyCollected = Annotated[list[Any], Field(max_length=MAX_COLLECTED, fail_fast=True)]


class AssistantMessage(TypedDict, total=False):
    """An earlier message of the model."""

    role: Required[Literal["assistant"]]
    content: AnswerContent | None
    name: MessageName | None
    model: Annotated[str, Field(max_length=256)] | None
    refusal: str | None
    reasoning: str | None
    reasoning_content: str | None
    reasoning_text: str | None
    reasoning_opaque: str | None
    thinking: str | None
    thinking_blocks: AnyCollected | None
    reasoning_details: (
        Annotated[list[ReasoningDetail], Field(max_length=MAX_COLLECTED, fail_fast=True)] | None
    )
    # A page that stores each call at its index leaves a null before the first, where a provider counts from 1.
    tool_calls: Annotated[list[ToolCall | None], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None
    function_call: FunctionCall | None
    images: Annotated[list[AssistantImage], Field(max_length=MAX_PARTS, fail_fast=True)] | None
    audio: AssistantAudio | None
    annotations: Annotated[list[dict[str, Any]], Field(max_length=MAX_COLLECTED, fail_fast=True)] | None
    citations: AnyCollected | None
    executed_tools: AnyCollected | None
    extra_content: ExtraContent | None
    provider_specific_fields: ExtraContent | None
    channel: Annotated[str, Field(max_length=64)] | None
    prefix: bool | None
    parsed: None


class ToolMessage(TypedDict):
    """The result of a tool."""

    role: Literal["tool"]
    tool_call_id: CallId
    content: ToolContent | None
    name: NotRequired[MessageName | None]


class UnknownMessage(TypedDict):
    """Refuses a message of an unknown role, at its role."""

    role: Role


Message = Annotated[
    Annotated[SystemMessage, tagged("system")]
    | Annotated[SystemMessage, tagged("developer")]
    | Annotated[UserMessage, tagged("user")]
    | Annotated[AssistantMessage, tagged("assistant")]
    | Annotated[ToolMessage, tagged("tool")]
    | Annotated[UnknownMessage, UNKNOWN],
    by_key("role", Role),
]


def stray_tool_messages(messages: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Yield the places of tool messages that answer no call of the assistant message before them."""
    calls: set[str] = set()
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "assistant":
            calls = {call.get("id") or "" for call in message.get("tool_calls") or () if call}
        elif role != "tool":
            calls = set()
        elif message["tool_call_id"] not in calls:
            yield index


def part_types(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the place (``messages.0.content.1``) and the type of each part of valid messages."""
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            for n, part in enumerate(content):
                if isinstance(part, dict):
                    yield f"messages.{index}.content.{n}", part["type"]


def image_addresses(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the place and the URL of each picture of valid messages."""
    for index, message in enumerate(messages):
        for key in ("content", "images"):
            found = message.get(key)
            if isinstance(found, list):
                for n, part in enumerate(found):
                    if isinstance(part, dict) and "image_url" in part:
                        yield f"messages.{index}.{key}.{n}.image_url.url", part["image_url"]["url"]
