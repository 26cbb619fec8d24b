"""Texts, pairs and numbers become rows; labels that make no sense are named with their line."""

from itertools import permutations

import numpy as np
import pytest

from minillm.config import UserError
from minillm.data.labels import (
    Labels,
    Scale,
    TextData,
    classify_targets,
    label_set,
    read_classify,
    read_regress,
)
from minillm.data.records import Record
from minillm.data.tasks import bucket, check_rows

from .task_tokenizer import PieceTokenizer


def records(*fields: dict) -> list[Record]:
    return [Record(f"f.jsonl:{line}", field) for line, field in enumerate(fields, 1)]


def labelled(*labels) -> list[Record]:
    return records(*({"text": f"text {i}", "label": label} for i, label in enumerate(labels)))


def test_names_whole_numbers_and_booleans_are_classes() -> None:
    examples = read_classify(labelled("b", "a", " b "))
    labels = label_set(examples)
    assert labels == Labels(("a", "b"))
    assert classify_targets(examples, labels).tolist() == [1, 0, 1]
    assert labels.counts(examples).tolist() == [1, 2]
    assert label_set(read_classify(labelled(10, 9, -1))).names == ("-1", "9", "10")
    assert label_set(read_classify(labelled(10, "x", 9))).names == ("10", "9", "x")  # not all of them numbers
    assert label_set(read_classify(labelled(True, False))).names == ("false", "true")
    assert label_set(read_classify(labelled("②", "①", "--3"))).names == ("--3", "①", "②")  # digits, but no numbers
    alike = [label_set(read_classify(labelled(*names))).names for names in permutations(["1", "01", "001", "0001"])]
    assert set(alike) == {("0001", "001", "01", "1")}  # a run that goes on must find the same order


def test_lists_are_several_labels() -> None:
    examples = read_classify(labelled(["x", "y"], [], ["y"]))
    labels = label_set(examples)
    assert labels == Labels(("x", "y"), multi=True)
    targets = classify_targets(examples, labels)
    assert targets.tolist() == [[1, 1], [0, 0], [0, 1]] and targets.dtype == np.float32
    assert labels.counts(examples).tolist() == [1, 2]
    with pytest.raises(UserError, match=r"f.jsonl:1: has a list of labels"):
        classify_targets(examples, Labels(("x", "y")))


