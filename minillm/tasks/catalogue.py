"""The tasks by their names."""

from collections.abc import Callable, Mapping
from typing import Any

from minillm.config import DamagedFile, UserError
from minillm.tasks.task import Task
from minillm.tasks.texts import Classify, Regress
from minillm.tasks.words import SpanQA, Tag
from minillm.tasks.writing import LM, Chat, Preference, Seq2Seq

TASKS: dict[str, Callable[..., Task]] = {
    "lm": LM,
    "chat": Chat,
    "classify": Classify,
    "tag": Tag,
    "span-qa": SpanQA,
    "seq2seq": Seq2Seq,
    "regress": Regress,
    "preference": Preference,
}


def known_task(section: Mapping[str, Any]) -> Task:
    """The task as a finetuned model knows it, from config.json's `task`.

    Raises `UserError` for one that is unknown, `DamagedFile` where what it learned is not there.
    """
    name, info = section.get("name"), section.get("info")
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(f"config.json names the task {name!r}, which is unknown; there are {', '.join(TASKS)}")
    task = TASKS[name]()
    if not isinstance(info, dict):
        raise DamagedFile(f"config.json does not say what {name} learned; restore it")
    task.from_info(info)
    return task
