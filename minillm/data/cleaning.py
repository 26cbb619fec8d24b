"""What is dropped from a corpus before training: no text, too little of it, and what is there already.

Near duplicates by MinHash (Broder 1997): the Jaccard similarity of two documents, |A ∩ B| / |A ∪ B| of their shingles
(stretches of 5 words), is estimated by how many of K hash functions have the same minimum over both. Documents are
compared only where a band of R minima agrees (locality-sensitive hashing): with 20 bands of 6 a pair of similarity 0.8
is compared in 99.8 % of cases, one of 0.4 in 8 %.

Text that stays is not changed. Of equal or similar documents the first in the source's order stays.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minillm.config import UserError
from minillm.data.folder import new_folder
from minillm.data.sources import Document, Source

_BANDS, _BAND = 20, 6
_SHINGLE = 5
_CHUNK = 4096  # shingles hashed at a time: the table [K, chunk] then stays in the processor's cache
_FILE = 256 << 20  # bytes after which the output goes on in another file
REASONS = ("empty", "short", "not text", "duplicate", "near duplicate")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What may stay."""

    shortest: int = 50
    """Characters, white space around them aside, that a document needs."""
    control: float = 0.02
    """Largest share of control characters (line ends, tabs and form feeds aside) and of U+FFFD."""
    similarity: float | None = 0.8
    """Share of common shingles from which a document counts as a near duplicate. None: those stay."""

    def __post_init__(self) -> None:
        if self.shortest < 0 or not 0 <= self.control <= 1:
            raise UserError("shortest must not be negative, control a share from 0 to 1")
        if self.similarity is not None and not 0.5 <= self.similarity <= 1:
            raise UserError(f"similarity must be from 0.5 to 1, not {self.similarity}: below it most pairs go unseen")


@dataclass
class Report:
    """Counts of documents and UTF-8 bytes before and after, and of what went by reason."""

    documents: list[int] = field(default_factory=lambda: [0, 0])
    bytes: list[int] = field(default_factory=lambda: [0, 0])
    dropped: dict[str, list[int]] = field(default_factory=lambda: {reason: [0, 0] for reason in REASONS})
    """(documents, bytes) by reason."""
    unreadable: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "before": {"documents": self.documents[0], "bytes": self.bytes[0]},
            "after": {"documents": self.documents[1], "bytes": self.bytes[1]},
            "dropped": {reason: {"documents": n, "bytes": size} for reason, (n, size) in self.dropped.items()},
            "unreadable": self.unreadable,
        }


