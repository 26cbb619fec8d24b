"""decode(encode(s)) == s for every valid Unicode string, and no text ever becomes a special token."""

import pickle
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenizer import Tokenizer, train
from tokenizer.tokenizer import MASK, PAD, ROLE_PIECES, UNKNOWN

HARD = {
    "empty": "",
    "space": " ",
    "spaces": "  a   b     c" + " " * 100,
    "indentation": "if a:\n    if b:\n        return\n\n\n",
    "tabs": "\t\ta\t b \t",
    "line ends": "a\r\nb\rc\n\r\n\r",
    "U+2581": "▁ ▁▁a▁b ▁",
    "U+2585": "a▅b",
    "NUL": "a\0b\0\0",
    "controls": "".join(map(chr, range(0x20))) + "\x7f\x80\x85\u2028\u2029",
    "BOM": "\ufeffa\ufeff",
    "Chinese": "清晨的渡船在日出之前离开了港口。",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈🇳🇴👍🏽",
    "combining": "e\u0301 é a\u0308\u0323",
    "right to left": "שלום مرحبا",
    "no characters": "\ufffe\uffff\U0010ffff\ufdd0",
    "bytes spelled out": "<0x41><0x0A> <0xE2>",
    "unknown": "<unk><s></s><pad> ⁇ ",
    "replacement": "\ufffd",
}
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
FRAGMENTS = st.lists(st.sampled_from([*HARD.values(), "def f(x):\n", " the", "é", "\u2581"]) | UNICODE).map("".join)
THOROUGH = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", HARD)
def test_hard_texts_come_back(any_text: Tokenizer, name: str) -> None:
    assert any_text.decode(any_text.encode(HARD[name])) == HARD[name]


@THOROUGH
@given(UNICODE)
def test_any_text_comes_back(any_text: Tokenizer, text: str) -> None:
    ids = any_text.encode(text)
    assert any_text.decode(ids) == text
    assert not set(ids) & set(any_text.special.values())


@pytest.mark.prove
@settings(THOROUGH, max_examples=2000)
@given(FRAGMENTS)
def test_thousands_of_texts_come_back(any_text: Tokenizer, text: str) -> None:
    ids = any_text.encode(text)
    assert any_text.decode(ids) == text
    assert not set(ids) & set(any_text.special.values())


@pytest.mark.prove
def test_a_line_of_fifty_megabytes_comes_back(bpe: Tokenizer) -> None:
    text = "0123456789 abcdef é▁" * (50_000_000 // 24)
    assert bpe.decode(bpe.encode(text)) == text


@THOROUGH
@given(st.lists(FRAGMENTS, max_size=4))
def test_batches_and_streams_agree_with_single_calls(any_text: Tokenizer, texts: list[str]) -> None:
    batch = any_text.encode_batch(texts, threads=2)
    assert batch == [any_text.encode(text) for text in texts]
    for text, ids in zip(texts, batch, strict=True):
        stream = any_text.stream_decoder()
        pushed = [stream.push(i) for i in ids]
        assert "".join(pushed) == any_text.decode(ids) == text
        assert stream.flush() == ""


@settings(THOROUGH, max_examples=100)
@given(data=st.data())
def test_a_stream_of_any_ids_equals_their_decoding(any_text: Tokenizer, data: st.DataObject) -> None:
    single_bytes = [i for i, text in enumerate(any_text.token_bytes) if len(text) == 1]
    ids = data.draw(st.lists(st.sampled_from(single_bytes) | st.integers(0, any_text.vocab_size - 1)))
    stream = any_text.stream_decoder()
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == any_text.decode(ids)


def test_a_stream_waits_for_whole_characters(bpe: Tokenizer) -> None:
    ids = bpe.encode("▁👍")
    stream = bpe.stream_decoder()
    assert [stream.push(i) for i in ids] == ["", "", "▁", "", "", "", "👍"]
    assert (stream.push(ids[0]), stream.flush(), stream.push(bpe.encode("a")[0])) == ("", "\ufffd", "a")


def test_what_is_no_utf8_decodes_to_replacement_characters(bpe: Tokenizer) -> None:
    byte = {text: i for i, text in enumerate(bpe.token_bytes) if len(text) == 1 and bpe.pieces[i].startswith("<0x")}
    assert bpe.decode([byte[b"\xff"], byte[b"\xe2"], byte[b"\x96"], byte[b"A"]]) == "\ufffd\ufffdA"
    assert bpe.decode([bpe.special["unknown"], bpe.pad_id, bpe.document_id]) == "\ufffd"


@pytest.mark.parametrize("ids", [[0, -1], [0, 4096], [0, 10**30]])
def test_ids_outside_the_vocabulary_are_refused(bpe: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"id {ids[1]} at position 1 is outside the vocabulary of 4096"):
        bpe.decode(ids)


def test_decode_takes_arrays_and_iterators(bpe: Tokenizer) -> None:
    ids = bpe.encode("def f():\n    return 1")
    assert bpe.decode(np.array(ids, np.uint16)) == bpe.decode(iter(ids)) == "def f():\n    return 1"


def test_no_text_becomes_a_special_token(any_text: Tokenizer) -> None:
    special = [any_text.pieces[i] for i in any_text.special.values()]
    assert {UNKNOWN, PAD, MASK, *ROLE_PIECES, "<|sentinel-0|>", "<|document|>", "<|end|>"} <= set(special)
    for text in [*special, "".join(special), "<unk>", "<s>", "</s>", "<pad>", "<0x41>", "<|endoftext|>", "[MASK]"]:
        ids = any_text.encode(text)
        assert not set(ids) & set(any_text.special.values()), text
        assert any_text.decode(ids) == text


def test_not_even_when_training_text_is_full_of_them() -> None:
    text = "<|user|> <unk> <s> <0x41> <|document|> <|sentinel-0|> word " * 200
    for type in ("bpe", "unigram"):
        tokenizer = train([text], type=type, vocab_size=282)
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special.values())
        assert tokenizer.decode(ids) == text
        assert tokenizer.pieces.count("<0x41>") == 1


