"""Small models for the tests: every combination of parts, none of the weights where they start."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from minillm.config import ModelConfig, from_dict, merge
from minillm.model.transformer import Transformer

BASE = {"layers": 2, "heads": 4, "dim": 16, "context": 32, "vocab_size": 29, "mlp": {"hidden_dim": 20}}

POSITIONS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "learned": {"kind": "learned"},
    "sinusoidal": {"kind": "sinusoidal"},
    "rope": {"kind": "rope", "theta": 100.0},
    "rope-linear": {"kind": "rope", "theta": 100.0, "scaling": "linear", "scaling_factor": 3.0},
    "rope-llama3": {"kind": "rope", "theta": 100.0, "scaling": "llama3", "original_context": 16},
    "alibi": {"kind": "alibi"},
}


def small(**changes: Any) -> ModelConfig:
    """Two blocks of width 16 with 4 heads and 29 words, changed as `from_dict` reads it."""
    return from_dict(ModelConfig, merge(BASE, changes))


def build(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model in evaluation mode whose every parameter is random: norms that are not 1, biases that are not 0."""
    model = Transformer(config).to(dtype).eval()
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(start + 0.2 * torch.randn_like(parameter))


def pairwise(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[dict[str, Any]], bool] = lambda case: True
) -> list[dict[str, Any]]:
    """Few cases in which every pair of values of any two factors occurs (where allowed); always the same ones.

    Most faults of combined options show with two of them; a full grid would be millions.
    """
    draw = random.Random(1)

    def pairs(case: Mapping[str, Any]) -> set[tuple]:
        return set(itertools.combinations(sorted((name, repr(value)) for name, value in case.items()), 2))

    def complete(fixed: dict[str, Any]) -> dict[str, Any]:
        return {name: fixed.get(name, draw.choice(values)) for name, values in factors.items()}

    cases: list[dict[str, Any]] = []
    covered: set[tuple] = set()
    for (first, firsts), (second, seconds) in itertools.combinations(factors.items(), 2):
        for pair in itertools.product(firsts, seconds):
            fixed = dict(zip((first, second), pair, strict=True))
            if pairs(fixed) <= covered:
                continue
            drawn = [case for _ in range(60) if allowed(case := complete(fixed))]
            if drawn:  # else the two exclude each other
                best = max(drawn, key=lambda case: len(pairs(case) - covered))
                covered |= pairs(best)
                cases.append(best)
    return cases
