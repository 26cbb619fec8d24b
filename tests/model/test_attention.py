"""Multi-head attention against PyTorch's own module, with the same weights."""

import pytest
import torch
from torch import nn

from minillm.model.attention import CrossAttention, SelfAttention, View
from tests.model.configs import small

# B rows, T queries, S keys, N width


def torchs(attention: SelfAttention | CrossAttention, heads: int, *, bias: bool) -> nn.MultiheadAttention:
    width = attention.q_proj.in_features
    module = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        module.out_proj.weight.copy_(attention.out_proj.weight)
        if bias:
            module.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
            module.out_proj.bias.copy_(attention.out_proj.bias)
    return module.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_equals_nn_multihead_attention(bias: bool, causal: bool) -> None:
    attention = SelfAttention(small(attention={"bias": bias}), 0, causal=causal)
    reference, x = torchs(attention, 4, bias=bias), torch.randn(3, 7, 16)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected, _ = reference(x, x, x, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(attention(x, View()), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_cross_attention_equals_nn_multihead_attention(bias: bool) -> None:
    attention = CrossAttention(small(attention={"bias": bias}), 0)
    reference, x, memory = torchs(attention, 4, bias=bias), torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 0, -1], [0, -1, -1, -1, -1]])
    expected, _ = reference(x, memory, memory, key_padding_mask=padding < 0, need_weights=False)
    got = attention(x, View(memory=memory, memory_segments=padding))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_gradients_equal_those_of_nn_multihead_attention() -> None:
    attention = SelfAttention(small(), 0, causal=False)
    reference = torchs(attention, 4, bias=False)
    mine, theirs = (torch.randn(2, 7, 16, generator=torch.manual_seed(3)).requires_grad_() for _ in range(2))
    up = torch.randn(2, 7, 16)
    attention(mine, View()).backward(up)
    reference(theirs, theirs, theirs, need_weights=False)[0].backward(up)
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=0)
    weights = torch.cat([p.weight.grad for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
    torch.testing.assert_close(weights, reference.in_proj_weight.grad, atol=1e-5, rtol=0)


def test_grouped_heads_equal_full_heads_with_repeated_weights() -> None:
    """GQA is multi-head attention in which the heads of a group have the same keys and values."""
    grouped = SelfAttention(small(kv_heads=2), 0, causal=True)
    full = SelfAttention(small(), 0, causal=True)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16)
    full.load_state_dict(state)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(grouped(x, View()), full(x, View()), atol=1e-6, rtol=0)
