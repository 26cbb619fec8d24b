"""Tokenizers of Hugging Face's behind our interface: WordPiece, byte-level BPE, SentencePiece's kind."""

import json
import pickle
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from minillm.config import DamagedFile, UserError
from minillm.interop.hf_tokenizer import HFTokenizer
from tests.interop.ours import TEXT

KINDS = ["wordpiece", "byte-level", "llama"]
HARD = ["Größe, naïve 🙂👩‍🚀 你好", "  two  spaces\n\ttab\r\n", "", " ", "x" * 300, "\x00\x01", "don't stop , now ."]


def _made(model, trainer, settings) -> HFTokenizer:
    model.train_from_iterator(TEXT * 3, trainer)
    content = json.loads(model.to_str())
    roles = {"wordpiece": ("cls_token", "sep_token")}.get(settings.get("kind"), ("bos_token", "eos_token"))
    names = {"document": roles[0], "end": roles[1], "pad": "pad_token", "mask": "mask_token", "unknown": "unk_token"}
    ids = {role: model.token_to_id(settings[name]) for role, name in names.items() if name in settings}
    return HFTokenizer(json.dumps(content).encode(), settings, {"pad": ids["end"], **ids})


def wordpiece() -> HFTokenizer:
    model = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer, model.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]
    settings = {"kind": "wordpiece", **dict(zip(names, special, strict=True))}
    return _made(
        model, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False), settings
    )


def byte_level() -> HFTokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    return _made(model, trainer, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


def llama() -> HFTokenizer:
    """As Llama's tokenizer.json: a space before the text, U+2581 for spaces, bytes for what is unknown."""
    special = ["<unk>", "<s>", "</s>"]
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=special + alphabet, show_progress=False)
    model.train_from_iterator(TEXT * 3, trainer)
    content = json.loads(model.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    roles = {"unknown": 0, "document": 1, "end": 2, "pad": 2}
    settings = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return HFTokenizer(json.dumps(content).encode(), settings, roles)


MAKERS = {"wordpiece": wordpiece, "byte-level": byte_level, "llama": llama}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> HFTokenizer:
    return MAKERS[request.param]()


def test_ids_are_the_librarys(tokenizer):
    theirs = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    for text in [*TEXT, *HARD]:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == theirs.decode(ids)
        if tokenizer.type != "wordpiece":
            assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([*TEXT, *HARD]) == [tokenizer.encode(text) for text in [*TEXT, *HARD]]


def test_spelled_special_tokens_stay_text(tokenizer):
    control = set(tokenizer.special.values()) - {tokenizer.special.get("unknown")}
    for piece in (tokenizer.pieces[i] for i in control):
        text = f"a {piece} b{piece}"
        ids = tokenizer.encode(text)
        assert control.isdisjoint(ids)
        if tokenizer.type != "wordpiece":
            assert tokenizer.decode(ids) == text


def test_streamed_text_is_the_decoded_text(tokenizer):
    for text in [*TEXT, *HARD]:
        ids = [tokenizer.document_id, *tokenizer.encode(text), tokenizer.end_id]
        stream = tokenizer.stream_decoder()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
    stream = tokenizer.stream_decoder()
    assert [stream.push(i) for i in tokenizer.encode(TEXT[0])] and stream.flush() == ""


def test_any_ids_stream_or_raise(tokenizer):
    draw = random.Random(1)
    for _ in range(20):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(30)]
        stream = tokenizer.stream_decoder()
        streamed = "".join(map(stream.push, ids)) + stream.flush()
        if (
            tokenizer.type == "bpe" and "<0x00>" in tokenizer.pieces
        ):  # a run of bytes is decoded as a whole or not at all
            assert streamed.replace("\ufffd", "")
        else:
            assert streamed.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")
    with pytest.raises(ValueError, match="id 99999 at position 1 is outside the vocabulary"):
        tokenizer.decode([0, 99999])
    with pytest.raises(ValueError, match="lone surrogate, U\\+D800, at offset 2"):
        tokenizer.encode("ab\ud800")


