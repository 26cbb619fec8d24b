"""What only a GPU can show of the kernels: compiled, at real sizes, past 2^31 elements, the same in every run.

    TRITON_INTERPRET=0 python -m pytest -m gpu tests/kernels

PyTorch's factories make their tensors on the GPU while these tests run, so the checks of the other files are taken from
there as they are.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy, cross_entropy_reference
from kernels.decode_attention import decode_attention, decode_attention_reference
from kernels.flash_attention import flash_attention, flash_attention_reference
from kernels.layer_norm import layer_norm, layer_norm_reference
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.rope import rope, rope_reference
from kernels.swiglu import swiglu, swiglu_reference
from tests.kernels import test_cross_entropy as cross_entropies
from tests.kernels import test_decode_attention as decoding
from tests.kernels import test_flash_attention as flash
from tests.kernels import test_layer_norm as layer_norms
from tests.kernels import test_linear_cross_entropy as linear
from tests.kernels import test_rms_norm as rms_norms
from tests.kernels import test_rope as ropes
from tests.kernels import test_swiglu as gates
from tests.kernels.compare import CUDA, DTYPES, results
from tests.kernels.operators import operators

pytestmark = CUDA
ROOT = Path(__file__).parents[2]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# The small grids that the interpreter runs (those of the norms, RoPE and SwiGLU have a device among their options).
test_flash_options = flash.test_every_two_options_together
test_flash_widths = flash.test_narrow_and_wide_heads
test_flash_layouts = flash.test_layouts
test_flash_extreme_logits = flash.test_extreme_logits
test_decode_options = decoding.test_options
test_decode_shapes = decoding.test_shapes
test_cross_entropy_options = cross_entropies.test_every_combination_of_options
test_cross_entropy_shapes = cross_entropies.test_shapes_on_both_sides_of_every_block_size
test_linear_cross_entropy_options = linear.test_every_combination_of_options
test_linear_cross_entropy_shapes = linear.test_shapes


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield
    torch.cuda.empty_cache()  # the next test may want most of the memory


# Real sizes


@each_dtype
@pytest.mark.parametrize("shape", [(4096, 768), (2, 1024, 4096), (333, 8192), (9, 50_257)], ids=str)
def test_real_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rms_norms.check(*rms_norms.tensors(shape, dtype, True, device="cuda"))
    layer_norms.check(*layer_norms.tensors(shape, dtype, True, True, device="cuda"))


@each_dtype
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_real_heads_turn(width: int, norm: bool, dtype: torch.dtype) -> None:
    case = {"batch": 2, "heads": (32, 8), "tokens": 1024, "width": width}
    ropes.check_case(case | {"dtype": dtype, "own_positions": False, "norm": norm}, "cuda")


@each_dtype
@pytest.mark.parametrize("form", gates.FORMS)
def test_real_gates(form: str, dtype: torch.dtype) -> None:
    gates.check_case({"form": form, "shape": (2, 1024, 11_008), "dtype": dtype, "scale": 1.0}, "cuda")


@each_dtype
@pytest.mark.parametrize("D", [64, 80, 128, 256])
@pytest.mark.parametrize("options", ["causal", "window", "documents", "padding, ALiBi and softcap"])
def test_real_attention(options: str, D: int, dtype: torch.dtype) -> None:
    ids = torch.randint(0, 5, (2, 1024)).sort().values
    lengths, slopes = torch.tensor([1024, 700]), torch.rand(8)
    *inputs, do = flash.tensors(1024, 1024, D, (8, 2), dtype)
    chosen = {
        "causal": {"causal": True},
        "window": {"causal": True, "window": (255, None)},
        "documents": {"causal": True, "segments": (ids, ids)},
        "padding, ALiBi and softcap": {"lengths": (lengths, lengths), "alibi_slopes": slopes, "softcap": 20.0},
    }[options]
    flash.check(inputs, do, **chosen)


@each_dtype
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("D", [64, 128])
def test_real_decoding(D: int, T: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(4, heads, n, D).to(dtype) for heads, n in ((32, T), (8, 8192), (8, 8192)))
    decoding.assert_right("", q, k, v, torch.tensor([8192, 4097, 63, 5]))


@each_dtype
def test_real_losses(dtype: torch.dtype) -> None:
    targets = torch.randint(50_304, (1024,))
    cross_entropies.assert_right("50304", (3 * torch.randn(1024, 50_304)).to(dtype), targets, z_loss=1e-4)
    tensors = [torch.randn(1024, 768).to(dtype), (0.05 * torch.randn(50_304, 768)).to(dtype), None]
    linear.assert_right("768 to 50304", tensors, targets)


# Past 2^31 elements: where an offset in 32 bits would come out negative. Only compared places get a gradient, so that
# the gradients of weights, sums over all rows, are those of the places alone.


def room(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:g} GB of GPU memory, {free:.0f} are free")


def places(rows: int, width: int) -> Tensor:
    """Row numbers at the head, around the element 2^31, and at the tail."""
    boundary = 2**31 // width
    assert boundary + 4 < rows, "nothing lies past 2^31 elements"
    return torch.cat([torch.arange(4), torch.arange(boundary - 4, boundary + 4), torch.arange(rows - 4, rows)])


def past_int32(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    by_row: dict[str, Tensor],
    weights: dict[str, Tensor] | None = None,
    targets: Tensor | None = None,
) -> None:
    """Outputs and gradients of `ours` at some rows are those of `reference` in fp64, given these rows alone.

    by_row   inputs whose first dimension counts rows; `targets` are such too, without a gradient
    weights  inputs that all rows share
    """
    first, weights = next(iter(by_row.values())), weights or {}
    at = places(len(first), first[0].numel())
    all_rows = {} if targets is None else {"targets": targets}
    some_rows = {name: y[at] for name, y in all_rows.items()}
    chosen = {name: x[at] for name, x in by_row.items()} | weights
    with torch.no_grad():
        answer = reference(**chosen, **some_rows)
    outputs = answer if isinstance(answer, tuple) else (answer,)
    some = [torch.randn(y.shape).to(y.dtype) for y in outputs]
    everywhere = [dy.new_zeros(len(first), *dy.shape[1:]).index_copy_(0, at, dy) for dy in some]
    got = results(lambda **inputs: ours(**inputs, **all_rows), by_row | weights, everywhere)
    exact = results(
        lambda **inputs: reference(**inputs, **some_rows),
        {name: x.double() for name, x in chosen.items()},
        [dy.double() for dy in some],
    )
    for name, expected in exact.items():
        mine = got[name] if name.removeprefix("d ") in weights else got[name][at]
        torch.testing.assert_close(mine.double(), expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max()))


def big(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_()


ROWS = 2**31 // 4096 + 8


def test_norms_past_int32() -> None:
    room(60)
    by_row, weights = {"x": big(ROWS, 4096), "residual": big(ROWS, 4096)}, {"weight": big(4096)}
    past_int32(rms_norm, rms_norm_reference, by_row, weights)
    past_int32(layer_norm, layer_norm_reference, by_row, weights | {"bias": big(4096)})


def test_gates_past_int32() -> None:
    room(40)
    past_int32(swiglu, swiglu_reference, {"gate": big(ROWS, 4096), "up": big(ROWS, 4096)})


@pytest.mark.parametrize("norm", [False, True])
def test_rope_past_int32(norm: bool) -> None:
    room(60)
    B, (cos, sin) = 2**31 // (8 * 64 * 64) + 8, (torch.randn(64, 32) for _ in range(2))
    weights = {"q_weight": big(64), "k_weight": big(64)} if norm else {}
    past_int32(
        lambda **inputs: rope(cos=cos, sin=sin, **inputs),
        lambda **inputs: rope_reference(cos=cos.double(), sin=sin.double(), **inputs),
        {"q": big(B, 8, 64, 64), "k": big(B, 8, 64, 64)},
        weights,
    )  # fmt: skip


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_past_int32(deterministic: bool) -> None:
    room(90)
    by_row = {name: big(2**31 // (8 * 32 * 64) + 8, 8, 32, 64) for name in "qkv"}
    past_int32(
        lambda **inputs: flash_attention(causal=True, deterministic=deterministic, **inputs),
        lambda **inputs: flash_attention_reference(causal=True, **inputs),
        by_row,
    )


def test_decoding_past_int32() -> None:
    room(20)
    B = 2**31 // (2 * 1024 * 64) + 8
    q, k, v, lengths = big(B, 8, 1, 64), big(B, 2, 1024, 64), big(B, 2, 1024, 64), torch.randint(1, 1025, (B,))
    at = places(B, 2 * 1024 * 64)
    expected = decode_attention_reference(*(x[at].double() for x in (q, k, v)), lengths[at])
    got = decode_attention(q, k, v, lengths)[at].double()
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)


def test_losses_past_int32() -> None:
    room(40)
    M = 2**31 // 50_304 + 8
    past_int32(
        lambda **inputs: cross_entropy(reduction="none", **inputs),
        lambda **inputs: cross_entropy_reference(reduction="none", **inputs),
        {"logits": big(M, 50_304)},
        targets=torch.randint(50_304, (M,)),
    )
    M = 2**31 // 64 + 8
    past_int32(
        lambda **inputs: linear_cross_entropy(reduction="none", **inputs),
        lambda **inputs: linear_cross_entropy_reference(reduction="none", **inputs),
        {"hidden": big(M, 64)},
        {"weight": big(16, 64)},
        targets=torch.randint(16, (M,)),
    )


# Races: 250 runs with the same bits. Only the fused backward's dq may differ, by the order of its atomic additions.


@pytest.mark.parametrize(
    "name",
    ["rms_norm", "layer_norm", "rope", "swiglu", "geglu", "cross_entropy", "linear_cross_entropy", "attention",
     "attention, deterministic"],
)  # fmt: skip
def test_the_same_in_250_runs(name: str) -> None:
    function, inputs = operators(torch.bfloat16, M=2048, N=1024, T=512, V=4096)[name]
    answer = function(**inputs)
    cotangents = [torch.randn_like(y) for y in (answer if isinstance(answer, tuple) else (answer,))]
    first = results(function, inputs, cotangents)
    for _ in range(250):
        for what, value in results(function, inputs, cotangents).items():
            if name == "attention" and what == "d q":  # fp32 sums in any order, rounded to bf16: the last bit
                atol = 1e-5 * float(first[what].abs().max())
                torch.testing.assert_close(value, first[what], rtol=2**-7, atol=atol)
            else:
                assert torch.equal(value, first[what]), what


def test_decoding_is_the_same_in_250_runs() -> None:
    q, k, v, lengths = big(4, 8, 1, 64), big(4, 2, 4096, 64), big(4, 2, 4096, 64), torch.tensor([4096, 1000, 65, 1])
    first = decode_attention(q, k, v, lengths)
    assert all(torch.equal(decode_attention(q, k, v, lengths), first) for _ in range(250))


# What no comparison of numbers shows: an access outside of its tensor that hits another, a race that was won by chance.


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.timeout(900)
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    every = [sys.executable, "-m", "tests.kernels.operators"]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *every]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else one allocation holds many tensors
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "decode_attention" in done.stdout
