"""The steps of kernels/README.md: its code blocks are run, and every step passes the same test."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kernels
from kernels.flash_attention import flash_attention_reference

README = Path(kernels.__file__).with_name("README.md")
STEPS = ("naive", "online", "tiled", "skipping", "flash")


@pytest.fixture(scope="module")
def ladder(tmp_path_factory) -> ModuleType:
    """All blocks as one module, in a file of its own, since Triton reads a kernel's source from its file."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    path = tmp_path_factory.mktemp("ladder") / "ladder.py"
    path.write_text("\n\n".join(blocks), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("ladder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(function, heads: tuple[int, int] | None, T: int, S: int, causal: bool) -> None:
    """Output and gradients, to the last digits of fp64."""
    torch.manual_seed(0)
    H, G = heads or (1, 1)
    inputs = [torch.randn(h, n, 16, dtype=torch.float64, requires_grad=True) for h, n in ((H, T), (G, S), (G, S))]
    do = torch.randn(H, T, 16, dtype=torch.float64)
    expected = flash_attention_reference(*(x[None] for x in inputs), causal=causal)[0]
    got = function(*inputs, causal) if heads else function(*(x[0] for x in inputs), causal)[None]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    pairs = zip(torch.autograd.grad(got, inputs, do), torch.autograd.grad(expected, inputs, do), strict=True)
    for ours, exact in pairs:
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T, S", [(1, 1), (10, 10), (7, 11)])
@pytest.mark.parametrize("step", STEPS)
def test_each_step_is_attention(ladder, step, T, S, causal):
    check(getattr(ladder, step), None, T, S, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(ladder, causal):
    check(ladder.grouped, (4, 2), 7, 11, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel(ladder, causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(20, 16), torch.randn(37, 16), torch.randn(37, 16)
    expected = flash_attention_reference(*(x[None, None].double() for x in (q, k, v)), causal=causal)[0, 0]
    torch.testing.assert_close(ladder.in_triton(q, k, v, causal).double(), expected, atol=2e-6, rtol=0)
