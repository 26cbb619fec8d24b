"""`minillm plot RUN…`: the loss curves of runs in one figure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from minillm import plots
from minillm.config import UserError
from minillm.training.run import read_metrics


@dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or metrics.jsonl files."""
    out: Path = Path("plot.png")
    """.png, .svg, or .html: one page that loads nothing."""
    x: Literal["steps", "tokens", "seconds"] = "steps"
    y: Literal["loss", "bits_per_byte"] | None = None
    """None: bits per byte where every run has them, else the loss."""


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, prog="minillm plot", description=__doc__, args=argv)
    if not args.runs:
        raise UserError("name at least one run folder: minillm plot RUN…")
    if args.out.suffix not in plots.FORMATS:
        raise UserError(f"--out {args.out} must end in one of {', '.join(plots.FORMATS)}")
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}; make it first")
    runs = dict(zip(_names(args.runs), map(_metrics, args.runs), strict=True))
    y = args.y or ("bits_per_byte" if all(_has_bits(metrics) for metrics in runs.values()) else "loss")
    try:
        plots.draw(runs, args.out, x=args.x, y=y)
    except ImportError as error:
        raise UserError(f'minillm plot needs matplotlib ({error}): pip install "minillm[plots]"') from error
    except ValueError as error:
        raise UserError(f"{error}; take another --y, or leave that run out") from error
    print(args.out)
    return 0


def _metrics(path: Path) -> list[dict[str, Any]]:
    folder = path.parent if path.name == "metrics.jsonl" else path
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{path} is no run: {folder / 'metrics.jsonl'} is missing")
    return read_metrics(folder)


def _names(paths: tuple[Path, ...]) -> list[str]:
    """The last part of each path, or all of it where two would be the same."""
    folders = [path.parent if path.name == "metrics.jsonl" else path for path in paths]
    if len(set(folders)) < len(folders):
        raise UserError("a run is named twice; name each once")
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _has_bits(metrics: list[dict[str, Any]]) -> bool:
    return any(line.get("split") == "val" and line.get("bits_per_byte") is not None for line in metrics)
