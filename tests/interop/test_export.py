"""Models of ours, opened by Transformers' Auto classes from what was exported; and read back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.config import UserError
from minillm.interop.export import Beside, export
from minillm.interop.hf import build, load_hf, read_hf
from tests.interop.ours import SHAPES, TEXT, VARIANTS, model_of, name_of, tokenizer_of
from tests.interop.theirs import output
from tokenizer.chat import JINJA_TEMPLATE, encode_chat

AUTO = {"gpt2": "CausalLM", "llama": "CausalLM", "qwen3": "CausalLM", "bert": "MaskedLM", "bart": "Seq2SeqLM"}

SAME = (
    "shape", "blocks", "heads", "key_value_heads", "head_width", "dim", "mlp_width", "context", "vocab_size", "tied",
    "output_bias", "output_transform", "token_types", "norm", "position",
)  # fmt: skip


@pytest.fixture(scope="module")
def bpe():
    return tokenizer_of("bpe")


def open_model(folder: Path, family: str, has_head: bool = True):
    import transformers

    kind = f"AutoModelFor{AUTO[family]}" if has_head else "AutoModel"
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_transformers_computes_the_same_and_it_comes_back(variant, bpe, tmp_path):
    family, changes = variant
    model = model_of(family, bpe.vocab_size, **changes)
    export(model, bpe, tmp_path / "out")
    has_head = changes.get("output_transform", True)
    theirs = open_model(tmp_path / "out", family, has_head)
    assert theirs.config.model_type == family
    ids, source = torch.randint(bpe.vocab_size, (2, 3, 17))
    types = torch.randint(2, ids.shape)
    hf: dict[str, Any] = {"input_ids": ids}
    mine: dict[str, Any] = {}
    if family == "bart":
        hf, mine = {"input_ids": source, "decoder_input_ids": ids}, {"source": source}
    elif family == "bert" and model.config.token_types:
        hf["token_type_ids"] = mine["token_types"] = types
    found = read_hf(tmp_path / "out")
    config, back = found.config, build(found)
    with torch.no_grad():
        expected = model(ids, **mine) if has_head else model.states(ids, **mine)
        again = back(ids, **mine) if has_head else back.states(ids, **mine)
    assert expected.abs().max() > 0.5
    assert (output(theirs, **hf) - expected).abs().max() < 1e-4
    assert (again - expected).abs().max() < 1e-6
    assert config.source_embedding == model.config.source_embedding
    if family == "bart":  # whose own default ends every text with id 2
        assert json.loads((tmp_path / "out" / "config.json").read_text())["forced_eos_token_id"] is None


def test_what_needs_no_zeros_comes_back_with_the_same_config(bpe, tmp_path):
    for family in SHAPES:
        model = model_of(family, bpe.vocab_size)
        export(model, bpe, tmp_path / family)
        back = read_hf(tmp_path / family).config
        for name in SAME:
            assert getattr(back, name) == getattr(model.config, name), (family, name)


@pytest.mark.parametrize("type", ["bpe", "unigram", "char"])
def test_the_tokenizer_agrees(type, tmp_path):
    import transformers

    ours = tokenizer_of(type)
    notes = export(model_of("llama", ours.vocab_size), ours, tmp_path / "out", Beside(chat_template=JINJA_TEMPLATE))
    assert ("unigram" in notes[-1]) == (type == "unigram") and "<|end|>" in notes[0]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [*TEXT, *(text[::-1] for text in TEXT)]
    texts += [] if type == "char" else ["U+2581 \u2581 <0x41> <0x4> \U0001f642", "  \n\t   a"]
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text) == theirs(text)["input_ids"]
        assert theirs.decode(ids) == text
    assert theirs.encode("<|end|>", add_special_tokens=False) == [ours.end_id]  # as the note says
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.document_id,
        ours.end_id,
        ours.pad_id,
    )
    assert (theirs.unk_token_id, theirs.mask_token_id) == (ours.special["unknown"], ours.mask_id)
    if type == "char":
        return
    messages = [{"role": "user", "content": "of  what?"}, {"role": "assistant", "content": "of\nthat"}]
    spelled = "<|document|><|user|>of  what?<|end|><|assistant|>of\nthat<|end|>"
    assert theirs.apply_chat_template(messages, tokenize=False) == spelled
    rendered = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert rendered == encode_chat(ours, messages[:1], reply=True)[0]


def test_transformers_generates_the_same(bpe, tmp_path):
    """Greedily, with the exported generation_config: what ends a text and what never comes is told there too."""
    from minillm.inference.generate import generate
    from minillm.inference.sampling import Sampling
    from minillm.inference.stream import stop_and_banned

    for family in ("gpt2", "llama", "qwen3", "bart"):
        model = model_of(family, bpe.vocab_size)
        export(model, bpe, tmp_path / family)
        theirs = open_model(tmp_path / family, family)
        prompt = [bpe.document_id, *bpe.encode("def width(self")]
        stops, banned = stop_and_banned(bpe, model.config)
        said = json.loads((tmp_path / family / "generation_config.json").read_text())
        assert said["suppress_tokens"] == sorted(banned) and said["eos_token_id"] == sorted(stops)
        assert banned.isdisjoint(bpe.sentinel_ids) == (family == "bart") and bpe.sentinel_ids
        source = [prompt[1:]] if family == "bart" else None
        mine = [bpe.document_id] if family == "bart" else prompt
        options = dict(max_new_tokens=24, sampling=Sampling(temperature=0), stop_ids=stops, banned_ids=banned)
        (ours,) = generate(model, [mine], sources=source, **options)
        read = torch.tensor([source[0] if source else prompt])
        made = theirs.generate(
            read, attention_mask=torch.ones_like(read), max_new_tokens=24, do_sample=False, num_beams=1
        )[0].tolist()[len(mine) :]
        assert len(ours) > 3
        assert made[: len(ours)] == ours and (len(made) == len(ours) or made[len(ours)] in stops)


REFUSED = [
    ("llama", {"position": {"kind": "alibi"}}, "model.position.kind=alibi"),
    ("llama", {"mlp": {"kind": "relu2"}}, "model.mlp.kind=relu2"),
    ("llama", {"softcap": 30.0}, "model.softcap=30.0"),
    ("llama", {"attention": {"softcap": 30.0}}, "model.attention.softcap=30.0"),
    ("llama", {"attention": {"window": 4}}, "model.attention.window=4"),
    ("llama", {"norm": {"kind": "layer"}}, "model.norm.kind=layer"),
    ("llama", {"norm": {"placement": "post"}}, "model.norm.placement=post"),
    ("llama", {"embedding_scale": True}, "model.embedding_scale=True"),
    ("qwen3", {"mlp": {"bias": True}}, "model.mlp.bias=True"),
    ("gpt2", {"kv_heads": 2}, "model.kv_heads=2"),
    ("gpt2", {"head_dim": 6}, "model.head_dim=6"),
    ("gpt2", {"attention": {"qk_norm": True}}, "model.attention.qk_norm=True"),
    ("bert", {"norm": {"embedding": False}}, "model.norm.embedding=False"),
    ("bert", {"output_transform": False}, "model.output_transform=False"),
    ("bart", {"norm": {"eps": 1e-6}}, "model.norm.eps=1e-06"),
    ("bart", {"position": {"kind": "sinusoidal"}}, "model.position.kind=sinusoidal"),
]


@pytest.mark.parametrize(
    ("family", "changes", "field"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_no_family_expresses_is_refused_by_name(family, changes, field, bpe, tmp_path):
    with pytest.raises(UserError, match=re.escape(field)):
        export(model_of(family, bpe.vocab_size, **changes), bpe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_leaves_nothing(bpe, tmp_path, monkeypatch):
    from minillm.interop import export as module
    from minillm.interop import tokenizer_files

    model, right = model_of("llama", bpe.vocab_size), module.to_theirs

    def wrong(*arguments):
        tensors = right(*arguments)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.1
        return tensors

    monkeypatch.setattr(module, "to_theirs", wrong)
    with pytest.raises(UserError, match=r"differs by .* from the model: nothing was written"):
        export(model, bpe, tmp_path / "out")

    def lacking(*arguments):
        return {name: x for name, x in right(*arguments).items() if name != "model.layers.1.mlp.up_proj.weight"}

    monkeypatch.setattr(module, "to_theirs", lacking)
    with pytest.raises(UserError, match=r"does not open as LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"):
        export(model, bpe, tmp_path / "out")
    monkeypatch.setattr(module, "to_theirs", right)
    monkeypatch.setattr(tokenizer_files, "tokenizer_json", lambda *_: module_json(tokenizer_of("bpe", 330)))
    with pytest.raises(UserError, match=r"the exported tokenizer treats .* in another way"):
        export(model, bpe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def module_json(other) -> str:
    from minillm.interop.sentencepiece import tokenizer_json

    return tokenizer_json(other._file, other.type)


def test_a_tokenizer_of_theirs_goes_out_as_it_came(tmp_path):
    import transformers

    from tests.interop.test_hf_tokenizer import MAKERS

    for kind, make in MAKERS.items():
        ours = make()
        export(model_of("llama", ours.vocab_size + 3), ours, tmp_path / kind)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / kind)
        assert theirs.encode(TEXT[0], add_special_tokens=False) == ours.encode(TEXT[0])
        assert theirs.eos_token_id == ours.end_id
        _, again = load_hf(tmp_path / kind)
        assert again.encode(TEXT[1]) == ours.encode(TEXT[1]) and again.roles == ours.roles
        assert json.loads((tmp_path / kind / "generation_config.json").read_text())["suppress_tokens"][-3:] == [
            *range(ours.vocab_size, ours.vocab_size + 3)
        ]
