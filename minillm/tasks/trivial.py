"""Whether a finetuned model is worth its training: what it reached beside the trivial answer, in one sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

from minillm.tasks.catalogue import TASKS

LOWER = ("loss", "rmse")
"""Measures of which less is better."""


def against_trivial(task: str, events: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The measure of a task, of the model and of the trivial answer: {"metric", "value", "trivial", "what", "beaten"}.

    Where the task has no trivial answer it is the model as it was before its first step.

    Args:
        events: the lines of metrics.jsonl.
        metrics: of the finished model.
    """
    validations = [event for event in events if event.get("split") == "val"]
    known = next((event for event in events if event.get("event") == "baselines"), {})
    metric = TASKS[task].judged  # type: ignore[attr-defined]  # they are classes
    value = metrics.get(metric, validations[-1].get(metric))
    what, trivial = known.get("trivial"), known.get(metric)
    if trivial is None:
        what, trivial = "the model as it was", validations[0].get(metric)
    beaten = None not in (value, trivial) and (value < trivial if metric in LOWER else value > trivial)
    return {"metric": metric, "value": value, "trivial": trivial, "what": what, "beaten": beaten}


def sentence(found: Mapping[str, Any]) -> str:
    """What `against_trivial` found, for people."""
    name, what = found["metric"].replace("_", " "), found["what"]
    if None in (found["value"], found["trivial"]):
        return f"There is nothing to hold its {name} against."
    shown, trivial = f"{found['value']:.4f}", f"{found['trivial']:.4f}"
    if not found["beaten"]:
        return (
            f"It does NOT beat the trivial answer ({what}: {name} {trivial}) with {shown}: "
            "more examples, --epochs or another --optim.lr may help."
        )
    gap = abs(found["value"] - found["trivial"])
    return f"It beats the trivial answer ({what}: {name} {trivial}) by {gap:.4f}, with {shown}."
