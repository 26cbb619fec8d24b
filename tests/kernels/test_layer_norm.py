"""LayerNorm's kernel against its reference in fp64: widths, dtypes, bias, residual, strides, large means."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import layer_norm as module
from kernels._launch import candidate, runs_triton
from kernels.layer_norm import layer_norm, layer_norm_reference
from tests.kernels.compare import DEVICES, DTYPES, compare, normal, pairwise, results, sampled

EPS = 1e-5
GRID = {
    "rows": (1, 3, 9),
    "width": (1, 3, 37, 128, 1000, 4097),  # around one block, two dtypes' vectors, and past a power of two
    "dtype": DTYPES,
    "bias": (False, True),
    "residual": (False, True),
    "scale": (1.0, 1e4, 1e-4),  # fp16 squares of 1e4 overflow, squares of 1e-4 vanish beside eps
}


def torchs(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    y = F.layer_norm(total, weight.shape, weight, bias, EPS)
    return y if residual is None else (y, total)


def terms(inputs: dict[str, Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
    x, w = inputs["x"], inputs["weight"]
    total = x + inputs.get("residual", 0.0)
    centred = total - total.mean(-1, keepdim=True)
    inv_std = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    n = centred * inv_std
    dx = torch.stack([inv_std * cotangents[0] * w, *(dy for dy in cotangents[1:])])
    named = {
        "output 0": torch.stack([n * w, n * 0 + inputs.get("bias", 0.0)]),
        "d x": dx,
        "d weight": cotangents[0] * n,
    }
    if "bias" in inputs:
        named["d bias"] = cotangents[0]
    if "residual" in inputs:
        named |= {"output 1": x.abs() + inputs["residual"].abs(), "d residual": dx}
    return named


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, residual: bool, scale: float = 1.0, device: str = "cpu"
) -> tuple[dict[str, Tensor], list[Tensor]]:
    inputs = {"x": normal(*shape) * scale, "weight": normal(shape[-1])}
    if bias:
        inputs["bias"] = normal(shape[-1])
    if residual:
        inputs["residual"] = normal(*shape) * scale
    cotangents = [normal(*shape) for _ in range(1 + residual)]
    return {k: v.to(device, dtype) for k, v in inputs.items()}, [dy.to(device, dtype) for dy in cotangents]


def check(inputs: dict[str, Tensor], cotangents: list[Tensor]) -> None:
    assert runs_triton(*inputs.values()), "the reference would be compared with itself"
    compare(layer_norm, torchs, layer_norm_reference, inputs, cotangents, terms)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", pairwise(**GRID))
def test_equals_the_reference(case: dict, device: str) -> None:
    check(*tensors((case["rows"], case["width"]), case["dtype"], case["bias"], case["residual"], case["scale"], device))


@pytest.mark.prove
@pytest.mark.parametrize("case", sampled(**GRID))
def test_equals_the_reference_in_many_cases(case: dict) -> None:
    check(*tensors((case["rows"], case["width"]), case["dtype"], case["bias"], case["residual"], case["scale"], "cpu"))


@pytest.mark.parametrize("residual", [False, True])
def test_rows_that_do_not_fit_into_registers(residual: bool) -> None:
    check(*tensors((3, 33_000), torch.float32, True, residual))


@pytest.mark.parametrize("block", [256, 512])
def test_programs_that_walk_over_several_rows(block: int) -> None:
    """With block 256 a row of 300 is shared by two programs, with 512 one program has two rows at once."""
    backward = {"ROWS": 2, "BLOCK": block, "STAGES": 1, "PER_MULTIPROCESSOR": 1, "num_warps": 4}
    forward = {"ROWS": 2, "BLOCK": block, "num_warps": 4}
    with candidate("layer_norm_forward", forward), candidate("layer_norm_backward", backward):
        check(*tensors((23, 300), torch.float32, True, True))


@pytest.mark.parametrize("leading", [(0,), (2, 0), (), (2, 3)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    check(*tensors((*leading, 37), torch.float32, True, True))


def test_no_rows_give_zero_weight_gradients() -> None:
    inputs, cotangents = tensors((0, 37), torch.bfloat16, True, False)
    gradients = results(layer_norm, inputs, cotangents)
    for name in ("d weight", "d bias"):
        assert torch.equal(gradients[name], torch.zeros(37, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", ["transposed", "expanded rows", "sliced", "unaligned", "every second feature"])
def test_strides(layout: str) -> None:
    x = {
        "transposed": lambda: torch.randn(37, 6).t(),
        "expanded rows": lambda: torch.randn(1, 37).expand(6, 37),
        "sliced": lambda: torch.randn(6, 100)[:, 20:57],
        "unaligned": lambda: torch.randn(6 * 37 + 1)[1:].view(6, 37),
        "every second feature": lambda: torch.randn(6, 74)[:, ::2],
    }[layout]()
    inputs = {"x": x, "weight": torch.randn(74)[::2], "bias": torch.randn(74)[::2], "residual": torch.randn(37, 6).t()}
    check(inputs, [torch.randn(6, 50)[:, 9:46], torch.randn(1, 37).expand(6, 37)])


def test_gradients_pass_through_cat_expand_and_transpose() -> None:
    a, b, w = torch.randn(4, 3, 20), torch.randn(4, 1, 20), torch.randn(20)

    def through(norm, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        y = norm(torch.cat((a, b.expand(4, 2, 20)), 1).transpose(0, 1), weight, eps=EPS)
        return y.transpose(0, 1).flatten(1).sum(1, keepdim=True).expand(4, 2)  # a gradient without strides comes back

    inputs, dy = {"a": a, "b": b, "weight": w}, torch.randn(4, 1).expand(4, 2)
    got = results(lambda **i: through(layer_norm, **i), inputs, [dy])
    exact = results(
        lambda **i: through(layer_norm_reference, **i), {k: v.double() for k, v in inputs.items()}, [dy.double()]
    )
    for name in exact:
        torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-5, atol=1e-5)


def test_only_the_sum_is_used() -> None:
    inputs, _ = tensors((3, 37), torch.float32, True, True)
    x, r = inputs["x"].requires_grad_(), inputs["residual"].requires_grad_()
    dtotal = torch.randn(3, 37)
    dx, dr = torch.autograd.grad(layer_norm(x, inputs["weight"], residual=r)[1], (x, r), dtotal)
    assert torch.equal(dx, dtotal) and torch.equal(dr, dtotal)


def test_a_wider_residual_stream_keeps_its_dtype() -> None:
    inputs, _ = tensors((3, 37), torch.float32, True, True)
    inputs["x"] = inputs["x"].bfloat16()
    check(inputs, [torch.randn(3, 37), torch.randn(3, 37)])
    got = results(layer_norm, inputs, [torch.randn(3, 37), torch.randn(3, 37)])
    assert [got[name].dtype for name in ("output 0", "output 1", "d x", "d residual")] == [
        torch.float32, torch.float32, torch.bfloat16, torch.float32,
    ]  # fmt: skip


@pytest.mark.parametrize("width", [37, 4097, 33_000])
@pytest.mark.parametrize("device", DEVICES)
def test_large_means_keep_the_variance(width: int, device: str) -> None:
    """mean(x²) − mean² has no digit left here: 1e8 ± 6 for a variance of 1."""
    inputs, cotangents = tensors((3, width), torch.float32, True, False, device=device)
    inputs["x"] += 1e4

    def cancelling(inputs: dict[str, Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
        n = inputs["x"].abs()  # as std is 1: what x − mean is the difference of
        g = (cotangents[0] * inputs["weight"]).abs().max()
        return {"output 0": n * inputs["weight"], "d x": n * g, "d weight": n * cotangents[0], "d bias": cotangents[0]}

    compare(layer_norm, torchs, layer_norm_reference, inputs, cotangents, cancelling)


def test_a_constant_row_gives_the_bias() -> None:
    bias = torch.randn(1000)
    y = layer_norm(torch.full((2, 1000), 3.0), torch.ones(1000), bias)
    assert torch.equal(y, bias.expand(2, 1000))


def test_the_sum_that_comes_back_is_the_one_that_was_normalised() -> None:
    """Rounded to fp16 before the statistics, not after: backward, and whoever goes on from the sum, see this one."""
    inputs, _ = tensors((3, 37), torch.float16, True, True)
    y, total = layer_norm(**inputs)
    assert torch.equal(y, layer_norm(total, inputs["weight"], inputs["bias"]))


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(3, 37)
    x[1, 5] = torch.nan
    bad = layer_norm(x, torch.ones(37), torch.ones(37)).isnan()
    assert bad[1].all() and not bad[[0, 2]].any()


def test_weight_gradients_have_the_same_bits_each_time() -> None:
    inputs, cotangents = tensors((50, 37), torch.float32, True, False)
    first, *others = (results(layer_norm, inputs, cotangents) for _ in range(3))
    assert all(torch.equal(first[name], other[name]) for other in others for name in ("d weight", "d bias"))


@pytest.mark.parametrize("residual", [False, True])
def test_is_a_sound_operator(residual: bool) -> None:
    inputs, cotangents = tensors((3, 37), torch.float32, True, residual)
    x, w, b = (inputs[name].requires_grad_() for name in ("x", "weight", "bias"))
    torch.library.opcheck(module._layer_norm, (x, w, b, inputs.get("residual"), EPS))
    dtotal = cotangents[1] if residual else None
    backward = (cotangents[0], dtotal, x.detach(), w.detach(), torch.rand(3), torch.rand(3), residual)
    torch.library.opcheck(module._layer_norm_backward, backward)


def test_compiles_without_a_graph_break() -> None:
    inputs, cotangents = tensors((3, 37), torch.float32, True, True)
    compiled = torch.compile(lambda **i: layer_norm(**i), fullgraph=True, backend="aot_eager")
    got, eager = results(compiled, inputs, cotangents), results(layer_norm, inputs, cotangents)
    assert all(torch.equal(got[name], eager[name]) for name in eager)


def test_fp64_takes_the_reference() -> None:
    x, w = torch.randn(3, 37, dtype=torch.float64), torch.randn(37, dtype=torch.float64)
    assert torch.equal(layer_norm(x, w), layer_norm_reference(x, w))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, 0), "weight": torch.ones(0)}, "no features"),
        ({"x": torch.ones(2, 4), "weight": torch.ones(3)}, r"weight must have shape \[4\]"),
        ({"x": torch.ones(2, 4), "weight": torch.ones(4), "bias": torch.ones(1)}, r"bias must have shape \[4\]"),
        ({"x": torch.ones(2, 4), "weight": torch.ones(4), "residual": torch.ones(4)}, "residual"),
        ({"x": torch.ones(2, 4, dtype=torch.int64), "weight": torch.ones(4)}, "x has dtype torch.int64"),
    ],
)
def test_refuses_what_does_not_fit(arguments: dict, message: str) -> None:
    for norm in (layer_norm, layer_norm_reference):
        with pytest.raises(ValueError, match=message):
            norm(**arguments)


def test_rows_are_loaded_once(ptx: Callable[..., str]) -> None:
    """The source loads x in every loop; where one chunk holds the row, the first load's registers are kept."""
    loads = re.findall(r"ld\.global\S*\.v4", ptx("kernels.layer_norm", "sm_90", "layer_norm_forward/n1024/bfloat16"))
    # 4 rows of 1024 bf16, 16 bytes at a time by 128 threads: 4 of x, 4 of the residual, 2 of weight and of bias (fp32).
    assert len(loads) == 12