@pytest.mark.parametrize(
    "fields, problem",
    [
        ([{"text": "x"}], "f.jsonl:1: has no 'label', only 'text'; classification data needs 'text', 'label'"),
        ([{"sentence": "x", "label": "y"}], "f.jsonl:1: has no 'text', only 'sentence', 'label'"),
        ([{"text": "x", "label": "a"}, {"text": "\t", "label": "a"}], "f.jsonl:2: 'text' is empty"),
        ([{"text": "x", "text_pair": "", "label": "a"}], "f.jsonl:1: 'text_pair' is empty"),
        ([{"text": "x", "label": ""}], "f.jsonl:1: 'label' is empty"),
        ([{"text": "x", "label": 0.5}], "f.jsonl:1: the label 0.5 is no class; .* take --task regress"),
        ([{"text": "x", "label": None}], "f.jsonl:1: the label None is no class"),
        ([{"text": "x", "label": ["a", "a"]}], "f.jsonl:1: has a label twice"),
        ([{"text": "x", "label": ["a"]}, {"text": "x", "label": "a"}], "f.jsonl:2: has one label where other records"),
        ([{"text": "x", "label": "a"}, {"text": "x", "label": ["a"]}], "f.jsonl:2: has one label where other records"),
    ],
)
def test_what_is_no_example_is_named(fields: list[dict], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        read_classify(records(*fields))


def test_one_class_alone_and_labels_unknown_at_evaluation() -> None:
    with pytest.raises(UserError, match=r"f.jsonl: all 3 examples have the label 'a'; .* two classes or more"):
        label_set(read_classify(labelled("a", "a", "a")))
    with pytest.raises(UserError, match=r"f.jsonl:2: the label 'c' is not one that the model knows \(a, b\)"):
        classify_targets(read_classify(labelled("a", "c")), Labels(("a", "b")))
    with pytest.raises(UserError, match=r"f.jsonl: no example has a label"):
        label_set(read_classify(labelled([], [])))


def test_numbers_are_scaled_and_back() -> None:
    examples = read_regress(labelled(1, "3.5", 6.0))
    scale = Scale.of(examples)
    targets = scale.targets(examples)
    assert targets.mean() == pytest.approx(0, abs=1e-6) and targets.std() == pytest.approx(1)
    np.testing.assert_allclose(scale.restore(targets), [1, 3.5, 6], rtol=1e-6)
    for bad in ("x", None, True, float("nan"), [1]):
        with pytest.raises(UserError, match=r"f.jsonl:1: the label .* is no finite number"):
            read_regress(labelled(bad))
    with pytest.raises(UserError, match=r"f.jsonl: all 2 labels are equal"):
        Scale.of(read_regress(labelled(2, 2.0)))
    for far in ((1e308, -1e308), (1e-320, 2e-320)):
        with pytest.raises(UserError, match=r"f.jsonl: the labels lie too far apart, or too close"):
            Scale.of(read_regress(labelled(*far)))


def rows_of(data: TextData, tokenizer: PieceTokenizer, **_) -> list[str]:
    batch = data.batch(np.arange(len(data)), np.arange(len(data)))
    marks = {1: "_", 2: "<", 3: ">"}
    return ["".join(marks.get(i) or tokenizer.token_bytes[i].decode() for i in row) for row in batch.ids.tolist()]


def test_rows_of_texts_and_pairs() -> None:
    tokenizer = PieceTokenizer()
    fields = {"text": "abc de", "text_pair": "fgh", "label": "a"}, {"text": "x", "label": "b"}
    examples = read_classify(records(*fields))
    data = TextData(examples, np.array([0, 1]), tokenizer, context=32, token_types=True)
    assert rows_of(data, tokenizer) == ["<abc de>fgh>" + "_" * 10, "<x>" + "_" * 13]
    batch = data.batch(np.array([1, 0]), np.array([40, 41]))
    assert batch.targets.tolist() == [1, 0] and batch.samples == (40, 41) and batch.counted == 2
    assert batch.segments.tolist() == [[0] * 3 + [-1] * 13, [0] * 6 + [-1] * 10]
    assert batch.token_types.tolist() == [[0] * 16, [0] * 4 + [1] * 2 + [0] * 10]
    assert data.truncated == 0


@pytest.mark.parametrize(
    "pieces, expected",
    [((10, 0), (6, 0)), ((10, 2), (3, 2)), ((2, 10), (2, 3)), ((10, 10), (3, 2)), ((4, 1), (4, 1)), ((6, 0), (6, 0))],
)
def test_the_longer_text_is_cut(pieces: tuple[int, int], expected: tuple[int, int]) -> None:
    """A row of eight: five pieces beside the three marks of a pair, six beside the two of a single text."""
    tokenizer = PieceTokenizer()
    texts = ["abc" * n for n in pieces]
    fields = {"text": texts[0], **({"text_pair": texts[1]} if texts[1] else {})}
    data = TextData(read_classify(records(fields), labelled=False), None, tokenizer, context=8)
    body = "abc" * expected[0] + ">" + ("abc" * expected[1] + ">" if texts[1] else "")
    assert rows_of(data, tokenizer)[0].rstrip("_") == "<" + body
    assert data.truncated == int(pieces != expected)
    assert data.batch(np.array([0]), np.array([0])).counted == 0  # nothing to learn without labels


def test_a_context_without_room_for_a_text_is_refused() -> None:
    examples = read_classify(records({"text": "abc" * 9}), labelled=False)
    assert len(TextData(examples, None, PieceTokenizer(), context=4).rows[0]) == 4
    with pytest.raises(UserError, match="a context of 3 leaves no room"):
        TextData(examples, None, PieceTokenizer(), context=3)


def test_what_the_tokenizer_refuses_is_named() -> None:
    with pytest.raises(UserError, match=r"f.jsonl:1: the snowman is not in the vocabulary"):
        TextData(read_classify(records({"text": "\N{SNOWMAN}"}), labelled=False), None, PieceTokenizer(), context=8)


def test_few_lengths_and_enough_rows() -> None:
    assert [bucket(n, 100) for n in (1, 16, 17, 25, 33, 49, 65, 97, 100)] == [16, 16, 24, 32, 48, 64, 96, 100, 100]
    assert bucket(5, 8) == 8
    data = TextData(read_classify(labelled("a", "b")), np.array([0, 1]), PieceTokenizer(), context=8)
    check_rows("f.jsonl", data, 2)
    with pytest.raises(UserError, match=r"f.jsonl: 2 examples are fewer than one batch of 3; .* --train.batch to 2"):
        check_rows("f.jsonl", data, 3)
