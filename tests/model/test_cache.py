"""Reading with a cache equals reading everything at once, however the tokens come in.

To 1e-12 in fp64; the last test says it in fp32.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.config import UserError
from minillm.model.cache import KVCache
from minillm.model.transformer import Transformer
from tests.model.configs import POSITIONS, build, pairwise, small

CASES = pairwise(
    {
        "position": list(POSITIONS),
        "kv_heads": [4, 2, 1],
        "window": [None, 1, 3],
        "qk_norm": [False, True],
        "softcap": [None, 0.7],
        "placement": ["pre", "post"],
        "chunks": [[1] * 10, [6, 1, 1, 1, 1], [3, 4, 3], [10]],
    }
)


def model_of(case: dict[str, Any], shape: str = "decoder") -> Transformer:
    options = {name: case[name] for name in ("window", "qk_norm", "softcap")}
    return build(
        small(
            shape=shape,
            decoder_layers=3 if shape == "encoder-decoder" else None,
            kv_heads=case["kv_heads"],
            position=POSITIONS[case["position"]],
            attention=options,
            norm={"placement": case["placement"]},
        )
    )


def cache_of(model: Transformer, rows: int, size: int) -> KVCache:
    weight = model.embedding.weight
    return KVCache(model.config, rows, size, weight.device, weight.dtype)


def assert_equal(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_cached_equals_uncached(case: dict[str, Any]) -> None:
    model, ids = model_of(case), torch.randint(29, (3, 10))
    cache = cache_of(model, 3, 10)
    parts = [model(part, cache=cache) for part in ids.split(case["chunks"], 1)]
    assert_equal(torch.cat(parts, 1), model(ids))


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_rows_of_different_lengths_equal_each_row_alone(case: dict[str, Any]) -> None:
    """Prompts of 6, 1 and 4 tokens side by side, then single tokens, then a second ragged chunk, then one more."""
    model = model_of(case)
    cache = cache_of(model, 3, 20)
    rows: list[Tensor] = [torch.empty(0, dtype=torch.long)] * 3
    for lengths in ([6, 1, 4], [1, 1, 1], [1, 1, 1], [2, 3, 1], [1, 1, 1]):
        T = max(lengths)
        ids = torch.randint(29, (3, T))
        logits = model(ids, cache=cache, new=None if min(lengths) == T else torch.tensor(lengths))
        for b, length in enumerate(lengths):
            rows[b] = torch.cat((rows[b], ids[b, :length]))
            assert_equal(logits[b, :length], model(rows[b][None])[0, -length:])
    assert cache.lengths.tolist() == [11, 7, 8]


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_an_encoder_decoder_reads_its_source_once(case: dict[str, Any]) -> None:
    """The padding of the source stays padding in the steps that no longer name it."""
    model, ids = model_of(case, "encoder-decoder"), torch.randint(29, (2, 10))
    source, segments = torch.randint(29, (2, 5)), torch.tensor([[0, 0, 0, 0, 0], [0, 0, -1, -1, -1]])
    cache, parts = cache_of(model, 2, 10), []
    for i, part in enumerate(ids.split(case["chunks"], 1)):
        first = {"source": source, "source_segments": segments} if i == 0 else {}
        parts.append(model(part, cache=cache, **first))
    assert_equal(torch.cat(parts, 1), model(ids, source=source, source_segments=segments))


@torch.no_grad()
def test_cached_equals_uncached_in_fp32() -> None:
    model, ids = build(small(kv_heads=2, attention={"qk_norm": True}), torch.float32), torch.randint(29, (2, 12))
    cache = cache_of(model, 2, 12)
    parts = [model(part, cache=cache) for part in ids.split([5, 1, 1, 5], 1)]
    assert_equal(torch.cat(parts, 1), model(ids), 1e-5)


@torch.no_grad()
def test_a_cache_in_fp32_reads_what_a_model_in_bf16_wrote() -> None:
    """Keys and values are those that the model made, to the bit; only scores and sums are finer."""
    model, ids = build(small(kv_heads=2), torch.bfloat16), torch.randint(29, (2, 12))
    expected, caches = model(ids), []
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(model.config, 2, 12, ids.device, dtype)
        parts = [model(part, cache=cache) for part in ids.split([5, 1, 1, 5], 1)]
        assert all(part.dtype == torch.bfloat16 for part in parts)
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=0.1, rtol=0.05)
        caches.append(cache.buffer[0])
    wide, narrow = caches
    assert wide.dtype == torch.float32 and torch.equal(wide, narrow.float())


@torch.no_grad()
def test_rows_of_one_length_are_written_as_rows_of_any_length() -> None:
    model, ids = build(small(kv_heads=2)), torch.randint(29, (3, 9))
    even, ragged, whole = (cache_of(model, 3, 12) for _ in range(3))
    ragged.ragged = whole.whole = True
    for part in ids.split([4, 1, 3, 1], 1):
        logits = [model(part, cache=cache) for cache in (even, ragged, whole)]
        assert_equal(logits[1], logits[0])
        assert_equal(logits[2], logits[0])
    assert_equal(ragged.buffer, even.buffer)
    assert_equal(whole.buffer, even.buffer)
    assert even.buffer[:, :, :, :, 9:].abs().max() == 0 < even.buffer[:, :, :, :, 8].abs().min()


@torch.no_grad()
def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    model, ids = build(small()), torch.randint(29, (1, 6))
    cache = cache_of(model, 1, 8)
    model(ids, cache=cache)
    with pytest.raises(UserError, match=r"holds 8 tokens, and 6 \+ 6 do not fit"):
        model(ids, cache=cache)
    assert cache.lengths.tolist() == [6]


def test_a_cache_refuses_gradients_instead_of_losing_them() -> None:
    model = build(small())
    with pytest.raises(UserError, match=r"within torch.no_grad\(\)"):
        model(torch.randint(29, (1, 2)), cache=cache_of(model, 1, 8))


@torch.no_grad()
def test_learned_positions_end_with_the_context_with_a_cache_too() -> None:
    model = build(small(position={"kind": "learned"}, context=8))
    cache = cache_of(model, 1, 20)
    model(torch.randint(29, (1, 8)), cache=cache)
    with pytest.raises(UserError, match=r"9 tokens do not fit: learned positions end at model.context"):
        model(torch.randint(29, (1, 1)), cache=cache)
