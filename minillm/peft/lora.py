"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685):  y = W x + b + scale · B (A x)

A [r, in] and B [out, r] are trained, W and b are not; scale = alpha / r. B begins as 0, so the model as it was.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.peft.linear import GrownLinear


class LoraLinear(GrownLinear):
    """
    Args:
        linear: whose weight it takes over.
        rank: r; scale: alpha / r.
        dropout: on what A reads.
    """

    own = ("lora_A", "lora_B")

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float):
        super().__init__(linear)
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        self.lora_A, self.lora_B = self.new(rank, linear.in_features), self.new(linear.out_features, rank)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)
        return super().forward(x) + self.scale * update

    @torch.no_grad()
    def delta(self) -> Tensor:
        return self.scale * (self.lora_B @ self.lora_A)
