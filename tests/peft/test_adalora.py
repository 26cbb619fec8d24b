"""AdaLoRA's ranks: they move to where they matter, meet the budget, and survive a checkpoint."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.config import UserError
from minillm.peft.adalora import BETA, Allocator, SvdLinear, budget
from minillm.peft.config import MethodConfig
from minillm.peft.inject import Adapted, inject
from tests.model.configs import build, small

CONFIG = MethodConfig(
    method="adalora", rank=2, initial_rank=4, rank_warmup=0.2, rank_settle=0.3, targets="q_proj,down_proj"
)
STEPS = 20


def task() -> tuple[Adapted, Tensor, Tensor]:
    """A model with AdaLoRA, ids, and targets for its second block's query layer to matter most."""
    model = build(small())
    adapted = inject(model, CONFIG)
    assert adapted.allocator is not None
    adapted.allocator.begin(STEPS)
    ids = torch.randint(29, (4, 8))
    return adapted, ids, torch.randint(29, (4, 8))


def step(adapted: Adapted, optimizer: torch.optim.Optimizer, ids: Tensor, targets: Tensor, number: int) -> float:
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(adapted.model(ids).flatten(0, 1), targets.flatten())
    loss.backward()
    adapted.allocator.regularise()
    adapted.allocator.measure()
    optimizer.step()
    adapted.allocator.after_step(number)
    return loss.item()


def optimizer_of(adapted: Adapted) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in adapted.model.parameters() if p.requires_grad], lr=0.02)


def test_the_budget_falls_with_the_cube_of_the_time_left() -> None:
    config = MethodConfig(method="adalora", rank_warmup=0.1, rank_settle=0.3)
    got = [budget(n, 100, 1200, 800, config) for n in (0, 10, 25, 40, 55, 70, 71, 100)]
    expected = [800 + round(400 * (1 - max(0, n - 10) / 60) ** 3) for n in (0, 10, 25, 40, 55, 70)] + [800, 800]
    assert got == expected == [1200, 1200, 969, 850, 806, 800, 800, 800]


def test_ranks_move_to_a_budget_that_is_met_at_every_step() -> None:
    adapted, ids, targets = task()
    optimizer, allocator = optimizer_of(adapted), adapted.allocator
    losses, seen = [], []
    for number in range(1, STEPS + 1):
        losses.append(step(adapted, optimizer, ids, targets, number))
        ranks = allocator.ranks()
        seen.append(tuple(ranks.values()))
        assert sum(ranks.values()) == budget(number, STEPS, 16, 8, CONFIG)
        for name, layer in allocator.layers.items():
            assert torch.equal(layer.lora_E.squeeze(1) != 0, layer.kept), name
    assert seen[3] == (4, 4, 4, 4) and sum(seen[-1]) == 8
    assert len(set(seen)) > 3 and len(set(seen[-1])) > 1  # not every layer ends with the same rank
    assert len(set(seen[13:])) == 1  # settled
    assert losses[-1] < losses[0]


def test_the_most_important_triplets_stay() -> None:
    """Sensitivity, uncertainty and score computed anew from the weights and gradients of five steps."""
    adapted, ids, targets = task()
    optimizer, allocator = optimizer_of(adapted), adapted.allocator
    smooth: dict[str, Any] = {}
    doubt: dict[str, Any] = {}
    for number in range(1, 7):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(adapted.model(ids).flatten(0, 1), targets.flatten()).backward()
        allocator.regularise()
        allocator.measure()
        for name, layer in allocator.layers.items():
            for own in ("lora_A", "lora_E", "lora_B"):
                weight, key = getattr(layer, own), f"{name}.{own}"
                now = (weight * weight.grad).abs().detach()
                smooth[key] = BETA * smooth.get(key, 0) + (1 - BETA) * now
                doubt[key] = BETA * doubt.get(key, 0) + (1 - BETA) * (now - smooth[key]).abs()
        optimizer.step()
        allocator.after_step(number)
    torch.testing.assert_close(allocator.sensitivity, smooth, atol=1e-15, rtol=1e-9)
    torch.testing.assert_close(allocator.uncertainty, doubt, atol=1e-15, rtol=1e-9)
    scores = {}
    for name in allocator.layers:
        A, E, B = (smooth[f"{name}.{own}"] * doubt[f"{name}.{own}"] for own in ("lora_A", "lora_E", "lora_B"))
        for i in range(4):
            scores[name, i] = float(E[i, 0] + A[i].mean() + B[:, i].mean())
    best = sorted(scores, key=scores.__getitem__, reverse=True)[: budget(6, STEPS, 16, 8, CONFIG)]
    kept = {(name, i) for name, layer in allocator.layers.items() for i in range(4) if layer.kept[i]}
    assert kept == set(best) and 8 < len(kept) < 16


def test_the_regulariser_pulls_towards_orthogonal_rows_and_columns() -> None:
    layers = {"one": SvdLinear(torch.nn.Linear(6, 5, dtype=torch.float64), 3, 1.0, 0.0)}
    layer = layers["one"]
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B)
    eye = torch.eye(3, dtype=torch.float64)
    P, Q = layer.lora_B, layer.lora_A
    (0.3 * ((P.T @ P - eye).square().sum() + (Q @ Q.T - eye).square().sum())).backward()
    expected = P.grad.clone(), Q.grad.clone()
    for parameter in (P, Q, layer.lora_E):
        parameter.grad = torch.zeros_like(parameter)
    Allocator(layers, MethodConfig(method="adalora", orthogonality=0.3)).regularise()
    torch.testing.assert_close((P.grad, Q.grad), expected, atol=1e-12, rtol=0)


def test_the_update_is_the_product_of_the_three() -> None:
    linear = torch.nn.Linear(6, 5, dtype=torch.float64)
    layer = SvdLinear(linear, 3, 1.7, 0.0)
    torch.nn.init.normal_(layer.lora_E)
    x = torch.randn(4, 6, dtype=torch.float64)
    matrix = linear.weight + 1.7 * layer.lora_B @ torch.diag(layer.lora_E.squeeze(1)) @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ matrix.T + linear.bias, atol=1e-12, rtol=0)


def test_a_resumed_run_allocates_the_same() -> None:
    adapted, ids, targets = task()
    optimizer = optimizer_of(adapted)
    for number in range(1, 8):
        step(adapted, optimizer, ids, targets, number)
    again = inject(build(small()), CONFIG)
    again.model.load_state_dict(copy.deepcopy(adapted.model.state_dict()))
    again.allocator.load_state(copy.deepcopy(adapted.allocator.state()))
    second = optimizer_of(again)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(8, STEPS + 1):
        assert step(adapted, optimizer, ids, targets, number) == step(again, second, ids, targets, number)
        assert adapted.allocator.ranks() == again.allocator.ranks()
    assert all(torch.equal(x, y) for x, y in zip(adapted.moved().values(), again.moved().values(), strict=True))


def test_a_run_too_short_for_ranks_to_fall_is_refused() -> None:
    adapted = inject(build(small()), MethodConfig(method="adalora"))
    with pytest.raises(UserError, match="ranks cannot fall within 0 steps"):
        adapted.allocator.begin(0)
    with pytest.raises(UserError, match=r"call begin\(steps\) before the first step"):
        adapted.allocator.after_step(1)
