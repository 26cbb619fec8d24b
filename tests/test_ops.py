"""The PyTorch side of each operator against the kernels' references and written-out formulas; then a model on both.

B batch, T queries, S keys, H query heads, G key/value heads, D head width, M rows, N features, V vocabulary.
"""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.decode_attention import decode_attention_reference
from kernels.flash_attention import flash_attention_reference
from kernels.layer_norm import layer_norm_reference
from kernels.rms_norm import rms_norm_reference
from minillm import ops
from minillm.config import UserError
from minillm.model.cache import KVCache
from minillm.model.transformer import Transformer
from tests.model.configs import build, small

SEGMENTS: dict[str, Callable[[int], Tensor]] = {  # length -> ids of two rows
    "packed": lambda n: torch.tensor([[i // 3 for i in range(n)], [-1] * 2 + [5] * (n - 2)]),
    "unsorted": lambda n: torch.tensor([[(4, 2, 2, 9)[i % 4] for i in range(n)], [1] * n]),
}
LENGTHS = {"some": ([3, 1], [5, 2]), "none": ([0, 2], [4, 0]), "more queries": ([5, 4], [3, 4])}

MASKS = [  # segments, lengths
    (None, None), ("packed", None), ("unsorted", None), ("strangers", None), (None, "some"), (None, "none"),
    (None, "more queries"), ("packed", "some"),
]  # fmt: skip
SIZES = [(7, 7), (5, 9), (9, 5), (1, 8), (6, 1)]  # T, S


def results(function: Callable[..., Tensor], tensors: list[Tensor], up: Tensor, **options: Any) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    output = function(*leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, up)]


def assert_equal(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=0)


def segments_of(kind: str | None, T: int, S: int) -> tuple[Tensor, Tensor] | None:
    if kind is None:
        return None
    if kind == "strangers":  # no key has the id of a query
        return torch.zeros(2, T, dtype=torch.int32), torch.ones(2, S, dtype=torch.int32)
    ids = SEGMENTS[kind](max(T, S) + 2)
    return (ids[:, :T], ids[:, :S]) if T != S else (ids[:, :T],) * 2


@pytest.mark.parametrize("softcap", [None, pytest.param(0.8, marks=pytest.mark.prove)])
@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.25, 0.1, 1.0], dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_the_reference_of_the_kernel(
    causal: bool, window: int | None, slopes: Tensor | None, softcap: float | None
) -> None:
    """Output and gradients in fp64 within 1e-12 for every mask, grouping and size, rows that see nothing included."""
    sides = None if window is None else (window - 1, 0 if causal else window - 1)
    for (segments, lengths), G, (T, S) in itertools.product(MASKS, (4, 2, 1), SIZES):
        if lengths is not None and min(T, S) < 5:
            continue
        q, k, v, up = (torch.randn(2, h, n, 6, dtype=torch.float64) for h, n in ((4, T), (G, S), (G, S), (4, T)))
        shared = {
            "causal": causal,
            "softcap": softcap,
            "segments": segments_of(segments, T, S),
            "lengths": None if lengths is None else tuple(torch.tensor(x) for x in LENGTHS[lengths]),
        }
        got = results(ops.attention, [q, k, v], up, **shared, window=window, slopes=slopes)
        expected = results(flash_attention_reference, [q, k, v], up, **shared, window=sides, alibi_slopes=slopes)
        for name, mine, theirs in zip(("output", "dq", "dk", "dv"), got, expected, strict=True):
            error = (mine - theirs).abs().max().item()  # of NaN where there is one, which no bound allows
            assert error <= 1e-12, f"{name} off by {error:.3g}: {segments=} {lengths=} {G=} {T=} {S=}"


@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.1])])
def test_rows_that_see_nothing_are_zeros_with_zero_gradients(slopes: Tensor | None) -> None:
    q, k, v, up = (torch.randn(1, 2, 5, 4) for _ in range(4))
    segments = torch.tensor([[0, 8, 0, 1, 8]]), torch.tensor([[0, 0, 0, 1, 1]])
    output, dq, dk, dv = results(ops.attention, [q, k, v], up, causal=True, segments=segments, slopes=slopes)
    alone = torch.zeros_like(dq[:, :, [1, 4]])
    assert torch.equal(output[:, :, [1, 4]], alone) and torch.equal(dq[:, :, [1, 4]], alone)
    assert output[:, :, [0, 2, 3]].abs().min() > 0
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    assert torch.equal(dk[:, :, 4], torch.zeros(1, 2, 4))  # the last key is seen by a query of its own only: none


def test_the_last_query_of_a_causal_call_stands_on_the_last_key() -> None:
    """torch's is_causal aligns the first ones instead, and would hide most of a cache."""
    q, k, v = (torch.randn(1, 1, n, 4) for n in (2, 5, 5))
    got = ops.attention(q, k, v, causal=True)
    for t, keys in ((0, 4), (1, 5)):
        weights = (q[0, 0, t] @ k[0, 0, :keys].T / 2).softmax(-1)
        torch.testing.assert_close(got[0, 0, t], weights @ v[0, 0, :keys])


