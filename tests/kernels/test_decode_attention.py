"""Decode attention under the interpreter, against the reference in fp64 and by the shared error rule."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._launch import candidate
from kernels.decode_attention import _op, decode_attention, decode_attention_reference, split_count
from tests.kernels.budget import OUTPUT, assert_within_budget

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def through_torch(q, k, v, lengths, *, scale=None, window=None, softcap=None, alibi_slopes=None):
    """The same from PyTorch's operators in q's dtype: SDPA with a bias, or written out where there is a softcap."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    position = lengths.long()[:, None, None, None] - T + torch.arange(T)[:, None]
    s = torch.arange(S)
    visible = s <= position
    if window is not None and window[0] is not None:
        visible = visible & (s >= position - window[0])
    slopes = torch.zeros(H) if alibi_slopes is None else alibi_slopes.detach()
    bias = -slopes[:, None, None] * (position - s).abs()
    bias = torch.where(visible, bias, float("-inf")).to(q.dtype).expand(B, H, T, S)
    seen = visible.any(-1, keepdim=True)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~seen, 0.0), scale=scale)
    else:
        score = softcap * torch.tanh(q @ k.mT * (D**-0.5 if scale is None else scale) / softcap)
        out = (score + bias.masked_fill(~seen, 0.0)).softmax(-1) @ v
    return out.masked_fill(~seen, 0.0)


def some_inputs(B, H, G, T, S, D, dtype, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator(torch.get_default_device()).manual_seed(seed)
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, D)
    q, k, v = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    return q, k, v


def assert_right(name, q, k, v, lengths, **options) -> None:
    """Within budget though all keys beyond `lengths` are poisoned; inputs as they were."""
    unused = (torch.arange(k.shape[2]) >= lengths.long()[:, None])[:, None, :, None]
    poisoned = [x.masked_fill(unused, float("nan")) for x in (k, v)]
    before = [x.clone() for x in (q, *poisoned, lengths)]
    ours = decode_attention(q, *poisoned, lengths, **options)
    exact = decode_attention_reference(q.double(), *(x.double() for x in poisoned), lengths, **options)
    pytorchs = through_torch(q, *(x.masked_fill(unused, 0.0) for x in (k, v)), lengths, **options)
    largest = float(v.abs().max()) if v.numel() else 0.0
    assert_within_budget(name, ours, pytorchs, exact, factor=OUTPUT, floor_terms=largest)
    after = (q, *poisoned, lengths)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, before, strict=True)), name


OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "zero scale": {"scale": 0.0},
    "window": {"window": (40, 0)},
    "own key only": {"window": (0, None)},
    "unlimited window": {"window": (None, 3)},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "all": {"scale": 0.3, "window": (70, 0), "softcap": 4.0, "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype):
    inputs, lengths = some_inputs(3, 4, 2, 3, 200, 16, dtype), torch.tensor([200, 3, 131])
    options = {name: x.to(lengths.device) if isinstance(x, Tensor) else x for name, x in options.items()}
    assert_right("", *inputs, lengths, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "H", "G", "T", "S", "D"),
    [
        (1, 1, 1, 1, 1, 1),
        (1, 2, 1, 1, 65, 3),
        (2, 6, 3, 2, 64, 24),
        (1, 8, 1, 9, 129, 32),  # 72 rows: more than one block of them
        (1, 5, 1, 5, 33, 80),  # a row of the block that no query fills
        (1, 3, 3, 4, 40, 96),
        (1, 2, 1, 1, 70, 256),
        (5, 4, 4, 1, 30, 64),  # more heads than programs: no split
    ],
)
def test_shapes(B, H, G, T, S, D, dtype):
    lengths = torch.linspace(S, T, B).long()
    assert_right("", *some_inputs(B, H, G, T, S, D, dtype), lengths)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256])
def test_every_split_of_the_keys(length):
    q, k, v = some_inputs(1, 2, 1, 1, 256, 16, torch.float32)
    for block in (16, 64):
        with candidate("decode_attention", {"BLOCK_M": 64, "BLOCK_N": block, "num_warps": 1, "num_stages": 1}):
            assert_right(f"{length} keys, blocks of {block}", q, k, v, torch.tensor([length]))
            assert_right(f"{length} keys, blocks of {block}", q, k, v, torch.tensor([length]), window=(30, 0))


