"""Adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751):  y' = y + up(gelu(down(y)))

A bottleneck after each half-block. Its last layer's output y is what the half-block adds to the stream, so the
adapter is put on that layer. `up` begins as 0, so the model as it was.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from minillm.peft.linear import GrownLinear

ENDS = ("out_proj", "down_proj")
"""The layers that end a half-block."""


class AdapterLinear(GrownLinear):
    """
    Args:
        linear: the last layer of a half-block, whose weight it takes over.
        width: of the bottleneck.
    """

    own = ("adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias")

    def __init__(self, linear: nn.Linear, width: int):
        super().__init__(linear)
        N = linear.out_features
        self.adapter_down, self.adapter_down_bias = self.new(width, N), self.new(width)
        self.adapter_up, self.adapter_up_bias = self.new(N, width), self.new(N)
        nn.init.normal_(self.adapter_down, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        inside = F.gelu(F.linear(y, self.adapter_down, self.adapter_down_bias))
        return y + F.linear(inside, self.adapter_up, self.adapter_up_bias)
