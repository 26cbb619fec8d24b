"""The tables of positions against their formulas in fp64, and what they are for: distances."""

import math

import pytest
import torch

from minillm.config import PositionConfig
from minillm.model.attention import View
from minillm.model.position import alibi_slopes, build_position, document_positions, rope_frequencies
from tests.model.configs import POSITIONS, build, small
from tests.model.naive import Naive


@pytest.mark.parametrize("name", ["rope", "rope-linear", "rope-llama3"])
def test_rope_tables_follow_the_formula(name: str) -> None:
    config = small(head_dim=16, position=POSITIONS[name], context=512)
    cos, sin = build_position(config).rotation(torch.arange(512))
    naive = Naive({}, config)
    exact = torch.stack([naive.angles(place) for place in range(512)])
    # An angle of 512 radians carries 512 · 2^-24 of rounding in fp32.
    torch.testing.assert_close(cos.double(), exact.real, atol=6e-5, rtol=0)
    torch.testing.assert_close(sin.double(), exact.imag, atol=6e-5, rtol=0)


def test_sinusoids_follow_the_formula() -> None:
    config = small(dim=64, position={"kind": "sinusoidal"})
    table = build_position(config).add(torch.zeros(1, 512, 64), torch.arange(512))[0]
    naive = Naive({}, config)
    exact = torch.stack([naive.waves(place) for place in range(512)])
    torch.testing.assert_close(table.double(), exact, atol=6e-5, rtol=0)
    half = build_position(config).add(torch.zeros(1, 512, 64, dtype=torch.bfloat16), torch.arange(512))[0]
    assert torch.equal(half, table.bfloat16())


def test_llama3_scaling_keeps_short_wavelengths_and_slows_long_ones() -> None:
    """The published setting of Llama 3.1: factor 8, old context 8,192, theta 500,000, head width 128."""
    config = PositionConfig(kind="rope", theta=500_000.0, scaling="llama3")
    plain = rope_frequencies(128, PositionConfig(kind="rope", theta=500_000.0))
    scaled = rope_frequencies(128, config)
    wavelengths = 2 * math.pi / plain
    kept, slowed = wavelengths < 8192 / 4, wavelengths > 8192
    assert kept.sum() > 20 and slowed.sum() > 20
    assert torch.equal(scaled[kept], plain[kept])
    torch.testing.assert_close(scaled[slowed], plain[slowed] / 8)
    between = scaled[~kept & ~slowed] / plain[~kept & ~slowed]
    assert len(between) > 2 and (between.diff() < 0).all() and 1 / 8 < between.min() and between.max() < 1


def test_alibi_slopes_are_the_published_ones() -> None:
    assert alibi_slopes(8) == [2**-i for i in range(1, 9)]  # Press et al. 2021, §3
    assert alibi_slopes(1) == [2**-8]
    first_of_16 = [2 ** (-0.5 * (i + 1)) for i in range(16)]
    assert alibi_slopes(12) == pytest.approx([2**-i for i in range(1, 9)] + first_of_16[0:8:2])
    position = build_position(small(position={"kind": "alibi"}))
    for device in ("cpu", "meta"):  # a model that has moved takes its slopes along
        assert position.slopes(torch.device(device)).device.type == device


@pytest.mark.parametrize("kind", ["rope", "alibi"])
def test_relative_positions_depend_on_distance_alone(kind: str) -> None:
    """The same tokens 100 places further on come out the same."""
    model = build(small(position={"kind": kind}, layers=1))
    stack = model.decoder
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    with torch.no_grad():
        here, there = (stack(x, torch.arange(6) + shift, View()) for shift in (0, 100))
    torch.testing.assert_close(here, there, atol=1e-5, rtol=0)  # RoPE's tables are fp32


def test_absolute_positions_do_not() -> None:
    model = build(small(position={"kind": "learned"}))
    ids = torch.full((1, 4), 7)
    with torch.no_grad():
        logits = model(ids)
    assert (logits[0, 0] - logits[0, 3]).abs().max() > 1e-3


def test_positions_count_anew_in_each_document() -> None:
    segments = torch.tensor([[4, 4, 4, 0, 0, -1], [-1, -1, 9, 9, 9, 9], [0, 1, 2, 3, 3, 3]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3], [0, 0, 0, 0, 1, 2]]
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        assert document_positions(segments.to(dtype)).tolist() == expected


def test_positions_have_no_weights_but_the_learned_ones() -> None:
    counts = {
        name: sum(p.numel() for p in build_position(small(position=position)).parameters())
        for name, position in POSITIONS.items()
    }
    assert counts.pop("learned") == 32 * 16
    assert set(counts.values()) == {0}
