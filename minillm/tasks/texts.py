"""Texts that get a label, several, or a number: `classify` and `regress`.

A class that is rare weighs more in training, and the probability from which it is given is tuned on validation data:
where one class has more than `UNBALANCED` times the examples of another, else every class is treated alike.

N examples, L labels.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from minillm.config import ModelConfig, UserError
from minillm.data.labels import Labels, Scale, TextData, TextExample, classify_targets, label_set, read_classify
from minillm.data.labels import read_regress as read_numbers
from minillm.data.records import Record
from minillm.data.sampling import class_weights
from minillm.evaluation.classification import (
    best_threshold,
    class_scores,
    classification_scores,
    confusion,
    multilabel_scores,
)
from minillm.evaluation.regression import regression_scores
from minillm.model.heads import HeadConfig, pooled_head
from minillm.tasks.info import listed, said
from minillm.tasks.task import Means, Task, outputs, unread
from minillm.training.objectives import Objective, label_loss, labels_loss, number_loss

UNBALANCED = 2.0


class Classify(Task):
    """One of several classes, or with lists of labels any number of them."""

    name, watch, judged = "classify", "macro_f1", "macro_f1"

    def __init__(self, *, weigh: bool | None = None, threshold: bool = True) -> None:
        self.threshold = threshold
        """Whether the probability from which a class is given is tuned, where it can be."""
        self.weigh = weigh
        """Whether rare classes weigh more. None: where they are unbalanced."""
        self.labels = Labels(())
        self.counts: list[int] = []
        """Training examples of each label."""

    def examples(self, records: Sequence[Record], *, labelled: bool = True) -> list[TextExample]:
        return read_classify(records, labelled=labelled)

    def fit(self, examples: Sequence[TextExample]) -> None:
        self.labels = label_set(examples)
        self.counts = self.labels.counts(examples).tolist()

    def classes(self, examples: Sequence[TextExample]) -> np.ndarray | None:
        labels = self.labels if self.labels.names else label_set(examples)
        return None if labels.multi else classify_targets(examples, labels)

    def names(self, example: TextExample) -> tuple[str, ...]:
        return example.names

    def given(self, example: TextExample) -> Hashable:
        return example.text, example.pair

    def info(self) -> dict[str, Any]:
        return {"labels": list(self.labels.names), "multi": self.labels.multi, "counts": self.counts}

    def from_info(self, info: Mapping[str, Any]) -> None:
        self.labels = Labels(tuple(listed(info, "labels", str)), said(info, "multi", bool))
        self.counts = listed(info, "counts", int)

    @property
    def unbalanced(self) -> bool:
        return max(self.counts) > UNBALANCED * min(self.counts)

    @property
    def weights(self) -> np.ndarray | None:
        """[L] what an example of each class weighs; None: all the same."""
        wanted = self.unbalanced if self.weigh is None else self.weigh
        return class_weights(np.array(self.counts)) if wanted and not self.labels.multi else None

    def head(self, config: ModelConfig, pool: str | None) -> HeadConfig:
        return pooled_head(len(self.labels.names), config, pool)

    def data(self, examples: Sequence[TextExample], means: Means, *, labelled: bool = True) -> TextData:
        targets = classify_targets(examples, self.labels) if labelled else None
        types = means.config.token_types > 1
        return TextData(examples, targets, means.tokenizer, context=means.room, token_types=types)

    def objective(self, start: nn.Module | None) -> Objective:
        weights = self.weights
        if weights is None:
            return self.score(start)
        return partial(label_loss, weights=torch.tensor(weights, dtype=torch.float32))

    def score(self, start: nn.Module | None) -> Objective:
        return labels_loss if self.labels.multi else label_loss

    def probabilities(self, model: nn.Module, data: TextData) -> np.ndarray:
        """[N, L]"""
        scores = torch.from_numpy(np.stack(outputs(model, data)))
        return (torch.sigmoid(scores) if self.labels.multi else torch.softmax(scores, -1)).numpy()

    def decide(self, p: np.ndarray, model: Any) -> np.ndarray:
        """[N] the class of each, or of multi-label data [N, L] zeros and ones."""
        threshold = model.threshold.cpu().numpy()
        if self.labels.multi:
            return (p >= np.where(np.isnan(threshold), 0.5, threshold)).astype(np.int64)
        chosen = p.argmax(1)
        for rare in np.flatnonzero(~np.isnan(threshold)):  # of two classes at most one has a threshold
            chosen = np.where(p[:, rare] >= threshold[rare], rare, 1 - rare)
        return chosen

    @property
    def tuned(self) -> Sequence[int]:
        """The labels that have a threshold: each of multi-label data, and the rare one of two unbalanced classes."""
        if not self.threshold or not (self.labels.multi or (len(self.labels.names) == 2 and self.unbalanced)):
            return ()
        return range(len(self.labels.names)) if self.labels.multi else [int(np.argmin(self.counts))]

    def tuned_metrics(self, model: Any, data: TextData, means: Means, start: nn.Module | None) -> dict[str, float]:
        p = self.probabilities(model, data)
        truth = data.targets if self.labels.multi else np.eye(len(self.labels.names))[data.targets]
        for label in self.tuned:
            if truth[:, label].any():
                model.threshold[label] = best_threshold(truth[:, label], p[:, label])[0]
        return self._scores(data.targets, self.decide(p, model))

    def metrics(self, model: nn.Module, data: TextData, means: Means, start: nn.Module | None) -> dict[str, float]:
        return self._scores(data.targets, self.decide(self.probabilities(model, data), model))

    def final_metrics(self, model: nn.Module, data: TextData, means: Means, start: nn.Module | None) -> dict[str, Any]:
        decided = self.decide(self.probabilities(model, data), model)
        scores: dict[str, Any] = self._scores(data.targets, decided)
        if not self.labels.multi:
            table = confusion(data.targets, decided, len(self.labels.names))
            scores["labels"], scores["confusion"] = list(self.labels.names), table.tolist()
            if self.unbalanced:
                scores["rare_f1"] = float(class_scores(table)["f1"][int(np.argmin(self.counts))])
        return scores

    def _scores(self, truth: np.ndarray, decided: np.ndarray) -> dict[str, float]:
        if self.labels.multi:
            return multilabel_scores(truth, decided)
        return classification_scores(truth, decided, len(self.labels.names))

    def baseline(self, train: Sequence[TextExample], val: Sequence[TextExample]) -> tuple[str, dict[str, float]]:
        truth, counts = classify_targets(val, self.labels), self.labels.counts(train)
        if self.labels.multi:
            common = np.tile(counts * 2 > len(train), (len(val), 1))
            return "the labels that most examples have", self._scores(truth, common.astype(np.int64))
        always = int(np.argmax(counts))
        return f"always {self.labels.names[always]!r}", self._scores(truth, np.full(len(val), always))

    def answers(
        self, model: nn.Module, examples: Sequence[TextExample], means: Means, **options: Any
    ) -> Iterator[dict]:
        data = self.data(examples, means, labelled=False)
        p = self.probabilities(model, data)
        for example, row, decided, lost in zip(examples, p, self.decide(p, model), data.lost, strict=True):
            names = self.labels.names
            label: Any = (
                names[decided] if not self.labels.multi else [n for n, d in zip(names, decided, strict=True) if d]
            )
            scores = {name: float(value) for name, value in zip(names, row, strict=True)}
            yield {**_shown(example), "label": label, "scores": scores} | unread(lost)


class Regress(Task):
    """A number; learnt as (label − mean) / std of the training data."""

    name, judged = "regress", "rmse"

    def __init__(self) -> None:
        self.scale = Scale(0.0, 1.0)

    def examples(self, records: Sequence[Record], *, labelled: bool = True) -> list[TextExample]:
        return read_numbers(records, labelled=labelled)

    def fit(self, examples: Sequence[TextExample]) -> None:
        self.scale = Scale.of(examples)

    def given(self, example: TextExample) -> Hashable:
        return example.text, example.pair

    def info(self) -> dict[str, Any]:
        return {"mean": self.scale.mean, "std": self.scale.std}

    def from_info(self, info: Mapping[str, Any]) -> None:
        self.scale = Scale(said(info, "mean", float), said(info, "std", float))

    def head(self, config: ModelConfig, pool: str | None) -> HeadConfig:
        return pooled_head(1, config, pool)

    def data(self, examples: Sequence[TextExample], means: Means, *, labelled: bool = True) -> TextData:
        targets = self.scale.targets(examples) if labelled else None
        types = means.config.token_types > 1
        return TextData(examples, targets, means.tokenizer, context=means.room, token_types=types)

    def score(self, start: nn.Module | None) -> Objective:
        return number_loss

    def metrics(self, model: nn.Module, data: TextData, means: Means, start: nn.Module | None) -> dict[str, Any]:
        truth = np.array([example.label for example in data.examples], np.float64)
        return _finite_scores(truth, self._numbers(model, data))

    def _numbers(self, model: nn.Module, data: TextData) -> np.ndarray:
        return self.scale.restore(np.concatenate(outputs(model, data)).astype(np.float64))

    def baseline(self, train: Sequence[TextExample], val: Sequence[TextExample]) -> tuple[str, dict[str, Any]]:
        truth = np.array([example.label for example in val], np.float64)
        return f"always the mean, {self.scale.mean:.4g}", _finite_scores(truth, np.full(len(truth), self.scale.mean))

    def answers(
        self, model: nn.Module, examples: Sequence[TextExample], means: Means, **options: Any
    ) -> Iterator[dict]:
        data = self.data(examples, means, labelled=False)
        for example, number, lost in zip(examples, self._numbers(model, data), data.lost, strict=True):
            yield {**_shown(example), "label": float(number)} | unread(lost)


def _finite_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """`regression_scores` with null for a correlation that a constant does not have."""
    try:
        scores = regression_scores(truth, predicted)
    except ValueError as error:
        raise UserError(f"regression cannot be scored: {error}") from error
    return {name: value if np.isfinite(value) else None for name, value in scores.items()}


def _shown(example: TextExample) -> dict[str, str]:
    return {"text": example.text} | ({} if example.pair is None else {"text_pair": example.pair})
