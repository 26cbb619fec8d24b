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
        # the quotient of times first: of equal ones it is 1, and no error bar comes out below 0 by rounding
        slow, fast = (middle * (row["ms_p50"] / row[name]) for name in ("ms_p80", "ms_p20"))
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


def draw_ladder(rows: Sequence[Row], path: Path) -> Path:
    """Validation bits per byte of every rung against tokens, seconds and FLOPs, a line of panels for each corpus.

    The mean over the seeds. Raises ValueError where matplotlib is missing.
    """
    ladder = [row for row in rows if row["kernel"] == "ladder"]
    corpora = list(dict.fromkeys(row["shape"]["corpus"] for row in ladder))
    figure = _figure(13, 4 * len(corpora))
    axes = figure.subplots(len(corpora), 3, squeeze=False, sharey="row")
    for line, corpus in zip(axes, corpora, strict=True):
        found = [row for row in ladder if row["shape"]["corpus"] == corpus]
        for rung in sorted({row["shape"]["rung"] for row in found}):
            seeds = [row for row in found if row["shape"]["rung"] == rung]
            for place, (unit, factor) in zip(line, _units(seeds[0]).items(), strict=True):
                x = [factor * point["seconds" if unit == "seconds" else "tokens"] for point in seeds[0]["curve"]]
                curves = [[point["bits_per_byte"] for point in row["curve"]] for row in seeds]
                mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
                colour = COLOURS[rung % len(COLOURS)]
                style = "-" if rung < len(COLOURS) else "--"
                label = ("+ " if rung else "") + seeds[0]["name"]
                place.plot(x[1:], mean[1:], style, color=colour, marker="o", markersize=3, label=label)
                place.set(xlabel=unit)
                place.grid(alpha=0.3)
        line[0].set(ylabel=f"bits per byte, {corpus}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    return path


def draw_widths(rows: Sequence[Row], path: Path) -> Path:
    """Validation bits per byte against the learning rate, a line for each width, without rates by width and with them.

    Raises ValueError where matplotlib is missing.
    """
    found = [row for row in rows if row["kernel"] == "width"]
    rates = sorted({row["shape"]["lr"] for row in found})
    figure = _figure(9, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    for place, transfer in zip(axes, (False, True), strict=True):
        for number, dim in enumerate(sorted({row["shape"]["dim"] for row in found})):
            line = {
                row["shape"]["lr"]: row["bits_per_byte"]
                for row in found
                if (row["shape"]["dim"], row["shape"]["transfer"]) == (dim, transfer)
            }
            best = min(line, key=lambda lr: line[lr])
            place.plot(sorted(line), [line[lr] for lr in sorted(line)], "-", color=COLOURS[number], label=f"{dim} wide")
            place.plot([best], [line[best]], "o", color=COLOURS[number])
        place.set(xscale="log", xlabel="learning rate", title="rates by width" if transfer else "one rate")
        place.set_xticks(rates, [f"{rate:g}" for rate in rates])
        place.minorticks_off()
        place.grid(alpha=0.3)
    axes[0].set(ylabel="bits per byte")
    axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    return path


def _figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the figures need matplotlib: pip install -e '.[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _units(row: Row) -> dict[str, float]:
    """What the x axes show, and by what tokens (or seconds) are multiplied for it."""
    return {"thousand tokens": 1e-3, "seconds": 1.0, "FLOP": row["flops_per_token"]}
