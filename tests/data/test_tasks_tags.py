"""Words keep one tag however they are cut; a file that misses a column is named with its line."""

import json
from pathlib import Path

import numpy as np
import pytest

from minillm.config import UserError
from minillm.data.batch import IGNORED
from minillm.data.labels import Labels
from minillm.data.offsets import encode_with_offsets
from minillm.data.records import Record
from minillm.data.tags import TagData, TagExample, read_tags, tag_set

from .task_tokenizer import PieceTokenizer

LABELS = Labels(("O", "B-X", "I-X"))


def sentence(words: str, tags: str = "") -> TagExample:
    chosen = tuple(tags.split()) if tags else tuple("O" for _ in words.split())
    return TagExample(Record("f:1", {}), tuple(words.split()), chosen)


CONLL = [(("EU", "rejects", "it"), ("B-ORG", "O", "O")), (("Peter",), ("B-PER",)), (("#", "1"), ("O", "O"))]


@pytest.mark.parametrize(
    "content",
    [
        "EU\tB-ORG\nrejects\tO\nit\tO\n\nPeter\tB-PER\n \t \n\n#\tO\n1\tO\n",
        "EU B-ORG\r\nrejects   O\r\nit \t O\r\n\r\nPeter B-PER\r\n\r\n# O\r\n1 O",
        "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects V B-VP O\nit P B-NP O\n\nPeter N B-NP B-PER\n"
        "-DOCSTART- -X- -X- O\n# N N O\n1 N N O\n",
    ],
)
@pytest.mark.parametrize("name", ["f.conll", "f.txt", "f.tsv"])
def test_conll(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert [(example.words, example.tags) for example in read_tags(tmp_path / name)] == CONLL


def test_a_tab_lets_words_hold_spaces(tmp_path: Path) -> None:
    (tmp_path / "f.conll").write_text("New York\tB-LOC\nwins\tO\n")
    assert read_tags(tmp_path / "f.conll")[0].words == ("New York", "wins")


def test_records_and_lines_to_predict(tmp_path: Path) -> None:
    fields = [{"tokens": list(words), "tags": list(tags)} for words, tags in CONLL]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(field) + "\n" for field in fields))
    (tmp_path / "f.json").write_text(json.dumps(fields))
    for name in ("f.jsonl", "f.json"):
        assert [(example.words, example.tags) for example in read_tags(tmp_path / name)] == CONLL
    (tmp_path / "p.txt").write_text("EU rejects  it\nPeter\n")
    (tmp_path / "p.jsonl").write_text('{"text": "EU rejects it"}\n{"tokens": ["Peter"]}\n')
    (tmp_path / "p.conll").write_text("EU\nrejects\nit\n\nPeter\n")
    (tmp_path / "tagged.conll").write_text("EU\tX\nrejects\tX\nit\tX\n\nPeter\tX\n")  # not read
    for name in ("p.txt", "p.jsonl", "p.conll", "tagged.conll"):
        found = read_tags(tmp_path / name, labelled=False)
        assert [(example.words, example.tags) for example in found] == [(words, None) for words, _ in CONLL[:2]]


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("f.conll", "EU\tB-ORG\nrejects\n", "f.conll:2: 'rejects' has 1 of 2 columns; write the word, a tab"),
        ("f.conll", "EU\tB-ORG\n\trejects\n", "f.conll:2: 'rejects' has 1 of 2 columns"),
        ("f.conll", "EU\n", "f.conll:1: 'EU' has 1 of 2 columns"),
        ("f.conll", "a N O\nb O\n", "f.conll:2: 'b O' has 2 of 3 columns"),
        ("f.conll", "\n \n", "f.conll holds no sentence"),
        ("f.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', "f.jsonl:1: has 2 tokens but 1 tags"),
        ("f.jsonl", '{"tokens": ["a"]}', "f.jsonl:1: has no 'tags'"),
        ("f.jsonl", '{"tokens": "a b", "tags": "O O"}', "f.jsonl:1: 'tokens' is no list of strings"),
        ("f.jsonl", '{"tokens": [], "tags": []}', "f.jsonl:1: 'tokens' is no list of strings"),
        ("f.jsonl", '{"tokens": ["a", " "], "tags": ["O", "O"]}', "f.jsonl:1: 'tokens' is empty"),
    ],
)
def test_what_is_no_sentence_is_named(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=problem):
        read_tags(tmp_path / name)


def test_tags_are_completed_by_prefix_and_type() -> None:
    examples = [sentence("a b c d", "B-X O B-Y I-Y")]
    assert tag_set(examples).names == ("O", "B-X", "I-X", "B-Y", "I-Y")
    assert tag_set([sentence("a b", "VERB NOUN")]).names == ("NOUN", "VERB")
    with pytest.raises(UserError, match="every tag is 'O'"):
        tag_set([sentence("a b")])
    with pytest.raises(UserError, match="f:1: the label 'B-Z' is not one that the model knows"):
        TagData([sentence("a", "B-Z")], LABELS, PieceTokenizer(), context=8)


