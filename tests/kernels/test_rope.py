"""RoPE's kernel, plain and with QK-norm, against its reference in fp64: head counts, widths, layouts, positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import rope as module
from kernels._launch import runs_triton
from kernels.rope import rope, rope_reference
from tests.kernels.compare import DEVICES, DTYPES, compare, pairwise, results, sampled

EPS = 1e-6
GRID = {
    "batch": (1, 2),
    "heads": ((1, 1), (6, 2), (5, 5)),  # query and key heads; 5 is not a multiple of what a program takes
    "tokens": (1, 3, 70),  # 70 is past one block
    "width": (2, 6, 64, 80, 256),
    "dtype": DTYPES,
    "own_positions": (False, True),  # cos and sin [B, T, D/2] instead of [T, D/2]
    "norm": (False, True),
}


def torchs(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None
):
    """As Transformers writes it: everything in q's dtype, cos and sin doubled."""
    cos, sin = (torch.cat((angle, angle), -1).to(q.dtype).unsqueeze(-3) for angle in (cos, sin))

    def rotate(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x if weight is None else F.rms_norm(x, weight.shape, weight, EPS)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return rotate(q, q_weight), rotate(k, k_weight)


def terms(inputs: dict[str, Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
    if "q_weight" not in inputs:
        q, k = inputs.values()
        return {"output 0": q, "output 1": k, "d q": cotangents[0], "d k": cotangents[1]}
    named = {}
    for i, (name, dy) in enumerate(zip("qk", cotangents, strict=True)):
        x, w = inputs[name], inputs[f"{name}_weight"]
        inv_rms = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
        largest = dy.abs().amax(-1, keepdim=True)  # the rotation mixes features
        named |= {f"output {i}": x * inv_rms * w.abs().max(), f"d {name}": inv_rms * largest * w}
        named[f"d {name}_weight"] = largest * x * inv_rms
    return named


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(shape) * 10
    return angle.cos(), angle.sin()


def check(inputs: dict[str, Tensor], cos: Tensor, sin: Tensor, cotangents: list[Tensor]) -> None:
    assert runs_triton(*inputs.values(), cos, sin), "the reference would be compared with itself"
    before = cos.clone(), sin.clone()
    compare(
        lambda **i: rope(cos=cos, sin=sin, **i),
        lambda **i: torchs(cos=cos, sin=sin, **i),
        lambda **i: rope_reference(cos=cos.double(), sin=sin.double(), **i),
        inputs,
        cotangents,
        terms,
    )
    assert torch.equal(cos, before[0]) and torch.equal(sin, before[1])


def check_case(case: dict, device: str) -> None:
    (B, (H, G), T, D), dtype = (case[name] for name in ("batch", "heads", "tokens", "width")), case["dtype"]
    inputs = {"q": torch.randn(B, H, T, D), "k": torch.randn(B, G, T, D)}
    if case["norm"]:
        inputs |= {"q_weight": torch.randn(D), "k_weight": torch.randn(D)}
    cotangents = [torch.randn(B, H, T, D), torch.randn(B, G, T, D)]
    cos, sin = angles(*((B, T) if case["own_positions"] else (T,)), D // 2)
    inputs = {name: x.to(device, dtype) for name, x in inputs.items()}
    check(inputs, cos.to(device), sin.to(device), [dy.to(device, dtype) for dy in cotangents])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", pairwise(**GRID))
def test_equals_the_reference(case: dict, device: str) -> None:
    check_case(case, device)


@pytest.mark.prove
@pytest.mark.parametrize("case", sampled(**GRID))
def test_equals_the_reference_in_many_cases(case: dict) -> None:
    check_case(case, "cpu")


def test_turns_a_pair_by_its_angle() -> None:
    q, quarter = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4), torch.tensor([[torch.pi / 2, 0.0]])
    turned, _ = rope(q, q, quarter.cos(), quarter.sin())
    torch.testing.assert_close(turned.flatten(), torch.tensor([-3.0, 2.0, 1.0, 4.0]))  # pairs are (1, 3) and (2, 4)


def test_scores_depend_on_the_distance_alone() -> None:
    angle = torch.arange(9)[:, None] * 10_000 ** (-torch.arange(8) / 8)
    q, k = torch.randn(16).expand(1, 1, 9, 16), torch.randn(16).expand(1, 1, 9, 16)
    q, k = rope(q, k, angle.cos(), angle.sin())
    scores = (q @ k.mT)[0, 0]
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "layout", ["heads inside tokens", "slices of one product", "expanded heads", "turned features"]
)
def test_strides(layout: str, norm: bool) -> None:
    B, H, G, T, D = 2, 3, 2, 5, 16
    qkv = torch.randn(B, T, H + 2 * G, D)
    inputs = {
        "heads inside tokens": lambda: {"q": torch.randn(B, T, H, D).transpose(1, 2), "k": torch.randn(B, G, T, D)},
        "slices of one product": lambda: {
            "q": qkv[:, :, :H].transpose(1, 2),
            "k": qkv[:, :, H : H + G].transpose(1, 2),
        },
        "expanded heads": lambda: {"q": torch.randn(B, 1, T, D).expand(B, H, T, D), "k": torch.randn(B, G, T, D)},
        "turned features": lambda: {"q": torch.randn(B, H, D, T).mT, "k": torch.randn(D, B, G, T).permute(1, 2, 3, 0)},
    }[layout]()
    if norm:
        inputs |= {"q_weight": torch.randn(2 * D)[::2], "k_weight": torch.randn(D)}
    cos, sin = torch.randn(B, D // 2, T).mT, torch.randn(B, T, D)[..., ::2]
    check(inputs, cos, sin, [torch.randn(B, T, H, D).transpose(1, 2), torch.randn(B, 1, T, D).expand(B, G, T, D)])


def test_the_answer_is_laid_out_as_the_question() -> None:
    q, k = torch.randn(2, 5, 3, 16).transpose(1, 2), torch.randn(2, 2, 5, 16)
    cos, sin = angles(5, 8)
    turned, other = rope(q, k, cos, sin)
    torch.testing.assert_close(turned, rope_reference(q, k, cos, sin)[0])
    assert turned.stride() == q.stride() and other.stride() == k.stride()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_nothing_to_turn(batch: int, tokens: int, norm: bool) -> None:
    inputs = {"q": torch.randn(batch, 3, tokens, 16), "k": torch.randn(batch, 1, tokens, 16)}
    if norm:
        inputs |= {"q_weight": torch.randn(16), "k_weight": torch.randn(16)}
    cos, sin = angles(tokens, 8)
    got = results(lambda **i: rope(cos=cos, sin=sin, **i), inputs, [inputs["q"], inputs["k"]])
    assert got["output 0"].shape == (batch, 3, tokens, 16) and got["d k"].shape == (batch, 1, tokens, 16)
    assert all(torch.equal(got[f"d {name}"], torch.zeros(16)) for name in inputs if name.endswith("weight"))


@pytest.mark.parametrize("width", [512, 514])
def test_the_widest_heads(width: int) -> None:
    """514 is past what a program holds: the reference answers, with the same values."""
    q, k, (cos, sin) = torch.randn(1, 2, 3, width), torch.randn(1, 1, 3, width), angles(3, width // 2)
    w = torch.randn(width)
    exact = rope_reference(*(x.double() for x in (q, k, cos, sin)), q_weight=w.double(), k_weight=w.double())
    for got, want in zip(rope(q, k, cos, sin, q_weight=w, k_weight=w), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", [rope, rope_reference])
def test_angles_get_no_gradient(implementation) -> None:
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    cos, sin = (angle.requires_grad_() for angle in angles(3, 2))
    turned, _ = implementation(q, q, cos, sin)
    gradients = torch.autograd.grad(turned.sum(), (q, cos, sin), allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1] is None and gradients[2] is None


def test_are_sound_operators() -> None:
    q, k = (torch.randn(2, heads, 5, 16, requires_grad=True) for heads in (3, 1))
    qw, kw = (torch.randn(16, requires_grad=True) for _ in range(2))
    cos, sin = angles(5, 8)
    torch.library.opcheck(module._rope, (q, k, cos, sin, False))
    torch.library.opcheck(module._rope_norm, (q, k, cos, sin, qw, kw, EPS))
    plain = [x.detach() for x in (q, k, q, k, cos, sin, qw, kw)]
    torch.library.opcheck(module._rope_norm_backward, (*plain, EPS))


@pytest.mark.parametrize("norm", [False, True])
def test_compiles_without_a_graph_break(norm: bool) -> None:
    inputs = {"q": torch.randn(2, 5, 3, 16).transpose(1, 2), "k": torch.randn(2, 1, 5, 16)}
    if norm:
        inputs |= {"q_weight": torch.randn(16), "k_weight": torch.randn(16)}
    cos, sin = angles(5, 8)
    compiled = torch.compile(lambda **i: rope(cos=cos, sin=sin, **i), fullgraph=True, backend="aot_eager")
    cotangents = [torch.randn(2, 3, 5, 16), torch.randn(2, 1, 5, 16)]
    got, eager = (results(f, inputs, cotangents) for f in (compiled, lambda **i: rope(cos=cos, sin=sin, **i)))
    assert all(torch.equal(got[name], eager[name]) for name in eager)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.ones(2, 1, 4, 8)}, "must share B, T and D"),
        ({"k": torch.ones(2, 1, 3, 8, dtype=torch.float16)}, "one float dtype"),
        ({"q": torch.ones(2, 2, 3, 7), "k": torch.ones(2, 1, 3, 7)}, "head width 7 must be even"),
        ({"cos": torch.ones(4, 4)}, r"cos must be \[T, D/2\] = \[3, 4\]"),
        ({"sin": torch.ones(2, 3, 4)}, "same shape"),
        ({"q_weight": torch.ones(8)}, "both q_weight and k_weight"),
        ({"q_weight": torch.ones(8), "k_weight": torch.ones(4)}, r"k_weight must have shape \[8\]"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict, message: str) -> None:
    arguments = {
        "q": torch.ones(2, 2, 3, 8),
        "k": torch.ones(2, 1, 3, 8),
        "cos": torch.ones(3, 4),
        "sin": torch.ones(3, 4),
    }
    for implementation in (rope, rope_reference):
        with pytest.raises(ValueError, match=message):
            implementation(**(arguments | changes))
