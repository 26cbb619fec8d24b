"""Flash attention under Triton's interpreter, forward and both backwards, against the reference in fp64.

Blocks are 64 × 32 and 32 × 64 there, so sizes up to 130 have several blocks either way, ragged ones among them.
"""

import math
import os
import random
import subprocess
import sys
from contextlib import ExitStack
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._launch import candidate
from kernels.flash_attention import flash_attention, flash_attention_reference
from tests.kernels.budget import GRADIENT, OUTPUT, assert_within_budget

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SIZES = (1, 5, 17, 64, 65, 130)
TABLES = [f"flash_attention_{name}" for name in ("forward", "backward", "backward_keys", "backward_queries")]
FACTORS = {
    "T": SIZES,
    "S": (None, *SIZES),  # None: as many as T
    "D": (16, 24, 40, 64, 80),
    "heads": ((1, 1), (4, 2), (2, 1)),  # H, G
    "dtype": (FP32, FP16, BF16),
    "causal": (False, True),
    "window": (None, (7, 3), (40, None), (None, 0)),
    "softcap": (None, 2.0),
    "alibi": (False, True),
    "segments": (None, "sorted", "shuffled"),
    "lengths": (False, True),
}


def pairwise(factors: dict[str, tuple]) -> list[dict]:
    """Few cases in which every two values of every two factors meet: the best of 40 random ones at each step."""
    rng, names = random.Random(0), list(factors)
    pairs = [((a, x), (b, y)) for a, b in combinations(names, 2) for x, y in product(factors[a], factors[b])]
    missing, cases = set(pairs), []
    while missing:
        tries = []
        for seed in rng.sample(sorted(missing, key=pairs.index), min(40, len(missing))):
            case = {name: rng.choice(factors[name]) for name in names} | dict(seed)
            tries.append((len({p for p in combinations(case.items(), 2) if p in missing}), case))
        cases.append(max(tries, key=lambda scored: scored[0])[1])
        missing -= set(combinations(cases[-1].items(), 2))
    return cases


def name_of(case: dict) -> str:
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in case.values())


def tensors(T: int, S: int, D: int, heads: tuple[int, int], dtype: torch.dtype, B: int = 2) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    shapes = (heads[0], T), (heads[1], S), (heads[1], S), (heads[0], T)
    return [torch.randn(B, h, n, D).to(dtype) for h, n in shapes]


