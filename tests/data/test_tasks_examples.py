"""One door to the examples of every task, from a file or from the default data."""

import json
from pathlib import Path

import pytest

from minillm.config import UserError
from minillm.data.examples import read_examples
from minillm.data.stdlib_tasks import stdlib_records

KINDS = {
    "classify": "TextExample",
    "regress": "TextExample",
    "tag": "TagExample",
    "seq2seq": "PairExample",
    "span-qa": "SpanExample",
    "chat": "ChatExample",
    "preference": "PreferenceExample",
}


@pytest.mark.parametrize("task", KINDS)
def test_default_data_written_to_a_file_reads_the_same(tmp_path: Path, task: str) -> None:
    fields = [record.fields for record in stdlib_records(task, seed=3)[:40]]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(field) + "\n" for field in fields))
    from_file, default = read_examples(task, tmp_path / "d.jsonl"), read_examples(task, "stdlib", seed=3)
    assert {type(example).__name__ for example in from_file} == {KINDS[task]}
    assert [e.record.where.rsplit("/")[-1] for e in from_file] == [f"d.jsonl:{line}" for line in range(1, 41)]
    for mine, theirs in zip(from_file, default[:40], strict=True):
        assert {**vars(mine), "record": None} == {**vars(theirs), "record": None}


@pytest.mark.parametrize(
    "task, name, content, field, value",
    [
        ("classify", "p.txt", "one\ntwo\n", "text", ["one", "two"]),
        ("regress", "p.jsonl", '{"text": "one"}\n', "text", ["one"]),
        ("seq2seq", "p.txt", "one\ntwo\n", "source", ["one", "two"]),
        ("tag", "p.txt", "one\n", "words", [("one",)]),
        ("chat", "p.txt", "one\n", "messages", [({"role": "user", "content": "one"},)]),
        ("span-qa", "p.jsonl", '{"question": "one?", "context": "two"}', "question", ["one?"]),
    ],
)
def test_inputs_to_predict_need_no_labels(tmp_path: Path, task: str, name: str, content: str, field, value) -> None:
    (tmp_path / name).write_text(content)
    assert [getattr(example, field) for example in read_examples(task, tmp_path / name, labelled=False)] == value
    with pytest.raises(UserError, match=r":1: "):
        read_examples(task, tmp_path / name)


def test_what_cannot_be_read() -> None:
    with pytest.raises(UserError, match="lm has no examples to read; choose classify, "):
        read_examples("lm", "stdlib")