def test_the_first_piece_carries_the_tag() -> None:
    tokenizer = PieceTokenizer()
    data = TagData([sentence("abcdefg h ijkl", "B-X I-X O"), sentence("m", "I-X")], LABELS, tokenizer, context=32)
    batch = data.batch(np.array([0, 1]), np.array([0, 1]))
    row = [tokenizer.token_bytes[i].decode() for i in batch.ids[0].tolist()][1:7]
    assert row == ["abc", "def", "g", " h", " ijk", "l"]
    assert batch.targets[0].tolist() == [IGNORED, 1, IGNORED, IGNORED, 2, 0, IGNORED] + [IGNORED] * 9
    assert batch.targets[1].tolist() == [IGNORED, 2] + [IGNORED] * 14
    assert batch.counted == 4 and data.truncated == data.dropped == 0


class SpaceApart(PieceTokenizer):
    """Pieces for spaces alone, a piece that is half of a character, and its own offsets."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return list(range(4, 4 + len(text))), [(i, i + 1) for i in range(len(text))]


def test_a_tokenizer_may_give_its_own_offsets() -> None:
    data = TagData([sentence("ab c", "B-X O")], LABELS, SpaceApart(), context=32)
    assert data.targets == [[IGNORED, 1, IGNORED, IGNORED, 0, IGNORED]]


class WithoutControls(PieceTokenizer):
    """Says nothing of the bell, as BERT's tokenizers do."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        kept = [i for i, character in enumerate(text) if character not in " \a"]
        return [4] * len(kept), [(i, i + 1) for i in kept]


def test_words_without_a_piece_are_named() -> None:
    examples = [sentence("a \a b \a\a", "B-X O I-X O"), sentence("a", "O")]
    data = TagData(examples, LABELS, WithoutControls(), context=4)
    assert len(data) == 2 and data.untagged() == [[1, 3], []]
    assert data.tags([np.array([0, 1, 2, 0]), np.array([0, 1, 0])], LABELS) == [["B-X", "O", "I-X", "O"], ["B-X"]]


class Bytes(PieceTokenizer):
    token_bytes = [b""] * 4 + [bytes([i]) for i in range(256)]

    def __init__(self) -> None:
        pass

    def encode(self, text: str) -> list[int]:
        return [4 + byte for byte in text.encode()]


class Forgetful(PieceTokenizer):
    def encode(self, text: str) -> list[int]:
        return super().encode(text)[1:]


def test_offsets_are_characters() -> None:
    record = Record("f:1", {})
    _, offsets = encode_with_offsets(PieceTokenizer(), record, "ab é北京xy")
    assert offsets.tolist() == [[0, 2], [2, 6], [6, 8]]
    _, offsets = encode_with_offsets(Bytes(), record, "é北")
    assert offsets.tolist() == [[0, 1]] * 2 + [[1, 2]] * 3
    assert encode_with_offsets(Bytes(), record, "")[1].shape == (0, 2)
    with pytest.raises(UserError, match="f:1: the tokenizer does not keep every byte of the text"):
        encode_with_offsets(Forgetful(), record, "abc d")
    with pytest.raises(UserError, match="f:1: the snowman"):
        encode_with_offsets(PieceTokenizer(), record, "\N{SNOWMAN}")


def test_pieces_of_characters_belong_to_their_word() -> None:
    data = TagData([sentence("é 北京 x", "B-X O I-X")], LABELS, Bytes(), context=32)
    words = ["é", " ", "北京", " ", "x"]
    starts = np.cumsum([1, *(len(word.encode()) for word in words)])
    assert data.first_pieces == [[(0, starts[0]), (1, starts[2]), (2, starts[4])]]
    assert [data.targets[0][at] for _, at in data.first_pieces[0]] == [1, 0, 2]


@pytest.mark.parametrize("context", [5, 6, 7, 11, 40])
def test_long_sentences_are_cut_between_words_and_no_tag_is_lost(context: int) -> None:
    tokenizer = PieceTokenizer()
    words = [f"{'w' * (1 + 5 * i % 9)}{i}" for i in range(23)]
    tags = [LABELS.names[i % 3] for i in range(23)]
    examples = [sentence(" ".join(words), " ".join(tags)), sentence("a b", "B-X I-X")]
    data = TagData(examples, LABELS, tokenizer, context=context)
    assert max(map(len, data.rows)) <= context and (context == 40) == (len(data) < 5)
    truth = [np.array(targets) for targets in data.targets]  # a perfect model predicts what it was given
    assert data.tags(truth, LABELS) == [tags, ["B-X", "I-X"]]
    kept = "".join(
        tokenizer.text(row[1:-1]) for row, number in zip(data.rows, data.example_of, strict=True) if not number
    )
    assert (kept == " ".join(words)) == (data.truncated == 0)
    assert (data.truncated == 0) == (context > 5)
    read = sum(len(row) - 2 for row, number in zip(data.rows, data.example_of, strict=True) if not number)
    assert data.lost == [len(tokenizer.encode(" ".join(words))) - read, 0] and data.untagged() == [[], []]


def test_without_labels_nothing_is_a_target() -> None:
    data = TagData([TagExample(Record("f:1", {}), ("ab", "c"), None)], None, PieceTokenizer(), context=8)
    assert data.batch(np.array([0]), np.array([0])).counted == 0
    assert data.tags([np.array([0, 1, 2, 0])], LABELS) == [["B-X", "I-X"]]