def options_of(case: dict, T: int, S: int, B: int = 2) -> dict:
    options = {name: case[name] for name in ("causal", "window", "softcap")}
    if case["alibi"]:
        options["alibi_slopes"] = torch.rand(case["heads"][0])
    if case["segments"]:
        ids = [torch.randint(0, 3, (B, n)) for n in (T, S)]
        options["segments"] = tuple(x.sort().values if case["segments"] == "sorted" else x for x in ids)
    if case["lengths"]:
        options["lengths"] = tuple(torch.tensor([n, random.randint(n // 2, n)][-B:]) for n in (T, S))
    return options


def gradients(function, inputs: list[Tensor], do: Tensor, **options) -> tuple[Tensor, ...]:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, do)


def largest_terms(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float | None, **options) -> list[float]:
    """The largest term in the sums that make up out, dq, dk, dv; the weights p are attention over an identity for v."""
    (D, S), group = (q.shape[-1], k.shape[2]), q.shape[1] // k.shape[1]
    scale, width = D**-0.5 if scale is None else scale, max(D, S)
    wide = [F.pad(x, (0, width - D)) for x in (q, k)]
    eye = torch.eye(S, width, dtype=q.dtype, device=q.device).expand(*k.shape[:2], S, width)
    p = flash_attention_reference(*wide, eye, scale=scale, **options)[..., :S]
    dp = do @ v.repeat_interleave(group, 1).mT
    delta = (p * dp).sum(-1, keepdim=True)
    ds = torch.maximum((p * dp).abs(), (p * delta).abs()) * scale  # ds is their difference, and may cancel
    sums = (p, v), (ds, k), (ds, q), (p, do)
    return [float(a.abs().max() * b.abs().max()) if a.numel() and b.numel() else 0.0 for a, b in sums]


def check(inputs: list[Tensor], do: Tensor, torch_too=flash_attention_reference, **options) -> None:
    """Output and gradients, both backwards, are within budget of what `torch_too` makes; the inputs stay."""
    exact_inputs, exact_do = [x.detach().double() for x in inputs], do.double()
    exact = gradients(flash_attention_reference, exact_inputs, exact_do, **options)
    torchs = gradients(torch_too, inputs, do, **options)
    scale = options.get("scale")
    terms = largest_terms(*exact_inputs, exact_do, scale, **{k: v for k, v in options.items() if k != "scale"})
    before = [x.clone() for x in (*inputs, do)]
    for deterministic in (False, True):
        ours = gradients(flash_attention, inputs, do, deterministic=deterministic, **options)
        for i, name in enumerate(("out", "dq", "dk", "dv")):
            factor = GRADIENT if i else OUTPUT
            name = f"{name}, {'deterministic' if deterministic else 'fused'}"
            assert_within_budget(name, ours[i], torchs[i], exact[i], factor=factor, floor_terms=terms[i])
    assert all(torch.equal(a, b) for a, b in zip((*inputs, do), before, strict=True)), "an input was modified"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)


# The reference against the definition


def test_the_reference_is_the_definition():
    """Every option at once, written out pair by pair as the interface words it."""
    B, H, G, T, S, D, scale, cap = 2, 4, 2, 6, 9, 8, 0.7, 1.5
    q, k, v, _ = tensors(T, S, D, (H, G), torch.float64, B)
    slopes, ids = torch.rand(H), (torch.randint(0, 2, (B, T)), torch.randint(0, 2, (B, S)))
    lengths = torch.tensor([6, 4]), torch.tensor([9, 5])
    expected = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b, h, t in product(range(B), range(H), range(T)):
        position, sums, total = t + int(lengths[1][b]) - int(lengths[0][b]), torch.zeros(D, dtype=torch.float64), 0.0
        for s in range(int(lengths[1][b])):
            seen = s <= position and position - 4 <= s <= position + 2 and ids[0][b, t] == ids[1][b, s]
            if t < lengths[0][b] and seen:
                score = cap * math.tanh(scale * float(q[b, h, t] @ k[b, h // 2, s]) / cap)
                weight = math.exp(score - float(slopes[h]) * abs(position - s))
                sums, total = sums + weight * v[b, h // 2, s], total + weight
        expected[b, h, t] = sums / total if total else sums
    got = flash_attention_reference(
        q,
        k,
        v,
        causal=True,
        window=(4, 2),
        scale=scale,
        softcap=cap,
        alibi_slopes=slopes,
        segments=ids,
        lengths=lengths,
    )
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_is_sdpa(causal):
    q, k, v, do = tensors(33, 33, 24, (4, 2), torch.float64)
    sdpa = gradients(lambda *x: F.scaled_dot_product_attention(*x, is_causal=causal, enable_gqa=True), [q, k, v], do)
    for got, expected in zip(gradients(flash_attention_reference, [q, k, v], do, causal=causal), sdpa, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


# The kernels against the reference


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=name_of)
def test_every_two_options_together(case):
    T, S = case["T"], case["S"] or case["T"]
    B = 1 if T * S > 2000 else 2  # the interpreter is slow
    *inputs, do = tensors(T, S, case["D"], case["heads"], case["dtype"], B)
    check(inputs, do, **options_of(case, T, S, B))


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(100))
def test_random_options_together(seed):
    rng = random.Random(seed)
    case = {name: rng.choice(values) for name, values in FACTORS.items()}
    case["D"] = rng.randint(1, 256)
    T, S = rng.randint(1, 150), rng.randint(1, 150)
    *inputs, do = tensors(T, S, case["D"], case["heads"], case["dtype"])
    check(inputs, do, **options_of(case, T, S))


@pytest.mark.parametrize("D", [1, 8, 128, 256])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_narrow_and_wide_heads(D, dtype):
    *inputs, do = tensors(40, 70, D, (2, 1), dtype, B=1)
    check(inputs, do, causal=True, window=(30, None))


@pytest.mark.parametrize("D", [16, 256 + 8])
def test_what_the_kernels_do_not_take_is_answered_by_the_reference(D):
    dtype = torch.float64 if D == 16 else FP32
    *inputs, do = tensors(9, 12, D, (2, 1), dtype)
    for ours, expected in zip(
        gradients(flash_attention, inputs, do, causal=True),
        gradients(flash_attention_reference, inputs, do, causal=True),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False) -> Tensor:
    """PyTorch's own flash attention: it finds the weights again from lse too, so that large scores cost it the same."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
def test_scales_of_any_sign(scale):
    *inputs, do = tensors(20, 40, 16, (2, 2), FP32, B=1)
    check(inputs, do, scale=scale, torch_too=sdpa)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_extreme_logits(dtype):
    """Scores up to ±1e4: exp would overflow anywhere but behind the row's maximum."""
    q, k, v, do = tensors(70, 70, 16, (2, 2), dtype, B=1)
    scale = 1e4 / float((q.double() @ k.double().mT).abs().max())
    check([q, k, v], do, causal=True, scale=scale, torch_too=sdpa)


def test_a_window_wider_than_int32_is_none():
    q, k, v, _ = tensors(5, 9, 16, (1, 1), FP32, B=1)
    for wide in (2**31 - 1, 2**40):
        assert torch.equal(flash_attention(q, k, v, window=(wide, wide)), flash_attention(q, k, v))


def test_rows_that_see_nothing_give_zeros():
    """More queries than keys: the first 30 stand before every key. Of the second row of the batch nothing is in use."""
    *inputs, do = tensors(50, 20, 16, (2, 1), FP32)
    lengths = torch.tensor([50, 0]), torch.tensor([20, 0])
    for deterministic in (False, True):
        out, dq, dk, dv = gradients(
            flash_attention, inputs, do, causal=True, lengths=lengths, deterministic=deterministic
        )
        for x in (out, dq):
            assert not x[0, :, :30].any() and not x[1].any() and x[0, :, 30:].abs().amin(-1).min() >= 0
        assert out[0, :, 30:].any(-1).all() and not dk[1].any() and not dv[1].any() and dv[0].any()
        assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("B, T, S", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty_tensors(B, T, S):
    *inputs, do = tensors(T, S, 16, (2, 1), FP32, B)
    ids = torch.zeros(B, T, dtype=torch.int32), torch.zeros(B, S, dtype=torch.int32)
    for deterministic, segments in product((False, True), (None, ids)):
        out, *grads = gradients(flash_attention, inputs, do, deterministic=deterministic, segments=segments)
        assert out.shape == (B, 2, T, 16) and not out.any()
        for grad, x in zip(grads, inputs, strict=True):
            assert grad.shape == x.shape and not grad.any()


# Layouts and integer types


def qkv_projection() -> list[Tensor]:
    """q, k, v as transposed slices of one fused product [B, T, 3, H, D]."""
    fused = torch.randn(2, 40, 3, 2, 24)
    return [fused[:, :, i].transpose(1, 2) for i in range(3)]


def expanded() -> list[Tensor]:
    """k and v the same for every row and every head: stride 0."""
    return [torch.randn(2, 2, 40, 24), *(torch.randn(1, 1, 40, 24).expand(2, 2, 40, 24) for _ in range(2))]


def unaligned() -> list[Tensor]:
    """Storage offset 1, rows 25 apart."""
    return [torch.randn(2, 2, 40, 25)[..., 1:] for _ in range(3)]


def columns() -> list[Tensor]:
    """The last axis is the one with the large stride."""
    return [torch.randn(2, 2, 24, 40).mT for _ in range(3)]


@pytest.mark.parametrize("layout", [qkv_projection, expanded, unaligned, columns])
def test_layouts(layout):
    inputs = layout()
    do = torch.randn(2, 40, 2, 24).transpose(1, 2)
    exact = [x.double() for x in inputs]
    expected = gradients(flash_attention_reference, exact, do.double(), causal=True)
    for deterministic in (False, True):
        got = gradients(flash_attention, inputs, do, causal=True, deterministic=deterministic)
        for ours, value in zip(got, expected, strict=True):
            torch.testing.assert_close(ours.double(), value, atol=2e-5, rtol=0)


def test_an_expanded_gradient():
    """out.sum() hands back one number, expanded to every place."""
    inputs = [x.requires_grad_() for x in tensors(20, 20, 16, (2, 2), FP32)[:3]]
    ours = torch.autograd.grad(flash_attention(*inputs).sum(), inputs)
    expected = torch.autograd.grad(flash_attention_reference(*(x.double() for x in inputs)).sum(), inputs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64], ids=str
)
def test_ids_and_lengths_of_any_integer_type(dtype):
    q, k, v, _ = tensors(20, 40, 16, (1, 1), FP32)
    ids, lengths = (torch.arange(20) // 8, torch.arange(40) // 16), (torch.tensor([20, 11]), torch.tensor([30, 40]))
    expected = flash_attention_reference(q, k, v, segments=tuple(x.expand(2, -1) for x in ids), lengths=lengths)
    ids, lengths = [tuple(x.to(dtype) for x in pair) for pair in (ids, lengths)]
    got = flash_attention(q, k, v, segments=tuple(x.expand(2, -1) for x in ids), lengths=lengths)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_ids_that_differ_above_32_bits():
    q, k, v, _ = tensors(20, 20, 16, (1, 1), FP32, B=1)
    ids = torch.arange(20)[None] % 2 * 2**32 + 5
    expected = flash_attention_reference(q, k, v, segments=(ids, ids))
    torch.testing.assert_close(flash_attention(q, k, v, segments=(ids, ids)), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, flash_attention_reference(q, k, v), atol=1e-2)


# What is never visited


def document_ids(*lengths_and_ids: tuple[int, int]) -> Tensor:
    return torch.cat([torch.full((length,), i) for length, i in lengths_and_ids])[None]


SPARSE = {  # options, and which pairs may see each other, for 48 queries at positions 0 to 47
    "causal": ({"causal": True}, lambda t, s: s <= t),
    "window": ({"window": (9, 5)}, lambda t, s: (s >= t - 9) & (s <= t + 5)),
    "causal window": ({"causal": True, "window": (14, None)}, lambda t, s: (s >= t - 14) & (s <= t)),
    "documents": (
        {"segments": (document_ids((20, 0), (12, 1), (16, 2)),) * 2},
        lambda t, s: (
            torch.bucketize(t, torch.tensor([20, 32]), right=True)
            == torch.bucketize(s, torch.tensor([20, 32]), right=True)
        ),
    ),
    "documents in no order, causal": (
        {"segments": (document_ids((16, 7), (16, 3), (16, 7)),) * 2, "causal": True},
        lambda t, s: (t // 16 % 2 == s // 16 % 2) & (s <= t),
    ),
    "padding": ({"lengths": (torch.tensor([48]), torch.tensor([30]))}, lambda t, s: (s < 30).expand(48, 48)),
}


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # from blocks that do see what is poisoned
@pytest.mark.parametrize("rule", SPARSE)
def test_blocks_that_cannot_contribute_are_never_visited(rule):
    """NaN wherever a block sees nothing: one visit would leave NaN · 0 = NaN in its sums."""
    options, visible = SPARSE[rule]
    n, block = 48, 16
    at = torch.arange(n)
    meets = visible(at[:, None], at).view(n // block, block, n // block, block).any(3).any(1)  # [query, key] blocks
    assert not meets.all()
    q, k, v, do = tensors(n, n, 16, (1, 1), FP32, B=1)
    window, numbers = options.get("window", (None, None)), (0.25, None)
    edges = window[0], 0 if options.get("causal") else window[1]
    extra = None, *options.get("segments", (None, None)), *options.get("lengths", (None, None)), *numbers, *edges
    ops = torch.ops.minillm

    def poisoned(x: Tensor, keep: Tensor) -> Tensor:
        return x.where(keep.repeat_interleave(block)[:, None], float("nan"))

    with ExitStack() as stack:
        for table in TABLES:
            stack.enter_context(candidate(table, {"BLOCK_M": block, "BLOCK_N": block, "num_warps": 1}))
        out, lse = ops.flash_attention(q, k, v, *extra, False)
        for i in range(n // block):
            mine = slice(i * block, (i + 1) * block)
            got, _ = ops.flash_attention(q, poisoned(k, meets[i]), poisoned(v, meets[i]), *extra, False)
            assert torch.equal(got[:, :, mine], out[:, :, mine]), f"query block {i} visits a key block it cannot see"
        for deterministic, i in product((False, True), range(n // block)):
            mine = slice(i * block, (i + 1) * block)
            saved = out, lse, *extra, deterministic
            dq, dk, dv = ops.flash_attention_backward(do, q, k, v, *saved)
            got, _, _ = ops.flash_attention_backward(do, q, poisoned(k, meets[i]), poisoned(v, meets[i]), *saved)
            assert torch.equal(got[:, :, mine], dq[:, :, mine]), f"dq of query block {i}"
            by_key = poisoned(do, meets[:, i]), poisoned(q, meets[:, i])
            _, *got = ops.flash_attention_backward(*by_key, k, v, *saved)
            assert torch.equal(got[0][:, :, mine], dk[:, :, mine]), f"dk of key block {i}"
            assert torch.equal(got[1][:, :, mine], dv[:, :, mine]), f"dv of key block {i}"


def test_alibi_far_from_all_keys():
    """Documents put rows 100 keys away from all that they see: each rounding of such scores, and of lse, shows."""
    *inputs, do = tensors(41, 150, 153, (1, 1), FP32)
    case = {"causal": True, "window": None, "softcap": None, "alibi": True, "segments": "sorted", "lengths": True}
    check(inputs, do, **options_of(case | {"heads": (1, 1)}, 41, 150))


# As an operator


def test_lse():
    q, k, v, _ = tensors(40, 20, 16, (2, 1), FP32)
    _, lse = torch.ops.minillm.flash_attention(q, k, v, None, None, None, None, None, 0.25, None, None, 0, False)
    scores = (q @ k.mT * 0.25).masked_fill(torch.arange(20) > torch.arange(-20, 20)[:, None], float("-inf"))
    assert lse.dtype == FP32 and (lse[:, :, :20] == float("inf")).all()
    torch.testing.assert_close(lse[:, :, 20:] * math.log(2), scores.logsumexp(-1)[:, :, 20:], atol=1e-5, rtol=0)


def test_deterministic_gradients_are_equal_bit_for_bit():
    *inputs, do = tensors(70, 70, 16, (2, 1), FP32)
    ids = torch.randint(0, 3, (2, 70)).sort().values
    runs = [gradients(flash_attention, inputs, do, segments=(ids, ids), deterministic=True) for _ in range(2)]
    with candidate("flash_attention_backward", {}):  # the fused backward, whose sum has no fixed order, cannot run
        runs.append(gradients(flash_attention, inputs, do, segments=(ids, ids), deterministic=True))
        torch.use_deterministic_algorithms(True)
        try:
            runs.append(gradients(flash_attention, inputs, do, segments=(ids, ids)))
        finally:
            torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("deterministic", [False, True])
def test_opcheck(deterministic):
    q, k, v, do = tensors(20, 33, 24, (2, 1), FP16, B=1)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ids = torch.zeros(1, 20, dtype=torch.int32), torch.zeros(1, 33, dtype=torch.int32)
    lengths = torch.tensor([18]), torch.tensor([30])
    extra = torch.rand(2), *ids, *lengths, 0.2, 5.0, 12, 0, deterministic
    torch.library.opcheck(torch.ops.minillm.flash_attention.default, (*inputs, *extra))
    out, lse = torch.ops.minillm.flash_attention(*(x.detach() for x in inputs), *extra)
    saved = (do, *(x.detach() for x in inputs), out, lse, *extra)
    torch.library.opcheck(torch.ops.minillm.flash_attention_backward.default, saved)


def test_compiled_without_a_graph_break():
    *inputs, do = tensors(20, 20, 16, (2, 1), FP32, B=1)
    slopes, ids = torch.rand(2), torch.arange(20)[None] // 9

    def call(q, k, v, ids):
        return flash_attention(q * 2, k, v, causal=True, alibi_slopes=slopes, segments=(ids, ids), softcap=3.0) + 1

    expected = gradients(lambda *x: call(*x, ids), inputs, do)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = gradients(lambda *x: compiled(*x, ids), inputs, do)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


WGMMA = """
from kernels._launch import compile_ahead
from kernels.flash_attention import aot_cases
for case in aot_cases("sm_90"):
    if case.name in ("flash_attention_forward/d64/bfloat16/causal", "flash_attention_backward/d64/bfloat16/causal"):
        print(case.name, compile_ahead(case, "sm_90").asm["ptx"].count("wgmma.mma_async"))
"""


def test_compiled_for_hopper_it_uses_the_tensor_cores():
    done = subprocess.run(
        [sys.executable, "-c", WGMMA],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert len(counts) == 2 and all(int(count) > 0 for count in counts.values()), counts


# What is refused

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8)


@pytest.mark.parametrize(
    "message, arguments, options",
    [
        (r"takes q \[B, H, T, D\]", (Q[0], K, K), {}),
        (r"must both be \[B, G, S, D\]", (Q, K, K[:, :, :5]), {}),
        (r"must both be \[B, G, S, D\]", (Q, K[..., :7], K[..., :7]), {}),
        ("must be a multiple", (Q[:, :3], K, K), {}),
        ("head width \\(0\\) at least 1", (Q[..., :0], K[..., :0], K[..., :0]), {}),
        ("one floating-point dtype", (Q, K, K.half()), {}),
        ("q is on cpu but v on meta", (Q, K, K.to("meta")), {}),
        ("softcap must be above 0", (Q, K, K), {"softcap": math.nan}),
        (
            "segments of the keys must be integers",
            (Q, K, K),
            {"segments": (torch.ones(2, 5).long(), torch.ones(2, 6) > 0)},
        ),
        ("window is", (Q, K, K), {"window": (-1, 0)}),
        ("window is", (Q, K, K), {"window": (1, 2, 3)}),
        ("window is .* not 3", (Q, K, K), {"window": 3}),
        ("window is .* not \\(1.5, None\\)", (Q, K, K), {"window": (1.5, None)}),
        ("softcap must be above 0", (Q, K, K), {"softcap": 0.0}),
        (r"alibi_slopes must have the shape \[4\]", (Q, K, K), {"alibi_slopes": torch.ones(2)}),
        (r"segments of the keys must have", (Q, K, K), {"segments": (torch.ones(2, 5).long(),) * 2}),
        ("segments of the queries must be integers", (Q, K, K), {"segments": (torch.ones(2, 5), torch.ones(2, 6))}),
        (
            r"lengths of the keys must lie in 0 to 6",
            (Q, K, K),
            {"lengths": (torch.tensor([5, 5]), torch.tensor([6, 7]))},
        ),
        (r"lengths of the queries must lie", (Q, K, K), {"lengths": (torch.tensor([-1, 5]), torch.tensor([6, 6]))}),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(message, arguments, options):
    for function in (flash_attention, flash_attention_reference):
        with pytest.raises(ValueError, match=message) as raised:
            function(*arguments, **options)
        assert "\n" not in str(raised.value)
