"""The references in 16 bits: fp32 inside, the input's dtype outside, so that the last rounding is all they lose."""

from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy_reference
from kernels.decode_attention import decode_attention_reference
from kernels.flash_attention import flash_attention_reference
from kernels.layer_norm import layer_norm_reference
from kernels.linear_cross_entropy import linear_cross_entropy_reference
from kernels.rms_norm import rms_norm_reference
from kernels.rope import rope_reference
from kernels.swiglu import geglu_reference, swiglu_reference

TARGETS, ANGLES = torch.tensor([3, 0, 36]), torch.linspace(-9, 9, 40).view(5, 8)
HEADS, CACHE = (2, 4, 5, 16), (2, 2, 9, 16)
REFERENCES = {  # function, shapes of its inputs, whether the answer is a loss (fp32 whatever the input)
    "rms_norm": (rms_norm_reference, {"x": (3, 37), "weight": (37,)}, False),
    "layer_norm": (layer_norm_reference, {"x": (3, 37), "weight": (37,), "bias": (37,)}, False),
    "swiglu": (swiglu_reference, {"gate": (3, 37), "up": (3, 37)}, False),
    "geglu": (geglu_reference, {"gate": (3, 37), "up": (3, 37)}, False),
    "rope": (
        partial(rope_reference, cos=ANGLES.cos(), sin=ANGLES.sin()),
        {"q": HEADS, "k": (2, 1, 5, 16), "q_weight": (16,), "k_weight": (16,)},
        False,
    ),
    "flash_attention": (partial(flash_attention_reference, causal=True), {"q": HEADS, "k": CACHE, "v": CACHE}, False),
    "decode_attention": (
        partial(decode_attention_reference, lengths=torch.tensor([9, 7])),
        {"q": HEADS, "k_cache": CACHE, "v_cache": CACHE},
        False,
    ),
    "cross_entropy": (partial(cross_entropy_reference, targets=TARGETS), {"logits": (3, 37)}, True),
    "linear_cross_entropy": (
        partial(linear_cross_entropy_reference, targets=TARGETS),
        {"hidden": (3, 5), "weight": (37, 5), "bias": (37,)},
        True,
    ),
}


def outputs(answer: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REFERENCES)
def test_only_the_last_rounding_is_lost(name: str, dtype: torch.dtype) -> None:
    function, shapes, is_loss = REFERENCES[name]
    inputs = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    exact = outputs(function(**{name: x.double() for name, x in inputs.items()}))
    expected = torch.float32 if is_loss else dtype
    half_a_unit = torch.finfo(expected).eps / 2
    for got, want in zip(outputs(function(**inputs)), exact, strict=True):
        assert got.dtype == expected
        rounding, inside = (half_a_unit if not is_loss else 0) * want.abs(), 1e-5 * want.abs().max()
        assert ((got.double() - want).abs() <= 1.01 * rounding + inside).all()
