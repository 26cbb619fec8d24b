"""What is written for a text: only replies and targets are learnt, and what the context cuts is counted or refused."""

from functools import partial

import numpy as np
import pytest

from minillm.config import UserError
from minillm.data.batch import IGNORED
from minillm.data.chat import ChatData, pack_rows, read_chat
from minillm.data.preference import PreferenceData, read_preferences
from minillm.data.records import Record
from minillm.data.seq2seq import PairData, Sides, read_pairs
from tokenizer import chat as template

from .task_tokenizer import PieceTokenizer, encode_chat

MARKS = {1: "_", 2: "<", 3: ">", IGNORED: "."}
SIDES = Sides([2], [2], [3])


def records(*fields: dict) -> list[Record]:
    return [Record(f"f.jsonl:{line}", field) for line, field in enumerate(fields, 1)]


def shown(tokenizer: PieceTokenizer, ids) -> str:
    return "".join(MARKS.get(int(i)) or tokenizer.token_bytes[int(i)].decode() for i in ids)


def turns(*contents: str) -> dict:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]}


def chat(tokenizer: PieceTokenizer, *fields: dict, **options) -> ChatData:
    return ChatData(read_chat(records(*fields)), partial(encode_chat, tokenizer), pad_id=1, **options)


def test_only_replies_are_learnt() -> None:
    tokenizer = PieceTokenizer()
    data = chat(tokenizer, turns("aaa", "bbb", "ccc", "dddeee"), context=32)
    batch = data.batch(np.array([0]), np.array([0]))
    assert shown(tokenizer, batch.ids[0]) == "<<aaa><bbb><ccc><dddeee" + "_" * 3
    assert shown(tokenizer, batch.targets[0]) == "....bbb>....dddeee>" + "." * 3
    assert (batch.segments[0] >= 0).sum() == 13 and batch.segments.max() == 0


def test_instructions_become_a_question_and_its_answer() -> None:
    (first, second) = read_chat(
        records(
            {"instruction": "Spell.", "input": "freind", "output": "friend"},
            {"instruction": "Go.", "input": " \n", "output": "No."},
        )
    )
    assert [message["content"] for message in first.messages] == ["Spell.\nfreind", "friend"]
    assert [message["role"] for message in first.messages] == ["user", "assistant"]
    assert [message["content"] for message in second.messages] == ["Go.", "No."]
    (asked,) = read_chat(records({"instruction": "Go."}), labelled=False)
    assert [message["content"] for message in asked.messages] == ["Go."]


def test_conversations_share_rows_without_seeing_each_other() -> None:
    tokenizer = PieceTokenizer()
    fields = [turns("aaa" * (1 + i % 4), "bbb") for i in range(11)]
    data = chat(tokenizer, *fields, context=20)
    alone = chat(tokenizer, *fields, context=20, pack=False)
    assert sorted(i for pack in data.packs for i in pack) == list(range(11))
    assert len(data) < len(alone) == 11
    batch = data.batch(np.arange(len(data)), np.arange(len(data)))
    assert batch.counted == 11 * 2
    for row, pack in enumerate(data.packs):
        for number, i in enumerate(pack):
            mine = batch.segments[row] == number
            assert batch.ids[row][mine].tolist() == alone.ids[i]
            assert batch.targets[row][mine].tolist() == alone.targets[i]
        assert (batch.segments[row] == -1).sum() == batch.ids.shape[1] - sum(len(data.ids[i]) for i in pack)


