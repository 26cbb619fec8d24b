"""Text to ids and back, exactly: encode(s) = ids of pieces whose bytes, joined, are s in UTF-8.

A piece stands for bytes: a stretch of text, one byte (`<0x41>`: what spells every character that has no piece of its
own), or none (the special tokens). `decode` joins those bytes itself instead of asking SentencePiece, whose own decoder
turns U+2581, its mark for a space, into a space. For the same reason U+2581 never reaches SentencePiece when encoding.

Special tokens are SentencePiece's control symbols: no text encodes to them, whatever it spells.

    id 0 <|unknown|>  1 <|pad|>  2 <|document|>  3 <|end|>  4 <|mask|>  then, but for `char`:
    <|system|> <|user|> <|assistant|> <|sentinel-0|> … and newline and tab, which never join other pieces
"""

import codecs
import hashlib
import json
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

SPACE_MARK = "\u2581"  # what SentencePiece writes for a space inside its pieces
UNKNOWN, PAD, DOCUMENT, END, MASK = "<|unknown|>", "<|pad|>", "<|document|>", "<|end|>", "<|mask|>"
ROLES = ("system", "user", "assistant")
ROLE_PIECES = [f"<|{role}|>" for role in ROLES]
FORMAT = 1  # of the manifest; a reader refuses a higher one

_PART = 4096  # characters handed to SentencePiece's BPE encoder at a time: it is slow where the text outgrows the cache


class DamagedFile(ValueError):
    """A file's content is not what was written; the message names the file."""


