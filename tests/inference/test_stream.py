"""Streaming: whole characters only, stop strings cut exactly wherever tokens begin and end."""

import codecs
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minillm.config import ModelConfig, UserError
from minillm.inference.stream import TextStream, stop_and_banned


class Bytes:
    """A tokenizer whose tokens are given byte strings."""

    def __init__(self, pieces: list[bytes]):
        self.pieces = pieces

    def stream_decoder(self):
        return ByteDecoder(self.pieces)


class ByteDecoder:
    def __init__(self, pieces: list[bytes]):
        self.pieces, self.utf8 = pieces, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self.utf8.decode(self.pieces[token])

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


def stream(pieces: list[bytes], stops: tuple[str, ...]) -> tuple[list[str], TextStream]:
    text = TextStream(Bytes(pieces), stops)
    return [*(text.push(i) for i in range(len(pieces))), text.flush()], text


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The definition: read character by character, end where a stop string is complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def test_a_character_of_several_tokens_comes_whole() -> None:
    shown, text = stream([b"a", b"\xe4", b"\xbd\xa0", b"\xf0\x9f", b"\x98\x80"], ())
    assert shown == ["a", "", "你", "", "😀", ""]
    assert text.text == "a你😀"


def test_a_stop_string_that_spans_tokens_is_never_shown_in_part() -> None:
    shown, text = stream([b"one\n", b"\n", b"two"], ("\n\n",))
    assert shown == ["one", "", "", ""]
    assert text.stopped
    assert stream([b"one\n\n\xe4"], ("\n\n",))[0] == ["one", ""]  # nor is half a character behind it
    shown, text = stream([b"one\n", b"two", b"\n"], ("\n\n",))
    assert shown == ["one", "\ntwo", "", "\n"], "what was no stop string in the end is given after all"
    assert not text.stopped


@example("abb", ("abb", "b"), set())  # both in one token: the shorter was complete first
@example("aab", ("aab",), {2})  # two characters to hold back, though the last one would do as well
@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3).map(tuple),
    cuts=st.sets(st.integers(0, 30)),
)
def test_any_cutting_into_tokens_gives_the_same_text(text: str, stops: tuple[str, ...], cuts: set[int]) -> None:
    edges = [0, *sorted(c for c in cuts if 0 < c < len(text)), len(text)]
    pieces = [text[a:b].encode() for a, b in pairwise(edges)]
    shown, result = stream(pieces, stops)
    assert ("".join(shown), result.stopped) == cut(text, stops)
    assert result.text == "".join(shown)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserError, match="a stop string must not be empty"):
        TextStream(Bytes([]), ("x", ""))


def test_special_tokens_end_a_text_or_are_banned_from_it() -> None:
    special = {"unknown": 0, "pad": 1, "document": 2, "end": 3, "mask": 4, "sentinel-0": 8, "sentinel-1": 9}
    tokenizer = SimpleNamespace(vocab_size=20, document_id=2, end_id=3, sentinel_ids=[8, 9], special=special)
    assert stop_and_banned(tokenizer, ModelConfig(vocab_size=22)) == ({2, 3}, {0, 1, 4, 8, 9, 20, 21})
    assert stop_and_banned(tokenizer, ModelConfig(shape="encoder-decoder", vocab_size=20)) == ({2, 3}, {0, 1, 4})
    bart = ModelConfig(shape="encoder-decoder", vocab_size=20)
    assert stop_and_banned(tokenizer, bart, [2]) == ({2, 3}, {0, 1, 4})
    assert stop_and_banned(tokenizer, bart, [3, 2]) == ({3}, {0, 1, 4})
