"""What the commands around finetuned models share: their examples, their means, and how numbers are shown."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from minillm.commands.corpus import run_objective
from minillm.config import DamagedFile, ModelConfig, Settings, UserError, from_dict
from minillm.data.shards import is_prepared, open_shards
from minillm.data.stdlib_tasks import stdlib_records
from minillm.loading import Opened
from minillm.peft.config import MethodConfig
from minillm.tasks.catalogue import TASKS, known_task
from minillm.tasks.task import Means, Task
from minillm.training.keeping import OldText
from tokenizer.chat import encode_chat

WITHOUT_HEAD = ("lm", "chat", "seq2seq", "preference")
TaskName = Literal["lm", "chat", "classify", "tag", "span-qa", "seq2seq", "regress", "preference"]


def means_of(tokenizer: Any, config: ModelConfig, method: MethodConfig | None = None) -> Means:
    """What a task works with; virtual tokens in front leave it less of the context."""
    front = method.length if method is not None and method.method in ("prefix", "prompt") else 0
    plain_text = run_objective(Settings(model=config), tokenizer)
    return Means(tokenizer, config, encode_chat, plain_text, config.context - front)


def opened_means(opened: Opened) -> Means:
    method = opened.config.get("method")
    config = opened.transformer.config
    means = means_of(opened.tokenizer, config, None if method is None else from_dict(MethodConfig, method, "method."))
    return replace(means, start=opened.start, frame=opened.frame)


def old_text(opened: Opened, means: Means) -> OldText | None:
    """The text that the model was pretrained on, where its run folder holds it in shards."""
    folder = opened.folder.parent.parent / "data"
    if "settings" not in opened.config or not is_prepared(folder):
        return None
    shards = open_shards(folder, tokenizer_hash=opened.tokenizer.hash, vocab_size=means.config.vocab_size)
    return OldText(shards.train, shards.val, means.plain_text, means.room)


def is_default(data: str) -> bool:
    return data in ("stdlib", "stdlib-unbalanced")


def examples_of(task: Task, data: str, *, seed: int = 0) -> list[Any]:
    """The examples of a file, or of the standard library; `stdlib-unbalanced` has one rare class."""
    if is_default(data):
        return task.examples(stdlib_records(task.name, seed=seed, unbalanced=data != "stdlib"))
    return task.read(data)


def task_of(opened: Opened, name: str | None, *, answers: bool = False) -> Task:
    """The task of a finetuned model; or of any other model, one of those that need no head.

    Args:
        answers: it is not to be scored, but to answer: without a head an encoder has nothing that it could do.

    Raises `UserError` where the model was not trained for the task `name`, `DamagedFile` where its head is another's.
    """
    section = opened.config.get("task")
    known = section.get("name", "") if section else None
    if known is not None and name in (None, known):
        task = known_task(section)
        head = task.head(opened.transformer.config, None)
        stored = section["head"] or {}
        if head is not None and (head.outputs, bool(head.pool)) != (stored.get("outputs"), bool(stored.get("pool"))):
            raise DamagedFile(
                f"{opened.folder / 'config.json'} is damaged: its head is none of {name or known} with "
                f"{head.outputs} outputs; restore it"
            )
        return task
    shape = opened.transformer.config.shape
    if name is None:
        there = ", ".join(other for other in WITHOUT_HEAD if shape in TASKS[other]().shapes)
        if answers and shape == "encoder":
            raise UserError("this model was finetuned for no task; do so first: minillm finetune MODEL --task TASK")
        raise UserError(f"this model was finetuned for no task; name one with --task: {there}; or finetune it for one")
    if section is not None and section["head"] is not None:
        raise UserError(f"this model was finetuned for {known} and does nothing else; leave --task out")
    if name not in WITHOUT_HEAD:
        raise UserError(f"this model has no head for {name}; finetune it first: minillm finetune MODEL --task {name}")
    task = TASKS[name]()
    task.check(opened.transformer.config)
    return task


def data_hash(parts: Sequence[Sequence[Any]]) -> str:
    """SHA-256 of all examples, by which a resumed run knows that its data is the same."""
    digest = hashlib.sha256()
    for part in parts:
        for example in part:
            value = example.text if hasattr(example, "text") and not example.record.fields else None
            shown = value if value is not None else getattr(example.record, "fields", {})
            words = [getattr(example, "words", ()), getattr(example, "tags", ())] if not shown else []
            digest.update(json.dumps([shown, words], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def shown_metrics(metrics: dict[str, Any]) -> list[str]:
    """A line for each number, and the confusion matrix as a table."""
    lines = [f"  {name:<22}{value:.4f}" for name, value in metrics.items() if isinstance(value, float)]
    if "confusion" in metrics:
        names, table = metrics["labels"], metrics["confusion"]
        width = max(map(len, [*names, *(str(n) for row in table for n in row)])) + 2
        lines.append("  truth \\ predicted" + "".join(f"{name:>{width}}" for name in names))
        for name, row in zip(names, table, strict=True):
            lines.append(f"  {name:<17}" + "".join(f"{count:>{width}}" for count in row))
    return lines


def json_ready(value: Any) -> Any:
    """NaN and infinities as null, since JSON has none."""
    if isinstance(value, dict):
        return {name: json_ready(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def data_name(data: str) -> str:
    return Path(data).name.split(".")[0] or "data"
