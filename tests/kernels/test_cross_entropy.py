"""Cross-entropy under the interpreter, against the reference in fp64 and by the shared error rule."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._scale_rows import scale_rows
from kernels.cross_entropy import _op, _shape_class, cross_entropy, cross_entropy_reference
from tests.kernels.budget import GRADIENT, OUTPUT, assert_within_budget

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IGNORE = -100


def torchs(logits, targets, *, ignore_index=IGNORE, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean"):
    """The same from PyTorch's operators, in fp32 as the contract wants losses."""
    z = logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)
    loss = F.cross_entropy(
        z, targets.long(), ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    loss = loss + z_loss * torch.logsumexp(z, -1).square() * (targets != ignore_index)
    if reduction == "none":
        return loss
    return loss.sum() / ((targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1)


def loss_and_gradient(function, logits: Tensor, targets: Tensor, upstream: Tensor, **options) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, targets, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype).expand(loss.shape))
    return loss.detach(), gradient


def assert_right(name: str, logits: Tensor, targets: Tensor, upstream: Tensor | float = 1.0, **options) -> None:
    """Loss and gradient within budget, and the inputs as they were."""
    upstream, before = torch.as_tensor(upstream), (logits.clone(), targets.clone())
    loss, gradient = loss_and_gradient(cross_entropy, logits, targets, upstream, **options)
    torch_loss, torch_gradient = loss_and_gradient(torchs, logits, targets, upstream, **options)
    exact, exact_gradient = loss_and_gradient(cross_entropy_reference, logits.double(), targets, upstream, **options)
    z = logits.double().nan_to_num(neginf=0.0)
    z_loss = options.get("z_loss", 0.0)
    biggest = float(z.abs().max()) + z_loss * float(z.abs().max() + 10) ** 2
    rows = len(targets) if options.get("reduction") == "sum" else 1
    assert_within_budget(f"{name} loss", loss, torch_loss, exact, factor=OUTPUT, floor_terms=rows * biggest)
    count = int((targets != options.get("ignore_index", IGNORE)).sum()) if "reduction" not in options else 1
    term = float(upstream.abs().max()) * (1 + 2 * z_loss * float(z.abs().max() + 10)) / max(count, 1)
    assert_within_budget(
        f"{name} gradient", gradient, torch_gradient, exact_gradient, factor=GRADIENT, floor_terms=term
    )
    assert torch.equal(logits.nan_to_num(), before[0].nan_to_num()) and torch.equal(targets, before[1]), name


