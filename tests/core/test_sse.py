from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.sse import Decoder, EventTooLarge, Frame, encode_comment, encode_event, encode_retry

STREAM = (
    b"\xef\xbb\xbf: comment\n\nid: 1\nevent: chunk\ndata: one\ndata: two\r\n\r\ndata:tight\rdata\r\r"
    b"retry: 2500\nid\ndata: \xe2\x82\xac \xf0\x9f\x98\x80\n\nunknown: x\nevent: lost\n\ndata\n\ndata:  two spaces\n\n"
)
FRAMES = [
    Frame("chunk", b"one\ntwo", "1"),
    Frame("message", b"tight\n", "1"),
    Frame("message", "€ 😀".encode(), ""),
    Frame("message", b"", ""),
    Frame("message", b" two spaces", ""),
]

PIECES = [b"data: a", b"data:", b"\n", b"\r", b"\r\n", b":", b"id: 7", b"x", b"\n\n", b"\xef\xbb\xbf"]


def decode(*pieces: bytes, limit: int = 10_000) -> list[Frame]:
    decoder = Decoder(limit)
    return [frame for piece in pieces for frame in decoder.feed(piece)]


def feed_all(decoder: Decoder, pieces: list[bytes]) -> None:
    for piece in pieces:
        decoder.feed(piece)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def test_all_line_ends_fields_and_a_bom_are_read() -> None:
    assert decode(STREAM) == FRAMES


def test_byte_by_byte_gives_the_same_frames() -> None:
    assert decode(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == FRAMES


@given(st.lists(st.integers(0, 500)))
def test_any_cut_gives_the_same_frames(places: list[int]) -> None:
    assert decode(*cut(STREAM, places)) == FRAMES


@given(
    st.lists(st.sampled_from(PIECES)),
    st.lists(st.integers(0, 500)),
)
def test_any_cut_of_any_stream_gives_the_same_frames(parts: list[bytes], places: list[int]) -> None:
    stream = b"".join(parts)
    assert decode(*cut(stream, places)) == decode(stream)


@given(st.text().filter(lambda t: "\x00" not in t), st.lists(st.integers(0, 500)))
def test_encoded_events_are_decoded_unchanged(text: str, places: list[int]) -> None:
    lines = text.encode("utf-8", "replace").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    event = encode_event("chunk", text.encode("utf-8", "replace"), "1-7")
    assert decode(*cut(event, places)) == [Frame("chunk", lines, "1-7")]


def test_an_event_without_a_blank_line_is_dropped() -> None:
    assert decode(b"data: half\n") == []


def test_comments_and_retries_are_not_events() -> None:
    decoder = Decoder(1000)
    assert decoder.feed(encode_comment("hello") + encode_retry(2500)) == []
    assert decoder.retry == 2500


def test_an_id_with_a_nul_is_ignored_and_an_empty_one_resets() -> None:
    decoder = Decoder(1000)
    decoder.feed(b"id: 4\n\nid: 5\0\n\n")
    assert decoder.last_event_id == "4"
    decoder.feed(b"id\n\n")
    assert decoder.last_event_id == ""


def test_an_id_counts_only_once_its_event_is_complete() -> None:
    decoder = Decoder(1000)
    decoder.feed(b"id: 4\ndata: x\n\nid: 5\ndata: y\n")
    assert decoder.last_event_id == "4"


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 50, b"data: xxxx\n"])
def test_an_event_over_its_bound_is_refused(piece: bytes) -> None:
    decoder = Decoder(100)
    with pytest.raises(EventTooLarge):
        feed_all(decoder, [piece] * 100)


def test_many_events_may_exceed_the_limit_of_one() -> None:
    assert len(decode(b"data: 0123456789\n\n" * 100, limit=20)) == 100


def test_an_unfinished_event_can_be_flushed() -> None:
    decoder = Decoder(1000)
    assert decoder.feed(b"data: a\n\nevent: b\ndata: c\r\ndata: d") == [Frame("message", b"a", "")]
    assert decoder.flush() == [Frame("b", b"c\nd", "")]
    assert decoder.flush() == []
    assert Decoder(1000).flush() == []


