"""How wrong each provider is, against fp64, on the very tensors whose times stand beside it.

The gate, for every output and gradient (the first line is FlashAttention's own test, hopper/test_flash_attn.py):

    max|x − exact|        ≤ 2   · max|torch − exact|        + eps · max|exact|
    ‖x − exact‖ / ‖exact‖ ≤ 1.2 · ‖torch − exact‖ / ‖exact‖ + eps / 4   (fp32: + eps)

torch is PyTorch's own way in the same dtype, eps that dtype's; the last terms are what one rounding explains where
PyTorch happens to hit the exact value. In fp32 it is a whole eps, as no 16-bit output hides that attention's backward
computes its weights anew from the kept logarithm. NaN or infinity, where the exact value has none, fails.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.families import Case, Function

LARGEST, RELATIVE = 2.0, 1.2  # factors of the gate
Results = dict[str, Tensor]


def outputs(answer: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


def leaves(case: Case, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs as the case wants them: with gradients, except forward and `fixed`."""
    wanted = case.direction != "forward"
    return {
        name: x.detach().requires_grad_(wanted and x.is_floating_point() and name not in case.fixed)
        for name, x in inputs.items()
    }


def cotangents(case: Case, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What comes back for each output in the backward pass: normal random numbers, 1 for a loss; fp64."""
    with torch.no_grad():
        shapes = [y.shape for y in outputs(case.torchs(**inputs))]
    device = next(iter(inputs.values())).device
    return [torch.randn(shape, device=device).double() if shape else torch.ones((), device=device) for shape in shapes]


def results(case: Case, function: Function, inputs: Mapping[str, Tensor], back: list[Tensor]) -> Results:
    """{"output 0": …, "d x": …} from copies of the inputs, as some peers write into theirs."""
    own = leaves(case, {name: x.clone() for name, x in inputs.items()})
    answer = outputs(function(**own))
    found = {f"output {i}": y.detach().clone() for i, y in enumerate(answer)}
    if case.direction != "forward":
        wanted = {name: x for name, x in own.items() if x.requires_grad}
        grads = torch.autograd.grad(
            answer, list(wanted.values()), [dy.to(y.dtype) for dy, y in zip(back, answer, strict=True)]
        )
        found |= {f"d {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return found


def wide(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def error(found: Results, exact: Results) -> dict[str, dict[str, float | None]]:
    """By tensor: "max" (absolute) and "relative" (Frobenius norms); None where a figure is not finite."""
    table = {}
    for name, trusted in exact.items():
        difference = found[name].double() - trusted
        scale = float(trusted.norm()) or 1.0
        figures = {"max": float(difference.abs().max()), "relative": float(difference.norm()) / scale}
        table[name] = {key: value if torch.tensor(value).isfinite() else None for key, value in figures.items()}
    return table


def gate(
    found: Mapping[str, Mapping[str, float | None]],
    torchs: Mapping[str, Mapping[str, float | None]],
    exact: Results,
    eps: float,
) -> str | None:
    """None where every tensor is within the gate, else the first that is not, with its figures."""
    for name, trusted in exact.items():
        floors = {"max": eps * float(trusted.abs().max()), "relative": eps if eps < 1e-6 else eps / 4}
        for figure, factor in (("max", LARGEST), ("relative", RELATIVE)):
            value = found[name][figure]
            if value is None:
                return f"{name}: NaN or infinity"
            allowed = factor * (torchs[name][figure] or 0.0) + floors[figure]
            if value > allowed:
                return f"{name}: {figure} error {value:.3g}, allowed {allowed:.3g}"
    return None
