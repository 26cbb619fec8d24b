"""The trivial answers that a finetuned model has to beat, counted by hand."""

import math

import pytest

from minillm.data.labels import read_classify, read_regress
from minillm.data.records import Record
from minillm.data.seq2seq import read_pairs
from minillm.data.spans import span_examples
from minillm.data.tags import tag_examples
from minillm.tasks.task import Task
from minillm.tasks.texts import Classify, Regress
from minillm.tasks.words import SpanQA, Tag
from minillm.tasks.writing import Preference, Seq2Seq


def baseline(task: Task, read, train: list[dict], val: list[dict]) -> tuple[str, dict]:
    train_examples, val_examples = (read([Record("f:1", fields) for fields in side]) for side in (train, val))
    task.fit(train_examples)
    return task.baseline(train_examples, val_examples)


def labelled(*labels) -> list[dict]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def test_always_the_most_frequent_class() -> None:
    name, scores = baseline(Classify(), read_classify, labelled("b", "a", "b"), labelled("a", "b", "b", "b"))
    assert name == "always 'b'" and scores["accuracy"] == 3 / 4
    assert scores["macro_f1"] == pytest.approx((0 + 2 * 3 / (3 + 4)) / 2)


def test_the_labels_that_most_examples_have() -> None:
    train = labelled(["x", "y"], ["x"], [], ["x", "z"])  # y and z: one in four, x: three
    name, scores = baseline(Classify(), read_classify, train, labelled(["x"], ["x", "y"], []))
    assert name == "the labels that most examples have"
    assert scores["accuracy"] == pytest.approx(1 / 3) and scores["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))


def test_always_the_mean_of_the_training_data() -> None:
    name, scores = baseline(Regress(), read_regress, labelled(1, 2, 6), labelled(3, 5))
    assert name == "always the mean, 3" and scores["mae"] == 1.0 and scores["rmse"] == pytest.approx(math.sqrt(2))
    assert scores["pearson"] is scores["spearman"] is None


def test_each_words_most_frequent_tag() -> None:
    train = [{"tokens": ["a", "a", "a", "b", "c", "d", "e"], "tags": ["B-X", "O", "B-X", "B-X", "O", "O", "O"]}]
    val = [{"tokens": ["a", "c", "new"], "tags": ["B-X", "B-X", "O"]}]
    name, scores = baseline(Tag(), tag_examples, train, val)
    assert name == "each word's most frequent tag" and scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["entity_recall"] == 1 / 2 and scores["entity_precision"] == 1.0


@pytest.mark.parametrize("answerable, name", [(1, "never an answer"), (3, "the whole context")])
def test_no_answer_or_all_of_the_context(answerable: int, name: str) -> None:
    answers = [{"text": "red", "answer_start": 0}]
    val = [{"question": "?", "context": "red dog", "answers": answers if i < answerable else []} for i in range(4)]
    found, scores = baseline(SpanQA(), span_examples, val, val)
    assert found == name
    assert scores["f1"] == pytest.approx({1: 3 / 4, 3: 3 / 4 * 2 / 3}[answerable])


@pytest.mark.parametrize(
    "sources, name", [(["x y", "q"], "the source itself"), (["q", "q"], "the most frequent target")]
)
def test_the_source_or_the_most_frequent_target(sources: list[str], name: str) -> None:
    train = [{"source": "s", "target": target} for target in ("b", "x z", "x z", "b", "x z")]
    val = [{"source": source, "target": target} for source, target in zip(sources, ("x y", "b c"), strict=True)]
    found, scores = baseline(Seq2Seq(), read_pairs, train, val)
    assert found == name and scores["rouge_l"] == {"the source itself": 1 / 2}.get(name, 1 / 4)
    assert scores["exact_match"] == {"the source itself": 1 / 2}.get(name, 0.0)


def test_the_model_as_it_was_prefers_nothing() -> None:
    assert Preference().baseline([], []) == (
        "the model as it was",
        {"loss": pytest.approx(math.log(2)), "reward_margin": 0.0, "reward_accuracy": 0.0},
    )
