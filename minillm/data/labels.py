"""Texts, or pairs of texts, with labels or a number: what `classify` and `regress` learn from.

    {"text": …, "text_pair": …, "label": "x"}      one of several classes; a whole number or true/false is a class too
    {"text": …, "label": ["x", "y"]}               multi-label: any number of them, none included (JSON only)
    {"text": …, "label": 3.5}                      regression: y = (label − mean) / std of the training data

B rows, L labels.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minillm.config import UserError
from minillm.data.batch import IGNORED, Batch
from minillm.data.records import Record
from minillm.data.tasks import TaskTokenizer, encode, source_of, text_batch

_LARGEST = 1e150  # squares of larger ones are infinite
_WHOLE = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True)
class TextExample:
    record: Record
    text: str
    pair: str | None
    label: tuple[str, ...] | float | None
    """Names of its classes (one, unless multi-label), its number, or None where there is nothing to learn."""

    @property
    def names(self) -> tuple[str, ...]:
        assert isinstance(self.label, tuple)
        return self.label


@dataclass(frozen=True)
class Labels:
    """The classes that a model tells apart, in the order of its outputs."""

    names: tuple[str, ...]
    multi: bool = False
    """Whether a text may have several, or none."""

    def index(self, name: str, record: Record) -> int:
        """Raises `UserError` for a label that the model was not trained on."""
        try:
            return self.names.index(name)
        except ValueError:
            record.fail(
                f"the label {name!r} is not one that the model knows ({', '.join(self.names)}); "
                "mend it, or train with examples of it"
            )

    def counts(self, examples: Sequence[TextExample]) -> np.ndarray:
        """[L] how many examples have each label."""
        found = Counter(name for example in examples for name in example.names)
        return np.array([found[name] for name in self.names])


def read_classify(records: Sequence[Record], *, labelled: bool = True) -> list[TextExample]:
    """Examples to classify. Without `labelled`, labels are neither asked for nor read.

    Raises `UserError`, with the record's place, for wrong columns, an empty text, a label that is no class, and a file
    in which some records have one label and others a list.
    """
    examples = [_example(record, "classification", _classes if labelled else None) for record in records]
    lists = [isinstance(example.record.fields.get("label"), list) for example in examples]
    if labelled and any(lists) and not all(lists):
        examples[lists.index(not lists[0])].record.fail(
            "has one label where other records have a list, or the other way round; write every label as a list"
        )
    return examples


def read_regress(records: Sequence[Record], *, labelled: bool = True) -> list[TextExample]:
    """Examples with a number. Raises as `read_classify`, and where the label is no finite number."""
    return [_example(record, "regression", _number if labelled else None) for record in records]


def _example(record: Record, task: str, read_label) -> TextExample:
    record.require(("text", "label") if read_label else ("text",), task)
    pair = record.text("text_pair") if record.fields.get("text_pair") is not None else None
    return TextExample(record, record.text("text"), pair, read_label(record) if read_label else None)


def _classes(record: Record) -> tuple[str, ...]:
    label = record.fields["label"]
    if isinstance(label, list):
        names = tuple(_class(record, item) for item in label)
        if len(set(names)) < len(names):
            record.fail(f"has a label twice: {', '.join(names)}; name each once")
        return names
    return (_class(record, label),)


def _class(record: Record, label) -> str:
    if isinstance(label, bool | int):
        return str(label).lower()
    if not isinstance(label, str):
        record.fail(f"the label {label!r} is no class; give a name or a whole number, or take --task regress")
    return record.checked(label.strip(), "label")


def _number(record: Record) -> float:
    label = record.fields["label"]
    try:
        value = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        record.fail(f"the label {label!r} is no finite number; give one, or take --task classify")
    return value


def label_set(examples: Sequence[TextExample]) -> Labels:
    """The labels of training data, sorted; whole numbers by value. Raises `UserError` where there is only one."""
    multi = any(isinstance(example.record.fields.get("label"), list) for example in examples)
    names = {name for example in examples for name in example.names}
    source = source_of([example.record for example in examples])
    if multi and not names:
        raise UserError(f"{source}: no example has a label; give some that have one")
    if not multi and len(names) < 2:
        raise UserError(
            f"{source}: all {len(examples)} examples have the label {next(iter(names), None)!r}; "
            "a classifier needs two classes or more"
        )
    numbers = all(_WHOLE.fullmatch(name) for name in names)
    return Labels(tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name))), multi)


def classify_targets(examples: Sequence[TextExample], labels: Labels) -> np.ndarray:
    """[B] int64 class of each, or of multi-label data [B, L] float32 of 0 and 1.

    Raises `UserError`, with the record's place, for a label that is not among `labels`.
    """
    if not labels.multi:
        for example in examples:
            if len(example.names) != 1:
                example.record.fail("has a list of labels, but the model tells single ones; give one label")
        return np.array([labels.index(example.names[0], example.record) for example in examples], np.int64)
    targets = np.zeros((len(examples), len(labels.names)), np.float32)
    for row, example in enumerate(examples):
        for name in example.names:
            targets[row, labels.index(name, example.record)] = 1
    return targets


@dataclass(frozen=True)
class Scale:
    """Labels to what the model predicts, and back: it starts near 0, wherever the labels lie."""

    mean: float
    std: float

    @classmethod
    def of(cls, examples: Sequence[TextExample]) -> "Scale":
        """Raises `UserError` where all labels are equal."""
        values = np.array([example.label for example in examples], np.float64)
        source = source_of([example.record for example in examples])
        if (values == values[0]).all():
            raise UserError(f"{source}: all {len(values)} labels are equal, which leaves nothing to learn")
        if np.abs(values).max() > _LARGEST or not values.std() > 0:
            raise UserError(f"{source}: the labels lie too far apart, or too close, for numbers; give another unit")
        return cls(float(values.mean()), float(values.std()))

    def targets(self, examples: Sequence[TextExample]) -> np.ndarray:
        """[B] float32"""
        values = np.array([example.label for example in examples], np.float64)
        return ((values - self.mean) / self.std).astype(np.float32)

    def restore(self, outputs: np.ndarray) -> np.ndarray:
        """Predictions in the labels' own unit."""
        return outputs * self.std + self.mean


