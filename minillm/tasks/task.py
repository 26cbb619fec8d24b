"""What all tasks have in common.

    file -> examples -> hold_out -> fit (labels, scale) -> data -> batches      (minillm/data)
    model + batch -> loss                                           (minillm/training/objectives.py)
    model + data -> metrics, or answers                             (minillm/evaluation)

A task that is `fit` knows all that its answers need; `info` and `from_info` carry that through config.json.
B rows, T tokens, L outputs of a head.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from minillm.config import ModelConfig, UserError
from minillm.data.batch import IGNORED, Batch
from minillm.data.records import Record, read_records
from minillm.data.sampling import k_folds, learnable
from minillm.data.tasks import TaskData, source_of
from minillm.model.heads import HeadConfig
from minillm.training.objectives import Objective, counted, likelihood

ROWS = 32
"""Rows of a batch where nothing is trained."""
DISTINCT = 10
"""Inputs a fold; with fewer, a fold of whole inputs would measure the luck of the draw."""


@dataclass(frozen=True)
class Means:
    """What a task is given to work with."""

    tokenizer: Any
    config: ModelConfig
    encode_chat: Callable[..., tuple[list[int], list[int]]]
    """(tokenizer, messages, reply=False) -> (ids, mask): the chat template."""
    plain_text: Any = None
    """What is predicted of plain text, one of minillm/data/corpus.py."""
    context: int | None = None
    """Tokens of a row, where a method takes some of the model's for itself. None: all of the model's."""
    start: Sequence[int] = ()
    """What the decoder of an encoder-decoder begins to write with. (): the tokenizer's document id, as in training."""
    frame: tuple[Sequence[int], Sequence[int]] = ((), ())
    """The ids before and behind what the encoder of an encoder-decoder was given of a text."""

    @property
    def room(self) -> int:
        return self.context or self.config.context


