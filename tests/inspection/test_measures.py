"""What is found inside a model, against what the model itself computes."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from minillm.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, PositionConfig, UserError
from minillm.inspection import ablation
from minillm.inspection.ablation import head_ablation
from minillm.inspection.attention import attention_maps, attention_weights, places
from minillm.inspection.depths import logit_lens
from minillm.inspection.measures import inspect
from minillm.inspection.reading import Reading, losses, reading, stacks_of
from minillm.model.attention import CrossAttention
from minillm.model.transformer import Transformer
from minillm.peft.config import MethodConfig
from minillm.peft.inject import inject

V, MASK = 61, 4
IDS = [7, 30, 12, 30, 55, 9, 12, 41, 30]
POST: dict[str, Any] = {"norm": NormConfig(kind="layer", placement="post"), "mlp": MLPConfig(kind="relu")}
VARIANTS: dict[str, dict[str, Any]] = {
    "no position": {"position": PositionConfig(kind="none")},
    "learned": {"position": PositionConfig(kind="learned")},
    "rope": {},
    "alibi": {"position": PositionConfig(kind="alibi")},
    "grouped heads, qk-norm": {"kv_heads": 2, "attention": AttentionConfig(qk_norm=True)},
    "one key head, qk-norm, no rope": {"kv_heads": 1, "attention": AttentionConfig(qk_norm=True),
                                       "position": PositionConfig(kind="alibi")},
    "window": {"attention": AttentionConfig(window=3)},
    "softcap": {"attention": AttentionConfig(softcap=2.0), "softcap": 8.0},
    "head width of its own, biases": {"head_dim": 12, "attention": AttentionConfig(bias=True)},
    "post-norm": POST,
    "encoder": {"shape": "encoder", **POST, "output_transform": True, "output_bias": True, "token_types": 2},
    "encoder, window": {"shape": "encoder", "attention": AttentionConfig(window=2)},
    "both": {"shape": "encoder-decoder", "layers": 2, "decoder_layers": 3, "attention": AttentionConfig(bias=True)},
    "both, post-norm": {"shape": "encoder-decoder", "layers": 2, "decoder_layers": 3, **POST,
                        "position": PositionConfig(kind="learned"), "attention": AttentionConfig(softcap=2.0)},
}  # fmt: skip
SOURCE = [2, 51, 8, 8, 33, 20, 3]


def model_of(**options: Any) -> Transformer:
    """Random weights, large enough for attention that is far from even."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"layers": 3, "heads": 4, "dim": 32, "context": 32, "vocab_size": V, "init_std": 0.3}
    return Transformer(ModelConfig(**sizes | options)).eval()


def reading_of(model: Transformer) -> Reading:
    return reading(model, IDS, ([2], []), MASK, SOURCE if len(stacks_of(model)) == 2 else None)


def states_of(model: Transformer, read: Reading) -> Tensor:
    return model.states(read.ids, source=read.source)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_times_values_are_what_the_module_returns(variant: str) -> None:
    model = model_of(**VARIANTS[variant])
    read = reading_of(model)
    seen: list[tuple[Tensor, Tensor]] = []

    def check(module: Any, inputs: Any, output: Tensor) -> None:
        weights = attention_weights(module, *inputs)
        memory = inputs[1].memory if isinstance(module, CrossAttention) else inputs[0]
        values = rearrange(module.v_proj(memory), "b t (g d) -> b g t d", d=module.head_width)
        values = values.repeat_interleave(weights.shape[1] // values.shape[1], 1)
        seen.append((module._merge_heads(weights @ values), output))

    modules = [block.get_submodule(part) for stack, part in places(model).values() for block in stack.blocks]
    for module in modules:
        module.register_forward_hook(check)
    with torch.no_grad():
        model.states(read.text, source=read.source)
    assert len(seen) == len(modules) == (8 if read.source is not None else 3)
    for ours, output in seen:
        torch.testing.assert_close(ours, output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["rope", "window", "encoder", "encoder, window"])
def test_a_map_shows_who_may_see_whom(variant: str) -> None:
    model = model_of(**VARIANTS[variant])
    ((name, maps),) = attention_maps(model, reading_of(model)).items()
    assert name == model.config.shape and maps.shape == (3, 4, 10, 10)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 4, 10))
    distance = torch.arange(10)[:, None] - torch.arange(10)  # [T, S] of the key before the query
    right = {"rope": 0, "window": 0, "encoder": 9, "encoder, window": 1}[variant]
    left = {"rope": 9, "window": 2, "encoder": 9, "encoder, window": 1}[variant]
    assert torch.equal(maps > 0, ((distance <= left) & (distance >= -right)).expand_as(maps))


def test_an_encoder_decoder_has_three_kinds_of_maps() -> None:
    """Each sees what it may: the source all of itself, the text what stands before, and across all of the source."""
    model = model_of(**VARIANTS["both"])
    maps = attention_maps(model, reading_of(model))
    assert {name: tuple(found.shape) for name, found in maps.items()} == {
        "encoder": (2, 4, 7, 7),
        "decoder": (3, 4, 10, 10),
        "cross": (3, 4, 10, 7),
    }
    for name, found in maps.items():
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
        seen = torch.ones(10, 10).tril() if name == "decoder" else torch.ones(found.shape[-2:])
        assert torch.equal(found > 0, (seen > 0).expand_as(found))


