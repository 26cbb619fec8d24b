"""Figures from kernels.json: the fraction of the roof against the size, one colour a provider, bars from p20 to p80."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import Row

SIZES = ("T", "S", "N", "F", "V", "M")  # the letter on the x axis: the first that varies within a figure
COLOURS = ("#d62728", "#7f7f7f", "#1f77b4", "#17becf", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def draw_all(rows: Sequence[Row], out: Path) -> list[Path]:
    """A PNG for each kernel, direction and mode under out/plots; returns the paths. Needs matplotlib (extra: plots).

    Raises ValueError where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the figures need matplotlib: pip install -e '.[plots]'") from error
    matplotlib.use("Agg")
    figures: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if "frac_roof" in row:
            figures.setdefault((row["kernel"], row["dir"], row["mode"]), []).append(row)
    return [_draw(key, found, out / "plots") for key, found in figures.items()]


def points(rows: Sequence[Row], letter: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """By provider: (size, fraction of the roof at the median, below it down to p80's time, above it up to p20's)."""
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in sorted(rows, key=lambda row: row["shape"][letter]):
        middle = row["frac_roof"]
        slow, fast = (middle * row["ms_p50"] / row[name] for name in ("ms_p80", "ms_p20"))
        series.setdefault(row["provider"], []).append((row["shape"][letter], middle, middle - slow, fast - middle))
    return series


def panels(rows: Sequence[Row]) -> tuple[str, dict[str, list[Row]]]:
    """The letter of the x axis, and the rows by everything else of their shape: a panel each."""
    letter = next((x for x in SIZES if len({row["shape"].get(x) for row in rows}) > 1), None)
    letter = letter or next(x for x in SIZES if x in rows[0]["shape"])
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        rest = {name: value for name, value in row["shape"].items() if name not in (letter, "B", "documents")}
        rest |= {"packed": len(row["shape"]["documents"])} if "documents" in row["shape"] else {}
        title = " ".join(f"{name}={json.dumps(value)}" for name, value in rest.items())
        grouped.setdefault(f"{row['dtype']} {title}", []).append(row)
    return letter, grouped


def _draw(key: tuple[str, str, str], rows: list[Row], out: Path) -> Path:
    from matplotlib import pyplot

    letter, grouped = panels(rows)
    columns = min(3, len(grouped))
    lines = math.ceil(len(grouped) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5 * columns, 3.4 * lines), squeeze=False, sharey=True)
    colours: dict[str, str] = {}
    for place, (title, found) in zip(axes.flat, grouped.items(), strict=False):
        for name, series in points(found, letter).items():
            colour = colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])
            x, y, below, above = zip(*series, strict=True)
            place.errorbar(x, y, yerr=(below, above), label=name, color=colour, marker="o", capsize=3)
        place.set(title=title, xlabel=letter, xscale="log")
        place.grid(alpha=0.3)
        place.legend(fontsize=7)
    for unused in list(axes.flat)[len(grouped) :]:
        unused.remove()
    axes[0][0].set(ylabel=f"fraction of the measured roof ({rows[0]['roof']['name']})", ylim=(0, None))
    kernel, direction, mode = key
    figure.suptitle(f"{kernel}, {direction}, {mode}: {rows[0]['device']}")
    figure.tight_layout()
    path = out / f"{kernel}-{direction}-{mode.replace(' ', '-')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path
