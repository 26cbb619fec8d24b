"""Which units ever fire, over all places and all passes, and whose gradient is whose."""

import pytest
import torch

from minillm.training.units import gradient_norms, watch_units
from tests.model.configs import build, small


def test_a_unit_lives_that_fires_at_any_place_of_any_pass() -> None:
    model = build(small(layers=1, mlp={"kind": "relu", "hidden_dim": 4}))
    mlp = model.decoder.blocks[0].mlp
    places = torch.zeros(2, 3, 4)
    places[1, 2, 0] = places[0, 0, 3] = 0.5  # one place each, of two rows of three
    later = torch.zeros(1, 2, 4)
    later[0, 1, 1] = -1e-30
    with watch_units(model) as alive:
        for hidden in (places, later):
            mlp.down_proj(hidden.double())
    assert {name: units.tolist() for name, units in alive.items()} == {
        "decoder.blocks.0.mlp": [True, True, False, True]
    }
    mlp.down_proj(torch.ones(1, 4).double())
    assert not alive["decoder.blocks.0.mlp"].all(), "nothing is watched any more"


def test_the_norm_of_a_half_block_is_that_of_all_its_gradients() -> None:
    model = build(small(layers=1, attention={"bias": True}), torch.float32)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    model.decoder.final_norm.weight.grad = None
    attention = sum(p.numel() for p in model.decoder.blocks[0].attention.parameters())
    found = gradient_norms(dict(model.named_parameters()))
    assert found["decoder.blocks.0.attention"] == pytest.approx((4 * attention) ** 0.5)
    assert found["embedding"] == pytest.approx((4 * 29 * 16) ** 0.5)
    assert "decoder" not in found and "decoder.blocks.0.mlp_norm" in found

    half = torch.nn.Parameter(torch.zeros(464, dtype=torch.float16))
    half.grad = torch.full_like(half, 300.0)  # whose square overflows
    assert gradient_norms({"embedding.weight": half})["embedding"] == pytest.approx(300 * 464**0.5)
