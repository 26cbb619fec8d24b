"""The model's logits against the forward pass written out in naive.py, for combinations of all its parts."""

from typing import Any

import pytest
import torch

from minillm.config import ModelConfig
from minillm.model.transformer import Transformer
from tests.model.configs import POSITIONS, build, pairwise, small
from tests.model.naive import Naive

FACTORS: dict[str, list[Any]] = {
    "shape": ["decoder", "encoder", "encoder-decoder"],
    "position": list(POSITIONS),
    "norm": ["rms", "layer", "layer with bias"],
    "placement": ["pre", "post"],
    "embedding_norm": [False, True],
    "mlp": ["gelu", "gelu-tanh", "relu", "relu2", "silu", "tanh", "swiglu", "geglu"],
    "mlp_bias": [False, True],
    "attention_bias": [False, True],
    "qk_norm": [False, True],
    "window": [None, 3],
    "score_softcap": [None, 0.7],
    "kv_heads": [4, 2, 1],
    "head_dim": [None, 6],
    "tied": [True, False],
    "source_embedding": [False, True],
    "output": ["plain", "bias", "transform and bias"],
    "softcap": [None, 1.5],
    "embedding_scale": [False, True],
    "token_types": [0, 2],
    "segments": [None, "packed", "padded left", "padded right"],
}

SEGMENTS = {
    "packed": [[3, 3, 3, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1]],
    "padded left": [[-1, -1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]],
    "padded right": [[0, 0, 0, 0, 0, 0, -1, -1], [0, -1, -1, -1, -1, -1, -1, -1]],
}


def possible(case: dict[str, Any]) -> bool:
    if case["source_embedding"] and case["shape"] != "encoder-decoder":
        return False
    return case["output"] != "transform and bias" or case["mlp"] not in ("swiglu", "geglu")


def config_of(case: dict[str, Any]) -> ModelConfig:
    return small(
        shape=case["shape"],
        decoder_layers=1 if case["shape"] == "encoder-decoder" else None,
        kv_heads=case["kv_heads"],
        head_dim=case["head_dim"],
        tied=case["tied"],
        source_embedding=case["source_embedding"],
        token_types=case["token_types"],
        embedding_scale=case["embedding_scale"],
        output_bias=case["output"] != "plain",
        output_transform=case["output"] == "transform and bias",
        softcap=case["softcap"],
        attention={
            "bias": case["attention_bias"],
            "qk_norm": case["qk_norm"],
            "window": case["window"],
            "softcap": case["score_softcap"],
        },
        mlp={"kind": case["mlp"], "bias": case["mlp_bias"]},
        position=POSITIONS[case["position"]],
        norm={
            "kind": case["norm"].split()[0],
            "bias": case["norm"].endswith("bias"),
            "placement": case["placement"],
            "embedding": case["embedding_norm"],
        },
    )


def inputs_of(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    segments = None if case["segments"] is None else torch.tensor(SEGMENTS[case["segments"]])
    inputs = {"ids": torch.randint(29, (2, 8))}
    if segments is not None:
        inputs["segments"] = segments
    if case["token_types"]:
        inputs["token_types"] = torch.randint(2, (2, 8))
    if case["shape"] == "encoder-decoder":
        inputs["source"] = torch.randint(29, (2, 6))
        if segments is not None:  # what is left of each document; document 0 of the second row reads nothing
            inputs["source_segments"] = segments[:, 2:]
    return inputs


def tables_of(model: Transformer) -> dict[str, Any]:
    """The model's own positions, which test_position.py holds against their formulas."""
    position = (model.decoder or model.encoder).position

    def angles(place: int) -> torch.Tensor:
        cos, sin = position.rotation(torch.tensor([place]))
        return torch.complex(cos[0].double(), sin[0].double())

    def waves(place: int) -> torch.Tensor:
        return position.add(torch.zeros(1, model.config.dim, dtype=torch.float64), torch.tensor([place]))[0]

    return {"angles": angles, "waves": waves}


def assert_equal_logits(case: dict[str, Any]) -> None:
    """fp64 within 1e-10 with the same tables of positions, fp32 within 1e-5 of everything written out."""
    config, inputs = config_of(case), inputs_of(case)
    model = build(config)
    with torch.no_grad():
        exact = Naive(model.state_dict(), config, **tables_of(model)).logits(**inputs)
        error = (model(**inputs) - exact).abs().max().item()
        assert error <= 1e-10, f"fp64 off by {error:.3g}: {case}"

        model = model.float()
        exact = Naive(model.state_dict(), config).logits(**inputs)
        error = (model(**inputs) - exact).abs().max().item()
        assert error <= 1e-5, f"fp32 off by {error:.3g}: {case}"


CASES = pairwise(FACTORS, possible)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_logits_equal_the_written_out_forward_pass(number: int) -> None:
    assert_equal_logits(CASES[number])


@pytest.mark.prove
@pytest.mark.parametrize("shape", FACTORS["shape"])
@pytest.mark.parametrize("position", list(POSITIONS))
def test_logits_equal_the_written_out_forward_pass_for_more_combinations(shape: str, position: str) -> None:
    factors = {**FACTORS, "shape": [shape], "position": [position]}
    for case in pairwise(factors, possible):
        assert_equal_logits(case)
