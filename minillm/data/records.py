"""Records of a task's data file, each with the line it stands on: .jsonl .jsonl.gz .json .csv .tsv .txt.

What is wrong with a file is one line, `file:line: what; how to mend it`, as a `UserError`: a finetuning run that leaves
out or misreads examples in silence looks like one that works.

    .json     an array of objects
    .csv      quoted as RFC 4180 says; the first line names the columns
    .tsv      one record a line, the first line names the columns; a field wholly in quotes loses them
    .txt      one input a line, for `predict`
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from minillm.config import UserError

_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Record:
    """One example as it stands in its file."""

    where: str
    """file:line, as errors name it."""
    fields: dict[str, Any]

    def fail(self, problem: str) -> NoReturn:
        """Raises `UserError` with this record's place."""
        raise UserError(f"{self.where}: {problem}")

    def require(self, keys: Sequence[str], task: str) -> None:
        """Raises `UserError`, with the keys that are there, where one of `keys` is missing."""
        if missing := [key for key in keys if key not in self.fields]:
            self.fail(
                f"has no {' and no '.join(map(repr, missing))}, only {', '.join(map(repr, self.fields)) or 'nothing'}; "
                f"{task} data needs {', '.join(map(repr, keys))}: rename the columns"
            )

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        """The string in field `key`. Raises `UserError` for another type, a lone surrogate, or white space alone."""
        value = self.fields.get(key)
        if not isinstance(value, str):
            self.fail(f"{key!r} is no string but {json.dumps(value)[:40]}; put the text in quotes")
        return self.checked(value, key, may_be_empty=may_be_empty)

    def checked(self, value: str, name: str, *, may_be_empty: bool = False) -> str:
        """`value`, where it is a text that can be learnt from; errors as for `text`."""
        if not may_be_empty and not value.strip():
            self.fail(f"{name!r} is empty; delete the record, or give it a text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.fail(f"{name!r} holds a lone surrogate at character {error.start}: not valid Unicode; replace it")
        return value


def read_records(path: str | Path, *, text_key: str = "text") -> list[Record]:
    """Every record of a file.

    Args:
        text_key: what the lines of a .txt are.

    Raises:
        UserError: no such file, an ending that is not read, not UTF-8 (with the offset), no record at all, or a record
            that cannot be parsed (with its line).
    """
    name = str(path)
    parse = next((parse for ending, parse in _PARSERS.items() if name.lower().endswith(ending)), None)
    if parse is None and not Path(path).is_dir():
        raise UserError(f"{name}: data files end in {' '.join(_PARSERS)}; rename it after what it holds")
    text = read_text(path)
    assert parse is not None  # a folder is no text
    found = list(parse(name, text, text_key))
    if not found:
        raise UserError(f"{name} holds no record; give a file with examples")
    return found


def read_text(path: str | Path) -> str:
    """The text of a file that the user named, without a byte order mark. Raises `UserError` as `read_records` does."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; give a data file")
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02X} at offset {error.start}; "
            "convert it (iconv -t UTF-8), or mend that byte"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return text.removeprefix("\ufeff")


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end); U+2028 and the like end no line. The last newline begins none."""
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        yield number, line.removesuffix("\r")


def line_of(text: str, offset: int) -> int:
    """The line, from 1, on which a character stands."""
    return text.count("\n", 0, offset) + 1


def parse_json(name: str, text: str) -> Any:
    """A whole JSON file. Raises `UserError` with the line where it breaks."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}:{error.lineno}: is no JSON ({error.msg}, column {error.colno}); mend it") from None
    except RecursionError:
        raise UserError(f"{name}: is nested too deeply; give an array of objects") from None


def _lines(name: str, text: str, text_key: str) -> Iterator[Record]:
    for number, line in numbered_lines(text):
        yield Record(f"{name}:{number}", {text_key: line})


def _jsonl(name: str, text: str, _: str) -> Iterator[Record]:
    for number, line in numbered_lines(text):
        if line.strip():
            where = f"{name}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: is no JSON ({error}); each line must be one object") from None
            yield _object(where, value)


def _json(name: str, text: str, _: str) -> Iterator[Record]:
    """The elements one by one, since the parser forgets on which line each stood."""
    decoder, at = json.JSONDecoder(), _SPACE.match(text, 0).end()
    if text[at : at + 1] != "[":
        parse_json(name, text)
        raise UserError(f"{name}:{line_of(text, at)}: is no array; put the objects in [ ], separated by commas")
    line, counted, at = 1, 0, _SPACE.match(text, at + 1).end()
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            place = getattr(error, "pos", at)
            reason = getattr(error, "msg", None) or str(error)
            raise UserError(f"{name}:{line_of(text, place)}: is no JSON ({reason}); mend it") from None
        yield _object(f"{name}:{line}", value)
        at = _SPACE.match(text, end).end()
        if text[at : at + 1] == ",":
            at = _SPACE.match(text, at + 1).end()
        elif text[at : at + 1] != "]":
            raise UserError(f"{name}:{line_of(text, at)}: is no JSON (a comma or ] is missing); mend it")


def _object(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {json.dumps(value)[:40]}, not an object; each example must be one in {{ }}")
    return Record(where, value)


def _csv(name: str, text: str, _: str) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a document may be longer than the module's limit
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # newline="" keeps line ends inside quotes
    header, line = None, 0
    try:
        for row in reader:
            where, line = f"{name}:{line + 1}", reader.line_num
            if header is None:
                header = _header(where, row)
            elif row:
                yield _row(where, header, row)
    except csv.Error as error:
        raise UserError(f"{name}:{line + 1}: is no CSV ({error}); close its quotes, or double those inside") from None


def _tsv(name: str, text: str, _: str) -> Iterator[Record]:
    header = None
    for number, line in numbered_lines(text):
        where, row = f"{name}:{number}", [_unquoted(field) for field in line.split("\t")]
        if header is None:
            header = _header(where, row)
        elif line:
            yield _row(where, header, row)


def _unquoted(field: str) -> str:
    inner = field[1:-1]
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else field


def _header(where: str, row: list[str]) -> list[str]:
    if len(set(row)) < len(row):
        raise UserError(f"{where}: names a column twice; the first line must name each column once")
    return row


def _row(where: str, header: list[str], row: list[str]) -> Record:
    if len(row) != len(header):
        raise UserError(
            f"{where}: has {len(row)} fields, but the first line names {len(header)} columns "
            f"({', '.join(header)}); put a field that holds the separator in quotes, or mend the line"
        )
    return Record(where, dict(zip(header, row, strict=True)))


_PARSERS = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _lines,
}
