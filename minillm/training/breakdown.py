"""Where the time of a step goes: a table of parts, as text and as a section of the report.

The parts add up to the step. A part's roof is the time that it would take if its matrix products ran at the rate of a
large one and its tensors moved as fast as a copy, both as measured on this machine in the same minute.
"""

import html
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from minillm.training.run import write_json

FILE, TRACE = "profile.json", "trace.json.gz"


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    milliseconds: float
    flops: float = 0.0
    """Of the matrix products that this part cannot do without."""
    bytes: float = 0.0
    """That it cannot but read or write; 0 where nobody has counted."""

    def of_roof(self, matrix_rate: float, copy_rate: float) -> float | None:
        """Least time over time taken; None where nothing was counted."""
        least = self.flops / matrix_rate + self.bytes / copy_rate
        return 1e3 * least / self.milliseconds if least and self.milliseconds else None


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    parts: tuple[Part, ...]
    milliseconds: float
    """Of a step while it was recorded: what the parts add up to."""
    unrecorded: float
    """Milliseconds of a step just before, without the recorder."""
    steps: int
    tokens: int
    """Of one step."""
    flops: float
    """Of one step, by the formula of MFU."""
    device: str
    dtype: str
    matrix_rate: float
    """FLOP a second."""
    copy_rate: float
    """Bytes a second."""
    slowest: tuple[tuple[str, float], ...] = ()
    """The operators that took longest, with their own milliseconds in a step."""

    @property
    def mfu(self) -> float:
        """Share of the measured matrix rate that the model's own arithmetic makes use of."""
        return self.flops / (self.unrecorded / 1e3) / self.matrix_rate

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(part, milliseconds, share of the step, work, share of its roof) in words."""
        return [
            (
                part.name,
                f"{part.milliseconds:,.2f}",
                f"{100 * part.milliseconds / self.milliseconds:.1f} %",
                _work(part),
                "" if (share := part.of_roof(self.matrix_rate, self.copy_rate)) is None else f"{100 * share:.0f} %",
            )
            for part in self.parts
        ]

    def heading(self) -> str:
        slower = self.milliseconds / self.unrecorded - 1
        return (
            f"A step of {self.tokens:,} tokens takes {self.unrecorded:,.1f} ms, "
            f"{1e3 * self.tokens / self.unrecorded:,.0f} tokens/s; MFU {100 * self.mfu:.1f} %. "
            f"Parts of {self.milliseconds:,.1f} ms, with the recorder running ({100 * slower:+.0f} %), mean of "
            f"{self.steps} steps. Roofs of this machine, measured now: {self.matrix_rate / 1e9:,.0f} GFLOP/s "
            f"({self.dtype} products), {self.copy_rate / 1e9:,.1f} GB/s (copies)."
        )


def write(run: Path, found: Breakdown) -> None:
    write_json(run / FILE, asdict(found))


def read(run: Path) -> Breakdown | None:
    """What a run's profile.json holds; None where it has none, or one that cannot be read."""
    try:
        values = json.loads((run / FILE).read_text(encoding="utf-8"))
        values["parts"] = tuple(Part(**part) for part in values["parts"])
        values["slowest"] = tuple((str(name), float(time)) for name, time in values["slowest"])
        return Breakdown(**values)
    except (OSError, ValueError, KeyError, TypeError):
        return None


HEADER = ("part", "ms", "of the step", "at least", "of its roof")
NOTE = (
    "Of its roof: the time that the least work takes at these rates, over the time taken; empty where no least is "
    "known. Data and idle are waiting, whose least is nothing."
)


def text(found: Breakdown, trace: Path) -> str:
    """One screen."""
    table = [HEADER, *found.rows()]
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    lines = [
        "  " + row[0].ljust(widths[0]) + "".join("  " + row[i].rjust(widths[i]) for i in range(1, 5)) for row in table
    ]
    slowest = ", ".join(f"{name} {time:,.1f} ms" for name, time in found.slowest)
    return "\n".join(
        ["profile", f"  {found.heading()}", *lines, f"  {NOTE}", f"  slowest operators: {slowest}",
         f"  {trace} (open it at https://ui.perfetto.dev or chrome://tracing)"]
    )  # fmt: skip


def section(run: Path) -> str:
    """The report's section; empty where the run was not profiled."""
    found = read(run)
    if found is None:
        return ""
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in found.rows())
    head = "".join(f"<th>{name}" for name in HEADER)
    return (
        f"<h2>Where a step goes</h2><p>{html.escape(found.heading())}</p><table><tr>{head}{rows}</table>"
        f"<p>{NOTE} The trace stands beside this page: <code>{TRACE}</code>.</p>"
    )


def _work(part: Part) -> str:
    work = [f"{part.flops / 1e9:,.1f} GFLOP"] if part.flops else []
    return ", ".join(work + ([f"{part.bytes / 1e6:,.0f} MB"] if part.bytes else []))
