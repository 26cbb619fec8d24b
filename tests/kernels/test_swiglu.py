"""SwiGLU and GeGLU against their references in fp64: shapes, dtypes, strides, extremes, compile."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import swiglu as module
from kernels._launch import runs_triton
from kernels.swiglu import geglu, geglu_reference, swiglu, swiglu_reference
from tests.kernels.compare import DEVICES, DTYPES, compare, every, normal, pairwise, results

Gated = Callable[[Tensor, Tensor], Tensor]
FORMS: dict[str, tuple[Gated, Gated, Gated]] = {  # ours, PyTorch's, the reference
    "silu": (swiglu, lambda gate, up: F.silu(gate) * up, swiglu_reference),
    "gelu": (geglu, lambda gate, up: F.gelu(gate) * up, geglu_reference),
    "gelu_tanh": (
        lambda gate, up: geglu(gate, up, approximate="tanh"),
        lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        lambda gate, up: geglu_reference(gate, up, approximate="tanh"),
    ),
}
GRID = {
    "form": tuple(FORMS),
    "shape": ((1,), (3, 1), (2, 5, 37), (1, 1000), (2, 4097)),
    "dtype": DTYPES,
    "scale": (1.0, 30.0, 1e4),  # 30: where σ leaves fp32's digits; 1e4: where exp(−x) would overflow
}


def terms(inputs: dict[str, Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
    gate, up = inputs.values()
    return {"output 0": gate * up, "d gate": cotangents[0] * up * (1 + gate.abs()), "d up": cotangents[0] * gate}


def check(form: str, gate: Tensor, up: Tensor, dy: Tensor) -> None:
    assert runs_triton(gate, up), "the reference would be compared with itself"
    compare(*FORMS[form], {"gate": gate, "up": up}, [dy], terms)


def check_case(case: dict, device: str) -> None:
    gate, up, dy = (normal(*case["shape"]).to(device, case["dtype"]) for _ in range(3))
    check(case["form"], gate * case["scale"], up, dy)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", pairwise(**GRID))
def test_equals_the_reference(case: dict, device: str) -> None:
    check_case(case, device)


@pytest.mark.prove
@pytest.mark.parametrize("case", every(**GRID))
def test_equals_the_reference_everywhere(case: dict) -> None:
    check_case(case, "cpu")


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_over_their_whole_range(form: str) -> None:
    """Random gates rarely hit the tails and the turning points; here each has its own, to fp32's last digits."""
    gate = torch.cat((torch.linspace(-12, 12, 2401), torch.tensor([0.0, -0.0, 1e-30, -1e-30])))
    _, _, reference = FORMS[form]
    got = results(FORMS[form][0], {"gate": gate, "up": torch.ones_like(gate)}, [torch.ones_like(gate)])
    wide = {"gate": gate.double(), "up": torch.ones_like(gate).double()}
    exact = results(reference, wide, [torch.ones_like(gate).double()])
    for name in exact:
        torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_extremes_are_the_limits(form: str) -> None:
    gate = torch.tensor([1e4, -1e4, 88.0, -104.0])
    got = results(FORMS[form][0], {"gate": gate, "up": torch.ones(4)}, [torch.ones(4)])
    torch.testing.assert_close(got["output 0"], torch.tensor([1e4, 0.0, 88.0, 0.0]), rtol=0, atol=1e-30)
    torch.testing.assert_close(got["d gate"], torch.tensor([1.0, 0.0, 1.0, 0.0]), rtol=0, atol=1e-30)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # the interpreter's numpy says so too
def test_a_product_beyond_fp16_is_infinite() -> None:
    gate = torch.full((3,), 1e4, dtype=torch.float16)
    assert swiglu(gate, gate).isinf().all()


@pytest.mark.parametrize("layout", ["halves of one product", "transposed", "expanded", "unaligned", "every second"])
def test_strides(layout: str) -> None:
    gate, up = {
        "halves of one product": lambda: torch.randn(4, 3, 74).chunk(2, -1),
        "transposed": lambda: (torch.randn(37, 12).t(), torch.randn(12, 37)),
        "expanded": lambda: (torch.randn(1, 37).expand(12, 37), torch.randn(12, 1).expand(12, 37)),
        "unaligned": lambda: (torch.randn(445)[1:].view(12, 37), torch.randn(447)[3:].view(12, 37)),
        "every second": lambda: (torch.randn(12, 74)[:, ::2], torch.randn(24, 37)[::2]),
    }[layout]()
    check("silu", gate, up, torch.randn(1).expand(gate.shape))
    check("silu", gate, up, torch.randn(*gate.shape[:-1], 50)[..., 9:46])


def test_gradients_of_the_halves_of_one_product() -> None:
    both, dy = torch.randn(4, 3, 74), torch.randn(4, 3, 37)
    got = results(lambda both: swiglu(*both.chunk(2, -1)), {"both": both}, [dy])["d both"]
    exact = results(lambda both: swiglu_reference(*both.chunk(2, -1)), {"both": both.double()}, [dy.double()])["d both"]
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 5), (3, 0)])
def test_nothing_to_gate(shape: tuple[int, ...]) -> None:
    got = results(swiglu, {"gate": torch.randn(shape), "up": torch.randn(shape)}, [torch.randn(shape)])
    assert [x.shape for x in got.values()] == [torch.Size(shape)] * 3


@pytest.mark.parametrize("form", FORMS)
def test_is_a_sound_operator(form: str) -> None:
    gate, up = (torch.randn(3, 37, requires_grad=True) for _ in range(2))
    torch.library.opcheck(module._gated, (gate, up, form))
    torch.library.opcheck(module._gated_backward, (torch.randn(3, 37), gate.detach(), up.detach(), form))


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_graph_break(form: str) -> None:
    inputs, dy = {"gate": torch.randn(3, 37), "up": torch.randn(3, 37)}, torch.randn(3, 37)
    ours = FORMS[form][0]
    compiled = torch.compile(lambda **i: ours(**i), fullgraph=True, backend="aot_eager")
    got, eager = results(compiled, inputs, [dy]), results(ours, inputs, [dy])
    assert all(torch.equal(got[name], eager[name]) for name in eager)


@pytest.mark.parametrize("implementation", [swiglu, swiglu_reference, geglu, geglu_reference])
def test_refuses_what_does_not_fit(implementation: Gated) -> None:
    with pytest.raises(ValueError, match=r"gate \[2, 3\] and up \[3\]"):
        implementation(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="one float dtype"):
        implementation(torch.ones(3), torch.ones(3, dtype=torch.float16))


@pytest.mark.parametrize("implementation", [geglu, geglu_reference])
def test_refuses_an_unknown_approximation(implementation: Gated) -> None:
    with pytest.raises(ValueError, match="'none' or 'tanh', not 'fast'"):
        implementation(torch.ones(3), torch.ones(3), approximate="fast")
