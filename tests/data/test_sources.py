"""Sources: which files, in which order, with which text; and what is said about those that cannot be read."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm.config import UserError
from minillm.data import readers
from minillm.data.sources import Document, open_source


def texts(source: str | Path) -> list[str]:
    return [document.text for document in open_source(str(source)).documents()]


def test_standard_library_without_its_tests() -> None:
    source = open_source("stdlib")
    names = [name for name, _ in source.files]
    documents = {document.name: document.text for document in source.documents()}
    assert names == sorted(names) and "json/decoder.py" in names
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert documents["json/decoder.py"] == Path(json.decoder.__file__).read_bytes().decode()
    assert 10_000_000 < sum(len(text.encode()) for text in documents.values()) < 14_000_000
    assert source.skipped == []


def test_installed_adds_packages_to_the_standard_library() -> None:
    paths = [path.as_posix() for _, path in open_source("installed").files]
    assert any(path.endswith("/json/decoder.py") for path in paths)
    assert any(path.endswith("site-packages/numpy/__init__.py") for path in paths)
    assert len(paths) == len(set(paths))


def test_folder_reads_every_kind_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_bytes(b"# b\r\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_bytes("\ufeffa\rz\0".encode())
    (tmp_path / "c.jsonl").write_text('{"text": "c1"}\n\n{"text": "c2", "other": 1}\n')
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "d"}\n')
    (tmp_path / "e.PY").write_bytes("# coding: latin-1\né\r\n".encode("latin-1"))
    (tmp_path / "ignored.csv").write_text("x")
    (tmp_path / ".hidden.txt").write_text("x")
    source = open_source(str(tmp_path))
    found = [(document.name, document.text) for document in source.documents()]
    assert found == [
        ("a/z.txt", "\ufeffa\rz\0"), ("b.md", "# b\r\n"), ("c.jsonl:1", "c1"), ("c.jsonl:3", "c2"),
        ("d.jsonl.gz:1", "d"), ("e.PY", "# coding: latin-1\né\r\n"),
    ]  # fmt: skip
    assert [(document.name, document.text) for document in source.documents()] == found  # and again
    assert source.skipped == [] and not source.by_position


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", "zwei\n"], "id": [1, 2]}), tmp_path / "t.parquet")
    assert texts(tmp_path / "t.parquet") == ["one", "zwei\n"]
    parquet.write_table(pyarrow.table({"words": ["one"]}), tmp_path / "w.parquet")
    with pytest.raises(UserError, match=r'w.parquet has no column "text", only words'):
        texts(tmp_path / "w.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(UserError, match=r"broken.parquet is no readable parquet file"):
        texts(tmp_path / "broken.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install "minillm\[data\]"'):
        texts(tmp_path / "t.parquet")


def test_a_named_file_that_is_not_utf8_is_an_error_with_its_offset(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "PART", 8)  # so that the byte lies in a later part
    for name in ("t.txt", "t.py"):
        (tmp_path / name).write_bytes(b"# ok\nabcdefghij\nxy\xff\n")
        with pytest.raises(UserError, match=rf"{name} is not UTF-8: byte 0xFF at offset 18; convert"):
            texts(tmp_path / name)
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"t.jsonl:2 is not UTF-8: byte 0xFF at offset 24"):
        texts(tmp_path / "t.jsonl")


def test_half_a_character_at_the_end_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("é".encode()[:1])
    with pytest.raises(UserError, match="offset 0"):
        texts(tmp_path / "t.txt")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is no JSON"), ("[" * 100_000, "is no JSON"), ("[1]", 'no "text"'), ('{"text": 3}', 'no "text"'),
        ('{"txt": "a"}', 'no "text"'), ('{"text": "\\ud800"}', "lone surrogate"),
    ],
)  # fmt: skip
def test_bad_records(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(UserError, match=rf"t.jsonl:2 .*{reason}"):
        texts(tmp_path / "t.jsonl")
    source = open_source(str(tmp_path))  # in a folder the rest is read
    assert [document.text for document in source.documents()] == ["good"]
    assert len(source.skipped) == 1 and source.skipped[0][0] == "t.jsonl:2" and reason in source.skipped[0][1]


def test_a_folder_skips_what_it_cannot_read_and_lists_it(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside.txt", tmp_path / "folder"
    outside.write_text("secret")
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xff")
    (folder / "b.txt").write_text("b")
    (folder / "c.txt").symlink_to(outside)
    (folder / "d.txt").symlink_to(folder / "nothing.txt")
    (folder / "e.txt").symlink_to(folder / "b.txt")
    os.mkfifo(folder / "f.txt")
    (folder / "g.py").write_text("# coding: klingon\n")
    (folder / "h.jsonl.gz").write_bytes(gzip.compress(b'{"text": "h"}\n' * 500)[:-9])
    (folder / "up").symlink_to(tmp_path)
    source = open_source(str(folder))
    read = [document.text for document in source.documents()]
    assert [text for text in read if text != "h"] == ["b", "b"]
    assert [name for name, _ in source.skipped] == ["a.txt", "c.txt", "d.txt", "f.txt", "g.py", "h.jsonl.gz"]
    assert "leads out of the folder" in dict(source.skipped)["c.txt"]


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "missing.txt": "does not exist",
        "empty.txt": "is empty; give a file with text",
        "data.csv": r"minillm reads \.txt \.md \.py \.jsonl",
        "folder": r"holds no file that minillm reads \(\.txt",
    }.items():
        with pytest.raises(UserError, match=rf"{name}.* {message}|{name}: {message}"):
            open_source(str(tmp_path / name))


def test_long_texts_come_in_parts_that_end_with_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PART", 16)
    text = "one\ntwo three\nfour five six\n" + "é" * 30 + "\nend"
    (tmp_path / "t.txt").write_text(text)
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}) + "\n" + '{"text": "next"}\n')
    for name in ("t.txt", "t.jsonl"):
        documents = list(open_source(str(tmp_path / name)).documents())
        first = [d for d in documents if d.name == documents[0].name]
        assert "".join(d.text for d in first) == text and [d.part for d in first] == list(range(len(first)))
        assert first[0].text == "one\ntwo three\n" and all(len(d.text.encode()) <= 32 for d in first)
    assert documents[-1] == Document(f"{tmp_path}/t.jsonl:2", "next", 0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(), part=st.integers(4, 20))
def test_any_text_comes_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, part: int) -> None:
    monkeypatch.setattr(readers, "PART", part)
    (tmp_path / "t.txt").write_bytes(text.encode() or b"x")
    documents = list(open_source(str(tmp_path / "t.txt")).documents())
    assert "".join(document.text for document in documents) == (text or "x")
    assert [document.part for document in documents] == list(range(len(documents)))


def test_sources_import_neither_torch_nor_pyarrow() -> None:
    code = "import sys, minillm.data.shards; print({'torch', 'pyarrow', 'sentencepiece'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