def test_files_and_pickles(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for again in (HFTokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert again.hash == tokenizer.hash and again.special == tokenizer.special
        assert again.encode(TEXT[0]) == tokenizer.encode(TEXT[0])
        assert (again.pad_id, again.document_id, again.end_id) == (
            tokenizer.pad_id,
            tokenizer.document_id,
            tokenizer.end_id,
        )
    (tmp_path / "roles.json").unlink()  # as Transformers would have written it
    found = HFTokenizer.load(tmp_path)
    assert found.roles == tokenizer.roles
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DamagedFile, match=r"tokenizer\.json is damaged"):
        HFTokenizer.load(tmp_path)


def test_roles():
    bert, gpt2 = wordpiece(), byte_level()
    assert [bert.pieces[i] for i in (bert.document_id, bert.end_id, bert.mask_id, bert.pad_id)] == [
        "[CLS]", "[SEP]", "[MASK]", "[PAD]",
    ]  # fmt: skip
    assert gpt2.document_id == gpt2.end_id == gpt2.pad_id == 0 and gpt2.mask_id is None


def test_words():
    bert, gpt2 = wordpiece(), byte_level()
    ids = bert.encode("moving averages")
    assert [bert.pieces[i].startswith("##") for i in ids] == [not bert.is_word_start(i) for i in ids]
    pieces = {piece: gpt2.is_word_start(i) for i, piece in enumerate(gpt2.pieces)}
    spaced = [starts for piece, starts in pieces.items() if piece.startswith("\u0120") and len(piece) > 1]
    assert spaced and all(spaced) and pieces["("] and pieces["<|endoftext|>"]
    assert not pieces["a"] and not pieces["_"] and not pieces["\u0142"]  # byte 0xA0: inside a character


def test_damage_and_absence_are_named(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer"):
        HFTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokenizer\.model without tokenizer\.json"):
        HFTokenizer.load(tmp_path)
    byte_level().save(tmp_path)
    (tmp_path / "roles.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="nothing says which token ends a text"):
        HFTokenizer.load(tmp_path)


def test_older_files_of_bart_have_its_names(tmp_path):
    gpt2 = byte_level()
    tokenizers.Tokenizer.from_str(gpt2.content.decode()).model.save(str(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    names = {"document": "<s>", "pad": "<pad>", "end": "</s>", "mask": "<mask>"}
    del vocabulary["<|endoftext|>"]
    vocabulary |= {name: gpt2.vocab_size + at for at, name in enumerate(names.values())}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    bart = HFTokenizer.load(tmp_path)
    assert bart.roles == bart.special == {role: vocabulary[name] for role, name in names.items()}
    assert bart.encode("of <s>") == [*gpt2.encode("of <"), *gpt2.encode("s"), *gpt2.encode(">")]


def test_older_files(tmp_path):
    """vocab.txt, and vocab.json with merges.txt: the same ids as from tokenizer.json."""
    bert = wordpiece()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(bert.pieces) + "\n")
    older = HFTokenizer.load(tmp_path / "bert")
    begin, end = bert.document_id, bert.end_id
    assert older.wrap("of", "a") == [begin, *bert.encode("of"), end, *bert.encode("a"), end]
    gpt2 = byte_level()
    (tmp_path / "gpt2").mkdir()
    tokenizers.Tokenizer.from_str(gpt2.content.decode()).model.save(str(tmp_path / "gpt2"))
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "eos_token_id": 0}')
    for ours, theirs in ((older, bert), (HFTokenizer.load(tmp_path / "gpt2"), gpt2)):
        assert ours.roles == theirs.roles and ours.special == theirs.special
        assert ours.decode([ours.end_id]) == ""
        for text in [*TEXT, *HARD]:
            assert ours.encode(text) == theirs.encode(text)
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    assert HFTokenizer.load(tmp_path / "gpt2").roles == gpt2.roles
    for changes in ({"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}):
        (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps(changes))
        names = {"do_lower_case": "lowercase", "tokenize_chinese_chars": "handle_chinese_chars"}
        options = {names.get(name, name): value for name, value in changes.items()}
        library = tokenizers.BertWordPieceTokenizer(str(tmp_path / "bert" / "vocab.txt"), **options)
        ours, plain = HFTokenizer.load(tmp_path / "bert"), []
        for text in ("Who May withdraw", "café, naïve", "of你好of", *TEXT):
            assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
            plain.append(ours.encode(text) == bert.encode(text))
        assert not all(plain), changes
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    spaced = HFTokenizer.load(tmp_path / "gpt2")
    assert spaced.encode("of a") == gpt2.encode(" of a") != gpt2.encode("of a")
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "qwen3", "eos_token_id": 0}')
    with pytest.raises(UserError, match=r"vocab\.json without tokenizer\.json"):
        HFTokenizer.load(tmp_path / "gpt2")
