"""Texts from the files and folders that the command line names, one at a time.

A file that is named must be valid; inside a folder, what cannot be read is skipped and reported. Line ends stay as they
are in the file.
"""

import codecs
import io
import json
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
_BLOCK = 2**24  # bytes; a longer file comes as several texts, so that memory does not grow with it


def read_texts(paths: Iterable[Path], skipped: Callable[[str], None]) -> Iterator[str]:
    """Texts of files (a .jsonl gives the `text` of each line) and of the .txt .md .py .jsonl files inside folders.

    `skipped` gets a line for each file inside a folder that could not be read. Raises FileNotFoundError for a missing
    path, and ValueError for a named file that is no UTF-8 (with the byte's offset) or no JSON lines with a `text` (with
    the line).
    """
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not files:
                raise ValueError(f"{path} holds no {' '.join(SUFFIXES)} file")
            for file in files:
                try:
                    yield from _python(file) if file.suffix == ".py" else _read(file)
                except (ValueError, SyntaxError, OSError) as error:
                    skipped(str(error) if str(file) in str(error) else f"{file}: {error}")
        elif path.exists():
            yield from _read(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")


def decode_utf8(data: bytes, name: str) -> str:
    """Raises ValueError with the offset of the first byte that is no UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(name, error.start, error.object[error.start]) from None


def _read(path: Path) -> Iterator[str]:
    return _json_lines(path) if path.suffix == ".jsonl" else _blocks(path)


def _blocks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK)
            begin = read - len(decoder.getstate()[0])  # where the bytes begin that the decoder is about to see
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(str(path), begin + error.start, error.object[error.start]) from None
            if text:
                yield text
            if not block:
                return
            read += len(block)


def _json_lines(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(str(path), offset + error.start, line[error.start]) from None
            offset += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: this is no JSON ({error})") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f'{path}, line {number}: expected an object with a string under "text"')
            yield record["text"]


def _python(path: Path) -> Iterator[str]:
    source = path.read_bytes()
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    yield source.decode(encoding)


def _not_utf8(name: str, offset: int, byte: int) -> ValueError:
    return ValueError(f"{name} is not UTF-8: byte 0x{byte:02x} at offset {offset}; convert the file to UTF-8")
