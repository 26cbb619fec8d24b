"""Folders that Transformers wrote, read as models of ours: the same logits, padded or not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.config import DamagedFile, UserError
from minillm.inference.generate import generate
from minillm.inference.sampling import Sampling
from minillm.interop.hf import build, is_hf, read_hf
from minillm.model.transformer import Transformer
from tests.finetuning import minillm
from tests.interop.theirs import LLAMA3, VARIANTS, V, make, name_of, output, save

TOLERANCE = 1e-4
LENGTHS = (9, 4, 6)


def ours_of(folder) -> Transformer:
    return build(read_hf(folder))


def compute(model: Transformer, has_head: bool, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs) if has_head else model.states(ids, **inputs)


def padding(side: str, T: int) -> torch.Tensor:
    """[B, T] 1 where a token is real."""
    places = torch.arange(T).expand(len(LENGTHS), T)
    lengths = torch.tensor(LENGTHS).unsqueeze(1)
    return (places < lengths if side == "right" else places >= T - lengths).long()


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_the_same_output_with_and_without_padding(variant, tmp_path):
    family, architecture, changes = variant
    theirs = make(family, architecture, **changes)
    ours = ours_of(save(theirs, tmp_path))
    has_head = not architecture.endswith("Model") or architecture == "GPT2LMHeadModel"
    T = max(LENGTHS)
    ids = torch.randint(3, V, (len(LENGTHS), T))
    for side in (None, "right", "left"):
        real = torch.ones_like(ids) if side is None else padding(side, T)
        hf: dict[str, Any] = {"attention_mask": real}
        mine: dict[str, Any] = {} if side is None else {"segments": real - 1}
        if family == "bart":
            if side == "left":
                continue  # their positions count the padding: see the test below
            source = torch.randint(3, V, (len(LENGTHS), T))
            hf = {"input_ids": source, "attention_mask": real, "decoder_input_ids": ids, "decoder_attention_mask": real}
            mine = {"source": source, "source_segments": mine.get("segments"), **mine}
        else:
            hf |= {"input_ids": ids, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
        if family == "bert":
            types = torch.randint(0, changes.get("type_vocab_size", 2), ids.shape)
            hf["token_type_ids"], mine["token_types"] = types, types
        expected, actual = output(theirs, **hf), compute(ours, has_head, ids, **mine)
        difference = (expected - actual).abs()[real.bool()].max().item()
        assert expected.abs().max() > 0.5  # else the tolerance would mean nothing
        assert difference < TOLERANCE, (side, difference)


def test_a_body_without_a_head_says_so(tmp_path):
    """But for one whose head is its embedding."""
    for architecture, tied, told in [
        ("GPT2Model", True, False),
        ("GPT2Model", False, True),
        ("LlamaModel", False, True),
        ("LlamaForCausalLM", False, False),
        ("BertModel", True, True),
        ("BertForMaskedLM", True, False),
        ("BertForTokenClassification", True, False),
    ]:
        family = architecture.removesuffix("Model").partition("For")[0].lower()
        folder = save(make(family, architecture, tie_word_embeddings=tied), tmp_path / f"{architecture}-{tied}")
        assert any("no language model's head" in note for note in read_hf(folder).notes) == told, architecture


def test_bart_padded_on_the_left_is_each_row_alone(tmp_path):
    theirs = make("bart", "BartForConditionalGeneration")
    ours = ours_of(save(theirs, tmp_path))
    source = torch.randint(3, V, (len(LENGTHS), 9))
    ids = torch.randint(3, V, (len(LENGTHS), 9))
    segments = padding("left", 9) - 1
    actual = compute(ours, True, ids, source=source, segments=segments, source_segments=segments)
    for row, length in enumerate(LENGTHS):
        alone = output(
            theirs, input_ids=source[row : row + 1, -length:], decoder_input_ids=ids[row : row + 1, -length:]
        )
        assert (actual[row, -length:] - alone[0]).abs().max() < TOLERANCE


def test_the_pooler_is_handed_on(tmp_path):
    theirs = make("bert", "BertModel")
    found = read_hf(save(theirs, tmp_path))
    ids = torch.randint(3, V, (2, 7))
    with torch.no_grad():
        states = build(found).states(ids)
        pooled = torch.tanh(states[:, 0] @ found.pooler["weight"].T + found.pooler["bias"])
        assert (pooled - theirs(ids).pooler_output).abs().max() < TOLERANCE
    assert is_hf(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "bart"])
def test_cached_generation_is_theirs(family, tmp_path):
    architecture = {"gpt2": "GPT2LMHeadModel", "bart": "BartForConditionalGeneration"}
    theirs = make(family, architecture.get(family, f"{family.capitalize()}ForCausalLM"))
    ours = ours_of(save(theirs, tmp_path))
    prompts = [[5, 9, 11, 3], [7, 4, 8, 30]]
    beginning = [[2], [2]] if family == "bart" else prompts
    made = theirs.generate(
        torch.tensor(prompts), attention_mask=torch.ones(2, 4, dtype=torch.long), max_new_tokens=20, min_new_tokens=20,
        do_sample=False, num_beams=1, pad_token_id=1, eos_token_id=40, forced_eos_token_id=None,
    )  # fmt: skip
    sources = prompts if family == "bart" else None
    options = dict(max_new_tokens=20, sampling=Sampling(temperature=0), banned_ids=[40])
    assert generate(ours, beginning, sources=sources, **options) == made[:, len(beginning[0]) :].tolist()


def test_shards_half_precision_and_older_names(tmp_path):
    theirs = make("bert", "BertForPreTraining")
    whole = read_hf(save(theirs, tmp_path / "whole")).weights
    save(theirs, tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded = read_hf(tmp_path / "sharded").weights
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): x for name, x in tensors_of(tmp_path / "whole").items()
    }
    older |= {"bert.embeddings.position_ids": torch.arange(32).unsqueeze(0)}
    rewrite(tmp_path / "whole", {name.replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in older.items()})
    renamed, notes = read_hf(tmp_path / "whole").weights, read_hf(tmp_path / "whole").notes
    assert whole.keys() == sharded.keys() == renamed.keys()
    assert all(torch.equal(whole[name], other[name]) for other in (sharded, renamed) for name in whole)
    assert any("cls.seq_relationship.bias" in note for note in notes)
    theirs.half().save_pretrained(tmp_path / "half")
    half, notes = read_hf(tmp_path / "half").weights, read_hf(tmp_path / "half").notes
    assert all(x.dtype == torch.float32 and torch.equal(x, whole[name].half().float()) for name, x in half.items())
    assert any("float16 were read as fp32" in note for note in notes)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def set_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: x for name, x in values.items() if x != "absent"}))


OPTIONS: list[tuple[str, str, dict[str, Any], str]] = [
    ("gpt2", "GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", "GPT2LMHeadModel", {"activation_function": "mish"}, "activation_function=mish is not supported"),
    ("gpt2", "GPT2LMHeadModel", {"n_head": "four"}, "n_head is four, which is no whole number"),
    ("gpt2", "GPT2LMHeadModel", {"n_head": 0}, "model.heads must be between"),
    (
        "gpt2",
        "GPT2LMHeadModel",
        {"architectures": ["MambaForCausalLM"]},
        "MambaForCausalLM is not supported; there are GPT2Model",
    ),
    ("gpt2", "GPT2LMHeadModel", {"architectures": None, "model_type": "t5"}, "model type t5 is not supported"),
    ("gpt2", "GPT2LMHeadModel", {"auto_map": {}}, "auto_map asks for code"),
    ("gpt2", "GPT2LMHeadModel", {"quantization_config": {}}, "quantization_config is set"),
    ("llama", "LlamaForCausalLM", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type=yarn is not supported"),
    ("llama", "LlamaForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ("llama", "LlamaForCausalLM", {"hidden_act": "relu"}, "hidden_act=relu is not supported"),
    ("llama", "LlamaForCausalLM", {"attention_bias": True}, r"layers.0.self_attn.q_proj.bias is missing"),
    ("llama", "LlamaForCausalLM", {"intermediate_size": 24}, r"gate_proj.weight has the shape (20, 16)"),
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}, "lm_head.weight differs from embed_tokens.weight"),
    ("llama", "LlamaForCausalLM", {"num_hidden_layers": 1}, r"layers.1.input_layernorm.weight is surplus"),
    ("qwen3", "Qwen3ForCausalLM", {"layer_types": ["full_attention", "sliding_attention"]}, "not mixed"),
    ("bert", "BertForMaskedLM", {"position_embedding_type": "relative_key"}, "position_embedding_type=relative_key"),
    ("bert", "BertForMaskedLM", {"is_decoder": True}, "is_decoder=True is not supported"),
    ("bart", "BartForConditionalGeneration", {"decoder_ffn_dim": 24}, "decoder_ffn_dim differs"),
    ("bart", "BartForConditionalGeneration", {"normalize_before": True}, "normalize_before=True"),
]


@pytest.mark.parametrize(
    ("family", "architecture", "changes", "said"), OPTIONS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_what_we_do_not_compute_is_refused_by_name(family, architecture, changes, said, tmp_path):
    folder = save(make(family, architecture), tmp_path)
    set_config(folder, **changes)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_hf(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_older_rope_settings_and_no_architecture(tmp_path):
    folder = save(make("llama", "LlamaForCausalLM", rope_parameters=LLAMA3), tmp_path)
    expected = read_hf(folder).config
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    set_config(folder, rope_parameters="absent", rope_theta=100.0, rope_scaling=scaling, architectures="absent")
    assert read_hf(folder).config == expected and expected.position.scaling == "llama3"


def test_tensors_of_a_hostile_or_broken_folder(tmp_path):
    folder = save(make("gpt2", "GPT2LMHeadModel"), tmp_path)
    good = tensors_of(folder)
    for name in ("transformer.h.1.attn.c_attn.bias", "transformer.wpe.weight"):
        rewrite(folder, {key: x for key, x in good.items() if key != name})
        with pytest.raises(UserError, match=re.escape(f"the tensor {name.removeprefix('transformer.')} is missing")):
            read_hf(folder)
    rewrite(folder, {**good, "transformer.h.0.extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"the tensor h\.0\.extra is surplus"):
        read_hf(folder)
    rewrite(folder, {**good, "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)})  # the mask of older files
    read_hf(folder)
    rewrite(folder, {**good, "wte.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"wte\.weight is there twice"):
        read_hf(folder)
    rewrite(folder, {**good, "transformer.wte.weight": torch.zeros(V, 16, dtype=torch.int8)})
    with pytest.raises(UserError, match=r"wte\.weight holds torch\.int8"):
        read_hf(folder)
    (folder / "model.safetensors").write_bytes((b"\xff" * 8) + b"{}")
    with pytest.raises(DamagedFile, match=r"model\.safetensors is damaged"):
        read_hf(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="is a pickle, which can run code"):
        read_hf(folder)
    (folder / "config.json").write_text("[1")
    with pytest.raises(DamagedFile, match=r"config\.json is damaged"):
        read_hf(folder)
    assert not is_hf(folder) and not is_hf(folder / "nothing")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_name(value, tmp_path, capsys):
    for family, architecture, name in (
        ("gpt2", "GPT2LMHeadModel", "transformer.h.1.mlp.c_fc.weight"),
        ("bert", "BertForSequenceClassification", "classifier.bias"),
        ("bert", "BertModel", "pooler.dense.weight"),
    ):
        folder = save(make(family, architecture), tmp_path / architecture)
        tensors = tensors_of(folder)
        tensors[name].view(-1)[1] = value
        rewrite(folder, tensors)
        done = minillm(capsys, "import", folder, "--out", tmp_path / "run")
        said = f"{folder}: {name.removeprefix('transformer.')} holds NaN or infinity in 1 of {tensors[name].numel():,}"
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_number_beyond_fp32_is_refused(tmp_path):
    """It would be read as an infinity."""
    folder = save(make("gpt2", "GPT2LMHeadModel"), tmp_path)
    tensors = tensors_of(folder)
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].double()
    tensors["transformer.wte.weight"][2, 3] = 1e300
    rewrite(folder, tensors)
    with pytest.raises(UserError, match=r"wte\.weight holds NaN or infinity in 1 of 656 places"):
        read_hf(folder)


def test_shards_that_are_missing_or_lead_out(tmp_path):
    theirs = make("llama", "LlamaForCausalLM")
    folder = save(theirs, tmp_path, max_shard_size="4KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["lm_head.weight"]
    for place, error, said in [
        ("../other.safetensors", DamagedFile, "leads out of the folder"),
        ("model-9.safetensors", UserError, "is missing, and model.safetensors.index.json lists it"),
        (sorted(set(content["weight_map"].values()) - {shard})[0], DamagedFile, "lacks lm_head.weight"),
    ]:
        places = content["weight_map"] | {"lm_head.weight": place}
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(error, match=re.escape(said)):
            read_hf(folder)
    index.write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(DamagedFile, match="its weight_map does not give a file"):
        read_hf(folder)
