"""Which text validates: a share of the documents by the hash of each, or the end of a single text.

By hash, equal documents are on the same side, and adding a document never moves another one. `share` of the hashes,
as numbers in [0, 1), lie below `share`. A text in parts goes by its first part (`readers.PART` bytes).
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from minillm.config import UserError
from minillm.data.sources import Source


@dataclass(frozen=True)
class Piece:
    """A part of a document and its side."""

    name: str
    text: str
    held_out: bool
    starts: bool
    """Whether a document starts here."""


@dataclass(frozen=True)
class Split:
    """How a source is divided; `plan` chooses."""

    kind: str
    """What config.json says: "by document hash" or "by position"."""
    threshold: float = 0.0
    """By hash: the numbers below it are held out."""
    train_bytes: int = 0
    """By position: the UTF-8 bytes before the held-out part, which then begins at the next character."""

    def pieces(self, source: Source) -> Iterator[Piece]:
        """Every text of the source that is not empty, in order."""
        done, held_out = 0, False
        for document in source.documents():
            raw = document.text.encode()
            if not raw:
                continue
            if self.kind != "by position":
                held_out = number(raw) < self.threshold if document.part == 0 else held_out
                yield Piece(document.name, document.text, held_out, document.part == 0)
                continue
            cut = min(max(self.train_bytes - done, 0), len(raw))
            while cut < len(raw) and raw[cut] & 0xC0 == 0x80:
                cut += 1
            if cut:
                yield Piece(document.name, raw[:cut].decode(), False, document.part == 0)
            if cut < len(raw):
                yield Piece(document.name, raw[cut:].decode(), True, document.part == 0 and not cut)
            done += len(raw)


def number(text: bytes) -> float:
    """The text's hash as a number in [0, 1)."""
    # Any six bytes of the hash would do. These hold out a typical part of Python 3.11's standard library: gzip -9 takes
    # 1.93 bits per byte of it; over the first 26 choices the median is 1.90, the range 1.77 to 2.07.
    return int.from_bytes(hashlib.sha256(text).digest()[15:21]) / 2**48


def plan(source: Source, share: float) -> Split:
    """The split of a source, by position where it is one plain text or one document.

    Where so few documents leave one side empty, the one whose hash is lowest is held out. Reads the source up to where
    both sides have a document. Raises `UserError` where there is no text at all.
    """
    if source.by_position:
        return Split("by position", train_bytes=int((source.size or 0) * (1 - share)))
    lowest, highest, size = 1.0, 0.0, 0
    for document in source.documents():
        raw = document.text.encode()
        size += len(raw)
        if raw and document.part == 0:
            lowest, highest = min(lowest, number(raw)), max(highest, number(raw))
            if lowest < share <= highest:
                return Split("by document hash", threshold=share)
    if size == 0:
        unread = [f"{len(source.skipped)} could not be read ({name} {reason})" for name, reason in source.skipped[:1]]
        raise UserError(f"{source.name} holds no text; {', '.join(unread) or 'give files that are not empty'}")
    if lowest == highest:
        return Split("by position", train_bytes=int(size * (1 - share)))
    return Split("by document hash (few documents: one is held out)", threshold=math.nextafter(lowest, 1))
