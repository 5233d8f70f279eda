"""Estimate numbers of tokens without any model's tokenizer, rather too high than too low.

Text is measured in UTF-8 bytes, which are divided by a model's bytes per token. Bytes work for all scripts: three
bytes of English are most of a word and less than a token; three bytes of Chinese are one character and about one
token. Everything else counts at a flat rate, whatever its length in base64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# English prose has 4 to 5 bytes per token; code and most other languages have about 3.
DEFAULT_BYTES_PER_TOKEN = 3.0

# The marks around a message that name its role, and those around the whole prompt; chat templates use 3 to 5.
MESSAGE_TOKENS = 6
PROMPT_TOKENS = 8

# Providers put their own instructions before a list of tools; the longest published ones have about this size.
TOOLS_TOKENS = 350

IMAGE_TOKENS = 2_000  # a full-size picture on most models
AUDIO_TOKENS = 4_000  # about two minutes
FILE_TOKENS = 8_000  # some pages of PDF
VIDEO_TOKENS = 16_000  # about a minute

PART_TOKENS: Mapping[str, int] = {
    "image_url": IMAGE_TOKENS,
    "input_audio": AUDIO_TOKENS,
    "file": FILE_TOKENS,
    "video_url": VIDEO_TOKENS,
    "input_video": VIDEO_TOKENS,
}


_FRAME = ("instructions", "tools", "response_format", "text", "prediction")


class Size(NamedTuple):
    """The size of a part of a prompt.

    Attributes:
        text_bytes: bytes of UTF-8 that a tokenizer will see.
        flat_tokens: tokens for pictures, sounds and files, and for the marks around the text.
    """

    text_bytes: int
    flat_tokens: int

    def tokens(self, bytes_per_token: float) -> int:
        """Return the estimated tokens, for a model with so many bytes per token."""
        return self.flat_tokens + estimate_text(self.text_bytes, bytes_per_token)


def estimate_text(byte_count: int, bytes_per_token: float) -> int:
    """Return the estimated tokens of so many bytes of UTF-8, rounded up."""
    return math.ceil(byte_count / bytes_per_token)


def estimate_prompt(
    messages: Iterable[Mapping[str, Any]],
    parameters: Mapping[str, Any],
    bytes_per_token: float = DEFAULT_BYTES_PER_TOKEN,
) -> int:
    """Return the estimated tokens of a prompt: the sum of its parts, each of them rounded up."""
    return measure_frame(parameters).tokens(bytes_per_token) + sum(
        measure_message(message).tokens(bytes_per_token) for message in messages
    )


def measure_frame(parameters: Mapping[str, Any]) -> Size:
    """Return the size of a prompt without its messages: instructions, tools, the schema of the answer, a prediction."""
    text_bytes, flat_tokens = 0, PROMPT_TOKENS
    for name in _FRAME:
        value = parameters.get(name)
        if isinstance(value, str):
            text_bytes += _utf8_length(value)
        elif value:
            text_bytes += len(orjson.dumps(value))
            flat_tokens += TOOLS_TOKENS if name == "tools" else 0
    return Size(text_bytes, flat_tokens)


def measure_message(message: Mapping[str, Any]) -> Size:
    """Return the size of one message, with all contents that a model may see."""
    text_bytes, flat_tokens = 0, MESSAGE_TOKENS
    for key, value in message.items():
        if key == "role" or value is None:
            continue
        if isinstance(value, str):
            text_bytes += _utf8_length(value)
        elif key == "content":
            for part in value:
                size = _measure_part(part)
                text_bytes += size.text_bytes
                flat_tokens += size.flat_tokens
        elif key == "images":
            flat_tokens += IMAGE_TOKENS * len(value)
        elif key == "audio":
            flat_tokens += AUDIO_TOKENS
        else:
            text_bytes += len(orjson.dumps(value))
    return Size(text_bytes, flat_tokens)


def _measure_part(part: Mapping[str, Any] | str) -> Size:
    if isinstance(part, str):  # as a page may have collected it
        return Size(_utf8_length(part), 0)
    if part["type"] in PART_TOKENS:
        return Size(0, PART_TOKENS[part["type"]])
    if part["type"] == "text":
        return Size(_utf8_length(part["text"]), 0)
    return Size(len(orjson.dumps(part)), 0)


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
