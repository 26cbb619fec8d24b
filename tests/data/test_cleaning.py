"""Cleaning: what goes, why, and what stays as it was."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from minillm.config import UserError
from minillm.data.cleaning import Rules, clean, control_share, minhash
from minillm.data.sources import open_source

WORDS = [f"word{i}" for i in range(500)]


def text(seed: int, words: int = 400) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def shingles(of: str) -> set[tuple[str, ...]]:
    words = of.split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def changed(of: str, count: int) -> str:
    """`of` with `count` of its words replaced, evenly spread: each changes 5 shingles."""
    words = of.split()
    for i in range(count):
        words[i * len(words) // count] = f"other{i}"
    return " ".join(words)


def test_reasons_and_counts(tmp_path: Path) -> None:
    original = text(1)
    documents = {
        "a": original + "\r\n", "b": " \n", "c": "short", "d": original + "\r\n", "e": changed(original, 3),
        "f": text(2), "g": "\x00\x01\x02" * 10 + text(3, 30), "h": "ab\ufffd" * 30, "i": changed(original, 40),
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    for name, content in documents.items():
        (tmp_path / "in" / f"{name}.txt").write_bytes(content.encode())
    (tmp_path / "in" / "z.txt").write_bytes(b"\xff")
    report = clean(open_source(str(tmp_path / "in")), tmp_path / "out")
    lines = (tmp_path / "out" / "part-00000.jsonl").read_text(encoding="utf-8").splitlines()
    kept = {line["name"][0]: line["text"] for line in map(json.loads, lines)}
    assert kept == {name: documents[name] for name in "afi"}
    counts = report.as_dict()
    assert {reason: n["documents"] for reason, n in counts["dropped"].items()} == {
        "empty": 1, "short": 1, "not text": 2, "duplicate": 1, "near duplicate": 1,
    }  # fmt: skip
    sizes = {name: len(content.encode()) for name, content in documents.items()}
    assert counts["before"] == {"documents": 9, "bytes": sum(sizes.values())}
    assert counts["after"] == {"documents": 3, "bytes": sum(sizes[name] for name in "afi")}
    assert counts["dropped"]["near duplicate"]["bytes"] == sizes["e"] and counts["unreadable"] == 1
    listed = {entry["name"]: entry for entry in json.loads((tmp_path / "out" / "report.json").read_text())["list"]}
    assert listed["e.txt"] == {"name": "e.txt", "reason": "near duplicate", "like": "a.txt"}
    assert listed["d.txt"]["like"] == "a.txt" and "not UTF-8" in listed["z.txt"]["reason"]
    again = clean(open_source(str(tmp_path / "out")), tmp_path / "again")
    assert again.documents == [3, 3]  # a clean corpus stays as it is


def test_the_output_goes_on_in_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.data.cleaning._FILE", 100)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text(seed)}) + "\n" for seed in (1, 2, 3)))
    clean(open_source(str(tmp_path / "t.jsonl")), tmp_path / "out")
    parts = [tmp_path / "out" / f"part-0000{number}.jsonl" for number in (0, 1, 2)]
    assert [json.loads(part.read_text())["text"] for part in parts] == [text(1), text(2), text(3)]


def test_nothing_that_can_be_read_is_nothing_cleaned(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "z.txt").write_bytes(b"\xff")
    report = clean(open_source(str(tmp_path / "in")), tmp_path / "out")
    assert report.documents == [0, 0] and report.unreadable == 1


def test_near_duplicates_can_stay(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": changed(text(1), n)}) + "\n" for n in (1, 2)))
    source = open_source(str(tmp_path / "t.jsonl"))
    assert clean(source, tmp_path / "a", Rules(similarity=None)).documents == [2, 2]
    assert clean(source, tmp_path / "b").documents == [2, 1]
    with pytest.raises(UserError, match="exists"):
        clean(source, tmp_path / "b")


def test_minima_agree_as_often_as_shingles_do() -> None:
    """Within four standard deviations of a mean over 40 pairs of 120 hash functions each."""
    for count in (2, 8, 30):
        exact, estimated = [], []
        for seed in range(40):
            one, other = text(seed), changed(text(seed), count)
            exact.append(len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other)))
            estimated.append(np.mean(minhash(one) == minhash(other)))
        j = float(np.mean(exact))
        assert abs(np.mean(estimated) - j) < 4 * (j * (1 - j) / (40 * 120)) ** 0.5
    assert np.mean(minhash(text(1)) == minhash(text(2))) < 0.05
    assert minhash("one two").tolist() != minhash("two one").tolist() and len(minhash("")) == 120


def test_control_characters() -> None:
    assert control_share("tab\tline\r\nfeed\f\f\vend") == 1 / 20
    assert control_share("a\x00\x7f\x9f\ufffdé") == 4 / 6 and control_share("") == 0


def test_impossible_rules() -> None:
    with pytest.raises(UserError, match=r"similarity must be from 0.5 to 1, not 0.2"):
        Rules(similarity=0.2)
    with pytest.raises(UserError, match="shortest must not be negative"):
        Rules(shortest=-1)
