"""Words that get a tag (`tag`), and stretches of a text that answer a question (`span-qa`)."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from minillm.config import ModelConfig
from minillm.data.labels import Labels
from minillm.data.records import Record
from minillm.data.spans import Answer, SpanData, SpanExample, read_spans, span_examples
from minillm.data.tags import TagData, TagExample, read_tags, tag_examples, tag_parts, tag_set
from minillm.evaluation.answers import answer_scores, best_null_threshold
from minillm.evaluation.entities import entities, entity_scores
from minillm.model.heads import HeadConfig
from minillm.tasks.info import listed, said
from minillm.tasks.task import Means, Task, outputs, unread
from minillm.training.objectives import Objective, label_loss, span_loss, span_scores


class Tag(Task):
    """A tag for each word, on its first piece."""

    name, watch, judged = "tag", "entity_f1", "entity_f1"

    def __init__(self) -> None:
        self.labels = Labels(())

    def read(self, path: str | Path, *, labelled: bool = True) -> list[TagExample]:
        return read_tags(path, labelled=labelled)

    def examples(self, records: Sequence[Record], *, labelled: bool = True) -> list[TagExample]:
        return tag_examples(records, labelled=labelled)

    def fit(self, examples: Sequence[TagExample]) -> None:
        self.labels = tag_set(examples)

    def names(self, example: TagExample) -> set[str]:
        return {part for tag in example.tags or () for part in tag_parts(tag)}

    def given(self, example: TagExample) -> Hashable:
        return example.words

    def info(self) -> dict[str, Any]:
        return {"labels": list(self.labels.names)}

    def from_info(self, info: Mapping[str, Any]) -> None:
        self.labels = Labels(tuple(listed(info, "labels", str)))

    def head(self, config: ModelConfig, pool: str | None) -> HeadConfig:
        return HeadConfig(outputs=len(self.labels.names))

    def data(self, examples: Sequence[TagExample], means: Means, *, labelled: bool = True) -> TagData:
        return TagData(examples, self.labels if labelled else None, means.tokenizer, context=means.room)

    def score(self, start: nn.Module | None) -> Objective:
        return label_loss

    def _tags(self, model: nn.Module, data: TagData) -> list[list[str]]:
        return data.tags([row.argmax(-1) for row in outputs(model, data)], self.labels)

    def metrics(self, model: nn.Module, data: TagData, means: Means, start: nn.Module | None) -> dict[str, float]:
        return entity_scores([example.tags or () for example in data.examples], self._tags(model, data))

    def baseline(self, train: Sequence[TagExample], val: Sequence[TagExample]) -> tuple[str, dict[str, float]]:
        """Each word its most frequent tag, and a word never seen the most frequent of all."""
        found: dict[str, dict[str, int]] = {}
        for example in train:
            for word, tag in zip(example.words, example.tags or (), strict=True):
                of_word = found.setdefault(word, {})
                of_word[tag] = of_word.get(tag, 0) + 1
        best = {word: max(sorted(tags), key=tags.__getitem__) for word, tags in found.items()}
        totals = {tag: sum(tags.get(tag, 0) for tags in found.values()) for tag in self.labels.names}
        default = max(totals, key=totals.__getitem__)
        guessed = [[best.get(word, default) for word in example.words] for example in val]
        return "each word's most frequent tag", entity_scores([example.tags or () for example in val], guessed)

    def answers(self, model: nn.Module, examples: Sequence[TagExample], means: Means, **options: Any) -> Iterator[dict]:
        data = self.data(examples, means, labelled=False)
        answers = zip(examples, self._tags(model, data), data.lost, data.untagged(), strict=True)
        for example, found, lost, untagged in answers:
            spans = [
                {"type": kind, "start": start, "end": end, "text": " ".join(example.words[start:end])}
                for kind, start, end in entities(found)
            ]
            answer = {"tokens": list(example.words), "tags": found, "entities": spans}
            yield answer | unread(lost) | ({"untagged": untagged} if untagged else {})


class SpanQA(Task):
    """A stretch of the context that answers a question, or no answer."""

    name, watch, judged = "span-qa", "f1", "f1"

    def __init__(self) -> None:
        self.unanswerable = False
        """Whether the training data has questions without an answer: only then may none be given."""

    def read(self, path: str | Path, *, labelled: bool = True) -> list[SpanExample]:
        return read_spans(path, labelled=labelled)

    def examples(self, records: Sequence[Record], *, labelled: bool = True) -> list[SpanExample]:
        return span_examples(records, labelled=labelled)

    def fit(self, examples: Sequence[SpanExample]) -> None:
        self.unanswerable = any(not example.answers for example in examples)

    def given(self, example: SpanExample) -> Hashable:
        return example.question, example.context

    def info(self) -> dict[str, Any]:
        return {"unanswerable": self.unanswerable}

    def from_info(self, info: Mapping[str, Any]) -> None:
        self.unanswerable = said(info, "unanswerable", bool)

    def head(self, config: ModelConfig, pool: str | None) -> HeadConfig:
        return HeadConfig(outputs=2)

    def data(self, examples: Sequence[SpanExample], means: Means, *, labelled: bool = True) -> SpanData:
        types = means.config.token_types > 1
        return SpanData(examples, means.tokenizer, context=means.room, labelled=labelled, token_types=types)

    def score(self, start: nn.Module | None) -> Objective:
        return span_loss

    def _found(self, model: nn.Module, data: SpanData) -> list[Answer]:
        scores = outputs(model, data, span_scores)
        return data.answers([row[:, 0] for row in scores], [row[:, 1] for row in scores])

    def _given(self, found: Sequence[Answer], model: Any) -> list[str]:
        threshold = float(model.threshold[0])
        lead = 0.0 if np.isnan(threshold) else threshold
        return [a.text if not self.unanswerable or a.score - a.null >= lead else "" for a in found]

    def tuned_metrics(self, model: Any, data: SpanData, means: Means, start: nn.Module | None) -> dict[str, float]:
        found, golden = self._found(model, data), _golden(data.examples)
        if self.unanswerable:
            margins = np.array([answer.score - answer.null for answer in found])
            model.threshold[0] = best_null_threshold([a.text for a in found], margins, golden)[0]
        return answer_scores(self._given(found, model), golden)

    def metrics(self, model: nn.Module, data: SpanData, means: Means, start: nn.Module | None) -> dict[str, float]:
        return answer_scores(self._given(self._found(model, data), model), _golden(data.examples))

    def baseline(self, train: Sequence[SpanExample], val: Sequence[SpanExample]) -> tuple[str, dict[str, float]]:
        """The better one of no answer at all and the whole context."""
        golden = _golden(val)
        tried = {
            "never an answer": answer_scores([""] * len(val), golden),
            "the whole context": answer_scores([example.context for example in val], golden),
        }
        best = max(tried, key=lambda name: tried[name]["f1"])
        return best, tried[best]

    def answers(
        self, model: nn.Module, examples: Sequence[SpanExample], means: Means, **options: Any
    ) -> Iterator[dict]:
        data = self.data(examples, means, labelled=False)
        found = self._found(model, data)
        for example, answer, given, lost in zip(examples, found, self._given(found, model), data.lost, strict=True):
            lead = {"score": answer.score, "null": answer.null}
            yield {"id": example.key, "question": example.question, "answer": given, **lead} | unread(lost)


def _golden(examples: Sequence[SpanExample]) -> list[list[str]]:
    return [[text for text, _ in example.answers] for example in examples]
