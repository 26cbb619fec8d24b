"""Attention: the only place where one token reads another.

B batch, T queries, S keys, H query heads, G key/value heads (H = G * queries per group),
D head width. Heads are laid out [B, H, T, D] from the projections to the output.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from minillm import ops
from minillm.config import ModelConfig
from minillm.model.cache import KVCache
from minillm.model.linear import Linear


@dataclass
class View:
    """What a block may see besides its own stream; the same for all blocks of a stack."""

    rotation: tuple[Tensor, Tensor] | None = None  # cos, sin [(B,) T, D/2]
    slopes: Tensor | None = None  # [H], ALiBi
    segments: Tensor | None = None  # [B, T] document of each token; negative ones are padding
    memory: Tensor | None = None  # [B, S, dim] output of the encoder
    memory_segments: Tensor | None = None  # [B, S]
    cache: KVCache | None = None
    prefix: Tensor | None = None  # [layers, 2, G, P, D] trained keys and values in front of the row's own
    prefix_segments: Tensor | None = None  # [P] with `segments`: the document that each of them belongs to


class HeadNorm(nn.Module):
    """RMSNorm over the width of each head, learned weight shared by the heads (QK-norm)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = ops.rms_norm(x, self.weight, eps=self.eps)  # type: ignore[assignment]  # no residual, no pair
        return y


class Attention(nn.Module):
    """Queries from x, keys and values from `source`; grouped heads (GQA) where there are fewer of these.

    Args:
        layer: index of the block, under which its keys stand in a cache.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_width, self.eps = config.head_width, config.norm.eps
        self.window, self.softcap = config.attention.window, config.attention.softcap
        width, kv_width = config.heads * config.head_width, config.key_value_heads * config.head_width
        bias = config.attention.bias
        self.q_proj = Linear(config.dim, width, bias=bias)
        self.k_proj = Linear(config.dim, kv_width, bias=bias)
        self.v_proj = Linear(config.dim, kv_width, bias=bias)
        self.out_proj = Linear(width, config.dim, bias=bias)
        qk_norm = config.attention.qk_norm
        self.q_norm = HeadNorm(config.head_width, config.norm.eps) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(config.head_width, config.norm.eps) if qk_norm else nn.Identity()

    def _queries(self, x: Tensor) -> Tensor:
        return self.q_norm(self._split_heads(self.q_proj(x)))

    def _keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_norm(self._split_heads(self.k_proj(source))), self._split_heads(self.v_proj(source))

    def _split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h d) -> b h t d", d=self.head_width)

    def _merge_heads(self, y: Tensor) -> Tensor:
        return self.out_proj(rearrange(y, "b h t d -> b t (h d)"))


class SelfAttention(Attention):
    """
    Args:
        causal: a token sees itself and what stands before it.
    """

    def __init__(self, config: ModelConfig, layer: int, *, causal: bool):
        super().__init__(config, layer)
        self.causal = causal

    def forward(self, x: Tensor, view: View) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]"""
        q, k, v = (self._split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._place(q, k, view.rotation)
        if view.cache is None:
            segments = None if view.segments is None else (view.segments, view.segments)
            if view.prefix is not None:
                k, v, segments = self._put_prefix(k, v, view)
            y = ops.attention(
                q,
                k,
                v,
                causal=self.causal,
                window=self.window,
                softcap=self.softcap,
                slopes=view.slopes,
                segments=segments,
            )
        else:
            y = self._attend_cached(q, k, v, view.slopes, view.cache).type_as(v)
        return self._merge_heads(y)

    def _place(self, q: Tensor, k: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """QK-norm and RoPE, each where the model has it; both together are one operator."""
        if rotation is None:
            return self.q_norm(q), self.k_norm(k)
        norms = None
        if isinstance(self.q_norm, HeadNorm) and isinstance(self.k_norm, HeadNorm):
            norms = (self.q_norm.weight, self.k_norm.weight)
        return ops.rope(q, k, *rotation, norms=norms, eps=self.eps)

    def _put_prefix(self, k: Tensor, v: Tensor, view: View) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """k, v [B, G, P + T, D], and who belongs to whom; a cache holds its prefix already."""
        assert view.prefix is not None
        keys, values = view.prefix[self.layer].unsqueeze(1).expand(-1, len(k), -1, -1, -1).type_as(k)
        segments = None
        if view.segments is not None and view.prefix_segments is not None:
            in_front = view.prefix_segments.expand(len(k), -1)
            segments = (view.segments, torch.cat((in_front, view.segments), 1))
        return torch.cat((keys, k), 2), torch.cat((values, v), 2), segments

    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, cache: KVCache) -> Tensor:
        k, v = cache.write(self.layer, k, v)  # keys go in rotated: a cached key never needs its position again
        q = q.type_as(k)
        options: dict[str, Any] = dict(window=self.window, softcap=self.softcap, slopes=slopes)
        if q.shape[2] == 1 and (cache.whole or cache.ragged):
            return ops.decode_attention(q, k, v, cache.lengths, **options)
        if not cache.ragged:  # rows of one length: the last query stands on the last key, no lengths are needed
            return ops.attention(q, k, v, causal=True, **options)
        return ops.attention(q, k, v, causal=True, lengths=(cache.new, cache.lengths), **options)


class CrossAttention(Attention):
    """A decoder reads the encoder's output: no positions, no window, nothing causal."""

    def forward(self, x: Tensor, view: View) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]"""
        memory = view.memory
        assert memory is not None
        if view.cache is None:
            k, v = self._keys_and_values(memory)
        else:
            k, v = view.cache.once(self.layer, lambda: self._keys_and_values(memory))
        segments = None
        if view.memory_segments is not None:
            mine = view.segments if view.segments is not None else view.memory_segments.new_zeros(x.shape[:2])
            segments = (mine, view.memory_segments)
        y = ops.attention(self._queries(x), k, v, causal=False, softcap=self.softcap, segments=segments)
        return self._merge_heads(y)
