"""Which weights decay, which go to Muon, and what the penalties add to the gradient."""

import pytest
import torch

from minillm.config import OptimConfig
from minillm.model.transformer import Transformer
from minillm.peft.config import MethodConfig
from minillm.peft.inject import inject
from minillm.training.optim import add_penalties, build_optimizers, gradient_norm, set_learning_rate
from tests.model.configs import small


def model(**changes) -> Transformer:
    return Transformer(small(**{"norm": {"kind": "layer", "bias": True}, "attention": {"bias": True}, **changes}))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_decay_shrinks_matrices_and_leaves_vectors(name: str) -> None:
    """A real step with zero gradients: all that moves is what decays, and by lr · weight_decay exactly."""
    net = model()
    optimizers = build_optimizers(net, OptimConfig(name=name, lr=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    kinds = set()
    for name, p in net.named_parameters():
        share = 0.95 if p.ndim >= 2 else 1.0
        kinds.add(share)
        torch.testing.assert_close(p.detach(), before[name] * share, rtol=1e-6, atol=0, msg=name)
    assert kinds == {0.95, 1.0}, "the model has no vectors, or no matrices: the test shows nothing"


def test_adamw_is_torchs() -> None:
    """Against torch.optim.AdamW on the same gradients, matrices and vectors in groups of their own."""
    torch.manual_seed(3)
    mine = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    theirs = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    theirs.load_state_dict(mine.state_dict())
    (ours,) = build_optimizers(mine, OptimConfig(lr=0.03, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-7))
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim == 2], "weight_decay": 0.2},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.03, betas=(0.8, 0.9), eps=1e-7, fused=False,
    )  # fmt: skip
    for _ in range(5):
        x = torch.randn(7, 5)
        for net, optimizer in ((mine, ours), (theirs, reference)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "kind", "own"),
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.2}),
        ("adam", torch.optim.Adam, {"betas": (0.8, 0.9), "eps": 1e-7, "decoupled_weight_decay": True}),
        ("sgd", torch.optim.SGD, {"momentum": 0.7, "nesterov": False, "weight_decay": 0.2}),
        ("muon", torch.optim.Muon, {"momentum": 0.7, "weight_decay": 0.2, "adjust_lr_fn": "original"}),
    ],
)
def test_each_name_is_torchs_optimizer_with_the_settings_given(name: str, kind: type, own: dict) -> None:
    given = OptimConfig(name=name, beta1=0.8, beta2=0.9, eps=1e-7, momentum=0.7, weight_decay=0.2)
    optimizer = build_optimizers(model(), given)[-1]
    assert type(optimizer) is kind
    assert {key: optimizer.param_groups[0][key] for key in own} == own


@pytest.mark.parametrize("shape", ["decoder", "encoder", "encoder-decoder"])
def test_muon_takes_exactly_the_matrices_inside_blocks(shape: str) -> None:
    net = model(shape=shape, tied=False)
    adamw, muon = build_optimizers(net, OptimConfig(name="muon"))
    assert type(muon) is torch.optim.Muon and type(adamw) is torch.optim.AdamW
    names = {id(p): name for name, p in net.named_parameters()}
    hidden = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    projections = {name for name in names.values() if ".blocks." in name and name.endswith("_proj.weight")}
    assert hidden == projections and projections
    assert rest == set(names.values()) - projections and "embedding.weight" in rest and "head.weight" in rest


@pytest.mark.parametrize("method", ["lora", "adalora", "adapter", "prefix"])
def test_muon_leaves_what_a_method_puts_in_to_adamw(method: str) -> None:
    net = inject(model(), MethodConfig(method=method)).model
    (adamw,) = build_optimizers(net, OptimConfig(name="muon"))
    held = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert type(adamw) is torch.optim.AdamW and held == {id(p) for p in net.parameters() if p.requires_grad}


def test_each_layer_has_its_share_of_both_rates() -> None:
    def scale(name: str) -> float:
        return 0.5 if ".blocks.0." in name else 1.0

    net = model()
    optimizers = build_optimizers(net, OptimConfig(name="muon", lr=0.004, muon_lr=0.02), scale)
    rates = {id(p): group["peak_lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, p in net.named_parameters():
        peak = 0.02 if name.endswith("_proj.weight") else 0.004
        assert rates[id(p)] == pytest.approx(scale(name) * peak), name


def test_frozen_weights_are_nobodys() -> None:
    net = model()
    net.embedding.weight.requires_grad_(False)
    for name in ("adamw", "muon"):
        held = [p for o in build_optimizers(net, OptimConfig(name=name)) for g in o.param_groups for p in g["params"]]
        assert len(held) == len(list(net.parameters())) - 1
        assert all(p is not net.embedding.weight for p in held)


def test_every_group_follows_the_schedule_from_its_own_peak() -> None:
    optimizers = build_optimizers(
        model(), OptimConfig(name="muon", lr=0.004, muon_lr=0.02, schedule="linear", warmup=0)
    )
    for step, share in ((0, 1.0), (5, 0.55), (9, 0.19)):  # from 1 to final_lr = 0.1 along a line of ten steps
        assert set_learning_rate(optimizers, step, 10, OptimConfig(schedule="linear", warmup=0)) == pytest.approx(
            0.004 * share
        )
        assert [g["lr"] for g in optimizers[0].param_groups] == pytest.approx([0.004 * share] * 2)
        assert [g["lr"] for g in optimizers[1].param_groups] == pytest.approx([0.02 * share])


def test_penalties_are_the_gradients_of_l1_and_l2_over_the_matrices() -> None:
    net = torch.nn.Linear(4, 3).double()
    with torch.no_grad():
        net.weight[1, 2] = 0.0  # where |w| has no slope
    net(torch.randn(5, 4).double()).square().sum().backward()
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    (net(torch.randn(1, 4).double()) * 0).sum().backward()
    add_penalties(net, OptimConfig(l1=0.3, l2=0.7))
    weight = net.weight.detach().clone().requires_grad_()
    (0.3 * weight.abs().sum() + 0.7 / 2 * weight.square().sum()).backward()
    torch.testing.assert_close(net.weight.grad, weight.grad, rtol=1e-12, atol=0)
    assert net.bias.grad.abs().max() == 0 and plain[0].abs().max() > 0
    add_penalties(net, OptimConfig())
    torch.testing.assert_close(net.weight.grad, weight.grad, rtol=0, atol=0)


def test_the_norm_is_that_of_all_gradients_together() -> None:
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert gradient_norm([a, b, c]).item() == 5.0


def test_what_is_looked_up_has_a_rate_of_its_own_and_products_one_by_their_width() -> None:
    net = model(tied=False, position={"kind": "learned"}, speedrun={"ngrams": 3, "ngram_dim": 4})
    config = OptimConfig(lr=0.004, embedding_lr=0.03, transfer=True)
    (adamw,) = build_optimizers(net, config)
    rates = {id(p): group["peak_lr"] for group in adamw.param_groups for p in group["params"]}
    for name, p in net.named_parameters():
        looked_up = name.startswith(("embedding", "ngram_embedding.tables", "decoder.position"))
        expected = 0.03 if looked_up else 0.004 if p.ndim < 2 else 0.004 * 256 / p.shape[1]
        assert rates[id(p)] == pytest.approx(expected), name
    assert adamw.param_groups[0]["lr"] == 0.004, "the log shows the first group's rate"
    assert set_learning_rate([adamw], 0, 10, OptimConfig(warmup=0, schedule="constant")) == 0.004
    assert len({id(p) for group in adamw.param_groups for p in group["params"]}) == len(list(net.parameters()))
