"""The chunked loss of a CPU against the plain one."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from minillm import cpu, ops
from minillm.config import ModelConfig
from minillm.model.transformer import Transformer

OPTIONS = list(itertools.product((False, True), (0.0, 0.1), (0.0, 1e-2), (None, 5.0)))


@pytest.mark.parametrize(("bias", "smoothing", "z_loss", "softcap"), OPTIONS)
def test_loss_and_gradients_equal_the_unchunked_ones(monkeypatch, bias, smoothing, z_loss, softcap):
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 37 * 9)  # 23 rows make three chunks, the last one short
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


@pytest.mark.parametrize("elements, chunks", [(9 * 12, 2), (9 * 4, 6), (1, 6)])
def test_a_chunk_has_as_many_rows_as_the_weight_has_columns(monkeypatch, elements, chunks):
    """Fewer would pass over the gradient of a large vocabulary's weight more often than over its logits."""
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", elements)
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **out: products.append(len(args[0])) or mm(*args, **out))
    hidden, weight = torch.randn(24, 4, requires_grad=True), torch.randn(9, 4)
    cpu.linear_cross_entropy(hidden, weight, torch.zeros(24, dtype=torch.long))
    assert len(products) == chunks and sum(products) == 24


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


@pytest.mark.parametrize("case", ["full", "causal", "chunk", "window", "documents", "slopes", "grouped"])
def test_attention_in_bf16_and_its_gradients_are_close_to_fp64(case):
    """No farther from the truth than twice what SDPA in bf16 is, whose only fault is rounding too."""
    torch.manual_seed(1)
    G = 2 if case == "grouped" else 4
    T = 9 if case == "chunk" else 24
    exact = [torch.randn(2, h, n, 16, dtype=torch.float64) for h, n in ((4, T), (G, 24), (G, 24))]
    options = {"causal": case != "full"}
    if case == "window":
        options["window"] = 7
    if case == "slopes":
        options["slopes"] = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    if case == "documents":
        documents = torch.arange(24).expand(2, 24) // 10
        options["segments"] = (documents, documents)
    upstream = torch.randn(2, 4, T, 16, dtype=torch.float64)

    def run(dtype, plainly=True):
        inputs = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in exact]
        if case == "slopes":
            options["slopes"] = options["slopes"].to(dtype)
        with pytest.MonkeyPatch.context() as patch:
            if not plainly:
                patch.setattr(cpu, "PLAIN_ATTENTION", 0)
            y = ops.attention(*inputs, **options)
        return [y, *torch.autograd.grad(y, inputs, upstream.to(dtype))]

    truth, sdpa, ours = run(torch.float64), run(torch.bfloat16, plainly=False), run(torch.bfloat16)
    assert any((a != b).any() for a, b in zip(ours, sdpa, strict=True)), "the two are the same operator"
    for right, usual, mine in zip(truth, sdpa, ours, strict=True):
        assert (mine - right).norm() <= 2.5 * (usual - right).norm()
        assert (mine - right).norm() < 0.02 * right.norm()


def test_causal_queries_before_the_first_key_give_zeros_in_bf16_too():
    q, k, v = (torch.randn(1, 2, n, 16).bfloat16() for n in (5, 3, 3))
    y = ops.attention(q, k, v, causal=True)
    assert torch.equal(y[:, :, :2], torch.zeros_like(y[:, :, :2]))
    torch.testing.assert_close(y[:, :, 2], v[:, :, 0])


