"""Charts: what is drawn where, and how numbers are written."""

import math
import re
from itertools import pairwise

import pytest

from minillm.training.charts import (
    MOST_POINTS,
    Level,
    Line,
    Scale,
    chart,
    compact,
    duration,
    fitting_scale,
    number,
    thin,
    ticks,
)


def test_a_long_line_keeps_its_spikes_and_gaps() -> None:
    points: list[tuple[float, float | None]] = [(x, math.sin(x / 50)) for x in range(20_001)]
    points[-3:] = [(19_998, -1.5), (19_999, 1.5), (20_000, 0.5)]
    points[7_777] = (7_777, 9.0)
    points[12_345] = (12_345, math.nan)
    kept = thin(points)
    assert len(kept) <= 1.1 * MOST_POINTS and kept[-1] == points[-1]
    assert (7_777, 9.0) in kept and any(x == 12_345 for x, _ in kept)
    assert set(x for x, _ in kept) <= set(x for x, _ in points)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_scales_hold_all_values_and_have_round_marks() -> None:
    assert fitting_scale([1.0, 2.0], False) == Scale(0.94, 2.06, log=False)
    assert fitting_scale([0.5, 2.0], True).low == 0
    assert fitting_scale([3.0], False) == Scale(3.0 - 0.3 * 1.0, 3.3, log=False)
    spiky = fitting_scale([0.1, 100.0], False)
    assert spiky.log and spiky(spiky.low) == 0 and spiky(10.0) - spiky(1.0) == pytest.approx(spiky(1.0) - spiky(0.1))
    assert ticks(Scale(1.5, 4.1, log=False)) == [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    assert ticks(Scale(0.09, 110.0, log=True)) == pytest.approx([0.1, 1, 10, 100])
    assert ticks(Scale(0.0, 2.1e-3, log=False)) == pytest.approx([0, 5e-4, 1e-3, 1.5e-3, 2e-3])


def test_a_chart_places_its_points_and_breaks_at_gaps() -> None:
    points = [(0, 1.0), (5, 2.0), (6, None), (7, 3.0), (8, math.nan), (10, 1.0), (20, 3.0)]
    drawn = chart("A & B", [Line("", points)], x_ticks=[(0, ["0"]), (20, ["20"])])
    (path,) = re.findall(r'class="line first" d="([^"]*)"', drawn)
    bottom, middle, top = (f"{1000 * (1 - y):.1f}" for y in (0.12 / 2.24, 0.5, 2.12 / 2.24))
    middle = middle.removesuffix(".0")
    assert path == f"M0 {bottom}L250 {middle}M350 {top}M500 {bottom}L1000 {top}"
    assert re.findall(r'class="dots first" d="([^"]*)"', drawn) == [f"M350 {top}h0"], "a point alone would be invisible"
    assert "A &amp; B" in drawn and "A & B" not in drawn
    assert chart("empty", [Line("", [(0, None)])], x_ticks=[(0, []), (1, [])]) == ""


@pytest.mark.parametrize(("values", "strokes"), [([3.0, 1.0], 0), ([3.0, 2.0, 1.0], 2)])
def test_two_values_alone_are_not_joined(values: list[float], strokes: int) -> None:
    drawn = chart("validation", [Line("", list(enumerate(values)), dots=True)], x_ticks=[(0, ["0"]), (2, ["2"])])
    (path,) = re.findall(r'class="line first" d="([^"]*)"', drawn)
    (dots,) = re.findall(r'class="dots first" d="([^"]*)"', drawn)
    assert path.count("L") == strokes and dots.count("h0") == len(values)


def test_labels_of_close_levels_do_not_lie_on_each_other() -> None:
    levels = [Level(name, value) for name, value in (("a", 1.0), ("b", 1.01), ("c", 1.02), ("d", 3.0))]
    drawn = chart("x", [Line("", [(0, 1.0), (1, 3.0)])], x_ticks=[(0, []), (1, [])], levels=levels, tall=True)
    tops = [float(top) for top in re.findall(r'class="label level" style="top:([\d.]+)%"', drawn)]
    assert len(tops) == 4
    assert all(below - above >= 5.1 for below, above in pairwise(tops)), "in order, one line apart"


@pytest.mark.parametrize(
    "value, words",
    [(0, "0"), (1.23456, "1.235"), (2e-4, "0.0002"), (1.5e-5, "1.5e-5"), (17503.4, "17,503"), (1e30, "1e30")],
)
def test_numbers_are_written_for_people(value: float, words: str) -> None:
    assert number(value) == words


def test_counts_and_times_are_written_for_people() -> None:
    assert [compact(n) for n in (950, 9_999, 12_345, 999_999, 4_100_000, 2.5e9, 3e12)] == [
        "950", "9,999", "12.3 k", "1.0 M", "4.1 M", "2.5 G", "3.0 T"]  # fmt: skip
    assert [duration(s) for s in (0.26, 42.4, 59.8, 303, 4_805)] == [
        "0.3 s",
        "42 s",
        "1 min 00 s",
        "5 min 03 s",
        "1 h 20 min",
    ]
