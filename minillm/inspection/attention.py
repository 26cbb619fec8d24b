"""Attention weights, found again: the fused operators give only what the weights make of the values.

    weight[t, s] = softmax_s( scale · q_t · k_s; softcap; − slope · |t − s|; causal and window masks )

the definition of `kernels.flash_attention.flash_attention_reference`, for a whole text as one document. B batch,
T queries and keys, H query heads, G key/value heads, D head width.
"""

import torch
from torch import Tensor

from minillm.model.attention import SelfAttention, View
from minillm.model.transformer import Stack, Transformer


def stack_of(model: Transformer) -> Stack:
    """The one stack of a decoder or of an encoder."""
    stack = model.encoder if model.decoder is None else model.decoder
    assert stack is not None
    return stack


def attention_weights(attention: SelfAttention, x: Tensor, view: View) -> Tensor:
    """x [B, T, dim], as the module reads it -> [B, H, T, T] fp32, rows that add up to 1."""
    q, k = (attention._split_heads(project(x)) for project in (attention.q_proj, attention.k_proj))
    q, k = attention._place(q, k, view.rotation)
    T, D = q.shape[-2:]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # [B, H, T, D]
    score = q.float() @ k.float().transpose(-1, -2) * D**-0.5  # [B, H, T, T]
    if attention.softcap is not None:
        score = attention.softcap * torch.tanh(score / attention.softcap)
    place = torch.arange(T, device=x.device)
    ahead = place - place[:, None]  # [T, T] how far the key stands behind the query in the text
    if view.slopes is not None:
        score = score - view.slopes.view(-1, 1, 1) * ahead.abs()
    hidden = (ahead > 0) if attention.causal else torch.zeros_like(ahead, dtype=torch.bool)
    if attention.window is not None:
        hidden = hidden | (ahead.abs() >= attention.window)
    return score.masked_fill(hidden, float("-inf")).softmax(-1)


@torch.no_grad()
def attention_maps(model: Transformer, ids: Tensor) -> Tensor:
    """ids [1, T] -> [layers, H, T, T]: of each query (row) how much it takes from each key (Vaswani et al. 2017,
    §3.2.1)."""
    found: list[Tensor] = []

    def record(module: torch.nn.Module, inputs: tuple[Tensor, View]) -> None:
        assert isinstance(module, SelfAttention)
        found.append(attention_weights(module, *inputs)[0])

    handles = [block.attention.register_forward_pre_hook(record) for block in stack_of(model).blocks]
    try:
        model.states(ids)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)
