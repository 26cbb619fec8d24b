"""Trains a SentencePiece model on a stream of texts.

The texts are read once. Memory holds a sample of them: pieces of at most 4,096 characters, cut at ends of lines, of
which all are kept up to `sample_characters`, and a uniform random choice beyond (Vitter, "Random sampling with a
reservoir", 1985, algorithm R). The model depends on the texts, the options and the version of SentencePiece alone: the
number of threads is fixed, because unigram's sums, and with them its pieces, change with it.

SentencePiece drops, without a word, lines that are long or hold U+2585, takes U+2581 for a space, and makes no piece of
NUL and U+001F. Hence the cutting; those characters become line ends in training text (encoding spells them in bytes).
"""

import hashlib
import io
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import sentencepiece

from tokenizer.tokenizer import (
    DOCUMENT,
    END,
    FORMAT,
    MASK,
    PAD,
    ROLE_PIECES,
    SPACE_MARK,
    UNKNOWN,
    Tokenizer,
    check_unicode,
    manifest_hash,
)

RESERVED = ("\0", "\x1f", SPACE_MARK, "\u2585")
PIECE = 4096  # characters
SAMPLE_CHARACTERS = 2**26  # as much again in SentencePiece; unigram takes some 24 bytes for each besides
THREADS = 16
LOG_LEVEL = 2  # SentencePiece's: errors alone

_EXACT = dict(  # each of SentencePiece's defaults here loses text
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
)
_SPECIAL = dict(
    unk_id=0,
    unk_piece=UNKNOWN,
    pad_id=1,
    pad_piece=PAD,
    bos_id=2,
    bos_piece=DOCUMENT,
    eos_id=3,
    eos_piece=END,
)


