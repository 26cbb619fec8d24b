"""`minillm finetune … --method all`: every method on the same data, beside the model from scratch, and one table."""

from typing import Any, get_args

from minillm.commands.series import Series, State, without
from minillm.peft.config import Method
from minillm.tasks.catalogue import TASKS

SCRATCH = "from-scratch"
"""The name of the same model trained without its pretraining."""
_FREEZE = ("--freeze-layers", "--train-only")
_HEADLESS = ("lm", "chat", "seq2seq", "preference")


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


def _lines(state: State) -> list[str]:
    where = next(iter(state["results"].values())).get("scored_on", {}).get("words", "on validation data")
    note = f"Measured {where}, at each method's best step; peak memory is that of the method's own process."
    return [*table(state["results"], TASKS[state["task"]]().judged), "", note]


METHODS = Series(
    file="methods.json",
    what="a comparison of methods",
    runs=lambda state: variants(state["task"], state["argv"]),
    lines=_lines,
    needs_all=False,
)
