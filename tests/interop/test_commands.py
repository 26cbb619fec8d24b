"""`import` and `export` as commands: run folders that every other command opens, errors in one line."""

import json
import shutil

import pytest
import torch

from minillm import doctor
from minillm.commands import embed, exporting, importing
from minillm.config import DamagedFile, UserError, to_dict
from minillm.interop.hf import build, load_hf
from minillm.interop.hf_tokenizer import HFTokenizer
from minillm.loading import open_model
from minillm.training import checkpoint
from tests.interop.ours import model_of, tokenizer_of
from tests.interop.test_hf_tokenizer import byte_level, wordpiece
from tests.interop.theirs import make, output, save
from tokenizer.chat import encode_chat


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
    assert doctor.examine(tmp_path / "run") == []  # it has no metrics, and no training that could go on
    (saved / "model.safetensors").write_bytes(b"")
    (problem,) = doctor.examine(tmp_path / "run")
    assert "model.safetensors" in problem.message and problem.message.endswith("import the model again")
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
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter, which is no model by itself; merge it into its base"):
        importing.main([str(adapter), "--out", str(tmp_path / "other")])
    shutil.move(adapter, tmp_path / "run/adapter")
    with pytest.raises(UserError, match=rf"holds an adapter, .*; give the run that it is of, {tmp_path / 'run'}"):
        open_model(tmp_path / "run/adapter")
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
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "who may withdraw"}]
    prompt = auto.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert prompt == encode_chat(tokenizer, talk, reply=True)[0] and auto.model_max_length == model.config.context
    with pytest.raises(UserError, match="is not empty"):
        exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_embeddings_are_the_states_of_transformers(family, tmp_path, capsys):
    """Of each text alone and without padding, pooled by hand."""
    tokenizer = wordpiece() if family == "bert" else byte_level()
    theirs = make(family, {"bert": "BertModel", "gpt2": "GPT2Model"}[family], vocab_size=tokenizer.vocab_size)
    save(theirs, tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    texts = ["of the account", "x", "numbers and prose, who may withdraw"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    pools = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "last": lambda x: x[-1]}
    for pool, of in pools.items():
        argv = [str(tmp_path / "theirs"), "--input", str(tmp_path / "texts.txt"), "--pool", pool]
        found = []
        for more in ([], ["--normalize"]):
            assert embed.main([*argv, *more]) == 0
            found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
        for text, plain, unit in zip(texts, *found, strict=True):
            ids = torch.tensor([[tokenizer.document_id, *tokenizer.encode(text), tokenizer.end_id]])
            expected = of(output(theirs, input_ids=ids)[0])
            assert plain["text"] == text and expected.abs().max() > 0.1
            assert (torch.tensor(plain["embedding"]) - expected).abs().max() < 1e-4
            assert (torch.tensor(unit["embedding"]) - expected / expected.norm()).abs().max() < 1e-5
