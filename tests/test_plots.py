"""`minillm plot`: what is drawn, in which file, and what is refused. The drawing itself needs matplotlib."""

import json
import math
import sys
from pathlib import Path

import pytest

from minillm import plots
from minillm.commands import plot as command
from minillm.config import UserError


def write_run(folder: Path, bits: float | None = 2.0, values: tuple[float, ...] = (8.0, 6.0, 5.0)) -> Path:
    folder.mkdir(parents=True)
    lines: list[dict] = [{"event": "baselines", "uniform": 4.0}]
    for i, loss in enumerate(values):
        for split in ("train", "val"):
            lines.append(
                {"step": 10 * i, "tokens": 640 * i, "seconds": i / 2, "split": split, "loss": loss + (split == "train"),
                 "bits_per_byte": bits and loss / bits}
            )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_curves_take_one_split_in_the_units_asked_for(tmp_path: Path) -> None:
    metrics = command.read_metrics(write_run(tmp_path / "a", values=(8.0, math.nan, 5.0)))
    xs, ys = plots.curves(metrics, "val", "tokens", "loss")
    assert xs == [0, 640, 1280] and ys[::2] == [8.0, 5.0] and math.isnan(ys[1])
    assert plots.curves(metrics, "train", "steps", "loss")[1][::2] == [9.0, 6.0]
    assert plots.curves(metrics, "train", "seconds", "bits_per_byte")[0] == [0, 0.5, 1.0]
    masked = command.read_metrics(write_run(tmp_path / "b", bits=None))
    assert plots.curves(masked, "val", "steps", "bits_per_byte") == ([], [])


def test_runs_are_compared_in_one_page_that_loads_nothing(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / name) for name in ("_cheap $x$", "a<b>")]
    out = tmp_path / "figure.html"
    assert command.main([*map(str, runs), "--out", str(out), "--x", "tokens"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = out.read_text(encoding="utf-8")
    for words in ("_cheap $x$: 2.5</text>", "a&lt;b&gt;: 2.5", "bits per byte", "tokens"):
        assert words in page, words
    assert "a<b>" not in page and "<script" not in page and "default-src 'none'" in page
    assert page.count("<!DOCTYPE") == 0, "the SVG's own heading would pull in a DTD"
    assert command.main([*map(str, runs), "--out", str(tmp_path / "again.html"), "--x", "tokens"]) == 0
    assert (tmp_path / "again.html").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_ending_of_the_name_decides_the_format(tmp_path: Path, suffix: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    run, out = write_run(tmp_path / "run"), tmp_path / f"figure{suffix}"
    assert command.main([str(run / "metrics.jsonl"), "--out", str(out), "--y", "loss"]) == 0
    assert out.read_bytes().startswith(start) and out.stat().st_size > 5_000


def test_the_unit_is_what_all_runs_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], str]] = []
    monkeypatch.setattr(plots, "draw", lambda runs, out, x, y: asked.append((list(runs), y)))
    both, masked = write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run", bits=None)
    command.main([str(both)])
    command.main([str(both), str(masked)])
    command.main([str(masked), "--y", "bits_per_byte"])
    assert asked == [(["run"], "bits_per_byte"), ([str(both), str(masked)], "loss"), (["run"], "bits_per_byte")]


def test_bad_input_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, empty = write_run(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    masked = write_run(tmp_path / "masked", bits=None)
    cases = [
        ([], "name at least one run folder"),
        ([str(empty)], "empty is no run: .*metrics.jsonl is missing"),
        ([str(run), str(run)], "a run is named twice"),
        ([str(run), "--out", "figure.pdf"], "figure.pdf must end in one of .png, .svg, .html"),
        ([str(run), "--out", str(tmp_path / "no" / "f.png")], "there is no folder .*no; make it first"),
    ]
    for argv, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            command.main(argv)
        assert "\n" not in str(raised.value)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r'pip install "minillm\[plots\]"'):
        patch.setitem(sys.modules, "matplotlib", None)
        command.main([str(run), "--out", str(tmp_path / "f.png")])
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="masked has recorded no bits_per_byte; take another --y"):
        command.main([str(run), str(masked), "--y", "bits_per_byte", "--out", str(tmp_path / "f.png")])
    assert not (tmp_path / "f.png").exists()
