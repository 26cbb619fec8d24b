"""The default data of each task reads as a file would, is the same each time, and asks what can be answered."""

import ast
import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from minillm.config import UserError
from minillm.data.chat import ChatData, read_chat
from minillm.data.labels import Scale, classify_targets, label_set, read_classify, read_regress
from minillm.data.preference import read_preferences
from minillm.data.records import read_records
from minillm.data.seq2seq import read_pairs
from minillm.data.spans import SpanData, span_examples
from minillm.data.stdlib_source import functions
from minillm.data.stdlib_tasks import FAMILIES, LIMIT, PAIRS, stdlib_records
from minillm.data.tags import TagData, tag_examples, tag_set
from minillm.evaluation.answers import exact_match
from minillm.evaluation.entities import entities

from .task_tokenizer import PieceTokenizer, encode_chat

READERS = {
    "classify": read_classify,
    "regress": read_regress,
    "tag": tag_examples,
    "seq2seq": read_pairs,
    "span-qa": span_examples,
    "chat": read_chat,
    "preference": read_preferences,
}


@pytest.mark.parametrize("task", READERS)
def test_written_to_a_file_it_reads_the_same(tmp_path: Path, task: str) -> None:
    records = stdlib_records(task, seed=3)[:40]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record.fields) + "\n" for record in records))
    read = READERS[task]
    for mine, theirs in zip(read(read_records(tmp_path / "d.jsonl")), read(records), strict=True):
        assert {**vars(mine), "record": None} == {**vars(theirs), "record": None}


@pytest.mark.parametrize("task", READERS)
def test_a_seed_gives_the_same_few_thousand_examples(task: str) -> None:
    found = stdlib_records(task)
    assert (PAIRS if task == "preference" else 2000) <= len(found) <= (PAIRS if task == "preference" else LIMIT)
    assert [record.fields for record in stdlib_records(task)] == [record.fields for record in found]
    assert [record.fields for record in stdlib_records(task, seed=1)] != [record.fields for record in found]
    assert len({str(record.fields) for record in found}) > 0.95 * len(found)


def test_code_is_cut_without_docstring_and_imports() -> None:
    every = functions()
    wrap = next(f for f in every if f.file == "textwrap.py" and f.name == "wrap" and f.owner is None)
    assert wrap.module == "textwrap" and wrap.arguments == ("text", "width")
    assert wrap.docstring == "Wrap a single paragraph of text, returning a list of wrapped lines."
    assert wrap.code.startswith("def wrap(text, width=70, **kwargs):\n") and '"""' not in wrap.code
    method = next(f for f in every if f.file == "textwrap.py" and f.name == "_munge_whitespace")
    assert method.owner == "class TextWrapper:" and method.arguments == ("text",)
    assert method.code.startswith("def _munge_whitespace(self, text):\n    ")
    assert not any(line.strip().startswith("import ") for f in every[:3000] for line in f.code.split("\n"))


def test_families_are_balanced_and_the_rare_one_is_rare() -> None:
    examples = read_classify(stdlib_records("classify"))
    counts = label_set(examples).counts(examples)
    assert len(counts) == len(FAMILIES) and counts.min() > 0.8 * counts.max()
    examples = read_classify(stdlib_records("classify", unbalanced=True))
    labels = label_set(examples)
    assert labels.names == ("imports", "other")
    share = (classify_targets(examples, labels) == 0).mean()
    assert 0.04 < share < 0.06


def test_branches_are_those_of_the_text() -> None:
    examples = read_regress(stdlib_records("regress"))
    assert Scale.of(examples).std > 0.5
    simple = [e for e in examples if not {"if", "for", "while", "except", "and", "or", "case"} & set(e.text.split())]
    assert len(simple) > 100 and np.mean([e.label == 1 for e in simple]) > 0.9
    for e in examples[:50]:
        ifs = sum(isinstance(node, ast.If | ast.For | ast.While) for node in ast.walk(ast.parse(e.text)))
        assert e.label >= 1 + ifs


def test_entities_are_those_of_the_source() -> None:
    examples = tag_examples(stdlib_records("tag"))
    labels = tag_set(examples)
    kinds = {name.partition("-")[2] for name in labels.names if name != "O"}
    assert kinds == {"BASE", "CALL", "CLASS", "FUNCTION", "PARAMETER", "STRING"}
    for example in examples[:300]:
        found = [(kind, "".join(example.words[a:b])) for kind, a, b in entities(example.tags)]
        at = example.words.index("def")
        assert ("FUNCTION", example.words[at + 1]) in found
        code = " ".join(example.words)
        for kind, text in found:
            if kind == "CALL":
                assert " . ".join(text.split(".")) + " (" in code
    data = TagData(examples[:200], labels, PieceTokenizer(), context=128)
    assert data.tags([np.array(t) for t in data.targets], labels) == [list(e.tags) for e in examples[:200]]


def test_names_are_not_in_their_docstrings() -> None:
    for example in read_pairs(stdlib_records("seq2seq")):
        assert example.target.strip("_").lower() not in example.source.lower()
        assert example.target.isidentifier()


def test_questions_are_answered_by_their_context() -> None:
    examples = span_examples(stdlib_records("span-qa"))
    unanswerable = np.mean([not example.answers for example in examples])
    assert 0.2 < unanswerable < 0.4
    assert len(Counter(example.question.split()[0] for example in examples)) >= 2
    data = SpanData(examples[:300], PieceTokenizer(), context=192)
    starts, ends = ([np.zeros(len(row)) for row in data.rows] for _ in range(2))
    for row, (first, last) in enumerate(data.targets):
        starts[row][first] = ends[row][last] = 5.0
    found = data.answers(starts, ends)
    exact = [
        exact_match(answer.text if answer.score > answer.null else "", [text for text, _ in example.answers])
        for answer, example in zip(found, examples[:300], strict=True)
        if not example.answers or len(example.answers[0][0]) < 40
    ]
    assert np.mean(exact) > 0.6  # the toy's pieces take letters of the neighbours along
    for example in examples:
        if example.question.endswith("return?") and not example.answers:
            returned = [n for n in ast.walk(ast.parse(example.context)) if isinstance(n, ast.Return)]
            assert all(node.value is None for node in returned)


def test_conversations_and_preferences_fit_a_short_context() -> None:
    chats = read_chat(stdlib_records("chat"))
    assert {len(example.messages) for example in chats} == {2, 4}
    tokenizer = PieceTokenizer()
    data = ChatData(chats, partial(encode_chat, tokenizer), pad_id=1, context=256)
    assert data.truncated == data.dropped == 0
    for example in read_preferences(stdlib_records("preference")):
        assert example.chosen != example.rejected and len(example.prompt) == 1


def test_prose_is_docstrings_each_once() -> None:
    texts = [record.text("text") for record in stdlib_records("lm")]
    known = {function.docstring for function in functions()}
    assert len(set(texts)) == len(texts) == 3000 and min(map(len, texts)) >= 15 and set(texts) <= known


def test_what_has_no_default_data() -> None:
    with pytest.raises(UserError, match="no default data for poetry; name a file with --data"):
        stdlib_records("poetry")
    with pytest.raises(UserError, match="no default data for tag unbalanced"):
        stdlib_records("tag", unbalanced=True)
