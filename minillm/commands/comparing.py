"""`minillm finetune … --method all`: every method on the same data, each in a process of its own, and one table."""

import subprocess
import sys
from typing import Any, get_args

from minillm.commands.finetuning import last_result
from minillm.commands.tasks import say
from minillm.config import UserError
from minillm.peft.config import Method
from minillm.tasks.catalogue import TASKS
from minillm.training.run import new_run, write_json
from minillm.training.signals import Signals

_FREEZE = ("--freeze-layers", "--train-only")


def compare_methods(task: str, argv: list[str], out: str | None, data: str, signals: Signals) -> int:
    """Runs `minillm finetune` with each method into OUT/<method>; the table goes to stdout and OUT/methods.json.

    Raises `UserError` where no method could be run; one that does not fit the model is left out with a line.
    """
    folder = new_run(out, f"{task}-all-{data}", overwrite=False)
    common = without(argv, "--method", "--out")
    headless = task in ("lm", "chat", "seq2seq", "preference")
    results: list[dict[str, Any]] = []
    for method in get_args(Method):
        own = without(common, *_FREEZE) if method != "freeze" else list(common)
        if method == "freeze" and not any(arg.startswith(_FREEZE) for arg in common):
            own += ["--freeze-layers", "1"] if headless else ["--train-only", "head"]
        say(f"--- {method}")
        command = [sys.executable, "-m", "minillm.cli", "finetune", *own, "--method", method]
        code = subprocess.run([*command, "--out", str(folder / method)], stdout=subprocess.DEVNULL).returncode
        signals.poll()
        if code != 0:
            say(f"{method} is left out: it ended with exit code {code}")
            continue
        results.append(last_result(folder / method))
    if not results:
        raise UserError("no method could be run; the lines above say why")
    write_json(folder / "methods.json", results)
    print("\n".join(table(results, TASKS[task]().watch)))
    return 0


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


def table(results: list[dict[str, Any]], watch: str | None) -> list[str]:
    """Markdown: quality, trained parameters, file size, peak memory, time."""
    first = [watch] if watch else []
    names = first + [name for name in ("loss", "accuracy") if name not in first]
    names = [name for name in names if any(isinstance(r["metrics"].get(name), float) for r in results)]
    head = ["method", *(name.replace("_", " ") for name in names), "trained", "file", "peak memory", "time"]
    rows = [head, ["---"] * len(head)]
    for r in results:
        scores = [f"{r['metrics'][name]:.4f}" if r["metrics"].get(name) is not None else "–" for name in names]
        trained = f"{r['trained_parameters']:,} ({r['trained_parameters'] / r['parameters']:.1%})"
        sizes = [f"{r['adapter_bytes'] / 2**10:,.0f} KiB", f"{r['peak_bytes'] / 2**20:,.0f} MiB"]
        rows.append([r["method"], *scores, trained, *sizes, f"{r['seconds']:.0f} s"])
    return ["| " + " | ".join(row) + " |" for row in rows]
