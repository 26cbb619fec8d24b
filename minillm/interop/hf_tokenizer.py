"""Tokenizers in Hugging Face's format (tokenizer.json) behind the interface of `tokenizer.Tokenizer`.

WordPiece (BERT), byte-level BPE (GPT-2, Qwen, BART) and SentencePiece's BPE and unigram (Llama) alike: the `tokenizers`
library does the work. Which token begins a document, ends a turn, pads or masks stands in the files beside it.

Special tokens are cut out of no text: what spells one is encoded as any other text.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from minillm.config import DamagedFile, UserError
from minillm.interop.folder import read_json
from minillm.interop.stream import HFStreamDecoder
from minillm.interop.token_roles import SETTINGS, find_roles
from minillm.interop.vocabulary import from_vocabulary

FILE, ROLES_FILE, TEMPLATE = "tokenizer.json", "roles.json", "chat_template.jinja"
_FORMAT = 1
_LARGEST = 2**24  # ids; a larger one is a damaged number, for which lists would be made
_PROBE = "A probe, na\u00efve\u2581 \u4f60\u597d \U0001f642 x1\t\r\n"
_SENTINEL = re.compile(r"<\|?(?:sentinel-|extra_id_)(\d+)\|?>")


class HFTokenizer:
    """A tokenizer.json and the roles of its special tokens; `from_folder` and `load` make one.

    vocab_size     ids are 0 … vocab_size - 1
    hash           SHA-256 (hex) of tokenizer.json and the roles
    type           wordpiece, bpe, unigram, wordlevel
    pad_id, document_id (begins every document), end_id (ends a turn, or a target), mask_id (None without one)
    sentinel_ids   for span corruption, the first span's first; most tokenizers have none
    special        name → id: unknown, pad, document, end, mask where there are such, and every other special token by
                   its spelling without the <| |> around it
    content        tokenizer.json
    settings       tokenizer_config.json as it was read, with a chat template where there is one
    """

    def __init__(self, content: bytes, settings: Mapping[str, Any], roles: Mapping[str, int]) -> None:
        import tokenizers

        self.content, self.settings, self.roles = content, dict(settings), dict(roles)
        self._model = tokenizers.Tokenizer.from_str(content.decode())
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # as text: a document that spells <|endoftext|> holds no such token
        self.hash = hashlib.sha256(content + json.dumps(self.roles, sort_keys=True).encode()).hexdigest()
        self.type = type(self._model.model).__name__.lower()
        added = self._model.get_added_tokens_decoder()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.pieces = [""] * self.vocab_size
        for piece, i in vocabulary.items():
            self.pieces[i] = piece
        self.special = dict(self.roles)
        for i, token in sorted(added.items()):
            if token.special and i not in self.roles.values():
                self.special[token.content.strip("<|>")] = i
        self.pad_id, self.document_id = self.roles["pad"], self.roles["document"]
        self.end_id, self.mask_id = self.roles["end"], self.roles.get("mask")
        sentinels = {int(found[1]): i for i, piece in enumerate(self.pieces) if (found := _SENTINEL.fullmatch(piece))}
        self.sentinel_ids = [i for _, i in sorted(sentinels.items())]
        self._control = {i for i, token in added.items() if token.special} - {self.roles.get("unknown")}

    def __reduce__(self) -> tuple[Any, ...]:
        return HFTokenizer, (self.content, self.settings, self.roles)

    # Encoding and decoding

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens.

        Raises ValueError for a lone surrogate (not valid Unicode), and where the vocabulary itself takes a part of the
        text for a special token.
        """
        return self._checked(self._model.encode(_valid(text), add_special_tokens=False).ids, text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and for each id its first character in `text` and the one behind its last."""
        encoded = self._model.encode(_valid(text), add_special_tokens=False)
        return self._checked(encoded.ids, text), list(encoded.offsets)

    def encode_batch(self, texts: list[str], *, threads: int | None = None) -> list[list[int]]:
        """`[encode(text) for text in texts]`, over as many threads as the library takes."""
        encoded = self._model.encode_batch([_valid(text) for text in texts], add_special_tokens=False)
        return [self._checked(one.ids, text) for one, text in zip(encoded, texts, strict=True)]

    def wrap(self, text: str, pair: str | None = None) -> list[int]:
        """Ids with the special tokens around them that the file's own template asks for."""
        return self._model.encode(_valid(text), pair).ids

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if not self._control.isdisjoint(ids):
            i = next(i for i in ids if i in self._control)
            raise ValueError(
                f"the text spells the special token {self.pieces[i]} ({text[:40]!r}), and this tokenizer cannot spell "
                "it in other tokens; remove it from the text"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens give nothing. Raises ValueError for an id outside the vocabulary."""
        ids = list(ids)
        for at, i in enumerate(ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} at position {at} is outside the vocabulary of {self.vocab_size}")
        return self._model.decode(ids, skip_special_tokens=True)

    def stream_decoder(self) -> HFStreamDecoder:
        """A decoder for ids that come one by one; it never gives half a character."""
        return HFStreamDecoder(self)

    # Words

    def is_word_start(self, i: int) -> bool:
        """Whether the piece begins a new word; see `word_starts`."""
        return self.word_starts[i]

    @cached_property
    def word_starts(self) -> list[bool]:
        """For each id whether it begins a new word, for masking whole words.

        WordPiece says so itself: a piece without ## begins one. Elsewhere a piece continues the word before it when it
        begins with a letter, digit, underscore or combining mark, or inside a character; special tokens begin one.
        """
        special = {i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        if self.type == "wordpiece":
            return [i in special or not piece.startswith("##") for i, piece in enumerate(self.pieces)]
        return [i in special or _starts_word(self._bytes_of(piece)) for i, piece in enumerate(self.pieces)]

    @cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.content).get("decoder"))

    def _bytes_of(self, piece: str) -> bytes:
        if self._byte_level:
            table = _byte_alphabet()
            return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    # Files

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, and roles.json, which binds the two and names the roles."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_bytes(self.content)
        (folder / SETTINGS).write_text(json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        about = {"format": _FORMAT, "roles": self.roles, "sha256": hashlib.sha256(self.content).hexdigest()}
        (folder / ROLES_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "HFTokenizer":
        """Reads what `save` wrote, or a folder in Hugging Face's format.

        Raises `UserError` where a file is missing, `DamagedFile` where one is not what was written.
        """
        folder = Path(folder)
        if not (folder / ROLES_FILE).is_file():
            return cls.from_folder(folder)
        about = read_json(folder / ROLES_FILE)
        roles = about.get("roles")
        if not isinstance(roles, dict) or not all(type(i) is int for i in roles.values()):
            raise DamagedFile(f"{folder / ROLES_FILE} is damaged: it does not give an id for each role")
        content = _content(folder)
        if hashlib.sha256(content).hexdigest() != about.get("sha256"):
            raise DamagedFile(f"{folder / FILE} is damaged: its SHA-256 is not the one in {ROLES_FILE}")
        return _made(cls, content, read_json(folder / SETTINGS), roles, folder)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "HFTokenizer":
        """The tokenizer of a model's folder: tokenizer.json, or BERT's vocab.txt, or GPT-2's vocab.json and merges.txt.

        Raises `UserError` where there is none, or nothing says which token ends a text; `DamagedFile` for what cannot
        be read.
        """
        folder = Path(folder)
        settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
        if (folder / TEMPLATE).is_file():
            settings["chat_template"] = (folder / TEMPLATE).read_text(encoding="utf-8", errors="replace")
        content = _content(folder) if (folder / FILE).is_file() else from_vocabulary(folder, settings)
        return _made(cls, content, settings, None, folder)


def _made(
    cls: type[HFTokenizer],
    content: bytes,
    settings: dict[str, Any],
    roles: Mapping[str, int] | None,
    folder: Path,
) -> HFTokenizer:
    import tokenizers

    try:
        _refuse_prefix(json.loads(content), folder / FILE)
        model = tokenizers.Tokenizer.from_str(content.decode())
        model.encode(_PROBE)
        model.encode(_PROBE, _PROBE)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and a panic of its Rust side is not even that
        raise DamagedFile(f"{folder / FILE} is damaged: it is no tokenizer ({str(error)[:200]})") from None
    ids = model.get_vocab(with_added_tokens=True).values()
    if not ids or max(ids) >= _LARGEST:
        raise DamagedFile(f"{folder / FILE} is damaged: its vocabulary is empty, or has ids beyond {_LARGEST}")
    return cls(content, settings, roles if roles is not None else find_roles(model, settings, folder))


def _refuse_prefix(values: Any, path: Path) -> None:
    """No BPE here has one, and one that cuts a piece inside a character makes the library end the whole process."""
    model = values.get("model")
    if isinstance(model, dict) and model.get("type") in (None, "BPE") and model.get("continuing_subword_prefix"):
        raise UserError(f"{path}: continuing_subword_prefix of a BPE model is not supported; only null is")


def _content(folder: Path) -> bytes:
    try:
        return (folder / FILE).read_bytes()
    except OSError as error:
        raise UserError(f"{folder / FILE} cannot be read: {error.strerror}") from None


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds a lone surrogate, U+{ord(text[error.start]):04X}, at offset {error.start}: not valid Unicode; "
            'read the source as UTF-8, or replace it with text.encode(errors="replace").decode()'
        ) from None
    return text


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _starts_word(piece: bytes) -> bool:
    if not piece:
        return True
    if 0x80 <= piece[0] < 0xC0:  # inside a character
        return False
    first = piece.decode(errors="replace")[0]
    if unicodedata.name(first, "").startswith(("CJK", "HIRAGANA", "KATAKANA")):
        return True
    return not (first.isalnum() or first == "_" or unicodedata.category(first).startswith("M"))
