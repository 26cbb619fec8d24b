"""A folder of prepared shards, opened: the token ids of a corpus, what validates them, and the index that names both.

    DIR/train-00000.tokens …   DIR/val-00000.tokens …   see tokens.py
    DIR/validation.txt         the held-out text in UTF-8, for the compressors among the baselines
    DIR/index.json             counts, the hash of each file and of itself

File names are not read from the index but follow from the counts in it, so that no index can lead out of its folder.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.config import DamagedFile, UserError
from minillm.data.sources import is_prepared
from minillm.data.tokens import Header, TokenStream, body_is_intact, check_fit, read_header, token_file

FORMAT = 1
INDEX, TEXT = "index.json", "validation.txt"
_AGAIN = "prepare the data again"
_INFO = {
    **dict.fromkeys(("source", "hash", "split", "tokenizer"), str),
    **dict.fromkeys(
        ("documents", "bytes", "train_tokens", "train_bytes", "val_tokens", "val_bytes", "val_targets"), int
    ),
    **{"bytes_per_token": float, "skipped": int},
}


@dataclass(frozen=True)
class Shards:
    """An opened folder.

    info: what config.json says about the corpus: source, hash, documents, bytes, train_tokens, train_bytes, val_tokens,
    val_bytes, val_targets, split, tokenizer (its hash), bytes_per_token, skipped (how many could not be read).
    """

    path: Path
    info: dict[str, Any]
    train: TokenStream
    val: TokenStream

    def val_text(self) -> Iterator[bytes]:
        """The held-out text, UTF-8, in blocks of a megabyte that may end inside a character."""
        with (self.path / TEXT).open("rb") as file:
            while block := file.read(1 << 20):
                yield block


def open_shards(path: Path | str, *, tokenizer_hash: str | None = None, vocab_size: int | None = None) -> Shards:
    """Opens a prepared folder: every header is checked now, the bodies only by `verify`.

    Args:
        tokenizer_hash: the tokenizer that the ids must come from. None: any.
        vocab_size: rows of the model's embedding, which every id must stay below. None: any.

    Raises `DamagedFile` for a file that is missing, cut short or changed, `UserError` for another tokenizer or for ids
    outside the vocabulary.
    """
    path = Path(path)
    index = read_index(path)
    streams = {}
    for name in ("train", "val"):
        files = []
        for file, sha256 in _token_files(path, index, name):
            header = _header(file, sha256)
            check_fit(file, header, tokenizer_hash=tokenizer_hash, vocab_size=vocab_size)
            files.append((file, header))
        streams[name] = TokenStream(files)
    text = path / TEXT
    if text.is_symlink() or not text.is_file() or text.stat().st_size != index["info"]["val_bytes"]:
        raise DamagedFile(f"{text} is missing or damaged; {_AGAIN}")
    return Shards(path, index["info"], streams["train"], streams["val"])


def verify(path: Path | str) -> list[str]:
    """Reads every byte of a prepared folder; what is wrong, one line for each file. An empty list: all is well."""
    path = Path(path)
    try:
        index = read_index(path)
    except DamagedFile as error:
        return [str(error)]
    problems = []
    for name in ("train", "val"):
        for file, sha256 in _token_files(path, index, name):
            try:
                if not body_is_intact(file, _header(file, sha256)):
                    problems.append(f"{file} is damaged: its tokens do not match their checksum; {_AGAIN}")
            except DamagedFile as error:
                problems.append(str(error))
    text = path / TEXT
    if not text.is_file() or _file_hash(text) != index["text"]:
        problems.append(f"{text} is missing, or does not match its checksum; {_AGAIN}")
    return problems


def render_index(index: dict[str, Any]) -> bytes:
    """The index as a file: the one way to write it, so that a flipped bit anywhere in it shows."""
    body = json.dumps(index, indent=1, sort_keys=True)
    return json.dumps({**index, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1, sort_keys=True).encode()


def read_index(path: Path) -> dict[str, Any]:
    """The checked index of a prepared folder. Raises `DamagedFile`, and `UserError` where there are no shards."""
    file = path / INDEX
    if not file.is_file():
        if is_prepared(path):
            raise DamagedFile(f"{file} is missing; {_AGAIN}")
        raise UserError(f"{path} holds no prepared data; make it with: minillm data prepare")
    raw = file.read_bytes()
    try:
        index = json.loads(raw)
        intact = render_index({key: value for key, value in index.items() if key != "sha256"}) == raw
    except (ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedFile(f"{file} is damaged: it does not match its own checksum; {_AGAIN}")
    if index.get("format") != FORMAT:
        raise UserError(f"{file} has format {index.get('format')}, not {FORMAT}; {_AGAIN} with this version")
    if not _is_whole(index):
        raise DamagedFile(f"{file} is damaged: it does not tell what the folder holds; {_AGAIN}")
    return index


def _is_whole(index: dict[str, Any]) -> bool:
    """Whether all that is read from an index is there and of its type: a checksum is soon made to fit."""
    info, files = index.get("info"), index.get("files")
    return (
        isinstance(info, dict)
        and all(type(info.get(name)) is kind for name, kind in _INFO.items())
        and isinstance(files, dict)
        and all(
            isinstance(files.get(name), list) and all(isinstance(sha256, str) for sha256 in files[name])
            for name in ("train", "val")
        )
        and isinstance(index.get("text"), str)
    )


def _token_files(path: Path, index: dict[str, Any], name: str) -> Iterator[tuple[Path, str]]:
    for number, sha256 in enumerate(index["files"][name]):
        yield path / token_file(name, number), sha256


def _header(file: Path, sha256: str) -> Header:
    if file.is_symlink():
        raise DamagedFile(f"{file} is a link; {_AGAIN}, or copy the file into the folder")
    header = read_header(file)
    if header.sha256 != sha256:
        raise DamagedFile(f"{file} is not the file that {INDEX} names; {_AGAIN}")
    return header


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