@pytest.mark.parametrize("G", [4, 1])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_rope_without_gradients_equals_rope_with_them(rows, norms, T, G):
    q, k = torch.randn(3, 4, T, 6, dtype=torch.float64), torch.randn(3, G, T, 6, dtype=torch.float64)
    cos, sin = torch.randn(2, *((3, T, 3) if rows else (T, 3)), dtype=torch.float64)
    weights = tuple(torch.randn(2, 6, dtype=torch.float64)) if norms else None
    assert not cpu.rotates_few(q)
    expected = ops.rope(q, k, cos, sin, norms=weights, eps=1e-3)
    with torch.no_grad():
        assert cpu.rotates_few(q)
        got = ops.rope(q, k, cos, sin, norms=weights, eps=1e-3)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_rope_without_gradients_rounds_once_in_bf16(weight_dtype):
    q, k = (torch.randn(2, n, 9, 32).bfloat16() for n in (4, 2))
    angle, weights = torch.randn(9, 16), tuple(torch.randn(2, 32).to(weight_dtype))
    cos, sin = angle.cos(), angle.sin()
    with torch.no_grad():
        ours = ops.rope(q, k, cos, sin, norms=weights)
    twice = ops.rope(q, k, cos, sin, norms=weights)
    wide = [x.double() for x in weights]
    truth = ops.rope(q.double(), k.double(), cos.double(), sin.double(), norms=tuple(wide))
    for mine, usual, right in zip(ours, twice, truth, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - right).norm() < 0.8 * (usual - right).norm()
        assert ((mine - right).abs() <= 2**-8 * right.abs() + 1e-6).all()


def test_many_tokens_are_rotated_apart():
    with torch.no_grad():
        assert cpu.rotates_few(torch.empty(2, 4, 2**8, 64))
        assert not cpu.rotates_few(torch.empty(2, 4, 2**8 + 1, 64))
        assert not cpu.rotates_few(torch.empty(2, 4, 1, 64, device="meta"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("N", [2, 3, 64, 65])
@pytest.mark.parametrize("rows", [(1, 1), (1,), (3, 1), (2, 2), (5, 1), (1, 32)])
def test_few_rows_are_multiplied_in_halves(monkeypatch, rows, N, bias):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, weight, b = torch.randn(*rows, 48), torch.randn(N, 48), torch.randn(N) if bias else None
    with torch.no_grad():
        assert cpu.multiplies_few(x, weight) == torch.backends.mkl.is_available()
        ours = cpu.linear(x, weight, b)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert ours.shape == (*rows, N) and ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="only MKL's products are slow with few rows")
@pytest.mark.parametrize("threads, rows", [(1, 4), (2, 32)])
def test_one_thread_gains_with_the_fewest_rows_alone(monkeypatch, threads, rows):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with torch.no_grad():
        assert cpu.multiplies_few(torch.empty(rows, 8), torch.empty(16, 8))
        assert not cpu.multiplies_few(torch.empty(rows + 1, 8), torch.empty(16, 8))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="only MKL's products are slow with few rows")
def test_what_is_no_step_of_generation_is_one_product():
    x, weight = torch.randn(2, 1, 48), torch.randn(10, 48)
    assert not cpu.multiplies_few(x, weight), "a gradient may be wanted"
    with torch.no_grad():
        assert cpu.multiplies_few(x, weight)
        assert not cpu.multiplies_few(torch.randn(33, 48), weight)
        assert not cpu.multiplies_few(x[:0], weight)
        assert not cpu.multiplies_few(x.bfloat16(), weight.bfloat16())
        assert not cpu.multiplies_few(x, weight.t().contiguous().t())
        assert not cpu.multiplies_few(x, weight[:1])
        with torch.autocast("cpu", torch.bfloat16):
            assert not cpu.multiplies_few(x, weight)


def test_the_models_linear_layers_go_through_the_door(monkeypatch):
    """Each of a block, and the output matrix: else a step of generation would be slow without a word."""
    seen = []
    real = cpu.linear
    monkeypatch.setattr(cpu, "multiplies_few", lambda x, weight: x.shape[:-1].numel() <= 32)
    monkeypatch.setattr(
        cpu, "linear", lambda x, weight, bias: seen.append(tuple(weight.shape)) or real(x, weight, bias)
    )
    model = Transformer(ModelConfig(layers=1, heads=2, dim=16, context=8, vocab_size=29, kv_heads=1))
    with torch.no_grad():
        logits = model(torch.tensor([[3]]))
    block = [(16, 16), (8, 16), (8, 16), (16, 16), *[(hidden := model.config.mlp_width, 16)] * 2, (16, hidden)]
    assert sorted(seen) == sorted([*block, (29, 16)]) and logits.shape == (1, 1, 29)
