"""The run folder: where a run stands on disk, the same for every loop.

config.json      settings, plan, corpus, versions; written first
metrics.jsonl    one JSON object a line, unrounded
tokenizer/  data/  checkpoints/step-N/  report.html
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from minillm.config import DamagedFile, UserError

_BEGUN = {".writable", "config.tmp"}
"""What is there of a run that is stopped before its first file is whole."""


def new_run(out: str | None, name: str, *, overwrite: bool) -> Path:
    """Makes the folder of a new run: `out`, or runs/<name> with -2, -3 … where that is taken.

    Raises `UserError` where `out` already holds a run (unless `overwrite`) or cannot be written.
    """
    if out is None:
        folder, number = Path("runs") / name, 2
        while folder.exists():
            folder, number = Path("runs") / f"{name}-{number}", number + 1
    else:
        folder = Path(out)
        if folder.is_file():
            raise UserError(f"--out {folder} is a file; name a folder")
        if _holds_run(folder):
            if not overwrite:
                raise UserError(
                    f"{folder} already holds a run; --resume {folder} goes on with it, --overwrite replaces it"
                )
            clear_run(folder)
        elif folder.exists() and not {path.name for path in folder.iterdir()} <= _BEGUN:
            # --overwrite replaces a run, never somebody's other files
            raise UserError(f"{folder} is not empty and holds no run; name another folder, or an empty one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from error
    return folder


def clear_run(folder: Path) -> None:
    """Removes what a run has put into its folder, and nothing else."""
    for name in ("checkpoints", "data", "tokenizer", "tensorboard", "adapter", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("config.json", "metrics.jsonl", "report.html", "result.json", "profile.json", "trace.json.gz"):
        (folder / name).unlink(missing_ok=True)


def _holds_run(folder: Path) -> bool:
    try:
        read_config(folder)
    except UserError:
        return (folder / "metrics.jsonl").exists()
    return True


def write_json(path: Path, value: Any) -> None:
    """All of the new content or all of the old one, whatever happens in between."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_config(run: Path) -> dict[str, Any]:
    """config.json. Raises `UserError` where there is none, `DamagedFile` where it cannot be read."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{run} holds no run: {path} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["settings"], dict):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: it is not a run's configuration") from error
    return config


class Metrics:
    """metrics.jsonl, open for appending; each line is on its way to the disk before the next step begins."""

    def __init__(self, run: Path):
        self.path = run / "metrics.jsonl"
        before = self.path.read_bytes() if self.path.exists() else b""
        self.file = self.path.open("a", encoding="utf-8")
        if before and not before.endswith(b"\n"):  # what a kill left half of must not swallow the next line
            self.file.write("\n")

    def write(self, **event: Any) -> None:
        self.file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line cut off by a kill is left out."""
    path = run / "metrics.jsonl"
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def cut_metrics(run: Path, step: int, *, chores_done: bool) -> None:
    """Takes metrics.jsonl back to what was known at `step`, so that a resumed run writes each line once.

    Args:
        chores_done: whether validation and samples of `step` itself were finished when it was saved.
    """

    def stays(event: dict[str, Any]) -> bool:
        if event.get("event") == "baselines":
            return True
        if event.get("event") == "end" or event.get("step", 0) > step:
            return False
        return event.get("step") != step or event.get("split") == "train" or chores_done

    kept = [json.dumps(event, ensure_ascii=False) + "\n" for event in read_metrics(run) if stays(event)]
    temporary = run / "metrics.tmp"
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(run / "metrics.jsonl")
