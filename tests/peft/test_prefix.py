"""What stands in front of a document: in packed and padded rows, under every position scheme, against a plain sum."""

from typing import Any

import pytest
import torch

from minillm.config import UserError
from minillm.inference.generate import generate
from minillm.inference.sampling import Sampling
from minillm.model.attention import View
from minillm.peft.config import MethodConfig
from minillm.peft.inject import inject
from tests.model.configs import POSITIONS, build, small
from tests.peft.helpers import move, shaken

FRONTS = ["prefix", "prefix-network", "prompt"]


@pytest.mark.parametrize("shape", ["decoder", "encoder"])
@pytest.mark.parametrize("position", [name for name in POSITIONS if name != "alibi"])
@pytest.mark.parametrize("method", FRONTS)
@torch.no_grad()
def test_each_packed_document_has_its_own(method: str, position: str, shape: str) -> None:
    model = shaken(method, shape, position=POSITIONS[position]).model
    ids = torch.randint(29, (2, 9))
    segments = torch.tensor([[0, 0, 0, 0, 2, 2, 2, 5, -1], [-1, -1, 0, 0, 0, 0, 0, 2, 2]])
    states = model.states(ids, segments=segments)
    for row, first, last in [(0, 0, 4), (0, 4, 7), (0, 7, 8), (1, 2, 7), (1, 7, 9)]:
        alone = model.states(ids[row : row + 1, first:last])
        torch.testing.assert_close(states[row : row + 1, first:last], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{"position": {"kind": "alibi"}}, {"attention": {"window": 5}}], ids=str)
@pytest.mark.parametrize("method", FRONTS)
@torch.no_grad()
def test_where_distance_counts_rows_may_be_padded_on_the_right_only(method: str, options: dict[str, Any]) -> None:
    model, ids = shaken(method, **options).model, torch.randint(29, (2, 6))
    right = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, -1, -1]])
    torch.testing.assert_close(model(ids, segments=right)[1, :4], model(ids[1:, :4])[0], atol=1e-12, rtol=0)
    for wrong in (torch.tensor([[0, 0, 0, 1, 1, 1]] * 2), torch.tensor([[-1, 0, 0, 0, 0, 0]] * 2)):
        with pytest.raises(UserError, match="one document a row"):
            model(ids, segments=wrong)


@torch.no_grad()
def test_a_window_counts_the_prefix_like_tokens() -> None:
    """With a window of 2 the third token sees no prefix any more: its first-layer attention is the plain model's."""
    adapted = shaken("prefix", layers=1, attention={"window": 2}, position={"kind": "none"})
    ids = torch.randint(29, (1, 6))
    with_prefix = adapted.model(ids)
    adapted.remove()
    plain = adapted.model(ids)
    assert (with_prefix - plain).abs().amax((0, 2)).gt(1e-9).tolist() == [True, False, False, False, False, False]


@torch.no_grad()
def test_a_prefix_is_keys_and_values_in_front_written_out() -> None:
    """One head group of the first block: softmax over P + t + 1 scores; prefix keys are not rotated, P is skipped."""
    adapted = shaken("prefix", position={"kind": "rope", "theta": 100.0})
    model, front = adapted.model, adapted.fronts["decoder"]
    attention: Any = model.decoder.blocks[0].attention
    x, P, T, D = torch.randn(1, 5, 16, dtype=torch.float64), 3, 5, 4
    keys, values = front.keys_and_values()[0]  # [G, P, D]
    stored = front.prefix.view(P, 2, 2, 2, D)  # token, layer, key or value, group, width: as PEFT's files have it
    assert torch.equal(keys, stored[:, 0, 0].transpose(0, 1)) and torch.equal(values, stored[:, 0, 1].transpose(0, 1))
    at = P + torch.arange(T)
    cos, sin = model.decoder.position.rotation(at)
    view = View(rotation=(cos, sin))
    front(x, at, view)
    got = attention(x, view)

    def rotate(y: torch.Tensor) -> torch.Tensor:
        a, b = y[..., :2], y[..., 2:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    outputs = []
    for head in range(4):
        group = head // 2
        q = rotate(attention.q_proj(x)[0, :, head * D : (head + 1) * D])
        k = rotate(attention.k_proj(x)[0, :, group * D : (group + 1) * D])
        v = attention.v_proj(x)[0, :, group * D : (group + 1) * D]
        scores = q @ torch.cat((keys[group], k)).T / D**0.5
        scores = scores.masked_fill(torch.ones(T, P + T).triu(P + 1).bool(), float("-inf"))
        outputs.append(scores.softmax(-1) @ torch.cat((values[group], v)))
    torch.testing.assert_close(got[0], attention.out_proj(torch.cat(outputs, -1)), atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_prompt_of_words_is_those_words_in_front() -> None:
    for options in ({}, {"position": {"kind": "learned"}}, {"embedding_scale": True}):
        model, ids = build(small(**options)), torch.randint(29, (2, 5))
        inject(model, MethodConfig(method="prompt", length=4))
        words = model.decoder.front.prompt
        scale = 4.0 if options.get("embedding_scale") else 1.0
        same = (words.unsqueeze(1) - scale * model.embedding.weight).abs().sum(-1).min(1)
        assert same.values.max() == 0  # it begins as real words
        got = model(ids)
        model.decoder.front = type(build(small()).decoder.front)()
        expected = model(torch.cat((same.indices.expand(2, -1), ids), 1))[:, 4:]
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["rope", "learned"])
@pytest.mark.parametrize("method", FRONTS)
def test_generation_with_a_cache_is_that_without(method: str, kind: str) -> None:
    """Rows of different lengths that end at different times, across the jump of the window at the context's end, of
    which what stands in front has its share."""
    adapted = shaken(method, context=16, position={"kind": kind})
    options: dict[str, Any] = {"max_new_tokens": 14, "sampling": Sampling(temperature=0.7), "seed": 5, "stop_ids": {3}}
    prompts = [[1, 2, 4], [5], [6, 7, 8, 9, 10, 11, 12, 13, 14]]
    cached = generate(adapted.model, prompts, **options)
    assert cached == generate(adapted.model, prompts, use_cache=False, **options)
    assert max(len(p) + len(new) for p, new in zip(prompts, cached, strict=True)) > 16
    adapted.remove()
    assert cached != generate(adapted.model, prompts, **options)


@pytest.mark.parametrize("method", FRONTS)
def test_gradients_cross_recomputed_blocks(method: str) -> None:
    """Activation checkpointing runs each block twice: the gradients are those of one run."""
    model, ids = shaken(method).model.train(), torch.randint(29, (2, 5))
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.decoder.checkpoint_activations = recompute
        model(ids).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=0)


@torch.no_grad()
def test_learned_positions_leave_room_for_what_stands_in_front() -> None:
    for method in ("prefix", "prompt"):
        model = build(small(position={"kind": "learned"}, context=8))
        inject(model, MethodConfig(method=method, length=3))
        move(model)
        assert model(torch.randint(29, (1, 5))).isfinite().all()
        with pytest.raises(UserError, match="9 tokens do not fit: learned positions end"):
            model(torch.randint(29, (1, 6)))