def test_packing_fits_and_is_tight() -> None:
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, 65, size=200)
        rows = pack_rows(lengths.tolist(), 64)
        assert sorted(i for row in rows for i in row) == list(range(200))
        assert max(lengths[row].sum() for row in rows) <= 64
        assert len(rows) <= 1.1 * lengths.sum() / 64 + 1
    assert pack_rows([], 64) == []


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"question": "x", "reply": "y"}, "has neither 'messages' nor 'instruction' and 'output', only 'question'"),
        ({"instruction": "x"}, "f.jsonl:1: has no 'output'"),
        ({"instruction": " ", "output": "y"}, "f.jsonl:1: 'instruction' is empty"),
        ({"messages": "x"}, 'f.jsonl:1: "messages" is no list of objects'),
        ({"messages": ["x"]}, 'f.jsonl:1: "messages" is no list of objects'),
        ({"messages": [{"role": "user"}]}, "f.jsonl:1: message 0 has no 'content'"),
        (turns("x", ""), "f.jsonl:1: 'content of message 1' is empty"),
        (turns("x"), "f.jsonl:1: has no message of the assistant"),
        ({"messages": []}, "f.jsonl:1: has no message of the assistant"),
        ({"messages": [{"role": "dog", "content": "x"}, *turns("x", "y")["messages"]]}, "f.jsonl:1: unknown role"),
        (turns("x", "\N{SNOWMAN}"), "f.jsonl:1: the snowman"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_named(fields: dict, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        chat(PieceTokenizer(), fields, context=32)


def test_content_that_is_no_string_is_named_by_the_template() -> None:
    examples = read_chat(records({"messages": [*turns("x")["messages"], {"role": "assistant", "content": 1}]}))
    with pytest.raises(UserError, match=r"f.jsonl:1: message 1 has content that is no string: 1"):
        ChatData(examples, partial(template.encode_chat, None), pad_id=1, context=32)


def test_replies_that_the_context_cuts() -> None:
    """A row of eight takes nine tokens: three marks, the question, a mark, and what is left for the reply."""
    tokenizer = PieceTokenizer()
    whole, part, gone = turns("aaa", "bbb"), turns("aaa", "bbb" * 9), turns("aaa" * 9, "bbb")
    data = chat(tokenizer, whole, part, gone, context=8, cut_limit=0.7, pack=False)
    assert (data.truncated, data.dropped, len(data)) == (2, 1, 2)
    assert shown(tokenizer, data.targets[1]) == "....bbbbbbbbbbbb"  # no end: it was cut off
    chat(tokenizer, *[whole] * 19, part, context=8)  # one in twenty passes
    with pytest.raises(UserError, match=r"f.jsonl: 1 of 19 replies are cut by the context of 8 tokens; .*longer"):
        chat(tokenizer, *[whole] * 18, part, context=8)
    with pytest.raises(UserError, match=r"f.jsonl: every reply is cut by the context of 8"):
        chat(tokenizer, gone, gone, context=8, cut_limit=1.0)


def pairs(tokenizer: PieceTokenizer, *fields: dict, **options) -> PairData:
    return PairData(read_pairs(records(*fields), labelled="target" in fields[0]), tokenizer, **options)


def test_decoder_rows() -> None:
    tokenizer = PieceTokenizer()
    data = pairs(tokenizer, {"source": "aaabbb", "target": "cccddd"}, context=32, sides=None)
    batch = data.batch(np.array([0]), np.array([0]))
    assert shown(tokenizer, batch.ids[0]) == "<aaabbb>cccddd" + "_" * 10
    assert shown(tokenizer, batch.targets[0]) == "...cccddd>" + "." * 10
    assert batch.segments[0].tolist() == [0] * 6 + [-1] * 10 and batch.source is None
    assert shown(tokenizer, data.sources[0]) == "<aaabbb>"  # the prompt


def test_encoder_decoder_rows() -> None:
    tokenizer = PieceTokenizer()
    fields = {"source": "aaabbb", "target": "cccddd"}, {"source": "a", "target": "b"}
    data = pairs(tokenizer, *fields, context=32, sides=SIDES)
    batch = data.batch(np.array([0, 1]), np.array([0, 1]))
    assert [shown(tokenizer, row) for row in batch.source] == ["<aaabbb>" + "_" * 12, "<a>" + "_" * 13]
    assert [shown(tokenizer, row) for row in batch.ids] == ["<cccddd" + "_" * 13, "<b" + "_" * 14]
    assert [shown(tokenizer, row) for row in batch.targets] == ["cccddd>" + "." * 13, "b>" + "." * 14]
    assert batch.source_segments.tolist() == [[0] * 4 + [-1] * 12, [0] * 3 + [-1] * 13]
    assert batch.segments.tolist() == [[0] * 3 + [-1] * 13, [0] * 2 + [-1] * 14]


@pytest.mark.parametrize("start", [[3], [3, 2]])
def test_a_decoder_that_begins_otherwise_writes_the_mark_of_the_source_first(start: list[int]) -> None:
    """As BART's, whether its config forces that mark or not."""
    tokenizer = PieceTokenizer()
    data = pairs(tokenizer, {"source": "aaabbb", "target": "cccddd"}, context=32, sides=Sides(start, [2], [3]))
    batch = data.batch(np.array([0]), np.array([0]))
    assert [shown(tokenizer, row[0, :5]) for row in (batch.source, batch.ids, batch.targets)] == [
        "<aaabbb>_",
        "><cccddd_",
        "<cccddd>.",
    ]
    assert Sides([3, 4], [2], [3]).opening == [3, 4]


@pytest.mark.parametrize(
    "source, target, kept_source, kept_target, cut",
    [(20, 2, 12, 2, 0), (2, 20, 2, 13, 1), (20, 20, 7, 8, 1), (2, 12, 2, 12, 0), (2, 13, 2, 13, 1)],
)
def test_a_decoders_row_is_shared(source: int, target: int, kept_source: int, kept_target: int, cut: int) -> None:
    """A row of 16 and the last target: 17 tokens, three of them marks."""
    tokenizer = PieceTokenizer()
    fields = {"source": "aaa" * source, "target": "bbb" * target}
    data = pairs(tokenizer, fields, *[{"source": "a", "target": "b"}] * 30, context=16, sides=None)
    assert len(data.sources[0]) - 2 == kept_source
    assert len(data.targets[0]) == kept_target + (not cut) and data.lost[0] == source - kept_source
    assert (data.cut, data.truncated) == (cut, int(cut or kept_source < source))
    assert len(data.sources[0] + data.targets[0]) - 1 <= 16


def test_an_encoder_decoder_has_room_for_each() -> None:
    tokenizer = PieceTokenizer()
    fields = {"source": "aaa" * 14, "target": "bbb" * 15}, {"source": "aaa" * 15, "target": "b"}
    data = pairs(tokenizer, *fields, context=16, sides=SIDES)
    assert [len(source) for source in data.sources] == [16, 16] and [len(t) for t in data.targets] == [16, 2]
    assert (data.cut, data.truncated) == (0, 1)
    with pytest.raises(UserError, match=r"f.jsonl: every reply is cut by the context of 16"):
        pairs(tokenizer, {"source": "a", "target": "bbb" * 16}, context=16, sides=SIDES)


def test_pairs_to_predict_and_pairs_that_are_none() -> None:
    data = pairs(PieceTokenizer(), {"source": "aaa"}, context=16, sides=None)
    assert len(data.sources[0]) == 3 and data.targets == [[]]
    assert pairs(PieceTokenizer(), {"source": "aaa"}, context=16, sides=Sides([3, 2], [2], [3])).targets == [[]]
    with pytest.raises(UserError, match=r"f.jsonl:1: has no 'target', only 'source', 'goal'"):
        read_pairs(records({"source": "a", "goal": "b"}))
    with pytest.raises(UserError, match=r"f.jsonl:2: 'target' is empty"):
        read_pairs(records({"source": "a", "target": "b"}, {"source": "a", "target": ""}))


def preferences(tokenizer: PieceTokenizer, *fields: dict, **options) -> PreferenceData:
    return PreferenceData(read_preferences(records(*fields)), partial(encode_chat, tokenizer), pad_id=1, **options)


def test_chosen_and_rejected_stand_side_by_side() -> None:
    tokenizer = PieceTokenizer()
    fields = (
        {"prompt": "aaa", "chosen": "bbb", "rejected": "cccddd"},
        {"prompt": turns("aaa", "bbb", "ccc")["messages"], "chosen": "ddd", "rejected": "eee"},
    )
    data = preferences(tokenizer, *fields, context=16)
    assert len(data) == 2
    batch = data.batch(np.array([1, 0]), np.array([7, 8]))
    assert batch.samples == (7, 7, 8, 8)
    assert [shown(tokenizer, row).rstrip("_") for row in batch.ids] == [
        "<<aaa><bbb><ccc><ddd", "<<aaa><bbb><ccc><eee", "<<aaa><bbb", "<<aaa><cccddd",
    ]  # fmt: skip
    assert [shown(tokenizer, row).rstrip(".") for row in batch.targets] == [
        "..........ddd>", "..........eee>", "....bbb>", "....cccddd>",
    ]  # fmt: skip


def test_pairs_that_prefer_nothing() -> None:
    tokenizer = PieceTokenizer()
    good, same = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}
    long = {"prompt": "a", "chosen": "b", "rejected": "c" * 60}
    data = preferences(tokenizer, good, same, context=16)
    assert (len(data), data.dropped, data.truncated) == (1, 1, 0)
    with pytest.raises(UserError, match=r"f.jsonl: chosen and rejected are equal in every pair"):
        preferences(tokenizer, same, same, context=16)
    with pytest.raises(UserError, match=r"f.jsonl: 1 of 2 replies are cut by the context of 16"):
        preferences(tokenizer, good, long, context=16)
    data = preferences(tokenizer, good, long, {**long, "prompt": "a" * 60}, context=16, cut_limit=0.9)
    assert (len(data), data.dropped, data.truncated) == (2, 1, 2)
    assert [len(ids) for ids, _ in data.rows] == [len(targets) for _, targets in data.rows] == [6, 6, 6, 16]
    assert preferences(tokenizer, {**good, "rejected": "c" * 33}, context=16).truncated == 0  # fits, its end included
    for fields, problem in (
        ({"prompt": "a", "chosen": "b"}, "f.jsonl:1: has no 'rejected'"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "f.jsonl:1: 'chosen' is empty"),
    ):
        with pytest.raises(UserError, match=problem):
            preferences(tokenizer, fields, context=16)
