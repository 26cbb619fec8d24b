"""Dead units: hidden units of an MLP that no token makes non-zero any more.

Behind ReLU such a unit passes no gradient either, so it stays dead (a rate that is too high kills many at once). What
is counted is the input of each MLP's last matrix: activation(up(x)), times the gate where there is one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


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
