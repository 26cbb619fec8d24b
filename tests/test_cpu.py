"""The chunked loss of a CPU against the plain one."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from minillm import cpu, ops

OPTIONS = list(itertools.product((False, True), (0.0, 0.1), (0.0, 1e-2), (None, 5.0)))


@pytest.mark.parametrize(("bias", "smoothing", "z_loss", "softcap"), OPTIONS)
def test_loss_and_gradients_equal_the_unchunked_ones(monkeypatch, bias, smoothing, z_loss, softcap):
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 37 * 7)  # 23 rows make four chunks, the last one short
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(37, dtype=torch.float64, requires_grad=True) if bias else None
    targets = torch.randint(0, 37, (23,))
    targets[::5] = -100
    options = dict(label_smoothing=smoothing, z_loss=z_loss, softcap=softcap)
    inputs = [x for x in (hidden, weight, b) if x is not None]

    ours = cpu.linear_cross_entropy(hidden, weight, targets, b, **options)
    plain = ops.cross_entropy(F.linear(hidden, weight, b), targets, **options)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    gradients = zip(torch.autograd.grad(1.7 * ours, inputs), torch.autograd.grad(1.7 * plain, inputs), strict=True)
    for mine, theirs in gradients:
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_no_target_that_counts_gives_zero_and_zero_gradients():
    hidden = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(9, 4, requires_grad=True)
    loss = cpu.linear_cross_entropy(hidden, weight, torch.full((5,), -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_autocast_multiplies_in_bf16_and_sums_in_fp32():
    hidden, weight = torch.randn(64, 32), torch.randn(100, 32)
    targets = torch.randint(0, 100, (64,))
    exact = ops.cross_entropy(F.linear(hidden.double(), weight.double()), targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours = cpu.linear_cross_entropy(hidden, weight, targets)
    assert ours.dtype == torch.float32
    assert 0 < abs(ours.item() / exact.item() - 1) < 2e-3  # rounded to bf16 once, not at every sum
