"""Files of text, read in bounded memory: .txt .md .py .jsonl .jsonl.gz .parquet.

A reader yields (name, text, part). Text stays as it is in the file, line ends included. `skip(name, reason)` takes what
cannot be read; without it, that is a `UserError` with file and place.
"""

import gzip
import json
import tokenize
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minillm.config import UserError

PART = 1 << 20
"""Bytes after which a text is cut, behind the last newline before it. This project's tokenizers give a newline a token
of its own, so that the parts' ids are those of the whole; only a line longer than this is cut inside."""

Skip = Callable[[str, str], None] | None
Read = Iterator[tuple[str, str, int]]


def read(name: str, path: Path, skip: Skip) -> Read:
    """The documents of one file. Raises `UserError` without `skip`."""
    try:
        yield from _READERS[ending(path) or ".txt"](name, path, skip)
    except (OSError, EOFError, zlib.error) as error:  # what a missing file, a broken disk or a broken .gz raise
        _fail(skip, name, f"cannot be read: {getattr(error, 'strerror', None) or error}")


def ending(path: Path) -> str | None:
    """Which of `ENDINGS` the file has."""
    return next((e for e in ENDINGS if path.name.lower().endswith(e)), None)


def _fail(skip: Skip, name: str, reason: str) -> None:
    if skip is None:
        raise UserError(f"{name} {reason}")
    skip(name, reason)


def _text(name: str, path: Path, skip: Skip) -> Read:
    with path.open("rb") as file:
        start, rest, number, last = 0, b"", 0, False
        while not last:
            piece = rest + file.read(PART - len(rest))
            last = len(piece) < PART
            end = len(piece) if last else piece.rfind(b"\n") + 1 or _last_character(piece) or len(piece)
            try:
                text = piece[:end].decode()
            except UnicodeDecodeError as error:
                _fail(skip, name, _not_utf8(error, start))
                return
            if text or number == 0:
                yield name, text, number
            start, rest, number = start + end, piece[end:], number + 1


def _not_utf8(error: UnicodeDecodeError, start: int) -> str:
    return (
        f"is not UTF-8: byte 0x{error.object[error.start]:02X} at offset {start + error.start}; "
        "convert it (iconv -t UTF-8), or mend that byte"
    )


def _last_character(piece: bytes) -> int:
    """Where the last character of `piece`, which may be incomplete, begins."""
    return next((len(piece) - back for back in range(1, 5) if piece[-back] & 0xC0 != 0x80), len(piece))


def _python(name: str, path: Path, skip: Skip) -> Read:
    """Python source by its declared encoding (PEP 263) where it was found in a folder; a named file is UTF-8."""
    encoding = "utf-8"
    if skip is not None:
        with path.open("rb") as file:
            try:
                encoding, _ = tokenize.detect_encoding(file.readline)
            except SyntaxError as error:
                skip(name, f"declares no encoding that Python knows: {error.msg}")
                return
    if encoding == "utf-8":
        yield from _text(name, path, skip)
        return
    try:
        text = path.read_bytes().decode(encoding)
    except UnicodeError as error:
        _fail(skip, name, f"is not {encoding}, which it declares: {error}")
        return
    yield from _parts(name, text)


def _jsonl(name: str, path: Path, skip: Skip) -> Read:
    offset = 0
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield from _line(f"{name}:{number}", line, offset, skip)
            offset += len(line)


def _line(where: str, line: bytes, offset: int, skip: Skip) -> Read:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        _fail(skip, where, _not_utf8(error, offset))
        return
    except (ValueError, RecursionError) as error:
        _fail(skip, where, f'is no JSON ({error}); each line must be an object with "text"')
        return
    yield from _value(where, record.get("text") if isinstance(record, dict) else None, skip)


def _value(where: str, text: Any, skip: Skip) -> Read:
    """One document out of a record's field "text"."""
    if not isinstance(text, str):
        _fail(skip, where, 'has no "text" that is a string; each record must have one')
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        _fail(skip, where, f"holds a lone surrogate at character {error.start}: not valid Unicode")
        return
    yield from _parts(where, text)


def _parts(name: str, text: str) -> Read:
    start = number = 0
    while number == 0 or start < len(text):
        end = len(text)
        if end - start > PART:
            end = text.rfind("\n", start, start + PART) + 1 or start + PART
        yield name, text[start:end], number
        start, number = end, number + 1


def _parquet(name: str, path: Path, skip: Skip) -> Read:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f'{name}: reading .parquet needs pyarrow; pip install "minillm[data]"') from None
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                _fail(skip, name, f'has no column "text", only {", ".join(file.schema_arrow.names)}')
                return
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for value in batch.column("text"):
                    row += 1
                    yield from _value(f"{name}:{row}", value.as_py(), skip)
    except pyarrow.ArrowException as error:
        _fail(skip, name, f"is no readable parquet file: {str(error).splitlines()[0]}")


_READERS: dict[str, Callable[[str, Path, Skip], Read]] = {
    ".txt": _text,
    ".md": _text,
    ".py": _python,
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".parquet": _parquet,
}
ENDINGS = tuple(_READERS)
