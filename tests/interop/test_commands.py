"""`import` and `export` as commands: run folders that every other command opens, errors in one line."""

import json

import pytest
import torch

from minillm.commands import exporting, importing
from minillm.config import DamagedFile, UserError, to_dict
from minillm.interop.hf import build, load_hf
from minillm.interop.hf_tokenizer import HFTokenizer
from minillm.training import checkpoint
from tests.interop.ours import model_of, tokenizer_of
from tests.interop.test_hf_tokenizer import byte_level
from tests.interop.theirs import make, save


def folder_of(tmp_path, family="bert", architecture="BertModel", **changes):
    tokenizer = byte_level()
    folder = save(make(family, architecture, vocab_size=tokenizer.vocab_size, **changes), tmp_path / "theirs")
    tokenizer.save(folder)
    return folder


def test_import_writes_a_checkpoint_that_opens(tmp_path, capsys):
    folder = folder_of(tmp_path)
    assert importing.main([str(folder), "--out", str(tmp_path / "run"), "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["shape"] == "encoder" and result["parameters"] == sum(
        x.numel() for x in build(load_hf(folder)[0]).parameters()
    )
    assert "attention_probs_dropout_prob is 0.1" in said.err
    saved = checkpoint.resolve(tmp_path / "run")
    expected = load_hf(folder)[0].weights
    weights = checkpoint.load_weights(saved)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert checkpoint.load_state(saved)["pooler"].keys() == {"weight", "bias"}
    assert HFTokenizer.load(saved / "tokenizer").hash == HFTokenizer.load(folder).hash


def test_import_refuses_what_is_there_and_what_is_not(tmp_path):
    folder = folder_of(tmp_path, "gpt2", "GPT2LMHeadModel")
    importing.main([str(folder), "--out", str(tmp_path / "run")])
    with pytest.raises(UserError, match="already holds a run"):
        importing.main([str(folder), "--out", str(tmp_path / "run")])
    importing.main([str(folder), "--out", str(tmp_path / "run"), "--overwrite"])
    with pytest.raises(UserError, match="is no folder"):
        importing.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "other")])
    (folder / "tokenizer.json").unlink()
    (folder / "roles.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: no tokenizer\.json"):
        importing.main([str(folder), "--out", str(tmp_path / "other")])
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(DamagedFile, match=r"model\.safetensors is damaged"):
        importing.main([str(folder), "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_export_of_a_checkpoint(tmp_path, capsys):
    import transformers

    tokenizer = tokenizer_of("bpe")
    model = model_of("qwen3", tokenizer.vocab_size)
    tokenizer.save(tmp_path / "tokenizer")
    config = {"format": 1, "settings": {"model": to_dict(model.config)}}
    weights = model.state_dict()
    checkpoint.save(
        tmp_path / "run", 3, weights=weights, state={}, config=config, tokenizer=tmp_path / "tokenizer", keep=1
    )
    assert exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "split_special_tokens" in capsys.readouterr().err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer.encode("def f(x):\n    return x\n")])
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    with pytest.raises(UserError, match="is not empty"):
        exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
