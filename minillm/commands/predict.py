"""`minillm predict MODEL --input FILE`: one line of JSON for each input.

classify  label, scores     regress  label     tag  tags, entities     span-qa  answer     seq2seq  target
chat, preference  reply     lm  text
unread_tokens too, where the context is too short (tag and span-qa read a long text in parts: of a word, or a question,
that fills one); untagged, the places of words whose characters the tokenizer drops
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from minillm.commands.running import say
from minillm.commands.tasks import TaskName, opened_means, task_of
from minillm.config import UserError
from minillm.data.records import read_records
from minillm.inference.sampling import Sampling
from minillm.loading import open_model
from minillm.tasks.task import Task
from minillm.training.plan import choose_device

WRITES = ("seq2seq", "chat", "preference", "lm")
PART = 256
"""Inputs whose answers are printed together."""


@dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, or a folder in Hugging Face's format."""
    input: Path
    """.jsonl with the training keys (.csv, .tsv, .json too), or .txt with one input a line (empty lines are none); of
    tag also CoNLL."""
    task: TaskName | None = None
    """None: what the model was finetuned for."""
    max_new_tokens: int = 128
    """Where texts are written."""
    temperature: float = 0.0
    """Where texts are written; 0 is greedy."""
    beams: int = 1
    """Where texts are written; above 1: the likeliest text that a search with so many side by side finds."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, prog="minillm predict", description=__doc__, args=argv)
    device = choose_device(args.device)
    opened = open_model(args.model, device=device)
    task = task_of(opened, args.task, answers=True)
    options: dict[str, Any] = {}
    if task.name in WRITES:
        if args.beams < 1 or (args.beams > 1 and args.temperature > 0):
            raise UserError("--beams must be at least 1; above 1 nothing is drawn, so leave --temperature out")
        sampling = Sampling(temperature=args.temperature)
        options = {"max_new_tokens": args.max_new_tokens, "sampling": sampling, "seed": args.seed, "beams": args.beams}
    elif args.beams != 1:
        raise UserError(f"--beams is for tasks that write texts: {', '.join(WRITES)}; this model does {task.name}")
    examples, means = inputs(task, args.input), opened_means(opened)
    cut = untagged = 0
    for first in range(0, len(examples), PART):
        for answer in task.answers(opened.model, examples[first : first + PART], means, **options):
            print(json.dumps(answer, ensure_ascii=False), flush=True)
            cut += "unread_tokens" in answer
            untagged += len(answer.get("untagged", ()))
    if cut:
        say(f"note: {cut} of {len(examples)} inputs do not fit the context of {means.room} tokens: see unread_tokens")
    if untagged:
        say(f"note: {untagged} words have no token in this tokenizer and get the default tag: see untagged")
    return 0


def inputs(task: Task, path: Path) -> list[Any]:
    """The examples of a file, labels neither asked for nor read. Raises `UserError` with file and line."""
    if path.suffix.lower() != ".txt":
        return task.read(path, labelled=False)
    key = {"seq2seq": "source", "chat": "instruction", "preference": "instruction"}.get(task.name, "text")
    if task.name == "span-qa":
        raise UserError(f"{path}: a question needs its context; give .jsonl with both, or SQuAD's .json")
    records = [record for record in read_records(path, text_key=key) if record.fields[key].strip()]
    if not records:
        raise UserError(f"{path} is empty: give one input a line")
    return task.examples(records, labelled=False)
