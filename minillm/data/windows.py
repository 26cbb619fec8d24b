"""Plain text as a task's data: all documents one behind the other, cut into windows that do not overlap.

What is predicted in a window is for corpus.py's objectives to say. N tokens of text, L of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.config import UserError
from minillm.data.batch import Batch
from minillm.data.loader import VALIDATION
from minillm.data.records import Record
from minillm.data.sources import open_source
from minillm.data.tasks import TaskTokenizer, encode

FEW = 10
"""Fewer documents than this are each divided by position, so that both sides get some of every text."""


@dataclass(frozen=True)
class TextDocument:
    record: Record
    text: str


def read_documents(source: str) -> list[TextDocument]:
    """The documents of a file, a folder, stdlib or installed (see sources.py), parts of a long one put together.

    Raises `UserError` for what cannot be read, prepared shards, and a source without text.
    """
    opened = open_source(source)
    if opened.is_prepared:
        raise UserError(f"{source} holds prepared shards; --task lm tokenizes anew: give the text itself")
    parts: list[tuple[str, list[str]]] = []
    for document in opened.documents():
        if document.part == 0:
            parts.append((document.name, []))
        parts[-1][1].append(document.text)
    found = [TextDocument(Record(name, {}), "".join(texts)) for name, texts in parts]
    found = [document for document in found if document.text.strip()]
    if not found:
        raise UserError(f"{source} holds no text; give a file with some")
    return found


def divide(documents: Sequence[TextDocument], share: float) -> tuple[list[TextDocument], list[TextDocument]]:
    """(the beginning of each document, its last `share`), cut behind a newline where there is one near."""
    first, last = [], []
    for document in documents:
        text = document.text
        wanted = round(len(text) * (1 - share))
        newline = text.rfind("\n", 0, wanted) + 1
        cut = newline if newline > wanted // 2 else wanted
        first.append(TextDocument(document.record, text[:cut]))
        last.append(TextDocument(document.record, text[cut:]))
    return [d for d in first if d.text], [d for d in last if d.text]


class WindowData:
    """Rows of consecutive windows; a `TaskData`.

    Args:
        objective: one of corpus.py; its batches of the same rows differ with `seed` and sample (what is hidden).
        seed: of what training hides. None: that of validation.
    """

    truncated = dropped = 0

    def __init__(
        self,
        examples: Sequence[TextDocument],
        tokenizer: TaskTokenizer,
        objective: Any,
        *,
        context: int,
        seed: int | None = None,
    ):
        self.examples, self.objective = list(examples), objective
        self.seed = VALIDATION if seed is None else seed
        self.stride, self.length = objective.sizes(context)
        tokens: list[int] = []
        for example in self.examples:
            tokens += [tokenizer.document_id, *encode(tokenizer, example.record, example.text)]
        self.tokens = np.array(tokens, np.int64)
        self.bytes = sum(len(example.text.encode()) for example in self.examples)

    def __len__(self) -> int:
        overlap = min(self.length - self.stride, 1)
        return max(1, -(-(len(self.tokens) - overlap) // self.stride))

    def batch(self, indices: np.ndarray, samples: np.ndarray) -> Batch:
        starts = indices * self.stride
        lengths = np.minimum(self.length, len(self.tokens) - starts)
        places = np.minimum(starts[:, None] + np.arange(self.length), len(self.tokens) - 1)  # what fills up counts not
        return self.objective.batch(self.tokens[places], lengths, samples, seed=self.seed)
