"""What is kept of a benchmark that is made of minillm's commands, stopped or not."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import records, runs
from benchmarks.records import Row


def test_a_row_takes_the_place_of_its_own_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep/a.json"
    first = [{"way": "a", "seed": 1, "recipe": [1]}, {"way": "a", "seed": 2, "recipe": [2]}]
    assert runs.keep(path, iter(first), ["way", "seed"], quick=False) == 0
    assert runs.keep(path, iter([{"way": "a", "seed": 2, "recipe": [2, 0]}]), ["way", "seed"], quick=True) == 0
    capsys.readouterr()
    assert runs.keep(path, iter([{"way": "a", "seed": 1, "recipe": ["other"]}]), ["way", "seed"], quick=False) == 0
    kept = records.load(path)
    assert [(row["seed"], row["recipe"], row["quick"]) for row in kept] == [
        (2, [2], False), (2, [2, 0], True), (1, ["other"], False)
    ]  # fmt: skip
    assert capsys.readouterr().out.strip() == path.read_text().strip() and kept[0]["versions"]["torch"]
    assert runs.lacks(path, [1]) and not runs.lacks(path, ["other"])


def test_told_to_stop_it_keeps_what_it_has_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rows() -> Iterator[Row]:
        yield {"way": "a", "recipe": []}
        os.kill(os.getpid(), signal.SIGTERM)
        yield {"way": "b", "recipe": []}

    before = signal.getsignal(signal.SIGTERM)
    assert runs.keep(tmp_path / "a.json", rows(), ["way"], quick=False) == 143
    assert [row["way"] for row in records.load(tmp_path / "a.json")] == ["a"] and capsys.readouterr().out == ""
    assert signal.getsignal(signal.SIGTERM) is before
