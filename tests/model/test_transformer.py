"""The model as a thing that is trained: dropout, gradients, recomputation, compilation, state."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.config import ModelConfig, UserError
from minillm.model.transformer import Transformer
from tests.model.configs import build, small

SHAPES = ["decoder", "encoder", "encoder-decoder"]
RICH = {  # every part that has weights
    "attention": {"bias": True, "qk_norm": True},
    "mlp": {"kind": "gelu", "bias": True},
    "position": {"kind": "learned"},
    "norm": {"kind": "layer", "bias": True, "embedding": True},
    "token_types": 2,
    "output_transform": True,
    "output_bias": True,
}


def inputs_of(config: ModelConfig, *, T: int = 9) -> dict[str, Tensor]:
    inputs = {"ids": torch.randint(29, (3, T))}
    if config.token_types:
        inputs["token_types"] = torch.randint(2, (3, T))
    if config.shape == "encoder-decoder":
        inputs["source"] = torch.randint(29, (3, 7))
    return inputs


def gradients(model: Transformer, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).square().mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_gets_a_finite_gradient(shape: str, tied: bool, placement: str) -> None:
    norm = {**RICH["norm"], "placement": placement}
    model = build(small(shape=shape, tied=tied, **{**RICH, "norm": norm})).train()
    _, found = gradients(model, inputs_of(model.config))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        # Adding the same to every key shifts all scores of a query alike, which softmax does not see.
        if not name.endswith("k_proj.bias") or "attention" not in name:
            assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64])
@pytest.mark.parametrize("shape", SHAPES)
def test_ids_may_have_any_integer_dtype(shape: str, dtype: torch.dtype) -> None:
    ngrams = {"speedrun": {"ngrams": 3}} if shape == "decoder" else {}
    model = build(small(shape=shape, token_types=2, **ngrams))
    inputs = inputs_of(model.config)
    narrow = {name: x.to(dtype) if name in ("ids", "source") else x for name, x in inputs.items()}
    assert torch.equal(model(**narrow), model(**inputs))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_finite_differences(shape: str) -> None:
    """Through the whole model, by the embeddings' weight: (f(w + h) - f(w - h)) / 2h along a random direction."""
    model = build(small(shape=shape, kv_heads=2, norm={"kind": "rms"}))
    inputs = inputs_of(model.config)
    _, found = gradients(model, inputs)
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-5, -2e-5, 1e-5):  # forth, back beyond the start, and home
            with torch.no_grad():
                parameter += step * direction
                values.append(model(**inputs).square().mean().item())
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx((found[name] * direction).sum().item(), rel=1e-5, abs=1e-9), name


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    model = build(small(dropout=0.5))
    inputs = inputs_of(model.config)
    plain = build(small())
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(**inputs), model(**inputs))
        assert torch.equal(model(**inputs), plain(**inputs))
        model.train()
        assert not torch.equal(model(**inputs), model(**inputs))
        torch.manual_seed(5)
        first = model(**inputs)
        torch.manual_seed(5)
        assert torch.equal(first, model(**inputs))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rate", "placement"), [(0.1, "pre"), (0.4, "post")])
def test_dropout_stands_on_embeddings_and_on_what_each_half_block_adds(shape: str, rate: float, placement: str) -> None:
    """Counted in a hook: of what goes in, `rate` becomes 0 and the rest is divided by 1 - rate."""
    model = build(small(shape=shape, dropout=rate, dim=64, vocab_size=64, norm={"placement": placement})).train()
    shares: dict[str, float] = {}

    def count(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            dropped = output == 0
            shares.setdefault(name, 0.0)
            shares[name] += dropped.double().mean().item()
            torch.testing.assert_close(output[~dropped], inputs[0][~dropped] / (1 - rate))

        return hook

    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(count(name))
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    ids = torch.randint(64, (8, 32))
    with torch.no_grad():
        model(ids, **({"source": ids} if shape == "encoder-decoder" else {}))
    halves = {"decoder": 2, "encoder": 2, "encoder-decoder": 2 + 3}[shape]
    stacks = 2 if shape == "encoder-decoder" else 1
    assert sum(calls.values()) == stacks + 2 * halves  # two layers in each stack
    for name, share in shares.items():
        assert abs(share / calls[name] - rate) < 0.02, f"{name} drops {share / calls[name]:.3f}"


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("shape", SHAPES)
def test_recomputed_activations_give_the_same_loss_and_gradients(shape: str, placement: str) -> None:
    """Dropout included: the second pass through a block draws what the first one drew."""
    model = build(small(shape=shape, dropout=0.3, norm={"placement": placement})).train()
    inputs, results, runs = inputs_of(model.config), [], []
    first_block = (model.encoder or model.decoder).blocks[0]
    first_block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for recompute in (False, True):
        for stack in filter(None, (model.encoder, model.decoder)):
            stack.checkpoint_activations = recompute
        torch.manual_seed(5)
        results.append(gradients(model, inputs))
    assert len(runs) == 3  # once without, twice with
    (loss, expected), (again, got) = results
    assert again == loss
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("shape", "position", "packed"),
    [
        ("decoder", "rope", True),
        ("encoder", "learned", True),
        ("encoder-decoder", "sinusoidal", False),
        pytest.param("decoder", "alibi", False, marks=pytest.mark.prove),
        pytest.param("encoder", "rope", False, marks=pytest.mark.prove),
        pytest.param("encoder-decoder", "rope", True, marks=pytest.mark.prove),
    ],
)
def test_the_compiled_model_equals_the_eager_one(shape: str, position: str, packed: bool) -> None:
    """One graph, forward and backward; inductor is left out, which needs a C compiler and a minute."""
    model = build(small(shape=shape, layers=1, position={"kind": position}))
    inputs = inputs_of(model.config)
    if packed:
        inputs["segments"] = torch.tensor([[0] * 5 + [1] * 4, [2] * 9, [0] * 6 + [-1] * 3])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, expected = gradients(model, inputs)
    model.zero_grad()
    again = compiled(**inputs).square().mean()
    again.backward()
    assert again.item() == pytest.approx(loss, rel=1e-12)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-12, rtol=1e-9)