def some_logits(M: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return (3 * torch.randn(M, V, generator=random)).to(dtype), torch.randint(V, (M,), generator=random)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_combination_of_options(reduction, dtype):
    logits, targets = some_logits(6, 37, dtype)
    some_ignored = targets.where(torch.tensor([True, False, True, True, False, True]), IGNORE)
    upstream = torch.linspace(-1.5, 2.0, 6) if reduction == "none" else 1.7
    for label_smoothing in (0.0, 0.1):
        for z_loss in (0.0, 1e-2):
            for softcap in (None, 5.0):
                for labels in (targets, some_ignored):
                    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
                    assert_right(f"{options}", logits, labels, upstream, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (3, 17), (2, 1024), (2, 1025), (3, 4099), (2, 8193), (1, 20_001)], ids=str
)
def test_shapes_on_both_sides_of_every_block_size(shape, dtype):
    logits, targets = some_logits(*shape, dtype)
    assert_right(f"{shape}", logits, targets)
    assert_right(f"{shape}", logits, targets, label_smoothing=0.2, z_loss=1e-3, softcap=15.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_label_may_lie_in_any_block(dtype):
    logits, _ = some_logits(6, 9000, dtype)
    assert_right("labels", logits, torch.tensor([0, 1, 8191, 8192, 8193, 8999]), reduction="sum")


def test_extreme_logits():
    logits, targets = some_logits(6, 50, torch.float32)
    logits[0] *= 1e4
    logits[1] += 1e4
    logits[2] -= 1e4
    logits[3, targets[3]] = -1e4
    assert_right("±1e4", logits, targets)
    assert_right("±1e4", logits, targets, label_smoothing=0.1, softcap=30.0, reduction="sum")
    assert_right("±1e4", logits, targets, z_loss=1e-4, reduction="none")


def test_excluded_classes_have_no_probability_and_no_gradient():
    logits, targets = some_logits(3, 9000, torch.float32)
    logits[0, :8500] = float("-inf")  # a whole block of nothing
    logits[1, 8192:] = float("-inf")
    targets[:2] = torch.tensor([8600, 3])
    assert_right("−inf", logits, targets)
    _, gradient = loss_and_gradient(cross_entropy, logits, targets, torch.tensor(1.0))
    assert (gradient[0, :8500] == 0).all() and (gradient[1, 8192:] == 0).all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_labels_ignored_and_no_rows_give_zero(reduction):
    logits, targets = some_logits(4, 9, torch.float32)
    logits[1] = float("nan")  # what a padded row holds does not matter
    for x, y in ((logits, torch.full_like(targets, IGNORE)), (logits[:0], targets[:0])):
        loss, gradient = loss_and_gradient(cross_entropy, x, y, torch.tensor(1.0), reduction=reduction, z_loss=0.1)
        assert torch.equal(loss, torch.zeros(loss.shape)) and torch.equal(gradient, torch.zeros(x.shape))
        assert torch.equal(loss, cross_entropy_reference(x, y, reduction=reduction, z_loss=0.1))


def test_ignore_index_may_be_a_class():
    logits, _ = some_logits(5, 7, torch.float32)
    assert_right("ignore 3", logits, torch.tensor([3, 0, 3, 6, 2]), ignore_index=3)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("integer", INTEGERS, ids=str)
def test_labels_of_any_integer_type(integer):
    logits, targets = some_logits(5, 11, torch.float32)
    expected = cross_entropy(logits, targets, reduction="none")
    assert torch.equal(cross_entropy(logits, targets.to(integer), reduction="none"), expected)
    of_reference = cross_entropy_reference(logits, targets, reduction="none")
    assert torch.equal(cross_entropy_reference(logits, targets.to(integer), reduction="none"), of_reference)


def test_strided_expanded_and_unaligned_inputs():
    wide, targets = some_logits(8, 40, torch.bfloat16)
    assert_right("columns of a wider tensor", wide[:, 3:36], targets % 33)
    assert_right("every second row", wide[::2], targets[::2])
    assert_right("transposed", wide.t(), torch.arange(40) % 8)
    assert_right("expanded rows", wide[:1].expand(8, 40), targets)
    assert_right("expanded labels", wide, targets[:1].expand(8))
    logits = wide[:, 3:36].requires_grad_()
    cross_entropy(logits, targets % 33).backward()
    assert logits.grad.shape == (8, 33)


def test_kept_graph_gives_the_same_gradient_again():
    logits, targets = some_logits(4, 9, torch.float32)
    logits.requires_grad_()
    loss = cross_entropy(logits, targets)
    first = torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)[0], first)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], first / 3)


def test_second_derivatives_are_refused():
    logits, targets = some_logits(4, 9, torch.float32)
    with pytest.raises(RuntimeError, match="cross_entropy_reference"):
        torch.autograd.grad(cross_entropy(logits.requires_grad_(), targets), logits, create_graph=True)


def test_fp16_gradients_of_a_mean_do_not_vanish_under_loss_scaling():
    logits = torch.zeros(200, 300, dtype=torch.float16)  # p / M = 1.7e-5; of 1/4096 of that fp16 keeps nothing
    targets = torch.zeros(200, dtype=torch.int64)
    logits[:, 1] = -9.0
    _, gradient = loss_and_gradient(cross_entropy, logits, targets, torch.tensor(65536.0))
    exact = loss_and_gradient(cross_entropy_reference, logits.double(), targets, torch.tensor(65536.0))[1]
    torch.testing.assert_close(gradient[:, 1].double(), exact[:, 1], rtol=0.03, atol=0)


@pytest.mark.parametrize(("label", "where"), [(9, "above"), (-1, "below")])
def test_a_label_outside_the_classes_raises_on_a_cpu_and_is_nan_in_the_kernel(label, where):
    logits, targets = some_logits(4, 9, torch.float32)
    targets[2] = label
    for function in (cross_entropy, cross_entropy_reference):
        with pytest.raises(ValueError, match=rf"targets\[2\] is {label}, outside the 9 classes 0 to 8"):
            function(logits, targets)
    losses, gradient = _op(logits, targets, torch.ones(1), IGNORE, 0.0, 0.0, None, False, True)
    assert losses.isnan().tolist() == gradient.isnan().all(1).tolist() == [False, False, True, False]
    assert gradient.isnan().sum() == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, "flatten the leading axes"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "flatten the leading axes"),
        ({"logits": torch.zeros(2, 0)}, "flatten the leading axes"),
        ({"targets": torch.zeros(2)}, "integer targets"),
        ({"targets": torch.zeros(2, dtype=torch.bool)}, "integer targets"),
        ({"logits": torch.zeros(2, 4, dtype=torch.int64)}, "float logits"),
        ({"label_smoothing": 1.5}, "between 0 and 1"),
        ({"label_smoothing": -0.1}, "between 0 and 1"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"softcap": float("nan")}, "softcap must be above 0"),
        ({"softcap": float("inf")}, "softcap must be above 0"),
        ({"reduction": "avg"}, "none, sum, mean"),
    ],
)
def test_bad_calls_say_what_is_wrong(change, message):
    call = {"logits": torch.zeros(2, 4), "targets": torch.zeros(2, dtype=torch.int64)} | change
    for function in (cross_entropy, cross_entropy_reference):
        with pytest.raises(ValueError, match=message):
            function(
                call["logits"], call["targets"], **{k: v for k, v in call.items() if k not in ("logits", "targets")}
            )