@pytest.mark.parametrize("group", [1, 2, 8])
def test_splits_are_joined_in_any_number_of_steps(group):
    q, k, v = some_inputs(1, 2, 1, 2, 256, 16, torch.float32)
    with (
        candidate("decode_attention_combine", {"GROUP": group, "num_warps": 1, "num_stages": 1}),
        candidate("decode_attention", {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 1, "num_stages": 1}),
    ):
        assert_right(f"{group} at a time", q, k, v, torch.tensor([250]))


def test_rows_that_see_nothing_give_zeros():
    q, k, v = some_inputs(3, 2, 1, 3, 20, 16, torch.float32)
    lengths = torch.tensor([0, 2, 20])  # no keys at all; the first of three queries stands before the first key
    assert_right("short", q, k, v, lengths)
    out = decode_attention(q, k, v, lengths)
    assert (out[0] == 0).all() and (out[1, :, 0] == 0).all() and (out[1, :, 1:] != 0).all()


@pytest.mark.parametrize("wide", [2**31 - 1, 2**40])
def test_a_window_wider_than_int32_is_none(wide):
    q, k, v = some_inputs(2, 2, 1, 4, 20, 16, torch.float32)
    lengths = torch.tensor([2, 20])  # the first two of four queries stand before the first key
    assert torch.equal(decode_attention(q, k, v, lengths, window=(wide, 0)), decode_attention(q, k, v, lengths))


def test_empty_batch_no_queries_and_empty_cache():
    q, k, v = some_inputs(2, 2, 1, 2, 20, 16, torch.float32)
    two = torch.tensor([5, 6])
    assert decode_attention(q[:0], k[:0], v[:0], two[:0]).shape == (0, 2, 2, 16)
    assert decode_attention(q[:, :, :0], k, v, two).shape == (2, 2, 0, 16)
    assert torch.equal(decode_attention(q, k[:, :, :0], v[:, :, :0], 0 * two), torch.zeros_like(q))


def test_extreme_scores():
    q, k, v = some_inputs(1, 2, 1, 2, 100, 16, torch.float32)
    q[0, 0] *= 1e4
    k[0, 0, 40] *= -20
    assert_right("huge scores", q, k, v, torch.tensor([100]))
    assert_right("huge scores, capped", q, k, v, torch.tensor([100]), softcap=30.0)


def test_the_cache_as_it_lies_in_a_model():
    q, k, v = some_inputs(2, 4, 2, 1, 90, 16, torch.bfloat16)
    lengths = torch.tensor([90, 50])
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_right("token-major", *token_major, lengths)
    assert_right("part of a longer buffer", q, k[:, :, 7:80], v[:, :, 7:80], lengths - 40)
    assert_right("columns", q[..., 3:12], k[..., 3:12], v[..., 3:12], lengths)
    assert_right("width not contiguous", q, k.mT.contiguous().mT, v.mT.contiguous().mT, lengths)
    assert_right("one cache for the batch", q, k[:1].expand_as(k), v[:1].expand_as(v), lengths[:1].expand(2))
    fp64_slopes = torch.tensor([0.5, 0.25, 0.1, 0.05], dtype=torch.float64, requires_grad=True)
    assert_right("slopes of another dtype", q, k, v, lengths, alibi_slopes=fp64_slopes)


@pytest.mark.parametrize("integer", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32], ids=str)
def test_lengths_of_any_integer_type(integer):
    q, k, v = some_inputs(2, 2, 1, 1, 50, 16, torch.float32)
    lengths = torch.tensor([50, 20])
    assert torch.equal(decode_attention(q, k, v, lengths.to(integer)), decode_attention(q, k, v, lengths))


def test_lengths_outside_the_cache_raise_on_a_cpu_and_are_nan_in_the_kernel():
    q, k, v = some_inputs(3, 2, 1, 1, 20, 16, torch.float32)
    lengths = torch.tensor([21, -1, 20])
    for function in (decode_attention, decode_attention_reference):
        with pytest.raises(ValueError, match=r"0 to 20, the cache's S_max, not \[21, -1, 20\]"):
            function(q, k, v, lengths)
    out = _op(q, k, v, lengths, 1.0, None, None, None)
    assert out.isnan().all((1, 2, 3)).tolist() == [True, True, False]


