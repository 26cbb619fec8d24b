"""Ours opened with the PEFT library on a Transformers model, and theirs with ours: fp32 logits within 1e-4."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minillm.config import UserError
from minillm.interop import peft as interop
from minillm.interop.export import content_of
from minillm.interop.hf import read_hf
from minillm.model.transformer import Transformer
from minillm.peft.config import MethodConfig
from minillm.peft.files import load, save
from minillm.peft.inject import Adapted, inject, target_layers
from minillm.peft.places import Place
from tests.peft.helpers import move

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of third parties about themselves, at import
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

pytestmark = [  # PEFT asks Transformers for what was renamed there, and warns of what it writes itself for AdaLoRA
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match.*lora_E:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),
]

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}),
    "qwen3": ("Qwen3Config", {**SIZES, "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 64}),
    "gpt2": ("GPT2Config", {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
THEIR_TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(family, a folder of a random Transformers model)"""
    torch.manual_seed(1)
    name, sizes = KINDS[request.param]
    theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes, use_cache=True))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return request.param, folder


def open_theirs(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def open_ours(folder: Path) -> Transformer:
    found = read_hf(folder)
    model = Transformer(found.config)
    model.load_state_dict(found.weights)
    return model.eval()


def places(folder: Path) -> dict[str, Place]:
    """Where each of our layers stands in the model of the folder."""
    return interop.places(content_of(open_ours(folder)))


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    ids = torch.randint(31, (2, 9))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[:, -9:]  # those of a soft prompt come first
        torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)


def changed_by(adapted: Adapted) -> float:
    """How much the method changes the logits: a comparison of two plain models would say nothing."""
    ids = torch.randint(31, (2, 9))
    with torch.no_grad():
        with_it = adapted.model(ids)
        state = {name: module for name, module in adapted.grown.items()}
        scales = {name: getattr(module, "scale", None) for name, module in state.items()}
        for module in state.values():
            module.scale = 0.0
        without = adapted.model(ids)
        for name, module in state.items():
            module.scale = scales[name]
    return float((with_it - without).abs().max())


OURS = {
    "lora": MethodConfig(method="lora", rank=3, alpha=7.0),
    "lora-qv": MethodConfig(method="lora", rank=2, targets="q_proj,v_proj"),
    "adalora": MethodConfig(method="adalora", rank=2, initial_rank=3, alpha=5.0),
    "prefix": MethodConfig(method="prefix", length=5),
    "prefix-network": MethodConfig(method="prefix", length=5, prefix_hidden=7),
    "prompt": MethodConfig(method="prompt", length=4),
}


@pytest.mark.parametrize("method", OURS)
def test_ours_opens_with_peft_and_comes_back(method: str, pair: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = pair
    adapted = inject(open_ours(folder), OURS[method])
    move(adapted.model)
    if adapted.allocator is not None:  # ranks that differ, one layer left without any
        for i, layer in enumerate(adapted.allocator.layers.values()):
            layer.kept.copy_(torch.tensor([i % 3 == 1, i % 2 == 1, i % 5 > 1]))
            layer.lora_E.data[~layer.kept] = 0.0
    if adapted.grown:
        assert changed_by(adapted) > 0.05
    save(adapted, tmp_path, rename=places(folder).__getitem__, base_model=str(folder))
    assert_same(adapted.model, peft.PeftModel.from_pretrained(open_theirs(folder), tmp_path).eval())
    again = load(open_ours(folder), tmp_path, rename=places(folder).__getitem__)
    assert_same(again.model, peft.PeftModel.from_pretrained(open_theirs(folder), tmp_path).eval())


def their_config(method: str, family: str) -> Any:
    options: dict[str, Any] = {"target_modules": THEIR_TARGETS[family], "lora_alpha": 6, "init_lora_weights": False}
    options["fan_in_fan_out"] = family == "gpt2"
    if method == "lora":
        return peft.LoraConfig(task_type="CAUSAL_LM", r=3, **options)
    if method == "rslora":
        first, second = ("0.attn.c_attn", "h.1.mlp.c_proj") if family == "gpt2" else ("0.self_attn.v_proj", "down_proj")
        patterns = {"rank_pattern": {first: 2}, "alpha_pattern": {second: 9}}
        return peft.LoraConfig(task_type="CAUSAL_LM", r=4, use_rslora=True, **options, **patterns)
    if method == "adalora":
        return peft.AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=10, **options)
    if method == "prefix":
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


@pytest.mark.parametrize("method", ["lora", "rslora", "adalora", "prefix", "prompt"])
def test_theirs_opens_with_ours(method: str, pair: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = pair
    theirs = peft.get_peft_model(open_theirs(folder), their_config(method, family)).eval()
    if method == "adalora":  # as after PEFT's own allocation, of a number that no equal ranks add up to
        config, allocator = theirs.peft_config["default"], theirs.base_model.rankallocator
        theirs(input_ids=torch.randint(31, (2, 9)), labels=torch.randint(31, (2, 9))).loss.backward()
        allocator.update_ipt(theirs.base_model.model)
        config.rank_pattern = allocator.mask_to_budget(theirs.base_model.model, allocator.target_bgt - 1)
        assert len({sum(kept) for kept in config.rank_pattern.values()}) > 1
    theirs.save_pretrained(tmp_path)
    adapted = load(open_ours(folder), tmp_path, rename=places(folder).__getitem__)
    if adapted.grown:
        assert changed_by(adapted) > 0.05
        assert len(adapted.grown) < len(target_layers(adapted.transformer, "all")), "what theirs leaves alone has grown"
    assert_same(adapted.model, theirs)


def test_a_layer_that_is_part_of_one_of_theirs_keeps_its_rank(pair: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = pair
    adapted = inject(open_ours(folder), MethodConfig(method="lora", rank=3, targets="q_proj,v_proj,up_proj"))
    move(adapted.model)
    save(adapted, tmp_path, rename=places(folder).__getitem__)
    again = load(open_ours(folder), tmp_path, rename=places(folder).__getitem__)
    assert again.grown.keys() == adapted.grown.keys()
    for name, layer in again.grown.items():
        for own in layer.own:
            assert torch.equal(getattr(layer, own), getattr(adapted.grown[name], own))
        assert layer.scale == pytest.approx(adapted.grown[name].scale, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias=all is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"peft_type": "IA3"}, "peft_type=IA3 is not supported; LORA, ADALORA"),
    ],
)
def test_what_has_no_counterpart_here_is_refused_by_name(
    change: dict[str, Any], message: str, pair: tuple[str, Path], tmp_path: Path
) -> None:
    family, folder = pair
    peft.get_peft_model(open_theirs(folder), their_config("lora", family)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load(open_ours(folder), tmp_path, rename=places(folder).__getitem__)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_theirs_for_another_model_is_refused(method: str, pair: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = pair
    name, sizes = KINDS[family]
    larger = {key: 2 * value if key in ("hidden_size", "n_embd", "head_dim") else value for key, value in sizes.items()}
    other = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**larger))
    peft.get_peft_model(other, their_config(method, family)).save_pretrained(tmp_path)
    model = open_ours(folder)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match="the adapter belongs to another model"):
        load(model, tmp_path, rename=places(folder).__getitem__)
    assert [type(module) for module in model.modules()] == kinds  # nothing was left in it
