"""Muon over several processes: each matrix is made orthogonal on one of them, as a whole.

    update = gather(g + m (b − g));   rank i mod size: O = orthogonal(update);   broadcast O, each takes its part

Orthogonalising needs the whole matrix, and rounds to bf16 on the way: on parts of it (as the same operations on
DTensors would) it rounds differently, and the losses leave those of one process within a few steps. Momentum and
weights stay with the ranks that hold them, so a checkpoint is torch.optim.Muon's.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from minillm.training.distributed import place, whole


class SharedMuon(torch.optim.Muon):
    """torch.optim.Muon's step, shared out over the ranks; all of them have to take it."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        size = dist.get_world_size()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            for first in range(0, len(parameters), size):  # as many whole matrices at a time as there are ranks
                part = slice(first, first + size)
                self._move(group, parameters[part], gradients[part], momenta[part])

    @staticmethod
    def _move(group: dict, parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor]) -> None:
        orthogonal = []
        for owner, (gradient, momentum) in enumerate(zip(gradients, momenta, strict=True)):
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = whole(gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum)
            if owner == dist.get_rank():
                update = _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
            orthogonal.append(update.to(torch.bfloat16).contiguous())
        for owner, (p, update) in enumerate(zip(parameters, orthogonal, strict=True)):
            dist.broadcast(update, owner)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(place(update, p), alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape))
