"""The feed-forward half of a block: each token alone, N wide -> hidden -> N."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from minillm import ops
from minillm.config import ModelConfig
from minillm.model.linear import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "tanh": F.tanh,
}
GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"swiglu": ops.swiglu, "geglu": ops.geglu}


class MLP(nn.Module):
    """down(activation(up(x)))"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp.kind]
        self.up_proj = Linear(config.dim, config.mlp_width, bias=config.mlp.bias)
        self.down_proj = Linear(config.mlp_width, config.dim, bias=config.mlp.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class GatedMLP(nn.Module):
    """down(activation(gate(x)) · up(x)) (Shazeer 2020, https://arxiv.org/abs/2002.05202)"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.combine = GATES[config.mlp.kind]
        self.gate_proj = Linear(config.dim, config.mlp_width, bias=config.mlp.bias)
        self.up_proj = Linear(config.dim, config.mlp_width, bias=config.mlp.bias)
        self.down_proj = Linear(config.mlp_width, config.dim, bias=config.mlp.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.combine(self.gate_proj(x), self.up_proj(x)))


def build_mlp(config: ModelConfig) -> nn.Module:
    return GatedMLP(config) if config.mlp.gated else MLP(config)
