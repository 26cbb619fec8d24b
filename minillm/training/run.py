"""The run folder: where a run stands on disk, the same for every loop.

config.json      settings, plan, corpus, versions; written first
metrics.jsonl    one JSON object a line, unrounded
tokenizer/  data/  checkpoints/step-N/  report.html
.removed/        what is being removed of a run that another one replaces
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minillm.config import DamagedFile, UserError

PARTS = (
    *("config.json", "checkpoints", "metrics.jsonl", "report.html", "result.json", "profile.json", "trace.json.gz"),
    *("data", "tokenizer", "tensorboard", "adapter", "logs"),
)
"""What a run puts into its folder. The first one gone, it is no run any more; the second, no model either."""
_BEGUN = {".writable", "config.tmp"}
"""What is there of a run that is stopped before its first file is whole."""
_REMOVED = ".removed"
_PATIENCE = 5.0
"""Seconds in which the helpers of a process that was killed have ended too."""


def new_run(out: str | None, name: str, *, overwrite: bool) -> Path:
    """Makes the folder of a new run: `out`, or runs/<name> with -2, -3 … where that is taken.

    Raises `UserError` where `out` already holds a run (unless `overwrite`) or cannot be written.
    """
    try:
        if out is None:
            folder, number = Path("runs") / name, 2
            while folder.exists():
                folder, number = Path("runs") / f"{name}-{number}", number + 1
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(out)
            if folder.is_file():
                raise UserError(f"--out {folder} is a file; name a folder")
            folder.mkdir(parents=True, exist_ok=True)
            with held(folder):
                _make_room(folder, overwrite)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from error
    return folder


def _make_room(folder: Path, overwrite: bool) -> None:
    if _half_removed(folder):
        clear_run(folder)
    elif _holds_run(folder):
        if not overwrite and not (folder / "config.json").exists():
            raise UserError(f"{folder} holds a run without its config.json; put it back, or --overwrite replaces it")
        if not overwrite:
            raise UserError(f"{folder} already holds a run; --resume {folder} goes on with it, --overwrite replaces it")
        clear_run(folder)
    elif not {path.name for path in folder.iterdir()} <= _BEGUN:
        # --overwrite replaces a run, never somebody's other files
        raise UserError(f"{folder} is not empty and holds no run; name another folder, or an empty one")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While open, no other process trains in this folder; the system lets go of it when this one ends, or is killed.

    Raises `UserError` where another process holds it. File systems that know no such locks have none.
    """
    descriptor, began = os.open(folder, os.O_RDONLY), time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() - began > _PATIENCE:
                    raise UserError(
                        f"another process is training in {folder}; wait for its end, stop it, or name another folder"
                    ) from None
                time.sleep(0.1)
            except OSError:
                break
            else:
                break
        yield
    finally:
        os.close(descriptor)


def clear_run(folder: Path) -> None:
    """Removes what a run has put into its folder, and nothing else.

    All of it is moved aside first, config.json before the rest: what a kill leaves is no run, and `new_run` goes on
    with removing it.
    """
    aside = folder / _REMOVED
    for name in PARTS:
        if os.path.lexists(folder / name):
            aside.mkdir(exist_ok=True)
            if (aside / name).is_dir():  # moved there before, and removed in part
                shutil.rmtree(aside / name)
            (folder / name).rename(aside / name)
    shutil.rmtree(aside, ignore_errors=True)


def _half_removed(folder: Path) -> bool:
    return (folder / _REMOVED).is_dir() and not (folder / "config.json").exists()


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
    if _half_removed(run):
        raise UserError(f"{run} holds no run: its last one was being removed; begin one there with --out {run}")
    if run.parent.name == "checkpoints" and (run.name == "best" or (run / "MANIFEST.json").exists()):
        raise UserError(f"{run} is a checkpoint; give the folder of its run: {run.parent.parent}")
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
        of_the_step = event.get("split") == "train" or event.get("event") == "skipped"
        return event.get("step") != step or of_the_step or chores_done

    kept = [json.dumps(event, ensure_ascii=False) + "\n" for event in read_metrics(run) if stays(event)]
    temporary = run / "metrics.tmp"
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(run / "metrics.jsonl")