@pytest.mark.parametrize("value", [b"", b"{}", b"null", b"[]", b'""', b"false"])
def test_an_empty_error_line_is_not_an_event(value: bytes) -> None:
    decoder = Decoder(1000, error_lines=True)
    assert decoder.feed(b"error: " + value + b"\r\nerror:" + value + b"\n") + decoder.flush() == []


@pytest.mark.parametrize("line", [b'error: {"code":500}', b'error:{"code":500}'])
def test_an_error_line_is_an_event_if_enabled(line: bytes) -> None:
    for ends in (b"\n", b"\r\n", b"\r"):
        for cut in range(len(line + ends) + 1):
            decoder, data = Decoder(1000, error_lines=True), line + ends
            frames = decoder.feed(data[:cut]) + decoder.feed(data[cut:]) + decoder.flush()
            assert frames == [Frame("error", b'{"code":500}', "")]
    assert Decoder(1000).feed(line + b"\n\n") == []


class LineByLine(Decoder):
    """A decoder that reads all bytes line by line: the reference."""

    def _plain_frames(self, data: bytes) -> list[Frame] | None:
        return None


LINES = [
    b"data: ",
    b"data:",
    b"a",
    b"{}",
    b"\n",
    b"\n\n",
    b"\r",
    b"\r\n",
    b": c\n\n",
    b"id: 1\n",
    b"event: e\n",
    b"dat",
]
EVENTS = [b"data: x\n\n", b"data: y\n\ndata: z\n\n", b"error: {}\n", b"\xef\xbb\xbf", b"\n\n\n"]
READS = st.lists(st.lists(st.sampled_from([*LINES, *EVENTS]), max_size=12).map(b"".join), max_size=8)


def outcome(step: Callable[[], list[Frame]]) -> list[Frame] | None:
    """Return the events; None where one is too large."""
    try:
        return step()
    except EventTooLarge:
        return None


@given(READS, st.sampled_from([12, 1000]))
def test_plain_events_are_decoded_as_line_by_line(reads: list[bytes], limit: int) -> None:
    fast, slow = Decoder(limit, error_lines=True), LineByLine(limit, error_lines=True)
    for data in reads:
        expected = outcome(partial(slow.feed, data))
        assert outcome(partial(fast.feed, data)) == expected
        if expected is None:
            return
        assert (fast.last_event_id, fast.retry) == (slow.last_event_id, slow.retry)
    assert outcome(fast.flush) == outcome(slow.flush)


def test_a_decoder_between_two_events_says_so() -> None:
    decoder = Decoder(1000)
    assert not decoder.is_between_events
    for data, expected in [
        (b"data: a\n\n", True),
        (b"data: b\n\nda", False),
        (b"ta: c\n\n", True),
        (b":\n", False),
    ]:
        decoder.feed(data)
        assert decoder.is_between_events is expected


@given(READS, st.data())
def test_complete_events_may_be_taken_and_given_back(reads: list[bytes], data: st.DataObject) -> None:
    """In as many parts as one likes."""
    whole, parted = Decoder(1000, error_lines=True), Decoder(1000, error_lines=True)
    for read in reads:
        events, rest = parted.take_complete(read)
        assert events == b"" or events.endswith(b"\n\n")
        cut = data.draw(st.integers(0, len(events)))
        frames = [*parted.feed(events[:cut]), *parted.feed(events[cut:] + rest)]
        assert frames == whole.feed(read)


def test_a_large_event_may_come_in_tiny_pieces() -> None:
    """What is kept is not copied again for each piece: that would take hours here."""
    decoder, size = Decoder(10**7), 400_000
    assert all(decoder.feed(byte) == [] for byte in (b"data: ", *[b"x"] * size, b"\n"))
    assert decoder.feed(b"\n") == [Frame("message", b"x" * size, "")]
