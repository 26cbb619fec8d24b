"""Attention weights, found again: the fused operators give only what the weights make of the values.

    weight[t, s] = softmax_s( scale · q_t · k_s; softcap; − slope · |t − s|; causal and window masks )

the definition of `kernels.flash_attention.flash_attention_reference`, for a whole text as one document; across, from a
decoder's text to the encoder's, there are neither positions nor masks. B batch, T queries, S keys, H query heads, G
key/value heads, D head width.
"""

import torch
from torch import Tensor

from minillm.inspection.reading import Reading, stacks_of
from minillm.model.attention import Attention, CrossAttention, SelfAttention, View
from minillm.model.transformer import Stack, Transformer


def places(model: Transformer) -> dict[str, tuple[Stack, str]]:
    """Name -> the stack in whose blocks an attention stands, and what it is called there."""
    found = {name: (stack, "attention") for name, stack in stacks_of(model).items()}
    if model.decoder is not None and model.encoder is not None:
        found["cross"] = (model.decoder, "cross_attention")
    return found


def attention_weights(attention: Attention, x: Tensor, view: View) -> Tensor:
    """x [B, T, dim], as the module reads it -> [B, H, T, S] fp32, rows that add up to 1."""
    if isinstance(attention, CrossAttention):
        assert view.memory is not None
        return _scores(attention, attention._queries(x), attention._keys_and_values(view.memory)[0]).softmax(-1)
    assert isinstance(attention, SelfAttention)
    q, k = (attention._split_heads(project(x)) for project in (attention.q_proj, attention.k_proj))
    score = _scores(attention, *attention._place(q, k, view.rotation))
    place = torch.arange(x.shape[1], device=x.device)
    ahead = place - place[:, None]  # [T, T] how far the key stands behind the query in the text
    if view.slopes is not None:
        score = score - view.slopes.view(-1, 1, 1) * ahead.abs()
    hidden = (ahead > 0) if attention.causal else torch.zeros_like(ahead, dtype=torch.bool)
    if attention.window is not None:
        hidden = hidden | (ahead.abs() >= attention.window)
    return score.masked_fill(hidden, float("-inf")).softmax(-1)


def _scores(attention: Attention, q: Tensor, k: Tensor) -> Tensor:
    """q [B, H, T, D], k [B, G, S, D] -> [B, H, T, S], softcap included"""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = q.float() @ k.float().transpose(-1, -2) * attention.head_width**-0.5
    return score if attention.softcap is None else attention.softcap * torch.tanh(score / attention.softcap)


@torch.no_grad()
def attention_maps(model: Transformer, read: Reading) -> dict[str, Tensor]:
    """Name of an attention -> [layers, H, T, S]: of each query (row) how much it takes from each key (Vaswani et al.
    2017, §3.2.1). An encoder reads the text with nothing masked."""
    found: dict[str, list[Tensor]] = {name: [] for name in places(model)}
    handles = []
    for name, (stack, part) in places(model).items():

        def record(module: torch.nn.Module, inputs: tuple[Tensor, View], maps: list[Tensor] = found[name]) -> None:
            assert isinstance(module, Attention)
            maps.append(attention_weights(module, *inputs)[0])

        handles += [block.get_submodule(part).register_forward_pre_hook(record) for block in stack.blocks]
    try:
        model.states(read.text, source=read.source)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack(maps) for name, maps in found.items()}
