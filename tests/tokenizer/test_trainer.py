"""The same text gives the same pieces, nothing is dropped, and a size that cannot be is refused with one that can."""

import hashlib
import json
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer import train, trainer
from tokenizer.trainer import PIECE, RESERVED

from .conftest import source_files

TEXT = list(source_files(60_000))


@pytest.mark.parametrize("type", ["bpe", "unigram", "char"])
def test_training_again_gives_the_same_file(type: str) -> None:
    first, second = train(TEXT, type=type, vocab_size=600), train(iter(TEXT), type=type, vocab_size=600)
    assert first.hash == second.hash
    assert first.manifest == second.manifest
    assert train([*TEXT, "qqq ~ " * 999], type=type, vocab_size=600).manifest["sha256"] != first.manifest["sha256"]


def test_the_seed_chooses_the_sample() -> None:
    def pieces(seed: int) -> list[str]:
        return train(TEXT, vocab_size=500, seed=seed, sample_characters=3 * PIECE).pieces

    assert pieces(1) == pieces(1)
    assert pieces(1) != pieces(2)


def test_the_sample_is_bounded_and_uniform() -> None:
    counts = [0] * 20
    for seed in range(2000):
        kept = trainer._sample(map(str, range(20)), 5, seed)
        assert len(kept) == len(set(kept)) == 5
        for number in kept:
            counts[int(number)] += 1
    assert all(400 < count < 600 for count in counts)  # 500 expected, five standard deviations are 97
    assert trainer._sample(["a", "b"], 5, 0) == ["a", "b"]


def test_a_stream_is_read_once_and_not_held() -> None:
    def endless(count: int) -> Iterator[str]:
        for number in range(count):
            yield f"line {number} of a text that is never in memory as a whole\n" * 100

    tokenizer = train(endless(400), vocab_size=300, sample_characters=10 * PIECE)
    text = tokenizer.manifest["text"]
    assert text["documents"] == 400
    assert text["characters"] == text["bytes"] > 2_000_000
    assert 5 * PIECE < text["characters_trained_on"] <= 10 * PIECE


def test_the_manifest_tells_what_was_trained_on() -> None:
    manifest = train(["é a\n", "b" * 50], vocab_size=275).manifest
    digest = hashlib.sha256()
    for text in ("é a\n", "b" * 50):
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    assert manifest["text"] == {
        "documents": 2,
        "characters": 54,
        "bytes": 55,
        "sha256": digest.hexdigest(),
        "characters_trained_on": 55,  # the line end between the two
    }
    assert (manifest["type"], manifest["seed"], manifest["options"]["vocab_size"]) == ("bpe", 0, 275)
    assert json.loads(json.dumps(manifest)) == manifest


HARD_LINES = {
    "NUL": "zq\0zq zq",
    "U+001F": "zq\x1fzq zq",
    "U+2581": "zq▁zq zq",
    "U+2585": "zq▅zq zq",
    "carriage returns": "zq\rzq\r\nzq",
    "a megabyte": "zq " * 400_000,
    "a megabyte without spaces": "zq" * 500_000,
    "a megabyte of line ends": "zq" + "\n" * 1_000_000 + "zq zq",
}


@pytest.mark.parametrize("name", HARD_LINES)
def test_no_line_is_dropped(name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "LOG_LEVEL", 0)
    tokenizer = train([HARD_LINES[name]], vocab_size=274)
    log = capfd.readouterr().err
    assert "zq" in tokenizer.pieces or "zqzq" in tokenizer.pieces
    pieces = [piece for piece in trainer._cut([HARD_LINES[name]]) if piece.strip("\n")]
    assert f"Loaded all {len(pieces)} sentences" in log
    assert not re.search("skipp|too long", log, re.IGNORECASE)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["long words " * 900, "x" * 2 * PIECE])
    )
)
def test_cutting_keeps_every_character(texts: list[str]) -> None:
    pieces = list(trainer._cut(texts))
    joined = "\n".join(texts)
    for character in RESERVED:
        joined = joined.replace(character, "\n")
    assert "".join(pieces).replace("\n", "") == joined.replace("\n", "")
    assert all(0 < len(piece) <= PIECE for piece in pieces)


@pytest.mark.parametrize("type", ["bpe", "unigram"])
@pytest.mark.parametrize("text", [["hello world, what a day\n" * 3], TEXT[:1]])
def test_too_large_a_vocabulary_names_the_largest(type: str, text: list[str]) -> None:
    with pytest.raises(ValueError, match="larger than the text supports") as refused:
        train(text, type=type, vocab_size=50_000)
    largest = int(re.search(r"largest that works is (\d+)", str(refused.value))[1])
    assert train(text, type=type, vocab_size=largest).vocab_size == largest
    with pytest.raises(ValueError, match=f"largest that works is {largest};"):
        train(text, type=type, vocab_size=largest + 1)


@pytest.mark.parametrize("type", ["bpe", "unigram"])
@pytest.mark.parametrize("size", [1, 7, 100, 280])
def test_too_small_a_vocabulary_names_the_smallest(type: str, size: int) -> None:
    with pytest.raises(
        ValueError, match="too small for the special tokens, the 256 bytes and the characters"
    ) as refused:
        train(TEXT, type=type, vocab_size=size)
    smallest = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert train(TEXT, type=type, vocab_size=smallest).vocab_size == smallest
    with pytest.raises(ValueError, match=f"at least {smallest};"):
        train(TEXT, type=type, vocab_size=smallest - 1)


@pytest.mark.parametrize("type", ["bpe", "unigram", "char"])
@pytest.mark.parametrize("texts", [[], [""], ["\n"], ["\n\t", "\r\n"]])
def test_text_with_nothing_in_it_is_refused(type: str, texts: list[str]) -> None:
    # bpe makes do with its bytes where there are tabs: then 300 is what is wrong
    message = r"^the text to train a tokenizer on (is empty|holds nothing)|^a vocabulary of 300 .* largest .* is 270;"
    with pytest.raises(ValueError, match=message):
        train(texts, type=type, vocab_size=300)


def test_characters_have_a_limit_and_reserved_ones() -> None:
    with pytest.raises(ValueError, match="ask for at least 8, or train with type bpe"):
        train(["abc"], type="char", vocab_size=7)
    assert train(["abc"], type="char", vocab_size=8).vocab_size == 8
    for character in "\0\x1f▁▅":
        with pytest.raises(ValueError, match=rf"training text 1 holds U\+{ord(character):04X} at offset 2"):
            train(["abc", "de" + character], type="char")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ["a", "b\ud800"]}, r"training text 1 holds a lone surrogate, U\+D800, at offset 1"),
        ({"texts": "abc"}, "not one string"),
        ({"texts": ["a"], "type": "word"}, "choose bpe, unigram or char"),
        ({"texts": ["a"], "vocab_size": 0}, "vocab_size must be positive"),
        ({"texts": ["a"], "sample_characters": 10}, "sample_characters must be at least 4096"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**arguments)


def test_sentinels_are_fewer_in_small_vocabularies() -> None:
    assert [trainer._sentinels(size) for size in (63, 300, 4096, 6400, 50_000)] == [0, 4, 64, 100, 100]
