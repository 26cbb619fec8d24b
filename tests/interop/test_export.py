"""Models of ours, opened by Transformers' Auto classes from what was exported; and read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.config import UserError
from minillm.interop.export import export
from minillm.interop.hf import build, load_hf, read_hf
from tests.interop.ours import SHAPES, VARIANTS, model_of, name_of, tokenizer_of
from tests.interop.theirs import output
from tokenizer.chat import JINJA_TEMPLATE, encode_chat, render_chat

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
    config, weights, _ = read_hf(tmp_path / "out")
    back = build(config, weights)
    with torch.no_grad():
        expected = model(ids, **mine) if has_head else model.states(ids, **mine)
        again = back(ids, **mine) if has_head else back.states(ids, **mine)
    assert expected.abs().max() > 0.5
    assert (output(theirs, **hf) - expected).abs().max() < 1e-4
    assert (again - expected).abs().max() < 1e-6


def test_what_needs_no_zeros_comes_back_with_the_same_config(bpe, tmp_path):
    for family in SHAPES:
        model = model_of(family, bpe.vocab_size)
        export(model, bpe, tmp_path / family)
        back, _, _ = read_hf(tmp_path / family)
        for name in SAME:
            assert getattr(back, name) == getattr(model.config, name), (family, name)
