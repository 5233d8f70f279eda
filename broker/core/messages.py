"""The messages of a chat request: what each role may hold.

Keys that are not known are refused here as they are at the top of the request: what nobody measures may cost, and
a misspelt key would be lost without a word. An assistant message may come back as a page has collected it from a
stream, with the index of its tool calls, its images and its annotations.

Shapes: https://openrouter.ai/docs/api-reference/chat-completion. Ours are typed dicts, for the document itself is
what goes upstream; a validated copy of it would only have to be dumped again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Required, get_args

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # typing's own tells pydantic too little before Python 3.12

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# The tag of a union's member takes a place in pydantic's path to an error, though it is no key of the document.
# Marked like this, the path can be cleaned of it again.
TAG_MARK = "\0"

MAX_PARTS = 256
MAX_TOOL_CALLS = 128


def by_key(key: str, names: Any) -> Discriminator:
    """Tells the members of a union apart by ``value[key]``, which is one of the literal type ``names``.

    A value with none of them goes to the member tagged ``UNKNOWN``, whose own type refuses it at that key.
    """
    tags = {name: TAG_MARK + name for name in get_args(names)}

    def tag_of(value: Any) -> str:
        name = value.get(key) if isinstance(value, dict) else None
        return tags.get(name, UNKNOWN.tag) if isinstance(name, str) else UNKNOWN.tag

    return Discriminator(tag_of)


def by_kind(kind: type) -> Discriminator:
    """Tells an array or an object (the member tagged ``INNER``) from everything else (``PLAIN``)."""
    return Discriminator(lambda value: INNER.tag if isinstance(value, kind) else PLAIN.tag)


def tagged(name: str) -> Tag:
    """Marks the member of a union that ``by_key`` finds by this name."""
    return Tag(TAG_MARK + name)


UNKNOWN, INNER, PLAIN = tagged("unknown"), tagged("inner"), tagged("plain")


def _address(value: str) -> str:
    # anything else (file:, for one) may mean something on the machine of a self-hosted model
    if not value[:8].lower().startswith(("https://", "http://", "data:")):
        raise PydanticCustomError("address", "Input should be an http, https or data address")
    return value


Role = Literal["system", "developer", "user", "assistant", "tool"]
PartType = Literal["text", "image_url", "input_audio", "file", "video_url", "input_video"]

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[!-~]+$")]
Address = Annotated[str, AfterValidator(_address)]


class CacheControl(TypedDict):
    """Marks the end of a prefix worth caching, as Anthropic names it."""

    type: Literal["ephemeral"]
    ttl: NotRequired[Literal["5m", "1h"] | None]


class CacheBreakpoint(TypedDict):
    """The same, as OpenAI names it."""

    mode: Literal["explicit"]


class TextPart(TypedDict):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: NotRequired[CacheControl | None]
    prompt_cache_breakpoint: NotRequired[CacheBreakpoint | None]


class Image(TypedDict):
    """Where a picture is, or the picture itself as a data URL."""

    url: Address
    detail: NotRequired[Literal["auto", "low", "high", "original"] | None]


class ImagePart(TypedDict):
    """A picture."""

    type: Literal["image_url"]
    image_url: Image


class Audio(TypedDict):
    """Base64 and its format, which differs too much between providers to be listed."""

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
    """Where a film is, or the film itself as a data URL."""

    url: Address


class VideoPart(TypedDict):
    """A film; ``input_video`` is the older name."""

    type: Literal["video_url", "input_video"]
    video_url: Video


class UnknownPart(TypedDict):
    """Refuses a part that is none of the above, at its type."""

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

# The first fault of a list of parts is told and ends its reading, so that a long list cannot bring as many faults.
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[Annotated[str, PLAIN] | Annotated[Parts, INNER], by_kind(list)]
TextContent = Annotated[Annotated[str, PLAIN] | Annotated[TextParts, INNER], by_kind(list)]


class SystemMessage(TypedDict):
    """Instructions; a developer message is the same thing under OpenAI's newer name."""

    role: Literal["system", "developer"]
    content: TextContent
    name: NotRequired[Name | None]


class UserMessage(TypedDict):
    """What the person says."""

    role: Literal["user"]
    content: Content
    name: NotRequired[Name | None]


class FunctionCall(TypedDict):
    """The function and its arguments, which are JSON in a string and may be broken: a model wrote them."""

    name: Name
    arguments: str


class ToolCall(TypedDict):
    """One call of a tool."""

    id: Name
    type: Literal["function"]
    function: FunctionCall
    index: NotRequired[int | None]


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
    """A piece of reasoning. Providers sign and encrypt it: it has to go back as it came, whatever it holds."""

    type: Annotated[str, Field(min_length=1, max_length=64)]


class AssistantMessage(TypedDict, total=False):
    """What a model has said before."""

    role: Required[Literal["assistant"]]
    content: Content | None
    name: Name | None
    model: Name | None
    refusal: str | None
    reasoning: str | None
    reasoning_content: str | None
    reasoning_details: Annotated[list[ReasoningDetail], Field(max_length=1024, fail_fast=True)] | None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None
    function_call: None
    images: Annotated[list[AssistantImage], Field(max_length=MAX_PARTS, fail_fast=True)] | None
    audio: AssistantAudio | None
    annotations: Annotated[list[dict[str, Any]], Field(max_length=1024, fail_fast=True)] | None


class ToolMessage(TypedDict):
    """What a tool answered."""

    role: Literal["tool"]
    tool_call_id: Name
    content: Content
    name: NotRequired[Name | None]


class UnknownMessage(TypedDict):
    """Refuses a message of no known role, at its role."""

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
    """The places of those tool messages that answer no call of the assistant message they follow."""
    calls: set[str] = set()
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "assistant":
            calls = {call["id"] for call in message.get("tool_calls") or ()}
        elif role != "tool":
            calls = set()
        elif message["tool_call_id"] not in calls:
            yield index
