"""Every operator with inputs of a given size; as a program, each of them once, forward and backward, on small ones:

compute-sanitizer --tool memcheck python -m tests.kernels.operators
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy
from kernels.decode_attention import decode_attention
from kernels.flash_attention import flash_attention
from kernels.layer_norm import layer_norm
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from kernels.swiglu import geglu, swiglu
from tests.kernels.compare import results

Operator = Callable[..., Tensor | tuple[Tensor, ...]]


def operators(dtype: torch.dtype, *, M: int, N: int, T: int, V: int) -> dict[str, tuple[Operator, dict[str, Tensor]]]:
    """{name: (function, inputs)}: M rows of N features, T tokens in heads of 64, V classes; on the default device."""

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_()

    x, residual, weight, bias = normal(M, N), normal(M, N), normal(N), normal(N)
    heads = {"q": normal(2, 8, T, 64), "k": normal(2, 2, T, 64)}
    cos, sin = torch.randn(T, 32), torch.randn(T, 32)
    ids, targets = torch.randint(0, 4, (2, T)).sort().values, torch.randint(V, (M,))
    qkv = heads | {"v": normal(2, 2, T, 64)}
    return {
        "rms_norm": (rms_norm, {"x": x, "weight": weight, "residual": residual}),
        "layer_norm": (layer_norm, {"x": x, "weight": weight, "bias": bias}),
        "rope": (partial(rope, cos=cos, sin=sin), heads | {"q_weight": normal(64), "k_weight": normal(64)}),
        "swiglu": (swiglu, {"gate": x, "up": residual}),
        "geglu": (geglu, {"gate": x, "up": residual}),
        "cross_entropy": (lambda logits: cross_entropy(logits, targets), {"logits": normal(M, V)}),
        "linear_cross_entropy": (
            lambda hidden, weight: linear_cross_entropy(hidden, weight, targets),
            {"hidden": x, "weight": normal(V, N)},
        ),
        "attention": (partial(flash_attention, causal=True, segments=(ids, ids)), qkv),
        "attention, deterministic": (partial(flash_attention, causal=True, deterministic=True), qkv),
    }


def main() -> None:
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    sizes = {"M": 65, "N": 200, "T": 70, "V": 333}  # no multiples of a block: masks are what may be wrong
    for name, (function, inputs) in operators(dtype, **sizes).items():
        answer = function(**inputs)
        outputs = answer if isinstance(answer, tuple) else (answer,)
        found = results(function, inputs, [torch.randn_like(y) for y in outputs])
        print(name, {what: round(float(x.double().norm()), 4) for what, x in found.items()})
    q, k, v = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 333, 64), torch.randn(2, 2, 333, 64)
    answer = decode_attention(q.to(dtype), k.to(dtype), v.to(dtype), torch.tensor([333, 65]))
    print("decode_attention", round(float(answer.double().norm()), 4))


if __name__ == "__main__":
    main()
