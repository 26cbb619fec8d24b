"""Which optimizer moves which weights.

Weight decay falls on matrices and embeddings only: a norm's weight or a bias shrunk towards zero loses its meaning.
Muon (Jordan et al. 2024) takes the matrices inside the blocks, whose update it makes orthogonal; embeddings, output
matrix, norms and biases stay with AdamW. So do the factors of LoRA and the bottlenecks of adapters: an orthogonal
step in each factor is none of their product, and it is large even where a factor of zeros leaves no gradient but noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minillm.config import OptimConfig
from minillm.training.schedules import learning_rate

TRANSFER_WIDTH = 256
"""The width at which `optim.lr` holds as it is with `optim.transfer`."""


def build_optimizers(
    model: nn.Module,
    config: OptimConfig,
    scale: Callable[[str], float] | None = None,
    *,
    muon: type[torch.optim.Muon] = torch.optim.Muon,
) -> list[torch.optim.Optimizer]:
    """One optimizer, or two with Muon; only weights that require gradients are theirs.

    Args:
        scale: factor of the learning rate by a parameter's name (layer-wise decay).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if config.name == "muon" and p.ndim == 2 and _in_block(name)]
    taken = {id(p) for p in hidden}
    matrices = [p for _, p in named if p.ndim >= 2 and id(p) not in taken]
    vectors = [p for _, p in named if p.ndim < 2]
    factors = {id(p): 1.0 if scale is None else scale(name) for name, p in named}
    base = _base_rates(model, config)
    rates = {id(p): factors[id(p)] * base.get(id(p), config.lr) for _, p in named if id(p) not in taken}
    groups = [
        {"params": chosen, "weight_decay": decay, "lr": rate}
        for rate in sorted(set(rates.values()), key=lambda rate: (rate != config.lr, -rate))  # the log shows the first
        for part, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if (chosen := [p for p in part if rates[id(p)] == rate])
    ]
    optimizers = [_build(config, groups)]
    if hidden:
        matrices_of_blocks = muon(
            [
                {"params": [p for p in hidden if factors[id(p)] == factor], "lr": factor * config.muon_lr}
                for factor in sorted({factors[id(p)] for p in hidden}, reverse=True)
            ],
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn="original",
        )
        optimizers.append(matrices_of_blocks)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _base_rates(model: nn.Module, config: OptimConfig) -> dict[int, float]:
    """The peak rate of each weight, by its `id`, that has another one than `config.lr`.

    What is looked up is moved a row at a time, whatever its width. A product's output moves by the sum of its inputs'
    shares, which grows with their number where all weights move alike: so that is divided out (muP, table 8).
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    rates = {}
    for p in model.parameters():
        if id(p) in embeddings:
            rates[id(p)] = config.embedding_lr or config.lr
        elif config.transfer and p.ndim >= 2:
            rates[id(p)] = config.lr * TRANSFER_WIDTH / p.shape[-1]
    return rates


def _in_block(name: str) -> bool:
    """Whether it is a layer's own weight inside a block; what a method puts there is called otherwise."""
    return ".blocks." in name and name.endswith(".weight")


def _build(config: OptimConfig, groups: list[dict]) -> torch.optim.Optimizer:
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum)
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    options = {"betas": (config.beta1, config.beta2), "eps": config.eps, "fused": fused}
    if config.name == "adam":
        # Adam's own decay is a part of the gradient, where 0.1 outweighs the loss: that is what `l2` is for.
        return torch.optim.Adam(groups, decoupled_weight_decay=True, **options)
    return torch.optim.AdamW(groups, **options)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, steps: int, config: OptimConfig) -> float:
    """Sets every group to its share of its peak for the coming step; returns the first group's rate."""
    share = learning_rate(step, steps, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
    return optimizers[0].param_groups[0]["lr"]


@torch.no_grad()
def add_penalties(model: nn.Module, config: OptimConfig) -> None:
    """Adds the gradients of l1 · Σ|w| and l2 / 2 · Σw² over the matrices."""
    if not (config.l1 or config.l2):
        return
    for p in model.parameters():
        if p.ndim >= 2 and p.grad is not None:
            p.grad.add_(config.l1 * p.sign() + config.l2 * p)


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """Norm of all gradients together, in fp32; of those that are spread over processes, that of the whole."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
