"""`minillm evaluate MODEL --data FILE`: a model's loss and its task's metrics on labelled examples."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from minillm.commands.running import say
from minillm.commands.start import known_start
from minillm.commands.tasks import TaskName, examples_of, json_ready, opened_means, shown_metrics, task_of
from minillm.config import UserError
from minillm.loading import Opened, open_model
from minillm.tasks.task import Task, batches, evaluating
from minillm.tasks.writing import Seq2Seq
from minillm.training.plan import choose_device


@dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, or a folder in Hugging Face's format."""
    data: str
    """File of examples with labels; stdlib: those cut from the standard library's source."""
    task: TaskName | None = None
    """None: what the model was finetuned for."""
    beams: int = 1
    """seq2seq: above 1, texts are written by a beam search with so many side by side; else greedily."""
    json: bool = False
    """One JSON object: task, examples, loss, and the task's metrics."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, prog="minillm evaluate", description=__doc__, args=argv)
    device = choose_device(args.device)
    opened = open_model(args.model, device=device)
    task = task_of(opened, args.task)
    if args.beams != 1:
        if not isinstance(task, Seq2Seq) or args.beams < 1:
            raise UserError("--beams is for --task seq2seq, and at least 1")
        task.beams = args.beams
    examples = examples_of(task, args.data)
    result: dict[str, Any] = {"task": task.name, "examples": len(examples)}
    result |= scores(opened, task, examples, device)
    if args.json:
        print(json.dumps(json_ready(result), ensure_ascii=False))
    else:
        print(f"{task.name}, {len(examples):,} examples of {args.data}")
        print("\n".join(shown_metrics(result)))
    return 0


def scores(opened: Opened, task: Task, examples: list[Any], device: torch.device) -> dict[str, Any]:
    """loss, and all of the task's metrics."""
    means = opened_means(opened)
    start = start_of(opened, device) if task.needs_start else None
    data = task.data(examples, means)
    if data.truncated or data.dropped:
        say(f"note: {data.truncated} examples are cut by the context of {means.room} tokens, {data.dropped} left out")
    total, counted, score = 0.0, 0, task.score(start)
    with evaluating(opened.model):
        for batch in batches(data):
            total += score(opened.model, batch.to(device)).double().item()
            counted += task.count(batch)
    return {"loss": total / max(1, counted)} | task.final_metrics(opened.model, data, means, start)


def start_of(opened: Opened, device: torch.device) -> torch.nn.Module:
    """The model that a finetuning began with; of any other model itself. Raises `UserError` where it has changed."""
    base = opened.config.get("base")
    if base is None:
        return opened.model
    return open_model(known_start(base, opened.folder), device=device).transformer
