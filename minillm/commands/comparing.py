"""`minillm finetune … --method all`: every method on the same data, each in a process of its own, and one table.

OUT/methods.json holds the options and each method's result as soon as there is one; OUT/<method> is the method's own
run. `minillm finetune --resume OUT` goes on with a comparison that was stopped.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

from minillm.commands.finetuning import last_result
from minillm.commands.tasks import say
from minillm.config import DamagedFile, UserError
from minillm.peft.config import Method
from minillm.tasks.catalogue import TASKS
from minillm.training.run import clear_run, new_run, write_json
from minillm.training.signals import Signals, Stopped

FILE = "methods.json"
SCRATCH = "from-scratch"
"""The name of the same model trained without its pretraining."""
_FREEZE = ("--freeze-layers", "--train-only")
_HEADLESS = ("lm", "chat", "seq2seq", "preference")


def compare_methods(task: str, argv: list[str], out: str | None, data: str, signals: Signals) -> int:
    """Runs `minillm finetune` with each method into OUT/<method>; the table goes to stdout, its rows to methods.json.

    Raises `UserError` where OUT holds a comparison already, or no method could be run; one that does not fit the model
    is left out with a line.
    """
    overwrite = "--overwrite" in argv
    if out is not None and is_comparison(Path(out)):
        if not overwrite:
            raise UserError(
                f"{out} already holds a comparison; --resume {out} goes on with it, --overwrite replaces it"
            )
        for name in variants(task, argv):
            clear_run(Path(out) / name)
        (Path(out) / FILE).unlink()
        folder = Path(out)
    else:
        folder = new_run(out, f"{task}-all-{data}", overwrite=overwrite)
    write_json(folder / FILE, {"task": task, "argv": argv, "results": {}})
    return resume_comparison(folder, signals)


def is_comparison(folder: Path) -> bool:
    return (folder / FILE).is_file()


def resume_comparison(folder: Path, signals: Signals) -> int:
    """Runs what methods.json lacks a result of. A process told to stop tells the method's, and gives its exit code."""
    state = _read(folder)
    task, results = state["task"], state["results"]
    try:
        for name, argv in variants(task, state["argv"]).items():
            if name in results:
                continue
            say(f"--- {name}")
            code = finish(argv, folder / name)
            signals.poll()
            if code > 128:
                return _stopped(folder, code)
            if code != 0:
                say(f"{name} is left out: it ended with exit code {code}")
                continue
            results[name] = last_result(folder / name)
            write_json(folder / FILE, state)
    except Stopped as stopped:
        return _stopped(folder, stopped.code)
    if not results:
        raise UserError("no method could be run; the lines above say why")
    print("\n".join(table(results, TASKS[task].judged)))
    print("\nOn validation data, at each method's best step; peak memory is that of the method's own process.")
    return 0


def variants(task: str, argv: list[str]) -> dict[str, list[str]]:
    """The name of each run of a comparison -> its options, from those of `minillm finetune … --method all`."""
    common = [arg for arg in without(argv, "--method", "--out", *_FREEZE) if arg != "--overwrite"]
    found = {} if task == "preference" else {SCRATCH: [*common, "--method", "full", "--from-scratch"]}
    for method in get_args(Method):
        found[method] = [*common, "--method", method]
    given = [arg for arg in argv if arg not in without(argv, *_FREEZE)]
    headless = ["--freeze-layers", "1"] if task in _HEADLESS else ["--train-only", "head"]
    found["freeze"] += given or headless
    return found


def finish(argv: list[str], run: Path) -> int:
    """`minillm finetune ARGV --out RUN` in a process of its own, or what is left of it; its exit code.

    Raises `Stopped` where this process is told to, after the other one has saved.
    """
    if (run / "result.json").is_file():
        return 0
    options = ["--resume", str(run)] if (run / "config.json").is_file() else [*argv, "--out", str(run)]
    process = subprocess.Popen([sys.executable, "-m", "minillm.cli", "finetune", *options], stdout=subprocess.DEVNULL)
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


def table(results: dict[str, dict[str, Any]], judged: str) -> list[str]:
    """Markdown: quality, trained parameters, file size, peak memory, time of each run by its name."""
    names = [judged] + [name for name in ("loss", "accuracy") if name != judged]
    names = [name for name in names if any(isinstance(r["metrics"].get(name), float) for r in results.values())]
    head = ["method", *(name.replace("_", " ") for name in names), "trained", "file", "peak memory", "time"]
    rows = [head, ["---"] * len(head)]
    for method, r in results.items():
        scores = [f"{r['metrics'][name]:.4f}" if r["metrics"].get(name) is not None else "–" for name in names]
        trained = f"{r['trained_parameters']:,} ({r['trained_parameters'] / r['parameters']:.1%})"
        sizes = [f"{r['adapter_bytes'] / 2**10:,.0f} KiB", f"{r['peak_bytes'] / 2**20:,.0f} MiB"]
        rows.append([method.replace("-", " "), *scores, trained, *sizes, f"{r['seconds']:.0f} s"])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _stopped(folder: Path, code: int) -> int:
    say(f"stopped; go on with: minillm finetune --resume {folder}")
    return code


def _read(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / FILE).read_text(encoding="utf-8"))
        state["argv"], state["results"], TASKS[state["task"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{folder / FILE} is damaged: it is no comparison; delete it and start anew") from error
    return state
