"""Rows that lie more than 2^31 elements apart: in int32 their offsets would wrap around.

The memory is a sparse file, which takes no space where nothing is written.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy
from kernels.decode_attention import decode_attention
from kernels.flash_attention import flash_attention
from kernels.layer_norm import layer_norm
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu
from tests.kernels.compare import results

APART = 2**30 + 8  # elements from row to row: that fits into int32, and twice as many do not
TARGETS = torch.tensor([3, 0, 36])
ANGLES = torch.linspace(-9, 9, 3 * 5 * 8).view(3, 5, 8)
QKV = {"q": (3, 2, 5, 16), "k": (3, 1, 9, 16), "v": (3, 1, 9, 16)}


@pytest.fixture(scope="module")
def far(tmp_path_factory) -> Callable[[Tensor], Tensor]:
    """`far(x)`: the values of x [3, …], its rows APART elements from one another."""
    path = str(tmp_path_factory.mktemp("far") / "rows")
    memory = torch.from_file(path, shared=True, size=2 * APART + 2**16, dtype=torch.float16)
    used = 0

    def place(x: Tensor) -> Tensor:
        nonlocal used
        view = memory.as_strided(x.shape, (APART, *x.stride()[1:]), used)
        used += x[0].numel()
        return view.copy_(x)

    return place


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, residual: rms_norm(x, torch.ones(37), residual=residual), {"x": (3, 37), "residual": (3, 37)}),
        (lambda x, residual: layer_norm(x, torch.ones(37), residual=residual), {"x": (3, 37), "residual": (3, 37)}),
        (swiglu, {"gate": (3, 37), "up": (3, 37)}),
        (partial(cross_entropy, targets=TARGETS), {"logits": (3, 37)}),
        (partial(rope, cos=ANGLES.cos(), sin=ANGLES.sin()), {"q": (3, 2, 5, 16), "k": (3, 1, 5, 16)}),
        (
            partial(rope, cos=ANGLES.cos(), sin=ANGLES.sin(), q_weight=torch.ones(16), k_weight=torch.ones(16)),
            {"q": (3, 2, 5, 16), "k": (3, 1, 5, 16)},
        ),
        (partial(flash_attention, causal=True, deterministic=True), QKV),
        (partial(flash_attention, causal=True), QKV),
    ],
    ids=["rms_norm", "layer_norm", "swiglu", "cross_entropy", "rope", "rope with norm", "by queries", "fused"],
)
def test_outputs_and_gradients_are_those_of_rows_side_by_side(function, shapes, far) -> None:
    inputs = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    answer = function(**inputs)
    cotangents = [torch.randn(y.shape).to(y.dtype) for y in (answer if isinstance(answer, tuple) else (answer,))]
    near = results(function, inputs, cotangents)
    apart = [far(dy) if dy.dim() > 1 else dy for dy in cotangents]
    got = results(function, {name: far(x) for name, x in inputs.items()}, apart)
    for name, values in near.items():
        assert torch.equal(got[name], values), name


def test_a_cache_of_more_than_2_to_the_31_elements(far) -> None:
    q, k, v = (torch.randn(shape).half() for shape in QKV.values())
    lengths = torch.tensor([9, 6, 5])
    assert torch.equal(decode_attention(far(q), far(k), far(v), lengths), decode_attention(q, k, v, lengths))


def test_tokens_that_lie_far_apart(far) -> None:
    """Within a tile offsets are int32: what they cannot reach is copied first."""
    apart = [far(torch.randn(3, 1, heads, 16).half()).permute(1, 2, 0, 3) for heads in (2, 1, 1)]
    near, lengths = [x.contiguous() for x in apart], torch.tensor([3])
    assert torch.equal(flash_attention(*apart, causal=True), flash_attention(*near, causal=True))
    assert torch.equal(decode_attention(*apart, lengths), decode_attention(*near, lengths))