def clean(
    source: Source,
    out: Path | str,
    rules: Rules | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Report:
    """Writes what may stay to out/part-00000.jsonl …, and to out/report.json the counts and what was dropped, and why.

    One document is in memory at a time, besides about 4.5 kilobytes for each that stays (for 10 million, 45 GB).

    Raises `UserError` where `out` is taken, or the source cannot be read or is prepared already.
    """
    if source.is_prepared:
        raise UserError(f"{source.name} is prepared already; give the text that it was made from")
    rules, report, dropped = rules or Rules(), Report(), []
    judge = _Judge(rules)
    with new_folder(Path(out), overwrite=overwrite) as folder, _Output(folder) as output:
        for name, text in _whole_documents(source):
            size = len(text.encode())
            report.documents[0] += 1
            report.bytes[0] += size
            reason, like = judge.reason(name, text)
            if reason is None:
                output.write({"name": name, "text": text})
                report.documents[1] += 1
                report.bytes[1] += size
            else:
                dropped.append({"name": name, "reason": reason, "like": like})
                report.dropped[reason][0] += 1
                report.dropped[reason][1] += size
            if progress is not None:
                progress(report.bytes[0], source.size)
        report.unreadable = len(source.skipped)
        dropped += [{"name": name, "reason": f"unreadable: {why}", "like": None} for name, why in source.skipped]
        record = {"source": source.name, "rules": asdict(rules), **report.as_dict(), "list": dropped}
        (folder / "report.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    return report


class _Judge:
    """Decides document by document; remembers those that stay."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self._seen: dict[bytes, str] = {}
        self._names: list[str] = []
        self._signatures: list[np.ndarray] = []
        self._bands: dict[bytes, tuple[int, ...]] = {}

    def reason(self, name: str, text: str) -> tuple[str | None, str | None]:
        """(why it goes or None, the document that it is like)"""
        stripped = text.strip()
        if not stripped:
            return "empty", None
        if len(stripped) < self.rules.shortest:
            return "short", None
        if control_share(text) > self.rules.control:
            return "not text", None
        digest = hashlib.sha256(text.encode()).digest()
        if digest in self._seen:
            return "duplicate", self._seen[digest]
        if self.rules.similarity is not None:
            signature = minhash(text)
            like = self._similar(signature)
            if like is not None:
                return "near duplicate", self._names[like]
            self._remember(signature)
        self._seen[digest] = name
        self._names.append(name)
        return None, None

    def _similar(self, signature: np.ndarray) -> int | None:
        candidates = sorted({i for band in self._keys(signature) for i in self._bands.get(band, ())})
        for i in candidates:
            if np.mean(self._signatures[i] == signature) >= self.rules.similarity:
                return i
        return None

    def _remember(self, signature: np.ndarray) -> None:
        for band in self._keys(signature):
            self._bands[band] = (*self._bands.get(band, ()), len(self._signatures))
        self._signatures.append(signature)

    @staticmethod
    def _keys(signature: np.ndarray) -> list[bytes]:
        return [signature[band * _BAND : (band + 1) * _BAND].tobytes() for band in range(_BANDS)]


def control_share(text: str) -> float:
    """Share of the characters that no text has: controls but for line ends, tabs, form feeds; and U+FFFD."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    control = (codes < 32) & ~np.isin(codes, [9, 10, 12, 13]) | (codes >= 127) & (codes < 160) | (codes == 0xFFFD)
    return float(control.mean()) if len(codes) else 0.0


# The upper half of m·x + s mod 2⁶⁴ for random m, s (Dietzfelbinger 1996). All 64 bits of a shingle are needed: with 32
# the minima of different texts agree too often by some hundredths.
_MULTIPLIERS, _SHIFTS = np.random.Philox(key=20).random_raw((2, _BANDS * _BAND, 1))


def minhash(text: str) -> np.ndarray:
    """[K] uint32 minima of K hash functions over the document's shingles; the same on every machine."""
    words = np.fromiter(map(zlib.crc32, text.encode().split()), np.uint64)
    count = max(1, len(words) - _SHINGLE + 1)
    shingles = np.zeros(count, np.uint64)
    for i in range(min(_SHINGLE, len(words))):
        shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + words[i : i + count]
    shingles = np.unique(shingles)
    minima = np.full(_BANDS * _BAND, 2**32 - 1, np.uint64)
    for start in range(0, len(shingles), _CHUNK):
        hashed = shingles[start : start + _CHUNK] * _MULTIPLIERS + _SHIFTS  # [K, chunk]
        minima = np.minimum(minima, (hashed >> np.uint64(32)).min(1))
    return minima.astype(np.uint32)


def _whole_documents(source: Source) -> Iterator[tuple[str, str]]:
    """(name, text), the parts of long documents joined again."""
    held: list[Document] = []
    for document in source.documents():
        if document.part == 0 and held:
            yield held[0].name, "".join(part.text for part in held)
            held = []
        held.append(document)
    if held:
        yield held[0].name, "".join(part.text for part in held)


class _Output:
    """part-00000.jsonl, part-00001.jsonl … of about `_FILE` bytes each."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        self._file = self._open()

    def _open(self):
        return (self.folder / f"part-{self.number:05d}.jsonl").open("w", encoding="utf-8", newline="\n")

    def write(self, record: dict[str, str]) -> None:
        if self._file.tell() >= _FILE:
            self._file.close()
            self.number += 1
            self._file = self._open()
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