class Task(ABC):
    """A task as it is before it has seen data; each one says the four abstract things, and overrides what differs."""

    name: ClassVar[str]
    watch: ClassVar[str | None] = None
    """The metric that early stopping follows, higher is better. None: the validation loss."""
    judged: ClassVar[str] = "loss"
    """The metric in which it has to beat the trivial answer."""
    shapes: ClassVar[tuple[str, ...]] = ("decoder", "encoder", "encoder-decoder")
    """Which models it can be learnt by."""

    def check(self, config: ModelConfig) -> None:
        """Raises `UserError` where the model's shape cannot do the task."""
        if config.shape not in self.shapes:
            raise UserError(
                f"--task {self.name} needs a model that is {' or '.join(self.shapes)}; this one is {config.shape}"
            )

    def read(self, path: str | Path, *, labelled: bool = True) -> list[Any]:
        """The examples of a file; errors name the file and the line."""
        return self.examples(read_records(path), labelled=labelled)

    @abstractmethod
    def examples(self, records: Sequence[Record], *, labelled: bool = True) -> list[Any]:
        """What the records of a file say; without `labelled` the truth may be missing. Errors name file and line."""

    def fit(self, examples: Sequence[Any]) -> None:
        """Learns from the training examples what outputs mean: labels, a scale."""

    def classes(self, examples: Sequence[Any]) -> np.ndarray | None:
        """[N] by which held-out data is chosen in proportion, and batches are balanced. None: there are none."""
        return None

    def names(self, example: Any) -> Collection[str]:
        """What of an example's truth the model can only know from training examples that have it too: its labels."""
        return ()

    @abstractmethod
    def given(self, example: Any) -> Hashable:
        """What the model sees of an example: where two have the same, having learnt one is knowing the other."""

    def folds(self, examples: Sequence[Any], count: int, seed: int) -> list[tuple[list[Any], list[Any]]]:
        """`count` times (examples to train on, examples held out), with every class in proportion.

        Each example is held out once, but for one that alone has a label: it is always trained on. Those of which the
        model is given the same are held out together, unless fewer than `DISTINCT` a fold differ.

        Raises `UserError` where that leaves nothing to hold out.
        """
        for parts in self._divided(examples, count, seed):
            if all(held for _, held in parts):
                return parts
        raise _indivisible(examples)

    def hold_out(self, examples: Sequence[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
        """The first of the folds that leaves something to hold out: (examples to train on, a seeded share held out),
        one example or more on each side."""
        if len(examples) < 2:
            source = source_of([example.record for example in examples])
            raise UserError(f"{source}: one example cannot be divided; give more, or name validation data with --val")
        for parts in self._divided(examples, min(max(2, round(1 / share)), len(examples)), seed):
            for train, held in parts:
                if held:
                    return train, held
        raise _indivisible(examples)

    def _divided(self, examples: Sequence[Any], count: int, seed: int) -> Iterator[list[tuple[list[Any], list[Any]]]]:
        """The folds, those first that keep together what the model cannot tell apart."""
        number: dict[Hashable, int] = {}
        groups = np.array([number.setdefault(self.given(example), len(number)) for example in examples])
        classes, names = self.classes(examples), [self.names(example) for example in examples]
        for together in [groups, None] if len(number) >= DISTINCT * count else [None]:
            parts = k_folds(len(examples), count, seed=seed, classes=classes, groups=together)
            parts = [learnable(part, names) for part in parts]
            yield [([examples[i] for i in train], [examples[i] for i in held]) for train, held in parts]

    def info(self) -> dict[str, Any]:
        """What `fit` found, as JSON."""
        return {}

    def from_info(self, info: Mapping[str, Any]) -> None:
        """Takes what `info` gave."""

    def head(self, config: ModelConfig, pool: str | None) -> HeadConfig | None:
        """The head to put on a model. None: its own output matrix is what the task uses."""
        return None

    @abstractmethod
    def data(self, examples: Sequence[Any], means: Means, *, labelled: bool = True) -> TaskData:
        """The examples as rows of token ids that fit the context."""

    def objective(self, start: nn.Module | None) -> Objective:
        """What training minimises; `start` is the model as it was, for a task that compares itself with it."""
        return self.score(start)

    def score(self, start: nn.Module | None) -> Objective:
        """What validation sums up."""
        return likelihood

    def count(self, batch: Batch) -> int:
        return counted(batch)

    needs_start: ClassVar[bool] = False
    """Whether it compares itself with the model as it was."""

    def metrics(self, model: nn.Module, data: TaskData, means: Means, start: nn.Module | None) -> dict[str, float]:
        """What is cheap enough for every validation."""
        return {}

    def tuned_metrics(
        self, model: nn.Module, data: TaskData, means: Means, start: nn.Module | None
    ) -> dict[str, float]:
        """As `metrics`, on validation data, by which thresholds are chosen first and put into the model."""
        return self.metrics(model, data, means, start)

    def final_metrics(
        self, model: nn.Module, data: TaskData, means: Means, start: nn.Module | None
    ) -> dict[str, float]:
        """All metrics; some tasks write texts for them."""
        return self.metrics(model, data, means, start)

    def baseline(self, train: Sequence[Any], val: Sequence[Any]) -> tuple[str, dict[str, float]]:
        """(what it does, its metrics): the trivial answer that a model has to beat; ("", {}) where the start is it."""
        return "", {}

    @abstractmethod
    def answers(self, model: nn.Module, examples: Sequence[Any], means: Means, **options: Any) -> Iterator[dict]:
        """One JSON object for each example."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, and afterwards as before; gives the model's device."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def batches(data: TaskData, rows: int = ROWS) -> Iterator[Batch]:
    """All rows once, in their order."""
    for first in range(0, len(data), rows):
        indices = np.arange(first, min(first + rows, len(data)))
        yield data.batch(indices, indices)


def outputs(
    model: nn.Module, data: TaskData, compute: Callable[[nn.Module, Batch], Tensor] | None = None
) -> list[np.ndarray]:
    """For each row what the model gives, [L] or [T, L], fp32.

    Args:
        compute: (model, batch) -> [B, …]; None: the model itself.
    """
    found: list[np.ndarray] = []
    with evaluating(model) as device:
        for batch in batches(data):
            batch = batch.to(device)
            result = model(batch.ids, **batch.inputs()) if compute is None else compute(model, batch)
            found += list(result.float().cpu().numpy())
    return found


def spelt_bytes(data: TaskData, tokenizer: Any) -> tuple[int, int]:
    """(targets, UTF-8 bytes of the text that they spell) of all rows."""
    targets = spelt = 0
    for batch in batches(data):
        for row in batch.targets:
            ids = row[row != IGNORED].tolist()
            targets += len(ids)
            spelt += len(tokenizer.decode(ids).encode())
    return targets, spelt


def _indivisible(examples: Sequence[Any]) -> UserError:
    source = source_of([example.record for example in examples])
    return UserError(
        f"{source}: {len(examples)} examples cannot be divided so that every label occurs in training; "
        "give more examples of each label, or name validation data with --val"
    )


def unread(tokens: int) -> dict[str, int]:
    """What an answer says of an input that is longer than the context: how many tokens of it the model never saw."""
    return {"unread_tokens": tokens} if tokens else {}