@pytest.mark.parametrize("variant", ["rope", "post-norm", "softcap", "both"])
def test_a_decoder_is_scored_on_each_next_token(variant: str) -> None:
    model = model_of(**VARIANTS[variant])
    read = reading_of(model)
    with torch.no_grad():
        source = None if read.source is None else torch.tensor([SOURCE])
        logits = model(torch.tensor([[2, *IDS]]), source=source)[0, :-1]
        found = losses(model, read)
    assert read.scored.tolist() == list(range(1, 10))
    torch.testing.assert_close(found, -logits.log_softmax(-1)[torch.arange(9), torch.tensor(IDS)])


def test_an_encoder_is_scored_on_each_masked_token_and_not_on_its_frame() -> None:
    model = model_of(**VARIANTS["encoder"])
    read = reading(model, IDS, ([2], [3]), MASK)
    with torch.no_grad():
        found = losses(model, read)
        for n, token in enumerate(IDS):
            row = [2, *IDS, 3]
            row[n + 1] = MASK
            expected = -model(torch.tensor([row]))[0, n + 1].log_softmax(-1)[token]
            torch.testing.assert_close(found[n], expected, rtol=1e-4, atol=1e-5)
    assert read.scored.tolist() == list(range(1, 10))


@pytest.mark.parametrize("variant", ["rope", "post-norm", "softcap", "encoder", "both", "both, post-norm"])
def test_the_lens_on_the_last_depth_is_the_model(variant: str) -> None:
    model = model_of(**VARIANTS[variant])
    read = reading_of(model)
    lens = list(logit_lens(model, read))
    with torch.no_grad():
        states = states_of(model, read)[read.rows, read.places]
        assert torch.equal(lens[-1], model.head(states, model.output_weight))
        whole = model(read.ids, source=read.source)[read.rows, read.places]
        torch.testing.assert_close(lens[-1], whole, rtol=1e-5, atol=1e-5)
    assert len(lens) == 4
    assert all(not torch.allclose(one, other, atol=0.1) for one, other in pairwise(lens))


@pytest.mark.parametrize("variant", ["rope", "post-norm", "both"])
def test_the_lens_on_a_depth_is_the_model_that_ends_there(variant: str) -> None:
    model = model_of(**VARIANTS[variant])
    read = reading_of(model)
    lens = list(logit_lens(model, read))
    assert model.decoder is not None
    for depth in (2, 1, 0):
        del model.decoder.blocks[depth]
        with torch.no_grad():
            ends = model(read.ids, source=read.source)[0, :-1]
        torch.testing.assert_close(lens[depth], ends, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 4000, ablation.AT_ONCE])
@pytest.mark.parametrize("variant", ["rope", "post-norm", "head width of its own, biases", "encoder", "both",
                                     "both, post-norm"])  # fmt: skip
def test_a_head_is_switched_off_as_by_zero_columns(variant: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many go through the model at once: against one pass of the whole model for each."""
    monkeypatch.setattr(ablation, "AT_ONCE", at_once)
    model = model_of(**VARIANTS[variant])
    read, D = reading_of(model), model.config.head_width
    found = head_ablation(model, read)
    with torch.no_grad():
        whole = losses(model, read).mean()
        for name, (stack, part) in places(model).items():
            assert found[name].shape == (len(stack.blocks), 4)
            for layer, block in enumerate(stack.blocks):
                weight = block.get_submodule(part).out_proj.weight
                kept = weight.clone()
                for head in range(4):
                    weight[:, head * D : (head + 1) * D] = 0
                    plain = losses(model, read).mean() - whole
                    torch.testing.assert_close(found[name][layer, head], plain, rtol=1e-4, atol=1e-5)
                    weight.copy_(kept)
            assert found[name].abs().min() > 1e-5
        assert float(losses(model, read).mean()) == float(whole)  # nothing of it stays in the model


def test_the_values_fit_each_other() -> None:
    model = model_of()
    found = inspect(model, reading_of(model), lambda i: f"t{i}")
    assert found["tokens"] == ["t2", *(f"t{i}" for i in IDS)]
    with torch.no_grad():
        bits = losses(model, reading_of(model)) / math.log(2)
    assert found["bits"] == pytest.approx(bits.tolist())
    assert found["mean_bits"] == pytest.approx(float(bits.mean()))
    assert found["lens"][-1]["mean_bits"] == pytest.approx(found["mean_bits"])
    with torch.no_grad():
        shares, likeliest = model(torch.tensor([[2, *IDS]]))[0, :-1].softmax(-1).max(-1)
    assert found["lens"][-1]["ids"] == likeliest.tolist()
    assert found["lens"][-1]["tokens"] == [f"t{i}" for i in likeliest.tolist()]
    assert found["lens"][-1]["probabilities"] == pytest.approx(shares.tolist(), rel=1e-5)
    nats = head_ablation(model, reading_of(model))["decoder"]
    assert found["ablation_bits"]["decoder"][1] == pytest.approx((nats[1] / math.log(2)).tolist())
    assert found["source"] is None


def test_adapters_in_a_model_are_looked_through() -> None:
    model = inject(model_of(), MethodConfig(method="adapter")).model
    found = head_ablation(model, reading_of(model))
    torch.testing.assert_close(found, head_ablation(model_of(), reading_of(model)))  # new ones do nothing yet
    assert found["decoder"].abs().min() > 1e-5


def test_what_cannot_be_inspected_is_refused() -> None:
    model = model_of(shape="encoder")
    with pytest.raises(UserError, match="has no mask"):
        reading(model, IDS, ([2], []), None)
    with pytest.raises(UserError, match="no token of the text can be scored"):
        reading(model_of(), [7], ([], []), None)
    model = inject(model_of(), MethodConfig(method="prefix")).model
    with pytest.raises(UserError, match="prefix or a soft prompt"):
        reading_of(model)
    model = model_of()
    with torch.no_grad():
        model.embedding.weight[7] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        inspect(model, reading_of(model), str)
