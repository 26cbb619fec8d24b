"""Training on the kernels is training on PyTorch: from one seed, both sides' losses stay together step after step.

A single step agrees to the last digits (tests/test_ops.py). Here rounding may pile up, since AdamW divides by the root
of a gradient's own square and so turns a small error of a small gradient into a step: what is bounded is how far the
two curves of losses ever part.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from minillm import ops
from minillm.config import ModelConfig, from_dict
from minillm.data.batch import Batch
from minillm.model.transformer import Transformer
from minillm.training.objectives import likelihood
from tests.kernels.compare import CUDA

TINY = {
    "layers": 1, "heads": 2, "kv_heads": 1, "dim": 32, "context": 16, "vocab_size": 61,
    "mlp": {"hidden_dim": 48}, "attention": {"qk_norm": True},
}  # fmt: skip
SMALL = TINY | {
    "layers": 4,
    "heads": 8,
    "kv_heads": 4,
    "dim": 512,
    "context": 512,
    "vocab_size": 4096,
    "mlp": {"hidden_dim": 1408},
}


@pytest.fixture(autouse=True)
def the_choice_ends_with_the_test() -> Iterator[None]:
    yield
    ops.select("auto")


def counting(rows: int, config: ModelConfig) -> Batch:
    """Each row counts on in a step of its own, with a tenth of the words wrong."""
    T, V = config.context, config.vocab_size
    step, start = torch.randint(1, 5, (rows, 1)), torch.randint(V, (rows, 1))
    words = (start + step * torch.arange(T + 1)) % V
    words = torch.where(torch.rand(words.shape) < 0.1, torch.randint(V, words.shape), words)
    return Batch(ids=words[:, :-1], targets=words[:, 1:], samples=tuple(range(rows)))


def losses(side: str, config: ModelConfig, steps: int, rows: int, device: str, dtype: torch.dtype) -> list[float]:
    """Mean loss of each step, in nats, of one model trained by AdamW on batches that depend on the seed alone."""
    ops.select(side)
    torch.manual_seed(5)
    model = Transformer(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    curve = []
    for _ in range(steps):
        batch = counting(rows, config).to(torch.device(device))
        with nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype):
            loss = likelihood(model, batch) / batch.counted
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def largest_gap(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def test_fifty_steps_stay_together() -> None:
    """In fp32 within 1e-5 nats at every step, twenty times what was measured, of a loss that falls by half a nat."""
    config = from_dict(ModelConfig, TINY)
    triton, torchs = (losses(side, config, 50, 2, "cpu", torch.float32) for side in ("triton", "torch"))
    assert torchs[0] - torchs[-1] > 0.5, "nothing was learned, so nothing was compared"
    assert triton != torchs, "one side was compared with itself"
    assert largest_gap(triton, torchs) < 1e-5


@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, 0.01), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_two_hundred_steps_stay_together_on_a_gpu(device: str, dtype: torch.dtype, band: float) -> None:
    """Within `band` nats; PyTorch's own atomic sums and bf16's rounding part two runs of one side by some of it."""
    config = from_dict(ModelConfig, SMALL)
    triton, torchs = (losses(side, config, 200, 8, device, dtype) for side in ("triton", "torch"))
    assert torchs[0] - torchs[-1] > 2.0, "nothing was learned, so nothing was compared"
    assert largest_gap(triton, torchs) < band


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=CUDA)], ids=["cpu", "cuda"]
)
def test_the_whole_model_is_one_graph_on_the_kernels(device: str, backend: str) -> None:
    """Loss and gradients without a break, compiled once for all batches of a shape, and the same as written."""
    ops.select("triton")
    config = from_dict(ModelConfig, TINY if device == "cpu" else SMALL)
    torch.manual_seed(5)
    model = Transformer(config).to(device)
    compiled = torch.compile(likelihood, fullgraph=True, backend=backend)
    found: dict[str, list[torch.Tensor]] = {}
    for name, objective in (("as written", likelihood), ("compiled", compiled)):
        torch.manual_seed(6)
        found[name] = []
        for step in range(3):
            batch = counting(2, config).to(torch.device(device))
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                loss = objective(model, batch)
            model.zero_grad()
            loss.backward()
            found[name] += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    for ours, expected in zip(found["compiled"], found["as written"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
