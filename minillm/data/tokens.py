"""Files of token ids, and the stream that several of them make.

    file = header (256 bytes) + body;   header = magic, format, width, count, largest id, tokenizer's SHA-256,
                                                 SHA-256 of the body, zeros, SHA-256 of the header before it
    body = count little-endian unsigned integers of `width` bytes (2 up to a vocabulary of 65,536, else 4)

The header is checked whenever a file is opened, the body (which may be terabytes) only by `verify`.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minillm.config import DamagedFile, UserError

_MAGIC, _FORMAT = b"mllmtok\n", 1
_FIELDS = struct.Struct("<8sIIQQ32s32s")
_HEADER = 256
_COVERED = _HEADER - 32  # what the header's own hash covers


@dataclass(frozen=True)
class Header:
    width: int
    """Bytes of one id: 2 or 4."""
    count: int
    max_id: int
    tokenizer: str
    """The tokenizer's hash, hex."""
    sha256: str
    """Of the body, hex."""

    def pack(self) -> bytes:
        hashes = bytes.fromhex(self.tokenizer), bytes.fromhex(self.sha256)
        fields = _FIELDS.pack(_MAGIC, _FORMAT, self.width, self.count, self.max_id, *hashes)
        covered = fields.ljust(_COVERED, b"\0")
        return covered + hashlib.sha256(covered).digest()


def read_header(path: Path) -> Header:
    """The checked header of a token file. Raises `DamagedFile` for any other content, and for a file cut short."""
    try:
        with path.open("rb") as file:
            raw, size = file.read(_HEADER), path.stat().st_size
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing; prepare the data again") from None
    if len(raw) < _HEADER or hashlib.sha256(raw[:_COVERED]).digest() != raw[_COVERED:]:
        raise DamagedFile(f"{path} is damaged: its header does not match its checksum; prepare the data again")
    magic, version, width, count, max_id, tokenizer, sha256 = _FIELDS.unpack_from(raw)
    if magic != _MAGIC or version != _FORMAT or width not in (2, 4):
        raise DamagedFile(f"{path} is no token file of format {_FORMAT}; prepare the data with this version")
    if size != _HEADER + count * width:
        raise DamagedFile(f"{path} is damaged: {size:,} bytes, not {_HEADER + count * width:,}; prepare the data again")
    return Header(width, count, max_id, tokenizer.hex(), sha256.hex())


def body_is_intact(path: Path, header: Header) -> bool:
    """Whether every byte of the body is what was written: reads all of it."""
    with path.open("rb") as file:
        file.seek(_HEADER)
        return hashlib.file_digest(file, "sha256").hexdigest() == header.sha256


class TokenWriter:
    """Writes ids, in pieces, to `name-00000.tokens`, `name-00001.tokens` … of at most `shard_tokens` tokens each.

    Args:
        width: bytes of one id, 2 or 4; the caller has checked that the ids fit.
        tokenizer: its hash, hex.
    """

    def __init__(self, folder: Path, name: str, *, width: int, tokenizer: str, shard_tokens: int):
        self.folder, self.name, self.width, self.tokenizer = folder, name, width, tokenizer
        self.shard_tokens, self.headers, self.tokens = shard_tokens, [], 0
        self._file: BinaryIO | None = None

    def write(self, ids: np.ndarray) -> None:
        """ids [n], any integer dtype"""
        self.tokens += len(ids)
        while len(ids):
            if self._file is None:
                self._open()
            piece, ids = ids[: self.shard_tokens - self._count], ids[self.shard_tokens - self._count :]
            raw = piece.astype(f"<u{self.width}").tobytes()
            self._file.write(raw)
            self._sha256.update(raw)
            self._count, self._max_id = self._count + len(piece), max(self._max_id, int(piece.max()))
            if self._count == self.shard_tokens:
                self.close()

    def _open(self) -> None:
        self._file = (self.folder / token_file(self.name, len(self.headers))).open("wb")
        self._file.write(bytes(_HEADER))
        self._sha256, self._count, self._max_id = hashlib.sha256(), 0, 0

    def close(self) -> None:
        """Completes the file in hand, if any: its header is written last."""
        if self._file is None:
            return
        header = Header(self.width, self._count, self._max_id, self.tokenizer, self._sha256.hexdigest())
        self.headers.append(header)
        self._file.seek(0)
        self._file.write(header.pack())
        self._file.close()
        self._file = None

    def abandon(self) -> None:
        """Lets go of the file in hand without completing it."""
        if self._file is not None:
            self._file.close()


def token_file(name: str, number: int) -> str:
    return f"{name}-{number:05d}.tokens"


def check_fit(path: Path, header: Header, *, tokenizer_hash: str | None, vocab_size: int | None) -> None:
    """Raises `UserError` where a file was made with another tokenizer, or holds ids that a model has no row for."""
    if tokenizer_hash is not None and header.tokenizer != tokenizer_hash:
        raise UserError(
            f"{path} was made with another tokenizer ({header.tokenizer[:12]}…, not {tokenizer_hash[:12]}…); "
            "give that one (--tokenizer.path), or prepare the data again"
        )
    if vocab_size is not None and header.max_id >= vocab_size:
        raise UserError(
            f"{path} holds the id {header.max_id}, outside a vocabulary of {vocab_size}; "
            "give the tokenizer that it was made with, or prepare the data again"
        )


class TokenStream:
    """The ids of one or more token files as one ring: after the last token comes the first.

    Memory-mapped: only what is asked for is read.
    """

    def __init__(self, files: list[tuple[Path, Header]]):
        self._files = [(path, header) for path, header in files if header.count]
        self._parts = [
            np.memmap(path, f"<u{header.width}", "r", _HEADER, (header.count,)) for path, header in self._files
        ]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.max_id = max((header.max_id for _, header in files), default=-1)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def window(self, start: int, length: int) -> np.ndarray:
        """[length] int64, from `start` on, around the ring."""
        return self.windows(np.array([start]), length)[0]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """[B, length] int64: from each of starts [B] on, around the ring.

        Raises `DamagedFile` for an id beyond those that were written; other damage is what `verify` reads all for.
        """
        at = (starts[:, None] + np.arange(length)) % len(self)
        if len(self._parts) == 1:
            return self._checked(0, self._parts[0][at].astype(np.int64))
        found = np.empty(at.shape, np.int64)
        of = np.searchsorted(self._ends, at, side="right")  # the part that holds each token
        for i in np.unique(of):
            here = of == i
            found[here] = self._checked(i, self._parts[i][at[here] - self._ends[i] + len(self._parts[i])])
        return found

    def _checked(self, i: int, ids: np.ndarray) -> np.ndarray:
        path, header = self._files[i]
        if ids.max(initial=0) > header.max_id:
            raise DamagedFile(
                f"{path} is damaged: it holds the id {ids.max()}, and {header.max_id} is the highest that was written; "
                "prepare the data again"
            )
        return ids
