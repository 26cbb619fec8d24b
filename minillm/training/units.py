"""What is watched of each layer while it learns: its dead units, and the norm of its gradient.

A unit is dead when no token makes it non-zero any more. Behind ReLU it then passes no gradient either, so it stays
dead (a rate that is too high kills many at once). What is counted is the input of each MLP's last matrix:
activation(up(x)), times the gate where there is one.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from minillm.training.distributed import whole


@contextmanager
def watch_units(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While open, collects by the name of each MLP [hidden] bool: the units that were ever non-zero."""
    alive: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            used = (inputs[0] != 0).flatten(0, -2).any(0)
            alive[name] = alive[name] | used if name in alive else used

        return hook

    last = {name: module for name, module in model.named_modules() if name.endswith("mlp.down_proj")}
    hooks = [m.register_forward_pre_hook(watch(name.removesuffix(".down_proj"))) for name, m in last.items()]
    try:
        yield alive
    finally:
        for hook in hooks:
            hook.remove()


def gradient_norms(weights: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """The norm of the gradients of each half-block, or of what lies outside of blocks, by its name."""
    squares: dict[str, float] = {}
    for name, p in weights.items():
        if p.grad is not None:
            parts = name.split(".")
            layer = ".".join(parts[:4]) if "blocks" in parts else parts[0]
            squares[layer] = squares.get(layer, 0.0) + whole(p.grad.float().square().sum()).item()
    return {name: math.sqrt(square) for name, square in squares.items()}