def test_bad_calls_say_what_is_wrong():
    q, k, v = some_inputs(2, 4, 2, 1, 20, 16, torch.float32)
    lengths = torch.tensor([5, 6])
    for function in (decode_attention, decode_attention_reference):
        with pytest.raises(ValueError, match=r"lengths must be integers \[B\] = \[2\]"):
            function(q, k, v, lengths[:1])
        with pytest.raises(ValueError, match="lengths must be integers"):
            function(q, k, v, lengths.float())
        with pytest.raises(ValueError, match="lengths must be integers"):
            function(q, k, v, lengths > 0)
        with pytest.raises(ValueError, match="q is on cpu but lengths on meta"):
            function(q, k, v, lengths.to("meta"))
        with pytest.raises(ValueError, match="softcap must be above 0"):
            function(q, k, v, lengths, softcap=-1.0)
        with pytest.raises(ValueError, match="window is"):
            function(q, k, v, lengths, window=(-1, 0))
        with pytest.raises(ValueError, match="one floating-point dtype"):
            function(q.half(), k, v, lengths)
        with pytest.raises(ValueError, match="multiple of k's 2"):
            function(q[:, :3], k, v, lengths)


def test_the_reference_is_attention_over_the_keys_in_use():
    q, k, v = some_inputs(2, 4, 2, 2, 20, 16, torch.float64)
    out = decode_attention_reference(q, k, v, torch.tensor([20, 7]))
    for b, length in enumerate((20, 7)):
        keys, values = (x[b, :, :length].repeat_interleave(2, 0) for x in (k, v))
        mask = torch.arange(length) <= length - 2 + torch.arange(2)[:, None]
        torch.testing.assert_close(out[b], F.scaled_dot_product_attention(q[b], keys, values, attn_mask=mask))


def test_fp64_and_very_wide_heads_take_the_reference():
    for width, dtype in ((16, torch.float64), (257, torch.float32)):
        q, k, v = some_inputs(1, 2, 1, 1, 9, width, dtype)
        lengths = torch.tensor([9])
        assert torch.equal(decode_attention(q, k, v, lengths), decode_attention_reference(q, k, v, lengths))


def test_there_is_no_gradient():
    q, k, v = some_inputs(1, 2, 1, 1, 9, 16, torch.float32)
    out = decode_attention(q.requires_grad_(), k, v, torch.tensor([9]))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.sum().backward()


def test_splits_fill_the_processors_and_no_more_than_there_are_blocks():
    assert [split_count(8, blocks, 132) for blocks in (0, 1, 2, 3, 20, 64, 999)] == [1, 1, 2, 4, 32, 64, 64]
    assert [split_count(n, 999, 132) for n in (1, 4, 64, 264, 10_000)] == [128, 128, 8, 1, 1]


def test_opcheck_and_one_graph():
    q, k, v = some_inputs(2, 4, 2, 2, 50, 16, torch.float32)
    lengths, slopes = torch.tensor([50, 20]), torch.tensor([0.5, 0.25, 0.1, 0.0])
    torch.library.opcheck(_op, (q, k, v, lengths, 0.3, 30, 2.0, slopes))
    torch.library.opcheck(_op, (q, k, v, lengths, 0.3, None, None, None))

    def doubled(q, k, v, lengths):
        return 2 * decode_attention(q * 3, k, v, lengths, softcap=2.0, alibi_slopes=slopes)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, lengths), doubled(q, k, v, lengths))


@pytest.mark.prove
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 8, 16, 33, 64, 72, 128, 160, 256])
def test_a_larger_grid(D, dtype):
    for seed, (B, H, G, T, S) in enumerate(
        [(1, 4, 4, 1, 513), (3, 8, 2, 2, 300), (2, 12, 1, 7, 190), (1, 2, 2, 64, 70)]
    ):
        slopes = torch.linspace(1.0, 0.01, H)
        lengths = torch.randint(T, S + 1, (B,), generator=torch.Generator().manual_seed(seed))
        for window in (None, (0, 0), (100, 0)):
            for softcap in (None, 3.0):
                for alibi_slopes in (None, slopes):
                    options = {"window": window, "softcap": softcap, "alibi_slopes": alibi_slopes}
                    inputs = some_inputs(B, H, G, T, S, D, dtype, seed)
                    assert_right(f"{D=} {options}", *inputs, lengths, **options)
