"""What the tables share: the table itself, a figure with what it varies by, and the line below about its making."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.records import Row


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> str:
    """A table whose first column is text and whose others are figures, and `note` below it."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), "", note])


def missing(command: str, where: str = "") -> str:
    """What stands there instead of a table."""
    return f"*Not measured yet: `{command}`{' ' + where if where else ''}.*"


def versions(rows: Sequence[Row]) -> str:
    """With what the newest row was measured, and when."""
    found = ", ".join(f"{name} {version}" for name, version in rows[-1]["versions"].items())
    return f"{found}; {rows[-1]['date'][:10]}{', --quick' if rows[-1].get('quick') else ''}."


def spread(row: Row, unit: str, digits: int) -> str:
    """Median (20th to 80th percentile)."""
    middle, low, high = (f"{row[f'{unit}_{name}']:,.{digits}f}" for name in ("p50", "p20", "p80"))
    return f"{middle} ({low} to {high})"


def deviation(values: Sequence[float]) -> str:
    """Mean ± standard deviation, or the one value."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"
