"""LayerNorm and RMSNorm, with the residual addition that precedes them in the same pass.

A block adds what its last half produced to the stream and norms the sum: `normed, stream = norm(new, stream)`
reads and writes memory once for both.
"""

import torch
from torch import Tensor, nn

from minillm import ops
from minillm.config import NormConfig


class LayerNorm(nn.Module):
    def __init__(self, width: int, config: NormConfig):
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if config.bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None):
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)


class RMSNorm(nn.Module):
    def __init__(self, width: int, config: NormConfig):
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, residual: Tensor | None = None):
        return ops.rms_norm(x, self.weight, eps=self.eps, residual=residual)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


def build_norm(width: int, config: NormConfig) -> nn.Module:
    return NORMS[config.kind](width, config)
