"""Gradients from block to block, and what residual connections do for them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.config import MLPConfig, ModelConfig, NormConfig, PositionConfig
from minillm.inspection.depths import Record, recorded
from minillm.inspection.gradients import Flow, blocks_alone, gradient_flow, without_additions
from minillm.inspection.reading import losses, reading, stacks_of
from minillm.model.transformer import Stack, Transformer
from tests.inspection.test_measures import VARIANTS, model_of, reading_of

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt": {
        "norm": NormConfig(kind="layer"),
        "mlp": MLPConfig(kind="gelu"),
        "position": PositionConfig(kind="learned"),
    },
    "post-norm": {"norm": NormConfig(kind="layer", placement="post"), "mlp": MLPConfig(kind="relu")},
}


def deep(kind: str) -> Transformer:
    """Twelve blocks with their first weights."""
    torch.manual_seed(0)
    return Transformer(ModelConfig(layers=12, heads=4, dim=64, context=64, vocab_size=128, **KINDS[kind])).eval()


def flows(model: Transformer) -> tuple[Flow, Flow, Flow]:
    """As it is, through the blocks alone, and with nothing added; of the last stack."""
    ids = torch.randint(0, 128, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    read = reading(model, ids, ([2], []), None)
    kept = gradient_flow(model, read)
    with blocks_alone(model):
        alone = gradient_flow(model, read)
    with without_additions(model):
        removed = gradient_flow(model, read)
    name = list(kept)[-1]
    return kept[name], alone[name], removed[name]


@pytest.mark.parametrize("variant", ["rope", "post-norm", "encoder", "both", "both, post-norm"])
def test_gradients_are_those_of_the_loss(variant: str) -> None:
    """Weights against `backward`; a stream against the slope of the loss where something is added to it by hand."""
    model = model_of(**VARIANTS[variant]).double()
    read, found = reading_of(model), gradient_flow(model, reading_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    losses(model, read).mean().backward()
    for name, stack in stacks_of(model).items():
        for block, norm in zip(stack.blocks, found[name].weights, strict=True):
            squares = sum(float((parameter.grad**2).sum()) for parameter in block.parameters())
            assert math.isclose(float(norm), math.sqrt(squares), rel_tol=1e-4)
        last = () if stack.final_norm is None else (stack.final_norm,)
        ids = read.source if name == "encoder" and read.source is not None else read.ids
        for part, norm in zip((*stack.blocks, *last), found[name].streams, strict=stack.final_norm is not None):
            added = torch.zeros(*ids.shape, model.config.dim, dtype=torch.float64, requires_grad=True)
            handle = part.register_forward_pre_hook(lambda _, inputs, more=added: (inputs[0] + more, *inputs[1:]))
            (gradient,) = torch.autograd.grad(losses(model, read).mean(), added)
            handle.remove()
            assert math.isclose(float(norm), float(gradient.norm()), rel_tol=1e-4)
        assert len(found[name].streams) == len(stack.blocks) + 1 and float(found[name].streams.min()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_vanish_where_no_addition_carries_them_past_the_blocks(kind: str) -> None:
    """Past twelve blocks with their first weights arrives about what left the end, through them next to nothing."""
    kept, alone, removed = flows(deep(kind))
    assert 0.5 < kept.streams[1] / kept.streams[-1] < 3
    assert alone.streams[-1] == kept.streams[-1]
    assert alone.streams[1] / alone.streams[-1] < 1e-8
    assert (alone.streams[6:] > 3 * alone.streams[5:-1]).all()  # those whose squares fp32 would make 0 too
    assert alone.streams[5] > 0
    assert kept.likeness[-1] < 0.5 and removed.likeness[-1] > 0.95 and alone.likeness.equal(kept.likeness)


def test_the_hooks_leave_the_model_as_it_was() -> None:
    model = deep("llama")
    first, second = flows(model), flows(model)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.streams, other.streams) and torch.equal(one.weights, other.weights)
    assert not torch.allclose(first[0].streams, first[2].streams, rtol=0.1)
    hooks = [hook for module in model.modules() for hook in (module._forward_pre_hooks, module._forward_hooks) if hook]
    assert not hooks


def branches(stack: Stack, record: Record, memory: Tensor | None) -> Tensor:
    """The stack's output where each branch reads what the one before it made, written out."""
    x, view = record.depths[0][-1], replace(record.view, memory=memory)
    for block in stack.blocks:
        parts = [(block.attention_norm, lambda x, part=block.attention: part(x, view))]
        if block.cross_attention is not None:
            parts.append((block.cross_norm, lambda x, part=block.cross_attention: part(x, view)))
        for norm, part in (*parts, (block.mlp_norm, block.mlp)):
            x = part(norm(x)) if stack.pre_norm else norm(part(x))
    return x if stack.final_norm is None else stack.final_norm(x)


@pytest.mark.parametrize("variant", ["rope", "post-norm", "both", "both, post-norm"])
def test_nothing_added_is_the_branches_one_after_another(variant: str) -> None:
    model = model_of(**VARIANTS[variant])
    read, states = reading_of(model), None
    with torch.no_grad():
        with recorded(stacks_of(model).values()) as records:
            plain = losses(model, read)
        for stack, record in zip(stacks_of(model).values(), records, strict=True):
            states = branches(stack, record, states)
        wanted = model.head(states, model.output_weight)[0, :-1]
        nats = -wanted.log_softmax(-1)[torch.arange(9), read.targets]
        with without_additions(model):
            torch.testing.assert_close(losses(model, read), nats, rtol=1e-4, atol=1e-4)
        with blocks_alone(model):
            assert torch.equal(losses(model, read), plain)
        assert (nats - plain).abs().max() > 0.1


def test_alike_is_the_mean_cosine_of_two_tokens() -> None:
    model = model_of()
    read = reading_of(model)
    found = gradient_flow(model, read)["decoder"].likeness
    with torch.no_grad():
        x = torch.nn.functional.normalize(model.embedding(read.ids)[0], dim=-1)
    pairs = [float(x[i] @ x[j]) for i in range(10) for j in range(10) if i != j]
    assert float(found[0]) == pytest.approx(sum(pairs) / 90, rel=1e-4)
