"""What the plan says of the operators is what a training step then calls."""

import importlib
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch

from minillm import ops
from minillm.commands.announce import operators
from minillm.config import ModelConfig, from_dict
from minillm.data.batch import Batch
from minillm.model.transformer import Transformer
from minillm.training.objectives import likelihood

CPU = torch.device("cpu")
TINY = {"layers": 1, "heads": 2, "dim": 16, "context": 8, "vocab_size": 11}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"attention": {"qk_norm": True}},
    "gpt2": {"norm": {"kind": "layer", "bias": True}, "mlp": {"kind": "gelu"}, "position": {"kind": "learned"}},
    "alibi": {
        "norm": {"kind": "layer"},
        "position": {"kind": "alibi"},
        "mlp": {"kind": "geglu"},
        "attention": {"qk_norm": True},
    },
}
KERNELS = {
    **{name: [name] for name in ("flash_attention", "layer_norm", "rms_norm", "rope", "linear_cross_entropy")},
    "swiglu": ["swiglu", "geglu"],
}


@pytest.fixture
def called(monkeypatch) -> dict[str, list[dict[str, Any]]]:
    """Kernels by name, with the options of each call; their references answer."""
    calls: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def recording(name: str, answer: Any) -> Any:
        def record(*args: Any, **options: Any) -> Any:
            calls[name].append(options)
            return answer(*args, **options)

        return record

    for file, names in KERNELS.items():
        module = importlib.import_module(f"kernels.{file}")
        for name in names:
            monkeypatch.setattr(module, name, recording(name, getattr(module, f"{name}_reference")))
    monkeypatch.setattr(ops, "_choice", "triton")
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_the_kernels_that_are_named_are_called(name: str, called) -> None:
    config = from_dict(ModelConfig, TINY | MODELS[name])
    ids = torch.arange(16).view(2, 8) % 11
    model = Transformer(config)
    likelihood(model, Batch(ids=ids, targets=ids, samples=torch.arange(2))).backward()
    said = operators(config, CPU, "fp32")
    norm = f"{config.norm.kind}_norm"
    assert said["norm"].startswith(norm) and "same pass" in said["norm"]
    assert sum(call.get("residual") is not None for call in called[norm]) == 3, (
        "before attention, before the MLP, at the end"
    )
    expected = {"flash_attention", "linear_cross_entropy", norm}
    assert said["attention"] == "flash_attention" and said["loss"].startswith("linear_cross_entropy")
    assert ("RoPE" in said) == (config.position.kind == "rope")
    if "RoPE" in said:
        expected.add("rope")
        fused = [call["q_weight"] is not None for call in called["rope"]]
        assert fused == ["QK-norm" in said]
    if said.get("QK-norm", "").startswith("rms_norm"):
        expected.add("rms_norm")
    if config.mlp.gated:
        expected.add(said["MLP"])
    assert set(called) == expected


def test_a_cpu_says_why_it_is_not_the_usual_operator() -> None:
    plain = from_dict(ModelConfig, TINY)
    assert operators(plain, CPU, "fp32")["attention"] == "F.scaled_dot_product_attention"
    capped = operators(from_dict(ModelConfig, TINY | {"attention": {"softcap": 20.0}}), CPU, "fp32")
    assert capped["attention"].startswith("flash_attention_reference") and "no softcap" in capped["attention"]
    windowed = operators(from_dict(ModelConfig, TINY | {"attention": {"window": 4}}), CPU, "fp32")
    assert "mask in memory" in windowed["attention"]
    assert operators(plain, CPU, "bf16")["attention"].startswith("two products and a softmax")
    assert operators(replace(plain, context=2048), CPU, "bf16")["attention"] == "F.scaled_dot_product_attention"