def test_special_tokens_have_their_places(bpe: Tokenizer) -> None:
    names = ["unknown", "pad", "document", "end", "mask", "system", "user", "assistant"]
    assert [bpe.special[name] for name in names] == list(range(8))
    assert (bpe.pad_id, bpe.document_id, bpe.end_id, bpe.mask_id) == (1, 2, 3, 4)
    assert bpe.sentinel_ids == list(range(8, 8 + 64))  # one for each 64 of the vocabulary
    assert [bpe.special[f"sentinel-{i}"] for i in (0, 63)] == [8, 71]
    assert (bpe.encode("\n"), bpe.encode("\t")) == ([72], [73])


def test_the_mark_for_spaces_is_spelled_in_bytes(any_text: Tokenizer) -> None:
    assert [any_text.pieces[i] for i in any_text.encode("▁")] == ["<0xE2>", "<0x96>", "<0x81>"]


def test_cutting_does_not_change_ids(any_text: Tokenizer, source: list[str]) -> None:
    text = "\n".join(source[:10]) + "x = 1 " * 2000 + "\n" + "   \n" * 3000 + "the last line " * 1000
    assert any_text.encode(text) == any_text._model.encode(text)


@pytest.mark.parametrize("unit", ["a", " ", "word and ", "漢字", "(_)", "👍"])
def test_lines_of_megabytes_come_back_in_seconds(any_text: Tokenizer, unit: str) -> None:
    text = unit * (5_000_000 // len(unit.encode()))
    start = time.process_time()  # of this process alone: other work on the machine does not count
    ids = any_text.encode(text)
    assert time.process_time() - start < 20  # quadratic time would be hours
    assert any_text.decode(ids) == text


@pytest.mark.parametrize("text", ["ab\ud800c", "ab\udfff"])
def test_lone_surrogates_are_refused(any_text: Tokenizer, char: Tokenizer, text: str) -> None:
    for encode in (any_text.encode, char.encode, lambda text: any_text.encode_batch(["", text])):
        with pytest.raises(ValueError, match=rf"U\+{ord(text[2]):04X}, at offset 2: not valid Unicode"):
            encode(text)


def test_words_begin_where_they_should(bpe: Tokenizer) -> None:
    starts = {text: begins for text, begins in zip(bpe.token_bytes, bpe.word_starts, strict=True)}
    for begins in (b" return", b"\n", b"\t", b" ", b"    ", b"(", b".", b'"', b" =", b"\xe2", b"\xf0", b""):
        assert starts[begins], begins
    for continues in (b"return", b"a", b"0", b"_", b"s", b"\x80", b"\xbf"):
        assert not starts[continues], continues
    assert [bpe.is_word_start(i) for i in (bpe.mask_id, bpe.encode("▁")[1])] == [True, False]
    words = train(["国家 é ee\u0301 ひら" * 50], vocab_size=290)
    starts = {
        text.decode(errors="ignore"): begins for text, begins in zip(words.token_bytes, words.word_starts, strict=True)
    }
    assert [starts[text] for text in ("国", "ひ", "é", "\u0301")] == [True, True, False, False]


def test_python_source_takes_three_bytes_a_token(bpe: Tokenizer, source: list[str]) -> None:
    ids = [bpe.encode(text) for text in source]
    assert sum(len(text.encode()) for text in source) / sum(map(len, ids)) >= 2.9
    assert bpe.decode(bpe.encode(" " * 16)) == " " * 16
    assert len(bpe.encode(" " * 16)) == 1


def test_worker_processes_get_the_same_tokenizer(bpe: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(bpe))
    assert copy.hash == bpe.hash
    assert copy.encode("def f(): ▁") == bpe.encode("def f(): ▁")


# Characters


def test_every_character_is_a_piece_and_comes_back(char: Tokenizer, source: list[str]) -> None:
    text = "".join(source[:20])
    assert char.vocab_size == len(set(text)) + 5
    ids = char.encode(text)
    assert len(ids) == len(text)
    assert char.decode(ids) == text
    assert char.encode_batch(source[:2]) == [char.encode(text) for text in source[:2]]
    assert ids == char._model.encode(text)  # another program that opens the model finds the same ids


def test_character_ids_are_in_the_order_of_code_points() -> None:
    tokenizer = train(["cab\n\r\t b\u0301<é👍\u2580"], type="char")
    assert "".join(map(tokenizer.decode, zip(range(5, tokenizer.vocab_size)))) == "\t\n\r<abcé\u0301\u2580 👍"
    assert tokenizer.special == {"unknown": 0, "pad": 1, "document": 2, "end": 3, "mask": 4}
    assert tokenizer.sentinel_ids == []
    assert tokenizer.encode("<\n") == [8, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [("ab漢", r"'漢' \(U\+6F22\) at offset 2"), ("▁", r"U\+2581\) at offset 0"), ("\ufffd", "U\\+FFFD")],
)
def test_unseen_characters_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(["ab "], type="char").encode(text)