class Tokenizer:
    """A trained SentencePiece model and its manifest; `train` and `Tokenizer.load` make one.

    vocab_size     ids are 0 … vocab_size - 1
    hash           SHA-256 (hex) of the model file: equal hashes give equal ids, so it binds shards and checkpoints
    type           bpe, unigram or char
    pad_id, document_id (starts every document), end_id (ends a chat turn, or a target), mask_id
    sentinel_ids   for span corruption, the first span's first; none in type char
    special        name → id of every special token: unknown, pad, document, end, mask, system, user, assistant,
                   sentinel-0 …
    token_bytes    for each id the bytes that it stands for; b"" for special tokens, U+FFFD's for unknown
    """

    def __init__(self, model: bytes, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self._file = model
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.hash = hashlib.sha256(model).hexdigest()
        self.type: str = manifest["type"]
        self.vocab_size: int = self._model.vocab_size()
        self.pieces: list[str] = [self._model.id_to_piece(i) for i in range(self.vocab_size)]
        self.token_bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        self.special = {
            piece.strip("<|>"): i
            for i, piece in enumerate(self.pieces)
            if self._model.is_control(i) or self._model.is_unknown(i)
        }
        self.pad_id, self.document_id = self.special["pad"], self.special["document"]
        self.end_id, self.mask_id = self.special["end"], self.special["mask"]
        self.sentinel_ids = [i for name, i in self.special.items() if name.startswith("sentinel-")]
        self._characters: dict[str, int] | None = None
        if self.type == "char":
            first = len(self.special)
            self._characters = {text.decode(): i for i, text in enumerate(self.token_bytes[first:], first)}
        else:
            self._space_mark_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    def _bytes_of(self, i: int) -> bytes:
        if self._model.is_byte(i):
            return bytes([int(self.pieces[i][1:-1], 16)])
        if self._model.is_control(i):
            return b""
        if self._model.is_unknown(i):  # never encoded; an untrained model may still say it
            return "\N{REPLACEMENT CHARACTER}".encode()
        return self.pieces[i].replace(SPACE_MARK, " ").encode()

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes get the bytes, not SentencePiece's object
        return Tokenizer, (self._file, self.manifest)

    # Encoding

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens.

        Raises ValueError, with the offset, for a lone surrogate (not valid Unicode) and in type char for a character
        that the training text did not have.
        """
        check_unicode(text)
        if self._characters is not None:
            return self._encode_characters(text)
        ids: list[int] = []
        for part in self._parts(text):
            ids += self._space_mark_ids if part == SPACE_MARK else self._model.encode(part)
        return ids

    def encode_batch(self, texts: list[str], *, threads: int | None = None) -> list[list[int]]:
        """`[encode(text) for text in texts]`, over `threads` threads (None: one for each core)."""
        if self._characters is not None:
            return [self.encode(text) for text in texts]
        for text in texts:
            check_unicode(text)
        parts = [list(self._parts(text)) for text in texts]
        flat = [part for of_text in parts for part in of_text]
        encoded = iter(self._model.encode(flat, num_threads=threads or os.cpu_count() or 1))
        batch = []
        for of_text in parts:
            ids: list[int] = []
            for part, part_ids in zip(of_text, encoded, strict=False):  # `encoded` goes on with the next text's parts
                ids += self._space_mark_ids if part == SPACE_MARK else part_ids
            batch.append(ids)
        return batch

    def _parts(self, text: str) -> Iterator[str]:
        """Cuts at U+2581, which stays alone; and for bpe after newlines, where ids cannot change: no piece spans one.

        Unigram stays whole. It adds up scores in fp32, and where two spellings score the same, what stands before
        decides, even beyond a newline.
        """
        for i, stretch in enumerate(text.split(SPACE_MARK)):
            if i:
                yield SPACE_MARK
            start = 0
            while self.type == "bpe" and len(stretch) - start > _PART:
                end = stretch.rfind("\n", start, start + _PART) + 1 or stretch.find("\n", start + _PART) + 1
                if not end:
                    break
                yield stretch[start:end]
                start = end
            if start < len(stretch):
                yield stretch[start:]

    def _encode_characters(self, text: str) -> list[int]:
        assert self._characters is not None
        try:
            return [self._characters[character] for character in text]
        except KeyError as unseen:
            character = unseen.args[0]
            raise ValueError(
                f"character {character!r} (U+{ord(character):04X}) at offset {text.index(character)} is not among the "
                f"{len(self._characters)} of this character-level tokenizer; train with type bpe to encode any text"
            ) from None

    # Decoding

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens give nothing, unknown and bytes that are no UTF-8 give U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return self._join(ids).decode(errors="replace")

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for ids that come one by one; it never gives half a character."""
        return StreamDecoder(self)

    def _join(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            at = next(at for at, i in enumerate(ids) if not 0 <= i < self.vocab_size)
            raise ValueError(f"id {ids[at]} at position {at} is outside the vocabulary of {self.vocab_size}")
        return b"".join([self.token_bytes[i] for i in ids])

    # Words

    def is_word_start(self, i: int) -> bool:
        """Whether the piece begins a new word; see `word_starts`."""
        return self.word_starts[i]

    @cached_property
    def word_starts(self) -> list[bool]:
        """For each id whether it begins a new word, for masking whole words.

        A piece continues the word before it when it begins with a letter, digit, underscore or combining mark, or is
        the second or a later byte of a character. It begins one when it begins with anything else (space, newline,
        tab, punctuation), with a Chinese or Japanese character (no spaces there, so that each is a word, as in BERT),
        when it is the first byte of a character, and when it is special. So `total_count` is one word, ` total.count`
        two, and the first word of a line takes the newline before it along.
        """
        return [_starts_word(text) for text in self.token_bytes]

    # Files

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes folder/tokenizer.model and folder/manifest.json, each complete or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "tokenizer.model", self._file)
        _write(folder / "manifest.json", (json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Reads what `save` wrote.

        Raises FileNotFoundError where a file is missing, DamagedFile where one is not what was written (SentencePiece
        never sees a model whose hash is wrong), ValueError for a manifest of a later format.
        """
        manifest_path, model_path = Path(folder) / "manifest.json", Path(folder) / "tokenizer.model"
        for path in (manifest_path, model_path):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: {folder} holds no tokenizer; `tokenizer train` makes one")
        manifest = _read_manifest(manifest_path)
        model = model_path.read_bytes()
        if hashlib.sha256(model).hexdigest() != manifest["model_sha256"]:
            raise DamagedFile(
                f"{model_path} is damaged: its SHA-256 is not the one in {manifest_path}; restore the file"
            )
        try:
            return cls(model, manifest)
        except (RuntimeError, KeyError, ValueError) as error:  # a piece that is no UTF-8, or no byte, is a ValueError
            raise DamagedFile(f"{model_path} is no model of this project's: {error}") from error


class StreamDecoder:
    """Text from ids one at a time; bytes wait until their character is complete. All pushes and the flush, joined,
    equal `decode` of the same ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        """The characters that this id completes, possibly none. Raises ValueError for an id outside the vocabulary."""
        return self._utf8.decode(self._tokenizer._join([i]))

    def flush(self) -> str:
        """U+FFFD for a character left incomplete, else nothing; the decoder is then as new."""
        return self._utf8.decode(b"", final=True)


def check_unicode(text: str, name: str = "text") -> bytes:
    """`text` in UTF-8. Raises ValueError with the offset of a lone surrogate, the one thing that UTF-8 cannot hold."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds a lone surrogate, U+{ord(text[error.start]):04X}, at offset {error.start}: "
            'not valid Unicode; read the source as UTF-8, or replace it with text.encode(errors="replace").decode()'
        ) from None


def manifest_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of the manifest without its own `sha256`, keys sorted."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _starts_word(text: bytes) -> bool:
    if len(text) == 1:  # ASCII, or one byte of a longer character
        return not (0x80 <= text[0] < 0xC0 or text.isalnum() or text == b"_")
    if not text:
        return True
    first = text.decode()[0]
    if unicodedata.name(first, "").startswith(("CJK", "HIRAGANA", "KATAKANA")):
        return True
    return not (first.isalnum() or first == "_" or unicodedata.category(first).startswith("M"))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
        intact = manifest["sha256"] == manifest_hash(manifest) and {"type", "model_sha256"} <= manifest.keys()
        later = manifest["format"] > FORMAT
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: it is no tokenizer manifest ({error!r}); restore the file") from None
    if not intact:
        raise DamagedFile(f"{path} is damaged: its content is not what was written; restore the file")
    if later:
        raise ValueError(f"{path} has format {manifest['format']}, this version reads up to {FORMAT}: update minillm")
    return manifest


def _write(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)  # NamedTemporaryFile makes it readable by its owner alone
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
