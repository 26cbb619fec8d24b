"""Answers are found again at the tokens that were their targets, in whichever window; wrong files are named."""

import json
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minillm.config import UserError
from minillm.data.records import Record
from minillm.data.spans import Answer, SpanData, SpanExample, read_spans
from minillm.tasks.words import SpanQA

from .task_tokenizer import PieceTokenizer

CONTEXT = "The cat sat on the mat. A dog barked at noon; nobody answered."
DOG = {"id": "q1", "question": "Who barked?", "answers": [{"text": "A dog", "answer_start": 24}]}
NOBODY = {"id": "q2", "question": "Who purred?", "answers": [], "is_impossible": True}


def squad(*questions: dict) -> dict:
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": list(questions)}]}]}


def flat(question: dict) -> dict:
    return {**question, "context": CONTEXT}


EXPECTED = [("q1", "Who barked?", CONTEXT, (("A dog", 24),)), ("q2", "Who purred?", CONTEXT, ())]


@pytest.mark.parametrize(
    "name, content",
    [
        ("s.json", json.dumps(squad(DOG, NOBODY))),
        ("s.json", json.dumps(squad(DOG, {**NOBODY, "plausible_answers": [{"text": "The cat", "answer_start": 0}]}))),
        ("s.json", json.dumps([flat(DOG), flat(NOBODY)])),
        ("s.json", json.dumps([flat(DOG), {**flat(DOG), **NOBODY, "answers": DOG["answers"]}])),
        ("s.jsonl", "\n".join(json.dumps(flat(question)) for question in (DOG, NOBODY))),
        ("s.jsonl", json.dumps(flat({**DOG, "answers": {"text": ["A dog"], "answer_start": [24]}})) + "\n"
         + json.dumps(flat({**NOBODY, "answers": {"text": [], "answer_start": []}}))),
    ],
)  # fmt: skip
def test_every_format(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert [(e.key, e.question, e.context, e.answers) for e in read_spans(tmp_path / name)] == EXPECTED
    assert [e.answers for e in read_spans(tmp_path / name, labelled=False)] == [(), ()]


@pytest.mark.parametrize(
    "content, problem",
    [
        (squad(NOBODY, {**DOG, "answers": [{"text": "A dog", "answer_start": 25}]}),
         r"s.json:\d+: question 'q1': the answer 'A dog' is not in its context at answer_start 25; it stands at 24"),
        (squad({**DOG, "answers": [{"text": "a dog", "answer_start": 24}]}), "nor anywhere else: copy it letter"),
        (squad({**DOG, "answers": [{"text": "A dog", "answer_start": -38}]}), "not in its context at answer_start -38"),
        (squad({**DOG, "answers": [{"text": "A dog"}]}), "'q1': an answer lacks \"text\", or \"answer_start\""),
        (squad({**DOG, "answers": [{"text": "", "answer_start": 0}]}), "'answer' is empty"),
        (squad({**DOG, "answers": "A dog"}), "\"answers\" is no list"),
        (squad({**DOG, "question": ""}), "'question' is empty"),
        (squad({"id": "q1", "question": "Who?"}), "has no 'answers'"),
        (squad(), "holds no question"),
        ({"data": [{"title": "t"}]}, "lacks its list \"paragraphs\""),
        ({"paragraphs": []}, "s.json:1: has no list \"data\""),
        ([{"question": "Who?", "context": "x", "answers": {"text": ["x"]}}], r"s.json:2: has not as many answer_start"),
    ],
)  # fmt: skip
def test_what_is_no_question_is_named(tmp_path: Path, content, problem: str) -> None:
    (tmp_path / "s.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(UserError, match=problem):
        read_spans(tmp_path / "s.json")


def test_the_line_is_the_questions(tmp_path: Path) -> None:
    wrong = {**DOG, "answers": [{"text": "A cow", "answer_start": 24}]}
    text = json.dumps(squad(NOBODY, wrong), indent=1)
    (tmp_path / "s.json").write_text(text)
    line = next(n for n, line in enumerate(text.split("\n"), 1) if '"q1"' in line)
    with pytest.raises(UserError, match=f"s.json:{line}: question 'q1'"):
        read_spans(tmp_path / "s.json")


def test_many_questions_take_time_in_proportion(tmp_path: Path) -> None:
    questions = [{**DOG, "id": f"q{number}"} for number in range(8000)]
    (tmp_path / "s.json").write_text(json.dumps(squad(*questions), indent=1))
    began = time.process_time()
    lines = [int(e.record.where.split(":")[1]) for e in read_spans(tmp_path / "s.json")]
    assert time.process_time() - began < 2  # searching the whole file for each takes longer
    assert set(np.diff(lines)) == {10}  # lines of each question


def example(question: str, *answers: str, context: str = CONTEXT) -> SpanExample:
    places = tuple((answer, context.index(answer)) for answer in answers)
    return SpanExample(Record("f:1", {}), "k", question, context, places)


def perfect(data: SpanData) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The scores of a model that is sure of the targets."""
    starts, ends = ([np.zeros(len(row)) for row in data.rows] for _ in range(2))
    for row, (first, last) in enumerate(data.targets):
        starts[row][first] = ends[row][last] = 5.0
    return starts, ends


@pytest.mark.parametrize("context", [18, 22, 64])
@pytest.mark.parametrize("answer", ["The cat", "dog", "noon", "nobody answered.", "t"])
def test_the_targets_spell_the_answer(context: int, answer: str) -> None:
    """Whole tokens: an answer that begins or ends inside one takes the rest of it along."""
    data = SpanData([example("Who?", answer), example("Why?")], PieceTokenizer(), context=context)
    assert (context < 64) == (len(data) > 2)
    found, none = data.answers(*perfect(data))
    assert answer in found.text and len(found.text) <= len(answer) + 4
    assert found.score == 10.0 and found.null == (0.0 if len(data.examples) == len(data) else found.null)
    assert none.score == 0.0 and none.null == 10.0
    assert data.truncated == data.dropped == 0
    inside = SpanData([example("Who?", "nob")], PieceTokenizer(), context=context)  # the word goes on behind it
    assert inside.answers(*perfect(inside))[0].text == "nob"


def test_rows_targets_and_token_types() -> None:
    tokenizer = PieceTokenizer()
    data = SpanData([example("Who?", "A dog")], tokenizer, context=64, token_types=True)
    batch = data.batch(np.array([0]), np.array([9]))
    ids = batch.ids[0].tolist()
    first, last = batch.targets[0].tolist()
    assert tokenizer.text(ids[first : last + 1]) == " A dog"
    assert ids[0] == 2 and tokenizer.text(ids[1:3]) == "Who?" and ids[3] == 3
    length = len(data.rows[0])
    assert ids[length - 1] == 3 and tokenizer.text(ids[4 : length - 1]) == CONTEXT
    assert batch.token_types[0].tolist() == [0] * 4 + [1] * (length - 4) + [0] * (len(ids) - length)
    assert batch.segments[0].tolist() == [0] * length + [-1] * (len(ids) - length)
    assert SpanData([example("Who?")], tokenizer, context=64).batch(np.array([0]), np.array([0])).targets.tolist() == [
        [0, 0]
    ]
    blank = SpanData([example("Who?")], tokenizer, context=64, labelled=False).batch(np.array([0]), np.array([0]))
    assert blank.counted == 0


def test_windows_overlap_and_cover_the_context() -> None:
    tokenizer = PieceTokenizer()
    context = " ".join(f"w{i}" for i in range(50))
    data = SpanData([example("Who?", context=f" {context}")], tokenizer, context=16, overlap=4)
    windows = [tokenizer.text(row[4:-1]).split() for row in data.rows]
    assert all(before[-4:] == after[:4] for before, after in pairwise(windows))
    assert dict.fromkeys(word for window in windows for word in window) == dict.fromkeys(context.split())
    for word in context.split():
        targets = SpanData(
            [example("Who?", f" {word}", context=f" {context}")], tokenizer, context=16, overlap=4
        ).targets
        assert [target != (0, 0) for target in targets] == [word in window for window in windows]
    assert max(map(len, data.rows)) == 16


def test_what_no_window_holds_is_counted() -> None:
    tokenizer = PieceTokenizer()
    context = " ".join(f"w{i}" for i in range(50))
    answer = " ".join(f"w{i}" for i in range(20, 40))
    data = SpanData([example("Who?", answer, context=context)], tokenizer, context=16)
    assert data.truncated == 1 and data.lost == [0] and set(data.targets) == {(0, 0)}
    long = SpanData([example("Why " * 40, "dog")], tokenizer, context=32)
    assert long.truncated == 1 and max(map(len, long.rows)) == 32
    assert long.lost == [len(tokenizer.encode("Why " * 40)) - (32 - 3) // 2]


def test_the_best_span_lies_in_order_and_is_not_endless() -> None:
    tokenizer = PieceTokenizer()
    context = " ".join(f"w{i}" for i in range(50))
    data = SpanData([example("Who?", context=context)], tokenizer, context=64)
    start, end = np.zeros((2, len(data.rows[0])))
    begin = data.begins[0]
    start[0], end[0] = 1.0, 2.0  # no answer
    start[1], end[1] = 90.0, 90.0  # inside the question, where no answer can be
    start[begin + 5], end[begin + 3] = 9.0, 8.0  # ends before it begins
    start[begin + 2] = 4.0
    start[begin], end[begin + 40] = 6.0, 7.0  # 41 words are too many
    (found,) = data.answers([start], [end])
    assert (found.text, found.score, found.null) == ("w0 w1 w2 w3", 14.0, 3.0)


def test_an_answer_whose_lead_reaches_the_threshold_is_given() -> None:
    """As the threshold was tuned: see `best_null_threshold`."""
    task, found = SpanQA(), [Answer("noon", 3.0, 1.0), Answer("dog", 2.75, 1.0)]
    assert task._given(found, SimpleNamespace(threshold=torch.tensor([2.0]))) == ["noon", "dog"]
    task.unanswerable = True
    assert task._given(found, SimpleNamespace(threshold=torch.tensor([2.0]))) == ["noon", ""]