@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"softcap": 0.8}, {"slopes": torch.tensor([0.5, 0.25, 0.1, 1.0])}], ids=str
)
@pytest.mark.parametrize("T", [1, 3])
def test_decode_attention_equals_the_reference_of_the_kernel(T: int, options: dict[str, Any]) -> None:
    q, k, v = torch.randn(3, 4, T, 8), torch.randn(3, 2, 16, 8), torch.randn(3, 2, 16, 8)
    lengths = torch.tensor([3, 16, 9])
    expected = dict(options)
    if "window" in options:
        expected["window"] = (2, 0)
    if "slopes" in options:
        expected["alibi_slopes"] = expected.pop("slopes")
    got = ops.decode_attention(q, k, v, lengths, **options)
    torch.testing.assert_close(got, decode_attention_reference(q, k, v, lengths, **expected), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [None, [9, 4]])
def test_a_single_query_reads_grouped_keys_where_they_are(
    lengths: list[int] | None, window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = torch.randn(2, 6, 1, 8).to(dtype), *torch.randn(2, 2, 3, 16, 8).to(dtype)[..., :9, :]
    used = torch.tensor(lengths or [9, 9])
    expected = decode_attention_reference(
        q.double(), k.double(), v.double(), used, window=None if window is None else (window - 1, 0)
    )
    monkeypatch.setattr(Tensor, "repeat_interleave", None, raising=False)
    if lengths is None:
        got = ops.attention(q, k, v, causal=True, window=window)
    else:
        got = ops.decode_attention(q, k, v, used, window=window)
    torch.testing.assert_close(got.double(), expected, atol=1e-6 if dtype == torch.float32 else 0.02, rtol=0)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer", "layer with bias"])
def test_norms_equal_the_references_of_the_kernels(kind: str, residual: bool) -> None:
    x, other, up, carried = (torch.randn(3, 5, 7, dtype=torch.float64) for _ in range(4))
    weight, bias = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    tensors = [x, weight, *([bias] if "bias" in kind else []), *([other] if residual else [])]

    def call(norm: Callable[..., Any]) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
            parameters = [weight] if kind == "rms" else [weight, rest[0] if "bias" in kind else None]
            y = norm(x, *parameters, eps=1e-3, residual=rest[-1] if residual else None)
            return (y[0] * up + y[1] * carried).sum() if residual else (y * up).sum()

        return run

    one = torch.ones((), dtype=torch.float64)
    pairs = {"rms": (ops.rms_norm, rms_norm_reference)}
    mine, theirs = pairs.get(kind, (ops.layer_norm, layer_norm_reference))
    assert_equal(results(call(mine), tensors, one), results(call(theirs), tensors, one))


def test_rms_norm_of_bf16_by_fp32_weights_rounds_once() -> None:
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(64)
    got = ops.rms_norm(x, weight, eps=1e-6)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rms_norm_reference(x, weight, eps=1e-6))


@pytest.mark.parametrize("rows", [False, True])
def test_rope_turns_pairs_of_features_in_the_plane(rows: bool) -> None:
    """(x_i, x_{i + D/2}) times e^{i · angle}, for each row's own angles or for one set."""
    q, k = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(2, 1, 5, 6, dtype=torch.float64)
    angle = torch.randn(2, 5, 3, dtype=torch.float64) if rows else torch.randn(5, 3, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)
    if rows:
        turn = turn[:, None]
    for x, got in zip((q, k), ops.rope(q, k, angle.cos(), angle.sin()), strict=True):
        expected = torch.complex(x[..., :3], x[..., 3:]) * turn
        torch.testing.assert_close(got, torch.cat((expected.real, expected.imag), -1), atol=1e-14, rtol=0)


