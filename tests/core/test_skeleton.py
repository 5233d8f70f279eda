"""Chunks that are like an earlier one but for their text: the fast path says the same as the slow one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.answer import Answer
from broker.core.chat_answer import ChatAnswer
from broker.core.errors import UpstreamError
from broker.core.skeleton import MAX_SIZE, MAX_TRIES, Skeleton
from broker.core.sse import decode_data, encode_data
from tests.recordings import RECORDINGS


class SlowAnswer(ChatAnswer):
    """A chat answer that parses every chunk: the reference."""

    read = Answer.read

    def read_plain(self, event: bytes) -> bool:
        return False

    def read_many_plain(self, events: bytes) -> list[bytes]:
        return []


def facts(answer: ChatAnswer) -> dict[str, Any]:
    """Return all that an answer knows."""
    names = {name for kind in type(answer).__mro__ for name in getattr(kind, "__slots__", ())}
    return {name: getattr(answer, name, None) for name in names - {"_skeleton", "_clock", "_wrote"}}


def outcome(answer: ChatAnswer, data: bytes, *, plain: bool) -> object:
    try:
        if plain and answer.read_plain(b"data: %b\n\n" % data):
            return data
        return answer.read(data)
    except UpstreamError as error:
        return type(error), str(error)


def agree(*chunks: bytes) -> None:
    """Check that the fast paths, on chunks, on whole events and on many of them, and the slow one find the same.

    The chunks are read as the first ones of an answer, and behind another one, since an answer learns from its second.
    """
    check(*chunks)
    check(chunk("First"), *chunks)


def check(*chunks: bytes) -> None:
    slow, fast, plain, many = SlowAnswer(), ChatAnswer(), ChatAnswer(), ChatAnswer()
    at_once: list[bytes] = []
    for n, data in enumerate(chunks):
        if not at_once:
            encoded = many.read_many_plain(b"".join(b"data: %b\n\n" % each for each in chunks[n:]))
            at_once = [decode_data(each) for each in encoded]
            is_told = bool(at_once)
        expected = outcome(slow, data, plain=False)
        assert outcome(fast, data, plain=False) == expected
        assert outcome(plain, data, plain=True) == expected
        assert facts(fast) == facts(plain) == facts(slow)
        assert (at_once.pop(0) if is_told else outcome(many, data, plain=False)) == expected
        if not at_once:
            assert facts(many) == facts(slow)


def chunk(content: object, **fields: Any) -> bytes:
    choice = {"index": 0, "delta": {"role": "assistant", "content": content}, "finish_reason": None}
    return json.dumps({"id": "gen-1", "model": "a/b", "choices": [choice], **fields}).encode()


ODD_TEXTS = ["", " ", "\\", '"', '","x":"', "\n", "\x7f", "\u2028", "\U0001f469\u200d\U0001f4bb"]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [*ODD_TEXTS, '"}}],"error":{"message":"x"}']
)


@given(st.lists(TEXTS, min_size=2, max_size=6), st.booleans())
def test_texts_are_counted_alike(texts: list[str], ascii_only: bool) -> None:
    agree(
        *(
            json.dumps(
                {"choices": [{"delta": {"content": text}}], "model": "m"}, ensure_ascii=ascii_only
            ).encode()
            for text in texts
        )
    )


@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(st.binary(max_size=8), min_size=1, max_size=4))
def test_bytes_between_the_two_parts_are_judged_alike(texts: list[str], raws: list[bytes]) -> None:
    start, end = chunk("|").split(b"|")
    agree(chunk("Hello"), *(chunk(text) for text in texts), *(start + raw + end for raw in raws))


FIELDS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "usage": st.sampled_from([None, {}, {"prompt_tokens": 1, "completion_tokens": 2}, []]),
        "error": st.sampled_from([None, {}, "It broke.", {"message": "x", "code": 429}]),
        "x_groq": st.sampled_from([None, {}, {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}]),
        "provider": st.sampled_from([None, "P"]),
        "object": st.sampled_from(["chat.completion.chunk", "error"]),
        "content": st.just("beside"),
    },
)
CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "delta": st.fixed_dictionaries(
            {},
            optional={
                "content": TEXTS | st.sampled_from(["a", "b", None, [{"type": "text", "text": "t"}]]),
                "role": st.just("assistant"),
                "reasoning": st.sampled_from(["r", None]),
                "tool_calls": st.just([{"index": 0, "function": {"arguments": "{}"}}]),
            },
        ),
        "message": st.just({"content": "m"}),
        "finish_reason": st.sampled_from([None, "", "stop", "error"]),
        "index": st.integers(0, 1),
    },
)


@given(
    st.lists(
        st.tuples(st.lists(CHOICES, max_size=2), FIELDS).map(
            lambda parts: json.dumps({"choices": parts[0], **parts[1]}).encode()
        )
        | st.sampled_from([b"[DONE]", b"null", b"", b"{", chunk("Hello"), chunk("you", finish="x")]),
        max_size=8,
    )
)
def test_any_chunks_are_read_alike(chunks: list[bytes]) -> None:
    agree(*chunks)


@pytest.mark.parametrize("name", RECORDINGS)
def test_recorded_answers_are_read_alike(name: str) -> None:
    lines = RECORDINGS[name].body.splitlines()
    agree(*(line[6:] for line in lines if line.startswith(b"data: ")))


def taught(*texts: str) -> ChatAnswer:
    """Return an answer that knows what its chunks are like: the first one teaches nothing."""
    answer = ChatAnswer()
    for text in texts:
        assert not answer.read_plain(b"data: %b\n\n" % chunk(text))
        assert answer.read(chunk(text)) == chunk(text)
    return answer


def test_the_chunk_that_a_page_waits_for_is_not_learned_from() -> None:
    assert not taught("Hello").read_plain(b"data: %b\n\n" % chunk(" you"))
    assert taught("He", "llo").read_plain(b"data: %b\n\n" % chunk(" you"))


def test_a_chunk_with_another_text_is_recognized() -> None:
    answer = taught("He", "llo")
    for text in (" you", "\u00e9\u00e8", "\U0001f600"):
        data = json.dumps(json.loads(chunk(text)), ensure_ascii=False).encode()
        assert answer.read_plain(b"data: %b\n\n" % data)
    assert answer.text_bytes == len("Hello you") + 4 + 4


def test_many_chunks_are_recognized_together() -> None:
    answer = taught("He", "llo")
    chunks = [chunk(text) for text in ("a", '\n"b"\\', "\u00e9", "\U0001f600", "\x7f")]
    encoded = [encode_data(data) for data in chunks]
    events = b"".join(b"%b\n\n" % each for each in encoded)
    assert answer.read_many_plain(events) == encoded
    assert answer.text_bytes == len("Hello") + 1 + 5 + 2 + 4 + 1
    assert answer.read_many_plain(events + b"data: [DONE]\n\n") == encoded
    assert answer.read_many_plain(events + b": silence\n\n" + events) == encoded
    assert answer.read_many_plain(b": silence\n\n" + events) == []


@pytest.mark.parametrize("odd", [b"", b"\xe2\x82", b'"', b"\\", b"\\x", b"\\ud800", b"\n", b"\0", b'","'])
def test_a_text_that_is_no_json_is_not_taken(odd: bytes) -> None:
    answer = taught("a", "|")
    start, end = chunk("|").split(b"|")
    events = [b"data: %b\n\n" % data for data in (chunk("a"), start + odd + end, start + b"\xac" + end)]
    assert len(answer.read_many_plain(b"".join(events))) <= 1
    assert answer.text_bytes <= 3


def test_after_a_finish_reason_every_chunk_is_parsed() -> None:
    answer = taught("He", "llo")
    answer.read(json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}]}).encode())
    assert not answer.read_plain(b"data: %b\n\n" % chunk(" you"))
    assert answer.read_many_plain(b"data: %b\n\n" % chunk(" you")) == []


def test_a_service_that_changes_every_chunk_is_not_tried_for_ever() -> None:
    skeleton = Skeleton()
    tries = 0

    class Counting(dict[str, Any]):
        def __eq__(self, other: object) -> bool:
            nonlocal tries
            tries += 1
            return False

        __hash__ = None

    for n in range(3 * MAX_TRIES):
        parsed = Counting(json.loads(chunk("a", id=n)))
        skeleton.learn(chunk("a", id=n), parsed, parsed["choices"][0]["delta"])
    assert tries == MAX_TRIES


def test_a_large_chunk_is_not_tried() -> None:
    skeleton, data = Skeleton(), chunk("a", padding="x" * MAX_SIZE)
    parsed = json.loads(data)
    skeleton.learn(data, parsed, parsed["choices"][0]["delta"])
    assert skeleton.text_size(b"data: %b\n\n" % data) == 0


def test_an_empty_usage_with_every_chunk_is_read_every_time() -> None:
    agree(
        chunk("a", usage={}),
        chunk("b", usage={"prompt_tokens": 1, "completion_tokens": 2}),
        chunk("c", usage={}),
        chunk("d", x_groq={}),
        chunk("e", x_groq={}),
    )


def test_data_of_several_lines_are_no_skeleton() -> None:
    """An event with such data has a field name on each line; as one line of data they mean something else."""
    answer, data = ChatAnswer(), json.dumps(json.loads(chunk("a")), indent=0).encode()
    for _ in range(2):
        assert answer.read(data) == data
    assert not answer.read_plain(b"data: %b\n\n" % data)
