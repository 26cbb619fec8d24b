"""Gated activations:  y = act(gate) · up  with act = silu (SwiGLU) or gelu (GeGLU).

    silu(x) = x · σ(x)                 silu'(x) = σ(x) · (1 + x · (1 − σ(x)))
    gelu(x) = x · Φ(x)                 gelu'(x) = Φ(x) + x · φ(x)
    gelu_tanh(x) = x · σ(2u)           gelu_tanh'(x) = σ(2u) + x · σ(2u) · (1 − σ(2u)) · 2u'
                                       u = √(2/π) · (x + 0.044715 x³), as (1 + tanh u) / 2 = σ(2u)

Φ and φ are the normal distribution and its density. Backward: dgate = dy · up · act'(gate), dup = dy · act(gate).

Fused, gate and up are read once and act(gate) is never written: forward moves 3 tensors, eager PyTorch 5.

Source: Shazeer, "GLU Variants Improve Transformer" (2020), eqs. 5 and 6; Hendrycks and Gimpel, "Gaussian Error Linear
Units" (2016), section 2.
M rows (leading dimensions flattened), F features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ._launch import POINTERS, AotCase, architecture, as_rows, jit, runs_triton, shipped, tl, triton, tuned

GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # by the word that torch.nn.functional.gelu has for them


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition: at least fp32 inside, the input's dtype outside; in fp64 it is what the tests trust."""
    _check(gate, up)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def geglu_reference(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """The definition: at least fp32 inside, the input's dtype outside; in fp64 it is what the tests trust."""
    _check(gate, up, approximate)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.gelu(gate.to(wide), approximate=approximate) * up.to(wide)).to(gate.dtype)


def _check(gate: Tensor, up: Tensor, approximate: str = "none") -> None:
    if gate.shape != up.shape:
        raise ValueError(f"gate {list(gate.shape)} and up {list(up.shape)} must have the same shape")
    if gate.dtype != up.dtype or not gate.is_floating_point():
        raise ValueError(f"gate and up must share one float dtype, not {gate.dtype} and {up.dtype}")
    if approximate not in GELUS:
        raise ValueError(f"approximate must be 'none' or 'tanh', not {approximate!r}")


@jit
def _sigmoid(x):
    """σ(x) and its derivative σ(x) · (1 − σ(x))."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))  # exp(-|x|), which cannot overflow
    larger = 1.0 / (1.0 + e)  # of σ(x) and σ(−x) = 1 − σ(x): the only division, and no difference that loses digits
    smaller = e * larger
    return tl.where(x >= 0, larger, smaller), larger * smaller


@jit
def _activation(x, ACTIVATION: tl.constexpr):
    """act(x) = x · s, with its gate s, and the derivative s + x · s'."""
    if ACTIVATION == "silu":
        s, slope = _sigmoid(x)
    elif ACTIVATION == "gelu":
        s = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # √½
        slope = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)  # 1/√(2π), ½ log2 e
    else:
        s, slope = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 √(2/π)
        slope *= 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return x * s, s + x * slope


@jit
def _forward(
    gate_ptr, up_ptr, y_ptr,  # [M, F] each
    stride_gate, stride_up, F, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # int64: offsets pass 2^31
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * stride_gate + col, col < F, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + col, col < F, other=0.0).to(tl.float32)
    act, _ = _activation(gate, ACTIVATION)
    tl.store(y_ptr + row * F + col, act * up, col < F)


@jit
def _backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,  # [M, F] each
    stride_dy, stride_gate, stride_up, F, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + row * stride_dy + col, col < F, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + col, col < F, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + col, col < F, other=0.0).to(tl.float32)
    act, derivative = _activation(gate, ACTIVATION)
    tl.store(dgate_ptr + row * F + col, dy * up * derivative, col < F)
    tl.store(dup_ptr + row * F + col, dy * act, col < F)


@custom_op("minillm::gated", mutates_args=())
def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate, up [M, F]  ->  act(gate) · up [M, F]; activation is 'silu', 'gelu' or 'gelu_tanh'."""
    (M, width), y = gate.shape, gate.new_empty(gate.shape)
    gate, up = as_rows(gate), as_rows(up)
    choice = tuned("gated_forward", architecture(gate.device), activation, gate.dtype)
    _forward[(M * triton.cdiv(width, choice["BLOCK"]),)](
        gate, up, y, gate.stride(0), up.stride(0), width, ACTIVATION=activation, **choice
    )
    return y


@custom_op("minillm::gated_backward", mutates_args=())
def _gated_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradient of the output [M, F]  ->  of gate and of up, [M, F] both."""
    (M, width), dgate, dup = gate.shape, gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    dy, gate, up = as_rows(dy), as_rows(gate), as_rows(up)
    choice = tuned("gated_backward", architecture(gate.device), activation, gate.dtype)
    _backward[(M * triton.cdiv(width, choice["BLOCK"]),)](
        dy, gate, up, dgate, dup, dy.stride(0), gate.stride(0), up.stride(0), width, ACTIVATION=activation, **choice
    )
    return dgate, dup


def _save(ctx, inputs, output):
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gradient(ctx, dy):
    return *_gated_backward(dy, *ctx.saved_tensors, ctx.activation), None


_gated.register_fake(lambda gate, up, activation: gate.new_empty(gate.shape))
_gated_backward.register_fake(lambda dy, gate, up, activation: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)))
_gated.register_autograd(_gradient, setup_context=_save)


def _fused(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    # Whole tensors as one row: short rows would leave most of a block empty. The halves of one product stay rows.
    rows = (1, -1) if gate.is_contiguous() and up.is_contiguous() else (-1, gate.shape[-1])
    return _gated(gate.reshape(rows), up.reshape(rows), activation).view(gate.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of any shape [...] and strides: fused where Triton runs, the reference elsewhere.

    Raises ValueError where shapes or dtypes of gate and up differ. Source: Shazeer (2020), eq. 6.
    """
    _check(gate, up)
    if gate.numel() == 0 or not runs_triton(gate, up):  # nothing is no grid to launch
        return swiglu_reference(gate, up)
    return _fused(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(gate) · up, of any shape [...] and strides: fused where Triton runs, the reference elsewhere.

    approximate: 'none' for the normal distribution's Φ, 'tanh' for GPT-2's, as in torch.nn.functional.gelu.
    Raises ValueError for another word, and where shapes or dtypes of gate and up differ. Source: Shazeer (2020), eq. 6.
    """
    _check(gate, up, approximate)
    if gate.numel() == 0 or not runs_triton(gate, up):
        return geglu_reference(gate, up, approximate=approximate)
    return _fused(gate, up, GELUS[approximate])


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Every shipped configuration, forward and backward."""
    for kernel, function in (("gated_forward", _forward), ("gated_backward", _backward)):
        for key, choice in shipped(kernel, arch).items():
            activation, dtype = key.split("/")
            constexprs = {"ACTIVATION": activation, "BLOCK": choice["BLOCK"]}
            signature = {
                name: "constexpr" if name in constexprs else POINTERS[dtype] if name.endswith("_ptr") else "i32:16"
                for name in function.arg_names
            }
            yield AotCase(f"{kernel}/{key}", function, signature, constexprs, {"num_warps": choice["num_warps"]})
