"""How a model begins: sizes, standard deviations, the first loss, a stream that keeps its scale."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.config import ModelConfig, from_dict
from minillm.model.transformer import Transformer
from minillm.presets import MODELS
from tests.model.configs import small

PUBLISHED = {  # gpt2*: Hugging Face's safetensors headers; the others: their model cards and configs
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "bert-base": 109_514_298,  # BertForMaskedLM, which has no pooler
    "transformer-base": 63_082_496,
}


def named(name: str, **changes: Any) -> ModelConfig:
    config = from_dict(ModelConfig, MODELS[name])
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_models_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(named(name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_the_original_transformer_is_the_65_millions_of_its_paper_less_three_percent() -> None:
    """Vaswani et al. 2017, table 3 gives "65 × 10⁶" for the base model and names no vocabulary to the token.

    With shared embeddings the blocks hold 44,138,496 and each of "about 37,000" tokens 512 more; 65 million would
    be reached at 40,745 tokens.
    """
    with torch.device("meta"):
        model = Transformer(named("transformer-base"))
    embedding = model.embedding.weight.numel()
    blocks = sum(p.numel() for p in model.parameters()) - embedding
    assert (blocks, embedding) == (44_138_496, 37_000 * 512)
    assert abs((blocks + embedding) / 65e6 - 1) < 0.03


def loss_on_random_tokens(model: Transformer) -> float:
    config = model.config
    ids, targets = torch.randint(config.vocab_size, (2, 4, config.context)).unbind()
    source = {"source": ids.flip(0)} if config.shape == "encoder-decoder" else {}
    with torch.no_grad():
        return F.cross_entropy(model(ids, **source).flatten(0, 1), targets.flatten()).item()


@pytest.mark.parametrize("init", ["normal", "xavier"])
@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny", "bert-tiny", "transformer-tiny"])
def test_the_first_loss_is_that_of_a_uniform_guess(name: str, init: str) -> None:
    config = named(name, init=init, vocab_size=4096)
    loss = loss_on_random_tokens(Transformer(config).eval())
    assert abs(loss / math.log(4096) - 1) < 0.02, f"{loss:.4f} nats, ln V is {math.log(4096):.4f}"


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_of_the_default_model_is_that_of_a_uniform_guess(tied: bool) -> None:
    loss = loss_on_random_tokens(Transformer(named("llama-5m", vocab_size=4096, tied=tied)).eval())
    assert abs(loss / math.log(4096) - 1) < 0.02


def kind_of(name: str) -> str:
    if "norm" in name:
        return "norm weight" if name.endswith("weight") else "bias"
    if name.endswith("bias"):
        return "bias"
    if "embedding" in name or name == "head.weight":
        return "embedding"
    return "ends a half-block" if "out_proj" in name or "down_proj" in name else "matrix"


def expected_std(kind: str, parameter: Tensor, config: ModelConfig, layers: int) -> float:
    if kind == "embedding":
        return config.init_std
    if config.init == "xavier":
        return math.sqrt(2 / sum(parameter.shape))  # a uniform of ±a has the deviation a / sqrt(3)
    return config.init_std / (math.sqrt(2 * layers) if kind == "ends a half-block" else 1)


@pytest.mark.parametrize("init", ["normal", "xavier"])
@pytest.mark.parametrize("shape", ["decoder", "encoder-decoder"])
def test_weights_begin_as_the_table_says(shape: str, init: str) -> None:
    config = small(
        shape=shape,
        layers=3,
        decoder_layers=2 if shape == "encoder-decoder" else None,
        dim=128,
        vocab_size=400,
        context=64,
        tied=False,
        init=init,
        init_std=0.03,
        token_types=40,
        output_bias=True,
        output_transform=True,
        attention={"bias": True, "qk_norm": True},
        mlp={"kind": "gelu", "bias": True, "hidden_dim": 512},
        position={"kind": "learned"},
        norm={"kind": "layer", "bias": True, "embedding": True},
    )
    model, seen = Transformer(config), set()
    for name, parameter in model.named_parameters():
        kind = kind_of(name)
        seen.add(kind)
        if kind in ("norm weight", "bias"):
            assert torch.equal(parameter, torch.full_like(parameter, float(kind == "norm weight"))), name
            continue
        layers = 2 if name.startswith("decoder.") and shape == "encoder-decoder" else 3
        expected, n = expected_std(kind, parameter, config, layers), parameter.numel()
        measured = parameter.std().item()
        assert abs(measured / expected - 1) < 5 / math.sqrt(2 * n), f"{name}: {measured:.5f}, not {expected:.5f}"
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(n), name
        if init == "xavier" and kind != "embedding":
            assert parameter.abs().max().item() <= math.sqrt(3) * expected * 1.0001, name
    assert seen == {"embedding", "matrix", "ends a half-block", "norm weight", "bias"}


def stream_deviation(layers: int) -> float:
    """Standard deviation of what the last of `layers` blocks hands to the final norm, over that of the embeddings."""
    model = Transformer(small(layers=layers, dim=128, mlp={"hidden_dim": 512})).eval()
    seen: list[Tensor] = []
    model.decoder.final_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0] + inputs[1]))
    ids = torch.randint(29, (4, 32))
    with torch.no_grad():
        model(ids)
        return (seen[0].std() / model.embedding(ids).std()).item()


def test_the_stream_keeps_its_scale_with_depth() -> None:
    """What each half-block adds shrinks with sqrt(2 · layers), so 2 blocks or 32 end at the same scale."""
    few, many = stream_deviation(2), stream_deviation(32)
    assert 1 < few < 3 and 1 < many < 3
    assert abs(many / few - 1) < 0.25


def test_the_same_seed_draws_the_same_weights() -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(Transformer(small()).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["embedding.weight"], states[2]["embedding.weight"])


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.vocab_size is not set"):
        Transformer(small(vocab_size=None))
    with pytest.raises(ValueError, match=r"model.output_transform needs an MLP without a gate"):
        Transformer(small(output_transform=True, mlp={"kind": "swiglu"}))
