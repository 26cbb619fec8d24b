"""Figures from what runs recorded; matplotlib is imported when one is drawn."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

AXES = {"steps": "step", "tokens": "tokens", "seconds": "seconds"}
WORDS = {
    "loss": "loss (nats per target)",
    "bits_per_byte": "bits per byte",
    "steps": "step",
    "tokens": "tokens",
    "seconds": "seconds of training",
}
FORMATS = (".png", ".svg", ".html")
COLOURS = ("#1f5fa8", "#c05a2e", "#2c7a4b", "#7b4fa3", "#9a7b12", "#b23a6f", "#3f8a99", "#6b655c")


def curves(metrics: Sequence[Mapping[str, Any]], split: str, x: str, y: str) -> tuple[list[float], list[float]]:
    """Where the lines of one split stand, and their values.

    Args:
        metrics: the lines of metrics.jsonl.
        split: train or val.
        x: steps, tokens or seconds.
        y: loss or bits_per_byte; lines without it are left out, NaN stays and leaves a gap.
    """
    points = [(line[AXES[x]], line[y]) for line in metrics if line.get("split") == split and line.get(y) is not None]
    return [point[0] for point in points], [point[1] for point in points]


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], out: Path, *, x: str = "steps", y: str = "loss") -> None:
    """Compares runs in one figure: validation as a line with marks, training thin and pale in the same colour.

    Args:
        runs: by name, the lines of metrics.jsonl.
        out: .png, .svg, or .html: a page that loads nothing.
        x: steps, tokens or seconds.
        y: loss or bits_per_byte.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a run has no value of `y`.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Fonts stay text in SVG, so that the page can be searched; the salt makes equal runs equal files.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "minillm", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for i, (name, metrics) in enumerate(runs.items()):
            _draw_run(axes, name, metrics, COLOURS[i % len(COLOURS)], x, y)
        axes.set(xlabel=WORDS[x], ylabel=WORDS[y])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4df", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        if out.suffix == ".html":
            _write_page(figure, out, list(runs))
        else:
            figure.savefig(out, dpi=160, metadata={"Date": None} if out.suffix == ".svg" else None)


def _draw_run(axes: Any, name: str, metrics: Sequence[Mapping[str, Any]], colour: str, x: str, y: str) -> None:
    train, val = curves(metrics, "train", x, y), curves(metrics, "val", x, y)
    if not (train[1] or val[1]):
        raise ValueError(f"{name} has recorded no {y}")
    # Matplotlib reads $ as the start of a formula, and leaves a name that begins with _ out of the legend.
    label = " " + name.replace("$", r"\$") + (f": {val[1][-1]:.4g}" if val[1] else "")
    axes.plot(*train, color=colour, linewidth=0.9, alpha=0.4, label=None if val[1] else label)
    if val[1]:
        axes.plot(*val, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=label)


def _write_page(figure: Any, out: Path, names: list[str]) -> None:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    title = html.escape("minillm: " + ", ".join(names))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    out.write_text(
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<style>body { margin: 2rem auto; max-width: 70rem; background: #fff } "
        "svg { width: 100%; height: auto }</style>\n"
        f"<body>\n{svg[svg.index('<svg') :]}</body>\n</html>\n",
        encoding="utf-8",
    )
