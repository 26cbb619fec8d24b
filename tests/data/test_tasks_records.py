"""Every file format gives its records with their lines, and what is wrong is one line that names the place."""

import gzip
import json
import time
from pathlib import Path

import pytest

from minillm.config import UserError
from minillm.data.records import Record, read_records

ROWS = [{"text": 'say "hi", twice', "label": "x"}, {"text": "tab and\u2028line", "label": "y"}]


def places(records: list[Record]) -> list[tuple[str, dict]]:
    return [(record.where.rsplit("/", 1)[-1], record.fields) for record in records]


@pytest.mark.parametrize(
    "name, content, lines",
    [
        ("a.jsonl", json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1], ensure_ascii=False) + "\n", (1, 3)),
        ("a.json", "\n[\n  " + json.dumps(ROWS[0]) + " ,\n\n " + json.dumps(ROWS[1]) + "]\n", (3, 5)),
        ("a.csv", 'text,label\n"say ""hi"", twice",x\ntab and\u2028line,y\n', (2, 3)),
        ("a.csv", 'label,text\r\nx,"say ""hi"", twice"\r\n\r\ny,tab and\u2028line\r\n', (2, 4)),
        ("a.tsv", 'text\tlabel\n"say ""hi"", twice"\tx\ntab and\u2028line\ty', (2, 3)),
        ("a.tsv", 'text\tlabel\r\nsay "hi", twice\tx\r\ntab and\u2028line\ty\r\n', (2, 3)),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_each_format_gives_the_same_records(tmp_path: Path, name: str, content: str, lines, mark: str) -> None:
    (tmp_path / name).write_bytes((mark + content).encode())
    expected = [(f"{name}:{line}", row) for line, row in zip(lines, ROWS, strict=True)]
    assert places(read_records(tmp_path / name)) == expected


def test_text_files_and_compressed_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n two\n")
    expected = [("a.txt:1", {"source": "one"}), ("a.txt:2", {"source": " two"})]
    assert places(read_records(tmp_path / "a.txt", text_key="source")) == expected
    (tmp_path / "a.JSONL.gz").write_bytes(gzip.compress(b'{"text": "z"}\n'))
    assert places(read_records(tmp_path / "a.JSONL.gz")) == [("a.JSONL.gz:1", {"text": "z"})]


def test_a_lone_quote_is_a_field_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"\t""\n')
    assert places(read_records(tmp_path / "a.tsv")) == [("a.tsv:2", {"text": '"', "label": ""})]


def test_many_records_take_time_in_proportion(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[\n" + ",\n".join(json.dumps({"text": "x" * 400}) for _ in range(8000)) + "]")
    began = time.process_time()
    lines = [int(record.where.rsplit(":", 1)[1]) for record in read_records(tmp_path / "a.json")]
    assert time.process_time() - began < 1  # 0.03; counting lines from the beginning for each took 4.6
    assert lines == list(range(2, 8002))


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    text = "word " * 40_000  # the csv module's own limit is 131,072 characters
    (tmp_path / "a.csv").write_text(f"text,label\n{text},x\n")
    assert read_records(tmp_path / "a.csv")[0].fields == {"text": text, "label": "x"}


def test_a_csv_field_may_hold_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,label\n"two\nlines",x\nz,y\n')
    found = places(read_records(tmp_path / "a.csv"))
    assert found == [("a.csv:2", {"text": "two\nlines", "label": "x"}), ("a.csv:4", {"text": "z", "label": "y"})]


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: is no JSON"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', r"a.jsonl:2: is \[\"x\"\], not an object"),
        ("a.jsonl", b"\n\n", "holds no record"),
        ("a.json", b'[\n{"text": "x"}\n{"text": "y"}]', "a.json:3: is no JSON .a comma or ] is missing"),
        ("a.json", b'[{"text": "x"},\n{"text": y}]', r"a.json:2: is no JSON \(Expecting value\); mend it"),
        ("a.json", b'[{"text": "x"},\n 7]', "a.json:2: is 7, not an object"),
        ("a.json", b'\n{"text": "x"}', "a.json:2: is no array"),
        ("a.json", b"[1, 2", "a.json:1: is 1, not an object"),
        ("a.json", b'[{"a": 1}', "a.json:1: is no JSON"),
        ("a.csv", b"text,label\nx,y\nx\n", "a.csv:3: has 1 fields, but the first line names 2 columns"),
        ("a.csv", b'text,label\nx,y\n"never closed,x\nz,y\n', "a.csv:3: is no CSV"),
        ("a.csv", b"text,text\nx,y\n", "a.csv:1: names a column twice"),
        ("a.csv", b"text,label\n", "holds no record"),
        ("a.tsv", b"text\tlabel\nx\ty\tz\n", "a.tsv:2: has 3 fields"),
        ("a.txt", b"", "holds no record"),
        ("a.txt", b"abc\xe9", "a.txt is not UTF-8: byte 0xE9 at offset 3"),
        ("a.yaml", b"x", "data files end in .jsonl"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem) as error:
        read_records(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_records(tmp_path / "folder.json")


def test_fields_are_checked_one_by_one() -> None:
    record = Record("f.jsonl:7", {"text": " ", "label": 3, "odd": "a\ud800"})
    assert record.text("text", may_be_empty=True) == " "
    with pytest.raises(UserError, match=r"f.jsonl:7: 'text' is empty; delete"):
        record.text("text")
    with pytest.raises(UserError, match=r"f.jsonl:7: 'label' is no string but 3"):
        record.text("label")
    with pytest.raises(UserError, match=r"f.jsonl:7: 'odd' holds a lone surrogate at character 1"):
        record.text("odd")
    with pytest.raises(UserError, match=r"f.jsonl:7: has no 'prompt' and no 'chosen', only 'text', 'label', 'odd'"):
        record.require(("prompt", "text", "chosen"), "preference")