def train(
    texts: Iterable[str],
    *,
    type: Literal["bpe", "unigram", "char"] = "bpe",
    vocab_size: int = 4096,
    seed: int = 0,
    sample_characters: int = SAMPLE_CHARACTERS,
) -> Tokenizer:
    """A tokenizer trained on `texts`, which are read once, one at a time.

    bpe (Sennrich et al. 2016) and unigram (Kudo 2018) have exactly `vocab_size` pieces: special tokens (8, and one
    sentinel for each 64 of vocab_size, at most 100), newline, tab, the 256 bytes, every character but the rarest
    0.05 % of the text, and what was learned. char has 5 special tokens and every character of the texts, in the order
    of their code points, but tab, newline and CR come first and space comes where its mark U+2581 would; `vocab_size`
    is then only a limit, and neither sample nor seed plays a part.
    `seed` chooses the sample where the texts exceed `sample_characters`.

    Raises ValueError for texts that are empty or no valid Unicode, and for a vocabulary larger than the texts support
    or too small for what it must hold, with the size that works.
    """
    if type not in ("bpe", "unigram", "char"):
        raise ValueError(f"tokenizer type {type!r} is unknown: choose bpe, unigram or char")
    if not 1 <= vocab_size < 2**31:
        raise ValueError(f"vocab_size must be positive and below 2³¹, not {vocab_size}")
    if sample_characters < PIECE:
        raise ValueError(f"sample_characters must be at least {PIECE}, not {sample_characters}")
    if isinstance(texts, str):
        raise ValueError("texts must be an iterable of strings, such as [text], not one string")
    stream = _Stream(texts)
    if type == "char":
        pieces, options = _characters(stream, vocab_size)
    else:
        pieces, options = _sample(_cut(stream), sample_characters // PIECE, seed), _learned(type, vocab_size)
    if stream.characters == 0:
        raise ValueError("the text to train a tokenizer on is empty; name files with text in them")
    sampled = sum(map(len, pieces))
    try:
        model = _fit(pieces, options)
    except RuntimeError as error:
        raise ValueError(_explain(str(error), type, vocab_size)) from error
    manifest = {
        "format": FORMAT,
        "type": type,
        "seed": seed,
        "sample_characters": sample_characters,
        "sentencepiece": sentencepiece.__version__,
        "options": options,
        "text": {**stream.counts(), "characters_trained_on": sampled},
        "model_sha256": hashlib.sha256(model).hexdigest(),
    }
    return Tokenizer(model, {**manifest, "sha256": manifest_hash(manifest)})


class _Stream:
    """Passes texts on and counts them; the hash covers each text's length and bytes, so that it sees borders too."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self._hash = texts, hashlib.sha256()
        self.documents = self.characters = self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            encoded = check_unicode(text, f"training text {self.documents}")
            self.documents += 1
            self.characters += len(text)
            self.bytes += len(encoded)
            self._hash.update(len(encoded).to_bytes(8, "little") + encoded)
            yield text

    def counts(self) -> dict[str, Any]:
        sizes = {"documents": self.documents, "characters": self.characters, "bytes": self.bytes}
        return {**sizes, "sha256": self._hash.hexdigest()}


def _cut(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of at most PIECE characters: at line ends where possible, else at spaces; short texts share a piece."""
    waiting: list[str] = []
    size = 0
    for text in texts:
        for character in RESERVED:
            text = text.replace(character, "\n")
        waiting.append(text)
        size += len(text) + 1
        if size > PIECE:
            yield from _cut_text("\n".join(waiting))  # newline joins no pieces, so texts stay apart
            waiting, size = [], 0
    if waiting:
        yield from _cut_text("\n".join(waiting))


def _cut_text(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            line, space = text.rfind("\n", start + 1, end), text.rfind(" ", start + 1, end)
            end = line if line > 0 else space if space > 0 else end
        yield text[start:end]
        start = end


def _sample(pieces: Iterable[str], limit: int, seed: int) -> list[str]:
    choice = random.Random(seed)
    kept: list[str] = []
    for n, piece in enumerate(pieces):
        if n < limit:
            kept.append(piece)
        elif (place := choice.randrange(n + 1)) < limit:
            kept[place] = piece
    return kept


def _characters(texts: Iterable[str], limit: int) -> tuple[list[str], dict[str, Any]]:
    """Every character once: SentencePiece orders equally frequent ones by code point."""
    found: set[str] = set()
    for number, text in enumerate(texts):
        found.update(text)
        if reserved := found.intersection(RESERVED):
            character = min(reserved)
            raise ValueError(
                f"training text {number} holds U+{ord(character):04X} at offset {text.index(character)}, which a "
                "character-level tokenizer cannot hold; remove it, or train with type bpe"
            )
    specials = len(_SPECIAL) // 2 + 1
    if len(found) + specials > limit:
        raise ValueError(
            f"the text has {len(found)} different characters, which with {specials} special tokens exceeds the "
            f"vocabulary of {limit}; ask for at least {len(found) + specials}, or train with type bpe"
        )
    breaks = sorted(found & {"\n", "\t", "\r"})  # SentencePiece strips line ends from what it trains on
    options = dict(
        **_EXACT,
        **_SPECIAL,
        model_type="char",
        vocab_size=len(found) + specials,
        control_symbols=[MASK],
        user_defined_symbols=breaks,
        character_coverage=1.0,
        use_all_vocab=True,
        num_threads=THREADS,
    )
    return sorted(found.difference(breaks)), options


def _learned(type: str, vocab_size: int) -> dict[str, Any]:
    sentinels = [f"<|sentinel-{i}|>" for i in range(_sentinels(vocab_size))]
    return dict(
        **_EXACT,
        **_SPECIAL,
        model_type=type,
        vocab_size=max(vocab_size, 8),  # below 8 too little for the special ids, and refused without the size it takes
        control_symbols=[MASK, *ROLE_PIECES, *sentinels],
        user_defined_symbols=["\n", "\t"],
        byte_fallback=True,
        allow_whitespace_only_pieces=True,  # indentation is one piece: 3.1 instead of 2.1 bytes a token of Python
        character_coverage=0.9995,
        max_sentence_length=4 * PIECE,  # bytes
        num_threads=THREADS,
    )


def _sentinels(vocab_size: int) -> int:
    """100 as in T5 (Raffel et al. 2020), fewer where they would take more than one row in 64."""
    return min(100, vocab_size // 64)


def _fit(pieces: list[str], options: dict[str, Any]) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pieces), model_writer=model, minloglevel=LOG_LEVEL, **options
    )
    return model.getvalue()


def _explain(message: str, type: str, vocab_size: int) -> str:
    """SentencePiece's message in the user's terms: its sizes count the sentinels, whose number depends on the size."""
    if found := re.search(r"set it to a value <= (\d+)", message):
        rest = int(found[1]) - _sentinels(vocab_size)
        largest = next(size for size in range(int(found[1]), 0, -1) if size - _sentinels(size) <= rest)
        return (
            f"a vocabulary of {vocab_size} is larger than the text supports: with type {type} the largest that works "
            f"is {largest}; lower the vocabulary size or give more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        rest = int(found[1]) - _sentinels(vocab_size)
        smallest = next(size for size in range(rest, 2 * rest + 200) if size - _sentinels(size) >= rest)
        return (
            f"a vocabulary of {vocab_size} is too small for the special tokens, the 256 bytes and the characters of "
            f"the text: it takes at least {smallest}; raise the vocabulary size"
        )
    if any(check in message for check in ("!sentences_.empty()", "!required_chars_.empty()", "(sum) > (0)")):
        return "the text to train a tokenizer on holds nothing but line ends and tabs; name files with text in them"
    return f"SentencePiece cannot train on this text: {message}"
