"""A task's examples out of whatever --data names: a file, or `stdlib` for the default data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillm.config import UserError
from minillm.data.chat import read_chat
from minillm.data.labels import read_classify, read_regress
from minillm.data.preference import read_preferences
from minillm.data.records import read_records
from minillm.data.seq2seq import read_pairs
from minillm.data.spans import read_spans, span_examples
from minillm.data.stdlib_tasks import stdlib_records
from minillm.data.tags import read_tags, tag_examples

# How the records of a task are read, and the key under which a line of a .txt stands.
_FROM_RECORDS = {
    "classify": (read_classify, "text"),
    "regress": (read_regress, "text"),
    "seq2seq": (read_pairs, "source"),
    "chat": (read_chat, "instruction"),
    "tag": (tag_examples, "text"),
    "span-qa": (span_examples, "question"),
}
_FROM_FILES = {"tag": read_tags, "span-qa": read_spans}  # those with a format of their own


def read_examples(task: str, data: str | Path, *, labelled: bool = True, seed: int = 0) -> Sequence[Any]:
    """The examples of `task`: TextExample, TagExample, SpanExample, PairExample, ChatExample or PreferenceExample.

    Args:
        data: a file, or `stdlib`.
        labelled: whether what should be predicted must be there; without, it is not read.
        seed: which default data; a file's examples keep their order.

    Raises:
        UserError: a task that has no examples of this kind (lm), or what is wrong with the data, with its line.
    """
    if task != "preference" and task not in _FROM_RECORDS:
        raise UserError(f"{task} has no examples to read; choose {', '.join(_FROM_RECORDS)} or preference")
    if task == "preference":  # a pair without a preference is none, so there is nothing to read without labels
        return read_preferences(stdlib_records(task, seed=seed) if data == "stdlib" else read_records(data))
    read, text_key = _FROM_RECORDS[task]
    if data == "stdlib":
        return read(stdlib_records(task, seed=seed), labelled=labelled)
    if task in _FROM_FILES:
        return _FROM_FILES[task](data, labelled=labelled)
    return read(read_records(data, text_key=text_key), labelled=labelled)
