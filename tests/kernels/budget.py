"""The one rule by which every kernel test judges an error.

A kernel may be wrong by a small multiple of what PyTorch's own operator is wrong by, on the same tensors in the same
dtype, both held against fp64; plus a floor for what rounding alone explains:

    max|ours − exact| ≤ factor · max|torch − exact| + 8 · eps(dtype) · largest term of the sum

So the bound tightens by itself in fp32, and no tolerance is chosen by hand for a kernel. The method is
FlashAttention's (hopper/test_flash_attn.py), the floor is ours: where PyTorch happens to hit the exact value,
twice its error would be zero.
"""

import torch
from torch import Tensor

OUTPUT, GRADIENT = 2.0, 3.0  # factors: a gradient goes through one rounding more than an output


def assert_within_budget(
    name: str,
    ours: Tensor,
    torchs: Tensor,
    exact: Tensor,
    *,
    factor: float,
    floor_terms: Tensor | float,
) -> None:
    """Raise AssertionError with the figures unless `ours` is within budget.

    name         what is compared, for the message ("rms_norm dx, bf16, N=37")
    ours         the kernel's result
    torchs       PyTorch's, from the same inputs in the same dtype
    exact        the reference's, from the same inputs in fp64
    factor       OUTPUT or GRADIENT
    floor_terms  the terms that enter the sum (for a product of vectors: the products), or their largest magnitude

    Shapes and dtypes must agree, and NaN and infinities stand in `ours` where they stand in `exact` (an infinity where
    the exact value lies outside the dtype's range). Where PyTorch's own result is not finite, its error counts as 0.
    """
    assert exact.dtype == torch.float64, f"{name}: the exact values must be fp64, not {exact.dtype}"
    assert ours.shape == torchs.shape == exact.shape, f"{name}: {ours.shape}, {torchs.shape}, {exact.shape}"
    assert ours.dtype == torchs.dtype, f"{name}: {ours.dtype} against PyTorch's {torchs.dtype}"
    expected = exact.detach().to(ours.dtype)  # what lies outside the dtype's range is infinite here
    same_places = torch.equal(ours.isnan(), expected.isnan()) and torch.equal(
        ours.where(ours.isinf(), 0), expected.where(expected.isinf(), 0)
    )
    assert same_places, f"{name}: NaN or infinity in {_bad(ours)} places, the reference in {_bad(expected)}"

    finite = expected.isfinite()
    if not finite.any():  # an empty tensor, or nothing left to compare
        return
    largest = float(floor_terms.detach().abs().max()) if isinstance(floor_terms, Tensor) else abs(float(floor_terms))
    error, torchs_error = _error(ours, exact, finite), _error(torchs, exact, finite & torchs.isfinite())
    floor = 8 * torch.finfo(ours.dtype).eps * largest
    assert error <= factor * torchs_error + floor, (
        f"{name}: off by {error:.3g}, allowed {factor * torchs_error + floor:.3g}"
        f" = {factor:g} × {torchs_error:.3g} (PyTorch's own) + {floor:.3g} (rounding of terms up to {largest:.3g})"
    )


def _error(got: Tensor, exact: Tensor, where: Tensor) -> float:
    errors = (got.detach().double() - exact.detach())[where].abs()
    return float(errors.max()) if errors.numel() else 0.0


def _bad(x: Tensor) -> int:
    return int((~x.isfinite()).sum())
