"""One block: attention, then (in a decoder with an encoder) cross-attention, then the MLP, each around the stream.

Pre-norm adds f(norm(x)) to x; post-norm makes norm(x + f(x)). In both, an addition is always followed by a norm, so
the two are one operator: a pre-norm block hands on what its MLP produced (`new`) for the next norm to add.
"""

from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.attention import CrossAttention, SelfAttention, View
from minillm.model.mlp import build_mlp
from minillm.model.norm import build_norm


class _Block(nn.Module):
    """The parts, under the same names whatever their order."""

    def __init__(self, config: ModelConfig, layer: int, *, causal: bool, cross: bool):
        super().__init__()
        self.attention_norm = build_norm(config.dim, config.norm)
        self.attention = SelfAttention(config, layer, causal=causal)
        self.cross_norm = build_norm(config.dim, config.norm) if cross else None
        self.cross_attention = CrossAttention(config, layer) if cross else None
        self.mlp_norm = build_norm(config.dim, config.norm)
        self.mlp = build_mlp(config)
        self.dropout = nn.Dropout(config.dropout)


class PreNormBlock(_Block):
    def forward(self, new: Tensor, stream: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """new, stream [B, T, dim]: the last addition, still to be made, and all before it."""
        normed, stream = self.attention_norm(new, stream)
        new = self.dropout(self.attention(normed, view))
        if self.cross_attention is not None:
            normed, stream = self.cross_norm(new, stream)
            new = self.dropout(self.cross_attention(normed, view))
        normed, stream = self.mlp_norm(new, stream)
        return self.dropout(self.mlp(normed)), stream


class PostNormBlock(_Block):
    def forward(self, x: Tensor, view: View) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]"""
        x, _ = self.attention_norm(self.dropout(self.attention(x, view)), x)
        if self.cross_attention is not None:
            x, _ = self.cross_norm(self.dropout(self.cross_attention(x, view)), x)
        x, _ = self.mlp_norm(self.dropout(self.mlp(x)), x)
        return x