def test_gates_are_their_formulas() -> None:
    gate, up = torch.randn(2, 50, dtype=torch.float64)
    silu = [g / (1 + math.exp(-g)) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
    gelu = [g * 0.5 * (1 + math.erf(g / math.sqrt(2))) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
    assert ops.swiglu(gate, up).tolist() == pytest.approx(silu, abs=1e-14)
    assert ops.geglu(gate, up).tolist() == pytest.approx(gelu, abs=1e-14)


def written_out(logits: Tensor, targets: Tensor, smoothing: float, z_loss: float, softcap: float | None) -> float:
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        if target == -100:
            continue
        z = row if softcap is None else [softcap * math.tanh(x / softcap) for x in row]
        lse = math.log(sum(math.exp(x) for x in z))
        losses = [lse - x for x in z]
        total += (1 - smoothing) * losses[target] + smoothing * sum(losses) / len(losses) + z_loss * lse**2
    return total


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bias", [None, "bias"])
def test_cross_entropy_equals_the_written_out_sum(
    smoothing: float, z_loss: float, softcap: float | None, bias: str | None
) -> None:
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    shift = torch.randn(9, dtype=torch.float64) if bias else None
    targets = torch.tensor([3, -100, 0, 8, -100, 3])
    logits = hidden @ weight.T + (0.0 if shift is None else shift)
    options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap}
    expected = written_out(logits, targets, smoothing, z_loss, softcap)
    assert ops.cross_entropy(logits, targets, **options).item() == pytest.approx(expected, abs=1e-12)
    assert ops.linear_cross_entropy(hidden, weight, targets, shift, **options).item() == pytest.approx(
        expected, abs=1e-12
    )
    assert torch.autograd.gradcheck(lambda x: ops.cross_entropy(x, targets, **options), logits.requires_grad_())


def test_no_label_that_counts_gives_zero_and_zero_gradients() -> None:
    logits, targets = torch.randn(3, 5, requires_grad=True), torch.full((3,), -100)
    loss = ops.cross_entropy(logits, targets, label_smoothing=0.1, z_loss=0.1)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(3, 5))


SELECT = "from minillm import ops; ops.select('triton')"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton has a GPU to run on")
def test_triton_on_a_cpu_without_the_interpreter_is_refused() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SELECT], env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: kernels=triton needs a GPU, or TRITON_INTERPRET=1" in last and "--kernels torch" in last


def test_triton_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels._launch.triton", None)
    with pytest.raises(UserError, match="triton is not installed"):
        ops.select("triton")


def test_the_choice_and_its_reason_can_be_told(on_triton: None) -> None:
    assert ops.selected(torch.device("cpu")) == ("triton", "chosen by --kernels")
    ops.select("auto")
    assert ops.selected(torch.device("cpu")) == ("torch", "auto: no GPU (cpu)")


@pytest.fixture
def on_triton() -> Iterator[None]:
    ops.select("triton")
    yield
    ops.select("auto")


class Launches(TorchDispatchMode):
    """Names of our own operators that were called, which the PyTorch side never does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "minillm":
            self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def loss_and_gradients(model: Transformer, inputs: dict[str, Tensor], targets: Tensor) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    states = model.head.transform(model.states(**inputs)).flatten(0, 1)
    loss = ops.linear_cross_entropy(states, model.output_weight, targets.flatten(), model.head.bias, z_loss=1e-3)
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2, "attention": {"qk_norm": True, "window": 4}, "mlp": {"kind": "swiglu"}},
    "gpt2": {
        "attention": {"bias": True},
        "mlp": {"kind": "gelu-tanh", "bias": True},
        "position": {"kind": "learned"},
        "norm": {"kind": "layer", "bias": True},
    },
    "bert": {
        "shape": "encoder",
        "mlp": {"kind": "gelu"},
        "position": {"kind": "alibi"},
        "norm": {"kind": "layer", "placement": "post", "bias": True},
        "output_bias": True,
        "output_transform": True,
    },
    "original": {"shape": "encoder-decoder", "attention": {"softcap": 2.0}, "mlp": {"kind": "geglu"}},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_on_the_kernels_as_on_pytorch(name: str, on_triton: None) -> None:
    """Loss and every gradient of packed and padded rows, in fp32 within 1e-5 of the largest one."""
    model = build(small(layers=1, dim=32, **MODELS[name]), torch.float32)
    segments = torch.tensor([[0] * 4 + [1] * 5, [2] * 7 + [-1] * 2])
    ids, targets = torch.randint(29, (2, 2, 9)).unbind()
    inputs = {"ids": ids, "segments": segments}
    if name == "original":
        inputs |= {"source": ids.flip(1)[:, :6], "source_segments": segments[:, 2:8]}
    targets = targets.masked_fill(segments < 0, -100)
    with Launches() as launches:
        loss, got = loss_and_gradients(model, inputs, targets)
    assert {"flash_attention", "flash_attention_backward"} < launches.names, launches.names
    ops.select("torch")
    with Launches() as launches:
        expected_loss, expected = loss_and_gradients(model, inputs, targets)
    assert not launches.names
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for (parameter, _), mine, theirs in zip(model.named_parameters(), got, expected, strict=True):
        error = (mine - theirs).abs().max().item()
        assert error <= 1e-5 * max(theirs.abs().max().item(), 1.0), f"{parameter} is off by {error:.3g}"


@torch.no_grad()
def test_a_cache_is_read_by_the_kernels_as_by_pytorch(on_triton: None) -> None:
    model = build(small(layers=1, dim=32, kv_heads=2), torch.float32)
    first, second = torch.randint(29, (2, 5)), torch.randint(29, (2, 1))
    logits = []
    for side in ("triton", "torch"):
        ops.select(side)
        cache = KVCache(model.config, 2, 8, torch.device("cpu"), torch.float32)
        model(first, cache=cache, new=torch.tensor([5, 2]))
        logits.append(model(second, cache=cache))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
