"""One comparison for all kernels: outputs and every gradient by the error rule, and inputs left as they were."""

import random
from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.budget import GRADIENT, OUTPUT, assert_within_budget

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SAMPLE = 60  # what the slow proofs can afford of one kernel's grid under the interpreter


def every(**options: tuple) -> list[Any]:
    """The whole grid of these options as test parameters, each a dict: for `@pytest.mark.prove`."""
    rows = [dict(zip(options, values, strict=True)) for values in product(*options.values())]
    return [pytest.param(row, id="-".join(str(v).removeprefix("torch.") for v in row.values())) for row in rows]


def sampled(**options: tuple) -> list[Any]:
    """At most SAMPLE cases of a grid that is too large for `every`: always the same ones, drawn without favour."""
    grid = every(**options)
    return random.Random(0).sample(grid, min(SAMPLE, len(grid)))


def pairwise(**options: tuple) -> list[Any]:
    """Few of `every`, among which each pair of values of each two options occurs; a greedy, repeatable choice."""
    grid = every(**options)
    pairs = [{(a, p.values[0][a], b, p.values[0][b]) for a, b in combinations(options, 2)} for p in grid]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(grid)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(grid[best])
    return chosen


def normal(*shape: int) -> Tensor:
    """Normal numbers cut off at ±2, so that 1e4 times their sums stays inside fp16."""
    return torch.randn(shape).clamp(-2, 2)


def results(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: dict[str, Tensor], cotangents: list[Tensor]
) -> dict[str, Tensor]:
    """{"output 0": …, "d x": …}: what `function(**inputs)` returns, and the gradient of each input that wants one."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    answer = function(**leaves)
    outputs = answer if isinstance(answer, tuple) else (answer,)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {f"output {i}": y.detach() for i, y in enumerate(outputs)} | {
        f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def compare(
    ours: Callable[..., Any],
    torchs: Callable[..., Any],
    exact: Callable[..., Any],
    inputs: dict[str, Tensor],
    cotangents: list[Tensor],
    terms: Callable[..., dict[str, Tensor]],
) -> None:
    """Hold `ours(**inputs)` and all its gradients against `exact` in fp64, by the error that `torchs` makes.

    inputs      the tensors, each of which gets a gradient, with the strides that are to be tested
    cotangents  what comes back for each output
    terms       terms(inputs, cotangents), both in fp64, gives for each name of `results` the terms that enter its sum
    """
    before = {name: x.clone() for name, x in inputs.items()}
    got, others = results(ours, inputs, cotangents), results(torchs, inputs, cotangents)
    wide, wide_cotangents = {name: x.double() for name, x in inputs.items()}, [dy.double() for dy in cotangents]
    trusted, largest = results(exact, wide, wide_cotangents), terms(wide, wide_cotangents)
    assert got.keys() == largest.keys(), f"terms for {sorted(largest)}, results {sorted(got)}"
    for name, value in got.items():
        factor = OUTPUT if name.startswith("output") else GRADIENT
        floor = largest[name].abs().max() if largest[name].numel() else 0.0
        assert_within_budget(name, value, others[name], trusted[name], factor=factor, floor_terms=floor)
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), f"{name} was modified"