class TextData:
    """Rows `document_id, text, end_id` or `document_id, text, end_id, pair, end_id`; a `TaskData`.

    What does not fit is cut from the end, of a pair token by token from the longer one.

    Args:
        targets: [N, …] from `classify_targets` or `Scale.targets`; None to predict.
        token_types: whether the model tells the first of a pair (0) from the second (1).
    """

    dropped = 0

    def __init__(
        self,
        examples: Sequence[TextExample],
        targets: np.ndarray | None,
        tokenizer: TaskTokenizer,
        *,
        context: int,
        token_types: bool = False,
    ):
        self.examples, self.context, self.pad_id = list(examples), context, tokenizer.pad_id
        self.targets = np.full(len(self.examples), IGNORED) if targets is None else targets
        self.rows: list[list[int]] = []
        self.types: list[list[int]] | None = [] if token_types else None
        self.lost: list[int] = []
        """Tokens of each example that do not fit."""
        for example in self.examples:
            first = encode(tokenizer, example.record, example.text)
            second = [] if example.pair is None else encode(tokenizer, example.record, example.pair)
            room = context - 2 - (example.pair is not None)
            if room < 2:
                raise UserError(f"a context of {context} leaves no room for a text; take a model with a longer one")
            self.lost.append(max(0, len(first) + len(second) - room))
            first, second = _fit(first, second, room)
            tail = [] if example.pair is None else [*second, tokenizer.end_id]
            self.rows.append([tokenizer.document_id, *first, tokenizer.end_id, *tail])
            if self.types is not None:
                self.types.append([0] * (len(first) + 2) + [1] * len(tail))

    @property
    def truncated(self) -> int:
        return sum(lost > 0 for lost in self.lost)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray, samples: np.ndarray) -> Batch:
        return text_batch(
            [self.rows[i] for i in indices],
            self.targets[indices],
            samples,
            pad_id=self.pad_id,
            context=self.context,
            token_types=None if self.types is None else [self.types[i] for i in indices],
        )


def _fit(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Both, cut to `room` together: the longer one down to the shorter one's length first."""
    if len(first) + len(second) <= room:
        return first, second
    half = room // 2
    if len(second) <= half:
        return first[: room - len(second)], second
    if len(first) <= half:
        return first, second[: room - len(first)]
    return first[: room - half], second[:half]
