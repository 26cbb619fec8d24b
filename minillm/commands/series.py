"""Several finetunings as one command: `--method all` and `--folds K`.

Each is a process of its own, with a run of its own in OUT/<name>. OUT/<file> holds the options, and each run's result
as soon as there is one, so that `minillm finetune --resume OUT` does what is missing.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.commands.finetuning import last_result
from minillm.commands.running import say
from minillm.config import DamagedFile, UserError
from minillm.tasks.catalogue import TASKS
from minillm.training.run import clear_run, new_run, write_json
from minillm.training.signals import Signals, Stopped

State = dict[str, Any]
"""What OUT/<file> holds: task, argv (the options of the whole command), results by name, and what a series adds."""


@dataclass(frozen=True)
class Series:
    file: str
    what: str
    """In a sentence: "a comparison"."""
    runs: Callable[[State], dict[str, list[str]]]
    """Name of each run -> its options."""
    lines: Callable[[State], list[str]]
    """What stdout shows in the end; may add to the state."""
    needs_all: bool
    """Whether one run that ends with an error ends the series."""

    def is_in(self, folder: Path) -> bool:
        return (folder / self.file).is_file()


def begin(series: Series, state: State, out: str | None, default: str, signals: Signals) -> int:
    """A new series in `out`, or in runs/<default>. Raises `UserError` where `out` holds one and argv no --overwrite."""
    overwrite = "--overwrite" in state["argv"]
    if out is not None and series.is_in(Path(out)):
        if not overwrite:
            raise UserError(
                f"{out} already holds {series.what}; --resume {out} goes on with it, --overwrite replaces it"
            )
        folder = Path(out)
        state = state | {"replaced": [*series.runs(_read(series, folder))]}
    else:
        folder = new_run(out, default, overwrite=overwrite)
    write_json(folder / series.file, state | {"where": str(Path.cwd()), "results": {}})
    return go_on(series, folder, signals)


def go_on(series: Series, folder: Path, signals: Signals) -> int:
    """Does the runs that have no result yet. Told to stop, this process tells the run's, and gives its exit code."""
    state = _read(series, folder)
    for name in state.get("replaced", ()):  # the series that was there before this one
        clear_run(folder / name)
    if state.pop("replaced", None):
        write_json(folder / series.file, state)
    try:
        for name, argv in series.runs(state).items():
            if name in state["results"]:
                continue
            say(f"--- {name}")
            code = finish(argv, folder / name, state.get("where"))
            signals.poll()
            if code and series.needs_all and not state["results"] and not (folder / name).exists():
                (folder / series.file).unlink()  # the run said what is wrong before it began, and so would all
                with contextlib.suppress(OSError):  # it may be where we stand
                    folder.rmdir()
                return code
            if code > 128 or (code and series.needs_all):
                return _ended(folder, code)
            if code != 0:
                say(f"{name} is left out: it ended with exit code {code}")
                continue
            state["results"][name] = last_result(folder / name)
            write_json(folder / series.file, state)
    except Stopped as stopped:
        return _ended(folder, stopped.code)
    if not state["results"]:
        raise UserError("no run could be made; the lines above say why")
    print("\n".join(series.lines(state)))
    write_json(folder / series.file, state)
    return 0


def finish(argv: list[str], run: Path, where: str | None = None) -> int:
    """`minillm finetune ARGV --out RUN` in a process of its own, or what is left of it; its exit code.

    ARGV's paths begin in the folder `where`. None: in the current one.

    Raises `Stopped` where this process is told to, after the other one has saved.
    """
    if (run / "result.json").is_file():
        return 0
    run = run.absolute()
    options = ["--resume", str(run)] if (run / "config.json").is_file() else [*argv, "--out", str(run)]
    command = [sys.executable, "-m", "minillm.cli", "finetune", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=where)
    try:
        return process.wait()
    except Stopped:
        process.terminate()  # never SIGINT: a terminal has sent one already, and the second quits without saving
        process.wait()
        raise


def without(argv: list[str], *names: str) -> list[str]:
    """The arguments without these options and their values."""
    kept, skip = [], False
    for arg in argv:
        if skip:
            skip = False
        elif arg in names:
            skip = True
        elif not arg.startswith(tuple(f"{name}=" for name in names)):
            kept.append(arg)
    return kept


def _ended(folder: Path, code: int) -> int:
    say(f"ended early; go on with: minillm finetune --resume {folder}")
    return code


def _read(series: Series, folder: Path) -> State:
    try:
        state = json.loads((folder / series.file).read_text(encoding="utf-8"))
        state["argv"], state["results"], TASKS[state["task"]]
        series.runs(state)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(
            f"{folder / series.file} is damaged: it is not {series.what}; delete it and start anew"
        ) from error
    return state