def test_the_first_of_several_wrong_labels_is_named():
    with pytest.raises(ValueError, match=r"targets\[1\] is 9, outside"):
        cross_entropy(torch.zeros(4, 9), torch.tensor([8, 9, -1, 12]))


def test_rows_of_one_block_have_classes_of_their_own():
    assert [_shape_class(V) for V in (1, 1024, 1025, 4096, 4097)] == ["v1024", "v1024", "v4096", "v4096", "large"]


def test_the_reference_is_pytorchs_cross_entropy():
    logits, targets = some_logits(6, 13, torch.float64)
    targets[4] = IGNORE
    for reduction in ("none", "sum", "mean"):
        for label_smoothing in (0.0, 0.3, 1.0):
            options = {"label_smoothing": label_smoothing, "reduction": reduction}
            expected = F.cross_entropy(logits, targets, **options)
            torch.testing.assert_close(cross_entropy_reference(logits, targets, **options), expected)
    lse = torch.logsumexp(2 * torch.tanh(logits / 2), -1)
    got = cross_entropy_reference(logits, targets, z_loss=0.5, softcap=2.0, reduction="none")
    capped = F.cross_entropy(2 * torch.tanh(logits / 2), targets, reduction="none")
    torch.testing.assert_close(got, capped + 0.5 * lse.square() * (targets != IGNORE))


def test_fp64_is_exact():
    logits, targets = some_logits(3, 7, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, targets, label_smoothing=0.1, z_loss=0.1, softcap=4.0), logits.requires_grad_()
    )
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float64 and torch.equal(loss, cross_entropy_reference(logits, targets))


def test_without_a_gradient_none_is_computed():
    logits, targets = some_logits(4, 9, torch.float32)
    weight, options = torch.ones(1), (IGNORE, 0.1, 0.1, 3.0)
    losses, nothing = _op(logits, targets, weight, *options, False, False)
    with_gradient, _ = _op(logits, targets, weight, *options, False, True)
    assert nothing.shape == (0,) and torch.equal(losses, with_gradient)


def test_opcheck():
    logits, targets = some_logits(4, 9, torch.bfloat16)
    logits.requires_grad_()
    torch.library.opcheck(_op, (logits, targets, torch.ones(1), IGNORE, 0.1, 0.1, 3.0, True, True))
    torch.library.opcheck(_op, (logits, targets, torch.ones(4), IGNORE, 0.0, 0.0, None, False, True))
    torch.library.opcheck(scale_rows, (logits.detach(), torch.tensor(2.0)))
    x = logits.detach().clone()
    scale_rows(x, torch.tensor([1.0, 2.0, 0.0, -1.0]))
    assert torch.equal(x, logits.detach() * torch.tensor([[1.0], [2.0], [0.0], [-1.0]], dtype=x.dtype))


def test_compiles_as_one_graph():
    logits, targets = some_logits(4, 9, torch.float32)

    def twice_the_loss(x, y, **options):
        return 2 * cross_entropy(3 * x, y, z_loss=0.1, **options)

    eager = loss_and_gradient(twice_the_loss, logits, targets, torch.tensor(1.5))
    compiled = torch.compile(twice_the_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss_and_gradient(compiled, logits, targets, torch.tensor(1.5)), eager)


@pytest.mark.prove
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 63, 64, 65, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8192, 50_257])
def test_a_larger_grid(V, dtype):
    for M in (1, 2, 9):
        logits, targets = some_logits(M, V, dtype, seed=V + M)
        targets[M // 2] = IGNORE if M > 1 else 0
        for reduction in ("none", "sum", "mean"):
            for label_smoothing, z_loss, softcap in (
                (0.0, 0.0, None),
                (0.1, 1e-3, None),
                (0.0, 1e-2, 30.0),
                (1.0, 0.0, 8.0),
            ):
                options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
                assert_right(f"{M}×{V} {options}", logits, targets, 0.7, reduction=reduction, **options)
