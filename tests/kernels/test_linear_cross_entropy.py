"""Linear cross-entropy under the interpreter: values, gradients, and that the logits are never held."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.linear_cross_entropy as module
from kernels.linear_cross_entropy import _op, chunk_rows, linear_cross_entropy, linear_cross_entropy_reference
from tests.kernels.budget import GRADIENT, OUTPUT, assert_within_budget
from tests.kernels.test_cross_entropy import DTYPES, IGNORE, torchs

NAMES = ("hidden", "weight", "bias")


def inputs(M: int, N: int, V: int, dtype: torch.dtype, *, bias: bool = True) -> tuple[list[Tensor | None], Tensor]:
    random = torch.Generator(torch.get_default_device()).manual_seed(M + N + V)
    tensors = [
        torch.randn(M, N, generator=random),
        torch.randn(V, N, generator=random),
        torch.randn(V, generator=random),
    ]
    targets = torch.randint(V, (M,), generator=random)
    if M > 2:
        targets[1] = IGNORE
    return [*(t.to(dtype) for t in tensors[: 3 if bias else 2]), *([] if bias else [None])], targets


def loss_and_gradients(function, tensors, targets, upstream, **options) -> tuple[Tensor, ...]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    loss = function(leaves[0], leaves[1], targets, leaves[2], **options)
    differentiated = [t for t in leaves if t is not None]
    return loss.detach(), *torch.autograd.grad(loss, differentiated, upstream.to(loss.dtype).expand(loss.shape))


def through_torch(hidden, weight, targets, bias, **options):
    return torchs(F.linear(hidden, weight, bias), targets, **options)


def assert_right(name, tensors, targets, upstream=1.0, **options) -> None:
    upstream, before = torch.as_tensor(upstream), [None if t is None else t.clone() for t in tensors]
    ours = loss_and_gradients(linear_cross_entropy, tensors, targets, upstream, **options)
    pytorchs = loss_and_gradients(through_torch, tensors, targets, upstream, **options)
    wide = [None if t is None else t.double() for t in tensors]
    exact = loss_and_gradients(linear_cross_entropy_reference, wide, targets, upstream, **options)
    counted = int((targets != IGNORE).sum()) if options.get("reduction", "mean") == "mean" else 1
    scale = float(upstream.abs().max()) / max(counted, 1)
    largest = [1.0 if t is None or not t.numel() else float(t.abs().max()) for t in tensors]
    # Terms of the sums: products that make a logit; p · weight; p · hidden; p. Each p is at most 1.
    terms = [largest[0] * largest[1], largest[1] * scale, largest[0] * scale, scale]
    for what, a, b, c, term in zip(("loss", *NAMES), ours, pytorchs, exact, terms, strict=False):
        factor = OUTPUT if what == "loss" else GRADIENT
        assert_within_budget(f"{name} {what}", a, b, c, factor=factor, floor_terms=term)
    assert all(t is None or torch.equal(t, b) for t, b in zip(tensors, before, strict=True)), f"{name}: inputs changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_combination_of_options(reduction, dtype):
    upstream = torch.linspace(-1.0, 2.0, 7) if reduction == "none" else torch.tensor(1.7)
    for bias, smoothing, z_loss, softcap in itertools.product((False, True), (0.0, 0.1), (0.0, 1e-2), (None, 5.0)):
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap, "reduction": reduction}
        assert_right(f"{options}", *inputs(7, 5, 33, dtype, bias=bias), upstream, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 100])
def test_any_number_of_chunks_gives_the_same(size, dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", size)
    monkeypatch.setattr(module, "chunk_rows", lambda M, V: min(M, size))
    tensors, targets = inputs(8, 16, 40, dtype)
    assert_right(f"chunks of {size}", tensors, targets)
    assert_right(f"chunks of {size}", tensors, targets, torch.linspace(-1.0, 2.0, 8), reduction="none")


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (2, 1, 9), (3, 65, 1030), (2, 8, 4099)], ids=str)
def test_shapes(shape):
    for dtype in DTYPES:
        assert_right(f"{shape} {dtype}", *inputs(*shape, dtype), label_smoothing=0.1)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_tokens_and_none_that_count_give_zero(reduction):
    for M in (0, 4):
        tensors, targets = inputs(M, 3, 11, torch.float32)
        results = loss_and_gradients(
            linear_cross_entropy, tensors, torch.full_like(targets, IGNORE), torch.tensor(1.0), reduction=reduction
        )
        expected_shapes = [(M,) if reduction == "none" else (), (M, 3), (11, 3), (11,)]
        assert [tuple(r.shape) for r in results] == expected_shapes
        assert all(torch.equal(r, torch.zeros(r.shape)) for r in results)


def test_extreme_logits():
    tensors, targets = inputs(6, 4, 20, torch.float32)
    tensors[0] *= 3e3  # logits up to ±1e4
    assert_right("±1e4", tensors, targets)
    assert_right("±1e4", tensors, targets, softcap=30.0, z_loss=1e-3)


def test_only_the_gradients_that_are_needed_are_computed():
    tensors, targets = inputs(6, 4, 20, torch.float32)
    full = loss_and_gradients(linear_cross_entropy, tensors, targets, torch.tensor(1.0))[1:]
    for reduction in ("mean", "none"):
        for chosen in range(3):
            leaves = [t.detach().requires_grad_(i == chosen) for i, t in enumerate(tensors)]
            loss = linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2], reduction=reduction)
            (loss if reduction == "mean" else loss.sum() / 5).backward()
            torch.testing.assert_close(leaves[chosen].grad, full[chosen])
            assert all(leaves[i].grad is None for i in range(3) if i != chosen)
    wanted = [False, True, False]
    _, *gradients = _op(*tensors[:2], targets, tensors[2], torch.ones(1), IGNORE, 0.0, 0.0, None, True, wanted)
    assert [g.numel() for g in gradients] == [0, 80, 0]


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest floating-point tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logits_of_all_tokens_are_never_held(dtype):
    (hidden, weight, bias), targets = inputs(64, 4, 256, dtype)
    with LargestTensor() as seen:
        _op._init_fn(hidden, weight, targets, bias, torch.ones(1), IGNORE, 0.0, 0.0, None, True, [True] * 3)
    assert seen.elements == 64 * 256 // 2  # the chunk: half of the tokens here, 8192 of any number of them
    with LargestTensor() as seen:
        through_torch(hidden, weight, targets, bias)
    assert seen.elements >= 64 * 256  # so the recorder sees what it should


def test_chunks_stay_within_their_bounds():
    assert [chunk_rows(M, 50_257) for M in (0, 1, 2, 3, 100, 16_384, 10**6)] == [1, 1, 1, 2, 50, 8192, 8192]
    assert chunk_rows(10**6, 128_256) == 4185 and chunk_rows(10**6, 2**30) == 1


def test_labels_and_shapes_are_checked():
    (hidden, weight, bias), targets = inputs(4, 3, 9, torch.float32)
    wrong_label = targets.clone()
    wrong_label[2] = 9
    bad_calls = [
        ((hidden, weight, wrong_label), r"targets\[2\] is 9, outside the 9 classes 0 to 8"),
        ((hidden, weight[:, :2], targets), r"hidden \[M, N\] and weight \[V, N\]"),
        ((hidden[None], weight, targets), r"hidden \[M, N\] and weight \[V, N\]"),
        ((hidden, weight[:0], targets), r"hidden \[M, N\] and weight \[V, N\]"),
        ((hidden, weight, targets[:3]), r"logits \[M, V\] and targets \[M\]"),
        ((hidden, weight, targets, bias[:3]), r"bias \[V\] = \[9\]"),
        ((hidden, weight.half(), targets), "one dtype"),
    ]
    for arguments, message in bad_calls:
        for function in (linear_cross_entropy, linear_cross_entropy_reference):
            with pytest.raises(ValueError, match=message):
                function(*arguments)
    with pytest.raises(ValueError, match="none, sum, mean"):
        linear_cross_entropy(hidden, weight, targets, reduction="avg")


@pytest.mark.parametrize("integer", [torch.uint8, torch.int32, torch.uint16, torch.uint64], ids=str)
def test_labels_of_any_integer_type(integer):
    hidden, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.tensor([3, 0, 10, 6, 2])
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        expected = function(hidden, weight, targets, reduction="none")
        assert torch.equal(function(hidden, weight, targets.to(integer), reduction="none"), expected)


def test_strided_inputs():
    (hidden, weight, bias), targets = inputs(8, 6, 24, torch.float32)
    assert_right("transposed", [hidden.t().contiguous().t(), weight.t().contiguous().t(), bias], targets)
    assert_right("columns", [hidden[:, 1:4], weight[::2, 3:], bias[::2]], targets % 12)
    assert_right("expanded", [hidden[:1].expand(8, 6), weight, bias[:1].expand(24)], targets[:1].expand(8))


def test_kept_graph_and_second_derivatives():
    (hidden, weight, bias), targets = inputs(6, 4, 20, torch.float32)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = linear_cross_entropy(hidden, weight, targets, bias)
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="linear_cross_entropy_reference"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_autocast_casts_as_a_linear_layer_does():
    (hidden, weight, bias), targets = inputs(6, 4, 20, torch.float32)
    rounded = [t.bfloat16().float().bfloat16() for t in (hidden, weight, bias)]
    expected = loss_and_gradients(linear_cross_entropy, rounded, targets, torch.tensor(1.0))
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_and_gradients(linear_cross_entropy, (hidden, weight, bias), targets, torch.tensor(1.0))
    assert [g.dtype for g in got] == [torch.float32] * 4
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(g.bfloat16(), e) for g, e in zip(got[1:], expected[1:], strict=True))


def test_opcheck():
    (hidden, weight, bias), targets = inputs(4, 3, 9, torch.float32)
    tensors = [t.requires_grad_() for t in (hidden, weight, bias)]
    rest = (IGNORE, 0.1, 0.1, 3.0)
    torch.library.opcheck(_op, (*tensors[:2], targets, bias, torch.ones(1), *rest, True, [True] * 3))
    torch.library.opcheck(_op, (*tensors[:2], targets, None, torch.ones(1), *rest, False, [False] * 3))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiles_as_one_graph(reduction):
    tensors, targets = inputs(6, 4, 20, torch.float32)

    def doubled(hidden, weight, targets, bias):
        return 2 * linear_cross_entropy(3 * hidden, weight, targets, bias, z_loss=0.1, reduction=reduction)

    upstream = torch.linspace(-1.0, 2.0, 6) if reduction == "none" else torch.tensor(1.5)
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    got = loss_and_gradients(compiled, tensors, targets, upstream)
    for a, b in zip(got, loss_and_gradients(doubled, tensors, targets, upstream), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.prove
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 63), (33, 64, 1024), (130, 31, 1025), (17, 128, 8193)], ids=str)
def test_a_larger_grid(shape, dtype):
    for reduction, smoothing, softcap in itertools.product(("none", "sum", "mean"), (0.0, 0.1), (None, 20.0)):
        options = {"reduction": reduction, "label_smoothing": smoothing, "softcap": softcap, "z_loss": 1e-3}
        assert_right(f"{shape} {options}", *inputs(*shape, dtype), 0.7, **options)
