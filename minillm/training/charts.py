"""Line charts as HTML: lines in an inline SVG that stretches, words beside it as HTML that does not.

The SVG has a square of 1000 × 1000 units that is pulled to whatever size the page gives it; strokes keep their width.
So a chart is as readable on a phone and on paper as on a wide screen, and needs no script to be drawn.
"""

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TypeGuard

MOST_POINTS = 600  # of one line; more than a screen has pixels for only make the page heavy


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float | None]]
    """x rising; a y that is None or not finite leaves a gap."""
    style: str = "first"
    """Class of the stroke: first or second."""
    dots: bool = False
    """Marks each point, and does not join two that stand alone: for lines of few."""


@dataclass(frozen=True)
class Level:
    """A labelled horizontal line to compare with; without `drawn` the label alone."""

    name: str
    value: float
    style: str = "level"
    drawn: bool = True


@dataclass(frozen=True)
class Scale:
    """y -> share of the height from the bottom."""

    low: float
    high: float
    log: bool

    def __call__(self, y: float) -> float:
        if self.log:
            return math.log(y / self.low) / math.log(self.high / self.low)
        return (y - self.low) / (self.high - self.low)


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_ticks: Sequence[tuple[float, Sequence[str]]],
    levels: Sequence[Level] = (),
    unit: str = "",
    from_zero: bool = False,
    tall: bool = False,
    readout: Sequence[Sequence[object]] = (),
) -> str:
    """One figure; "" where no line has a finite point.

    Args:
        x_ticks: position and lines of words of each mark below; the first and the last one bound the x axis.
        unit: follows the values in the read-out.
        from_zero: the y axis begins at 0, as for rates; else where the values do.
        readout: [x, words] shown for the place under the pointer, besides the values.
    """
    lines = [Line(line.name, thin(line.points), line.style, line.dots) for line in lines]
    values = [y for line in lines for _, y in line.points if finite(y)]
    if not values:
        return ""
    scale = fitting_scale([*values, *(level.value for level in levels)], from_zero)
    low, high = x_ticks[0][0], x_ticks[-1][0]
    across = (high - low) or 1.0

    def place(x: float) -> float:
        return (x - low) / across

    marks = [y for y in ticks(scale) if -1e-9 <= scale(y) <= 1 + 1e-9]
    grid = "".join(_rule(scale(y), "grid") for y in marks)
    rules = "".join(_rule(scale(level.value), level.style) for level in levels if level.drawn)
    paths = "".join(_path(line, place, scale) for line in lines)
    y_words = "".join(
        f'<span class="y" style="top:{_percent(1 - scale(y))}">{words}</span>'
        for y, words in zip(marks, _mark_words(marks, scale), strict=True)
    )
    middle = len(x_ticks) // 2
    x_words = "".join(_x_mark(place(x), words, i != middle) for i, (x, words) in enumerate(x_ticks))
    last = [(line, [y for _, y in line.points if finite(y)]) for line in lines]
    now = " · ".join(_value(line, ys[-1], len(lines) > 1, unit) for line, ys in last if ys)
    data = {
        "low": low,
        "across": across,
        "unit": unit,
        "lines": [[line.name if len(lines) > 1 else "", _plain(line.points)] for line in lines],
        "words": list(readout),
    }
    return (
        f'<figure class="chart{" tall" if tall else ""}{" labelled" if levels else ""}">'
        f'<figcaption><b>{html.escape(title)}</b> <span class="readout">{now}</span></figcaption>'
        f'<div class="plot" data-chart="{html.escape(json.dumps(data, ensure_ascii=False))}">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{html.escape(title)}">'
        f"{grid}{rules}{paths}</svg>{y_words}{x_words}{_labels(levels, scale, 0.052 if tall else 0.12)}"
        '<i class="cursor"></i></div></figure>'
    )


def finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def thin(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most about MOST_POINTS of them: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        gaps = [i for i, (_, y) in enumerate(part) if not finite(y)]
        known = sorted((y, i) for i, (_, y) in enumerate(part) if y is not None and finite(y))
        chosen = {i for _, i in (known[:1] + known[-1:])} | set(gaps[:1])
        kept += [part[i] for i in sorted(chosen)]
    if kept[-1][0] != points[-1][0]:
        kept.append(points[-1])
    return kept


def fitting_scale(values: Sequence[float], from_zero: bool) -> Scale:
    """Linear, or logarithmic where the values span more than an order of magnitude: a spike hides nothing then."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 12 and not from_zero:
        return Scale(low / 1.1, high * 1.1, log=True)
    if from_zero:
        low = min(low, 0.0)
    if high == low:
        room = abs(high) * 0.1 or 1.0
        return Scale(low if from_zero else low - room, high + room, log=False)
    room = (high - low) * 0.06
    return Scale(low if from_zero else low - room, high + room, log=False)


def ticks(scale: Scale, most: int = 6) -> list[float]:
    """Round numbers inside the scale: steps of 1, 2 or 5 times a power of ten; on a log scale these themselves."""
    if scale.log:
        first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
        for factors in ((1, 2, 5), (1, 3), (1,)):
            marks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
            marks = [y for y in marks if scale.low <= y <= scale.high]
            if len(marks) <= most:
                return marks
        return marks[:: math.ceil(len(marks) / most)]
    step = round_step((scale.high - scale.low) / most)
    count = math.floor(scale.high / step) - math.ceil(scale.low / step) + 1
    return [(math.ceil(scale.low / step) + i) * step for i in range(count)]


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((f * power for f in (1, 2, 5) if f * power >= least * (1 - 1e-9)), 10 * power)


def number(value: float) -> str:
    """A value as a person writes it: four digits that matter, thousands apart."""
    if value == 0:
        return "0"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    if not 1e-4 <= abs(value) < 1000:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def compact(count: float) -> str:
    """1,234 as it is, then 12.3 k, 4.1 M, 2.0 G."""
    if abs(count) < 10_000:
        return f"{count:,.0f}"
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.99995 * power:  # 999,999 is 1.0 M, not 1000.0 k
            return f"{count / power:.1f} {letter}"
    raise AssertionError


def duration(seconds: float) -> str:
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _rule(share: float, style: str) -> str:
    y = _units(1 - share)
    return f'<path class="{style}" d="M0 {y}H1000"/>'


def _path(line: Line, place: Callable[[float], float], scale: Scale) -> str:
    runs = [list(run) for known, run in groupby(line.points, key=lambda point: finite(point[1])) if known]
    at = [[f"{_units(place(x))} {_units(1 - scale(y))}" for x, y in run if finite(y)] for run in runs]
    # Between two lone values, a line would draw a way down that nobody has measured.
    strokes = "".join("M" + "L".join(run) for run in at if not line.dots or len(run) > 2)
    # A point between two gaps has no stroke to be seen by.
    dots = "".join(f"M{point}h0" for run in at for point in run if line.dots or len(run) == 1)
    return f'<path class="line {line.style}" d="{strokes}"/>' + (
        f'<path class="dots {line.style}" d="{dots}"/>' if dots else ""
    )


def _labels(levels: Sequence[Level], scale: Scale, gap: float) -> str:
    """The words on the right, moved apart where they would lie on each other."""
    ordered = sorted(levels, key=lambda level: scale(level.value))
    places = [scale(level.value) for level in ordered]
    for _ in range(50):
        crowded = [(i, i + 1) for i, (a, b) in enumerate(pairwise(places)) if b - a < gap - 1e-9]
        for below, above in crowded:
            push = (gap - (places[above] - places[below])) / 2
            places[below], places[above] = max(0.0, places[below] - push), places[above] + push
        if not crowded:
            break
    return "".join(
        f'<span class="label {level.style}" style="top:{_percent(1 - share)}">{html.escape(level.name)} '
        f"<b>{number(level.value) if level.value >= 1000 else f'{level.value:.2f}'}</b></span>"
        for level, share in zip(ordered, places, strict=True)
    )


def _mark_words(marks: Sequence[float], scale: Scale) -> list[str]:
    """All with as many decimals as their distance needs."""
    if scale.log or len(marks) < 2 or not 1e-4 <= (apart := marks[1] - marks[0]) < 1000:
        return [number(y) for y in marks]
    return [f"{y:,.{max(0, -math.floor(math.log10(apart) + 1e-9))}f}" for y in marks]


def _x_mark(share: float, words: Sequence[str], minor: bool) -> str:
    """`minor` marks between the ends give way on narrow screens."""
    place = "start" if share == 0 else "end" if share == 1 else "minor" if minor else ""
    shown = "".join(f"<small>{html.escape(word)}</small>" for word in words)
    return f'<span class="x {place}" style="left:{_percent(share)}">{shown}</span>'


def _value(line: Line, y: float, named: bool, unit: str) -> str:
    name = f"{html.escape(line.name)} " if named else ""
    return f"{name}<b>{number(y)}</b>{html.escape(unit)}"


def _plain(points: Sequence[tuple[float, float | None]]) -> list[list[object]]:
    return [[x, number(y)] for x, y in points if y is not None and finite(y)]


def _units(share: float) -> str:
    return f"{1000 * share:.1f}".removesuffix(".0")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