def test_bf16_products_stay_near_fp32() -> None:
    """Autocast, as the loop uses it: the stream and the norms stay fp32, and 8 bits of mantissa remain of products."""
    model = build(small(attention={"qk_norm": True}, kv_heads=2, dim=64), torch.float32).train()
    inputs = inputs_of(model.config)
    exact = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs)
    logits.float().square().mean().backward()
    assert 0 < (logits - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_tied_weights_are_one_tensor() -> None:
    tied, untied = build(small()), build(small(tied=False))
    assert tied.output_weight is tied.embedding.weight
    assert "head.weight" not in tied.state_dict()
    assert untied.output_weight.data_ptr() != untied.embedding.weight.data_ptr()
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 29 * 16


@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_dict_carries_the_whole_model(shape: str) -> None:
    model, other = (build(small(shape=shape, **RICH)) for _ in range(2))
    inputs = inputs_of(model.config)
    with torch.no_grad():
        assert not torch.equal(model(**inputs), other(**inputs))
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(model(**inputs), other(**inputs))


def test_logits_have_a_row_for_each_token_and_a_place_for_each_word() -> None:
    model = build(small())
    ids = torch.randint(29, (3, 9))
    with torch.no_grad():
        logits = model(ids)
        assert logits.shape == (3, 9, 29)
        expected = model.states(ids) @ model.embedding.weight.T
        torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(model(ids.to(torch.int32)), logits, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("shape", "wrong", "message"),
    [
        ("decoder", {"source": torch.zeros(1, 2, dtype=torch.long)}, "reads no `source`"),
        ("decoder", {"token_types": torch.zeros(1, 4, dtype=torch.long)}, "need a model with model.token_types"),
        ("decoder", {"new": torch.tensor([4])}, "`new` belongs to a `cache`"),
        ("encoder-decoder", {}, "an encoder-decoder needs `source`"),
    ],
)
def test_inputs_that_would_be_ignored_are_refused(shape: str, wrong: dict[str, Tensor], message: str) -> None:
    model = build(small(shape=shape))
    with pytest.raises(UserError, match=message):
        model(torch.zeros(1, 4, dtype=torch.long), **wrong)


def test_learned_positions_end_with_the_context_and_others_do_not() -> None:
    model = build(small(position={"kind": "learned"}, context=8))
    with pytest.raises(UserError, match=r"9 tokens do not fit: learned positions end at model.context \(8\)"):
        model(torch.zeros(1, 9, dtype=torch.long))
    others = build(small(context=8))
    ids = torch.randint(29, (1, 9))
    torch.testing.assert_close(others(ids)[:, :8], others(ids[:, :8]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_biases_stand_where_they_are_asked_for(kind: str) -> None:
    def biases(bias: bool) -> set[str]:
        norm, mlp = {"kind": "layer", "bias": bias}, {"kind": kind, "bias": bias}
        model = Transformer(small(layers=1, norm=norm, mlp=mlp, attention={"bias": bias}))
        return {name.removeprefix("decoder.blocks.0.") for name, _ in model.named_parameters() if "bias" in name}

    layers = {f"attention.{x}_proj" for x in ("q", "k", "v", "out")} | {"mlp.up_proj", "mlp.down_proj"}
    layers |= {"attention_norm", "mlp_norm", "decoder.final_norm"} | ({"mlp.gate_proj"} if kind == "swiglu" else set())
    assert biases(True) == {f"{layer}.bias" for layer in layers} and biases(False) == set()


def test_ids_that_are_none_are_refused() -> None:
    model, both = build(small()), build(small(shape="encoder-decoder"))
    ids = torch.zeros(1, 4, dtype=torch.long)
    for wrong in (ids.float(), ids.bool(), ids[0], ids[None]):
        for call in (lambda: model(wrong), lambda: both(wrong, source=ids), lambda: both(ids, source=wrong)):  # noqa: B023
            with pytest.raises(UserError, match=r"must be integers \[B, T\], not torch\.\w+ of shape"):
                call()
