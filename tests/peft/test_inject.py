"""Every method in every shape: what it moves, what it leaves alone, folding in and taking out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minillm.config import UserError
from minillm.model.cache import KVCache
from minillm.model.transformer import Transformer
from minillm.peft.config import MethodConfig
from minillm.peft.inject import inject, summary
from minillm.peft.linear import GrownLinear
from tests.model.configs import build, small
from tests.peft.helpers import METHODS, SHAPES, Tagger, copies, inputs, move, shaken

INSIDE = {"lora": "lora_", "adalora": "lora_", "adapter": "adapter_", "prefix": "front.", "prompt": "front."}


def steps(model: nn.Module, batch: dict[str, Tensor], count: int = 3) -> None:
    """Optimizer steps on a loss that reaches every output."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(count):
        optimizer.zero_grad()
        model(**batch).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_only_what_the_method_moves_is_trained(method: str, shape: str) -> None:
    model, batch = build(small(**SHAPES[shape])), inputs(shape)
    config = MethodConfig(**METHODS[method])
    adapted = inject(model, config)
    before = copies(model)
    steps(model, batch)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == trained == {name for name in adapted.moved() if not name.endswith(".kept")}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    assert len(adapted.moved()) - len(trained) == (len(adapted.grown) if method == "adalora" else 0)  # which ranks stay
    if config.method in INSIDE:
        assert trained == {name for name in before if INSIDE[config.method] in name and not name.endswith("kept")}
    assert summary(model) == (sum(before[name].numel() for name in trained), sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["full", "freeze", "lora", "adalora", "adapter"])
@torch.no_grad()
def test_a_method_begins_as_the_model_it_is_put_into(method: str, shape: str) -> None:
    model, batch = build(small(**SHAPES[shape])), inputs(shape)
    before = model(**batch)
    inject(model, MethodConfig(**METHODS[method]))
    assert torch.equal(model(**batch), before)
    move(model)
    assert (model(**batch) - before).abs().max() > 1e-2  # the test would see a method that does nothing


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["lora", "adalora"])
@torch.no_grad()
def test_merged_equals_unmerged(method: str, shape: str) -> None:
    adapted, batch = shaken(method, shape, torch.float32), inputs(shape)
    model = adapted.model
    names, before = set(build(small(**SHAPES[shape])).state_dict()), model(**batch)
    adapted.merge()
    torch.testing.assert_close(model(**batch), before, atol=1e-5, rtol=0)
    assert set(model.state_dict()) == names
    assert not any(isinstance(module, GrownLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["adapter", "prefix", "prompt"])
def test_what_cannot_be_merged_says_so_and_stays(method: str) -> None:
    adapted, batch = shaken(method), inputs("decoder")
    before = adapted.model(**batch)
    with pytest.raises(UserError, match=f"method={method} cannot be merged"):
        adapted.merge()
    assert torch.equal(adapted.model(**batch), before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["lora", "adalora", "adapter", "prefix", "prompt"])
def test_remove_gives_the_model_back_bit_for_bit(method: str, shape: str) -> None:
    model, batch = build(small(**SHAPES[shape])), inputs(shape)
    model.embedding.weight.requires_grad_(False)
    before, weights, kinds = model(**batch), copies(model), [type(m) for m in model.modules()]
    adapted = inject(model, MethodConfig(**METHODS[method]))
    steps(model, batch)
    adapted.remove()
    assert torch.equal(model(**batch), before)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert [type(m) for m in model.modules()] == kinds
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"embedding.weight"}


@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_cached_equals_uncached(method: str, position: str) -> None:
    """Rows of different lengths, a first pass over the prompts, then token by token."""
    adapted = shaken(method, position={"kind": position})
    model: Any = adapted.model
    weight, ids, lengths = model.embedding.weight, torch.randint(29, (2, 7)), torch.tensor([4, 2])
    cache = KVCache(model.config, 2, 7, weight.device, weight.dtype)
    logits = model(ids[:, :4], cache=cache, new=lengths)
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(logits[b, :length], model(ids[b : b + 1, :length])[0], atol=1e-12, rtol=0)
    rows = [ids[0, :4].tolist(), ids[1, :2].tolist()]
    for step in range(3):
        logits = model(ids[:, 4 + step : 5 + step], cache=cache)
        for b, row in enumerate(rows):
            row.append(int(ids[b, 4 + step]))
            torch.testing.assert_close(logits[b, 0], model(torch.tensor([row]))[0, -1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_cached_equals_uncached_in_an_encoder_decoder(method: str) -> None:
    model, batch = shaken(method, "encoder-decoder").model, inputs("encoder-decoder")
    ids, source = batch.pop("ids"), batch
    weight = model.embedding.weight
    cache = KVCache(model.config, 2, 6, weight.device, weight.dtype)
    parts = [model(ids[:, :3], cache=cache, **source), *(model(part, cache=cache) for part in ids[:, 3:].split(1, 1))]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, **source), atol=1e-12, rtol=0)


def test_lora_adds_scaled_products_to_the_targets_alone() -> None:
    model = build(small())
    weight = model.decoder.blocks[1].attention.q_proj.weight.clone()
    adapted = inject(model, MethodConfig(method="lora", rank=2, alpha=3.0, targets="q_proj, down_proj"))
    ends = {name.rpartition(".")[2] for name in adapted.grown}
    assert ends == {"q_proj", "down_proj"} and len(adapted.grown) == 4
    layer: Any = model.decoder.blocks[1].attention.q_proj
    move(model)
    x = torch.randn(5, 16, dtype=torch.float64)
    expected = x @ (weight + 3.0 / 2 * layer.lora_B @ layer.lora_A).T
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_dropout_is_on_the_update_alone() -> None:
    model, batch = build(small()), inputs("decoder")
    before = model(**batch)
    inject(model, MethodConfig(method="lora", dropout=0.5))
    assert not any(module.training for module in model.modules())  # as the model was
    model.train()
    assert torch.equal(model(**batch), before)  # B is 0: whatever A reads
    move(model)
    assert not torch.equal(model(**batch), model(**batch))
    model.eval()
    assert torch.equal(model(**batch), model(**batch))


def test_an_adapter_is_a_bottleneck_behind_each_half_block() -> None:
    adapted = shaken("adapter", "encoder-decoder")
    ends = sorted(name.rpartition(".")[0].rpartition(".")[2] for name in adapted.grown)
    assert ends == sorted(["attention", "mlp"] * 5 + ["cross_attention"] * 3)
    layer: Any = adapted.model.decoder.blocks[0].mlp.down_proj
    x = torch.randn(4, 20, dtype=torch.float64)
    y = x @ layer.weight.T
    inside = torch.nn.functional.gelu(y @ layer.adapter_down.T + layer.adapter_down_bias)
    torch.testing.assert_close(layer(x), y + inside @ layer.adapter_up.T + layer.adapter_up_bias)


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({"freeze_layers": 0}, ("embedding.", "type_embedding.", "decoder.position.", "decoder.embedding_norm.")),
        ({"freeze_layers": 1}, ("embedding.", "type_embedding.", "decoder.position.", "decoder.embedding_norm.",
                                "decoder.blocks.0.")),
        ({"train_only": "head"}, ("embedding.", "type_embedding.", "decoder.")),
    ],
)  # fmt: skip
def test_freeze_leaves_the_first_layers_bit_identical(options: dict[str, Any], frozen: tuple[str, ...]) -> None:
    shape = small(tied=False, token_types=2, position={"kind": "learned"}, norm={"embedding": True})
    model = build(shape)
    inject(model, MethodConfig(method="freeze", **options))
    before = copies(model)
    steps(model, inputs("decoder"))
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == {name for name in before if name.startswith(frozen)}


@pytest.mark.parametrize("method", [*METHODS, "head"])
def test_a_head_of_the_task_is_trained_besides(method: str) -> None:
    options = {"method": "freeze", "train_only": "head"} if method == "head" else METHODS[method]
    model = Tagger(build(small(tied=False)))  # its own output matrix is no head of the task
    adapted = inject(model, MethodConfig(**options), extra=["head"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} <= trained
    if method == "head":
        assert trained == {"head.weight", "head.bias"}
    before = copies(model)
    steps(model, inputs("decoder"))
    assert not torch.equal(model.head.weight, before["head.weight"])
    if method not in ("full", "freeze"):
        adapted.remove()
        assert all(
            torch.equal(x, before[name]) for name, x in model.state_dict().items() if not name.startswith("head")
        )


def test_what_does_not_fit_the_model_is_one_line() -> None:
    model = build(small())
    for options, message in [
        ({"method": "lora", "targets": "q_proj,key"}, "has no layer 'key'; it has down_proj, gate_proj, k_proj"),
        ({"method": "freeze", "freeze_layers": 3}, "--freeze-layers 3: the model has 2 layers"),
        ({"method": "freeze", "train_only": "head"}, "nothing to train: the model's output matrix is its embedding"),
        ({"method": "prefix", "length": 32}, r"length \(32\) leaves no room in model.context \(32\)"),
    ]:
        with pytest.raises(UserError, match=message):
            inject(model, MethodConfig(**options))
    for wrong in ("classifier", ""):  # the second would be the model itself
        with pytest.raises(UserError, match=f"no module '{wrong}' to train besides"):
            inject(model, MethodConfig(method="lora"), extra=[wrong])
    with pytest.raises(UserError, match="this one has 0"):
        inject(nn.Linear(2, 2), MethodConfig(method="lora"))
    assert all(p.requires_grad for p in model.parameters())
    inject(model, MethodConfig(method="lora"))
    with pytest.raises(UserError, match="has a method in it already"):
        inject(model, MethodConfig(method="prefix"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "method.rank must be at least 1, not 0"),
        ({"dropout": 1.0}, r"method.dropout must be in \[0, 1\), not 1.0"),
        ({"rank_settle": -0.1}, r"method.rank_settle must be in \[0, 1\), not -0.1"),
        ({"alpha": 0.0}, "method.alpha must be positive"),
        ({"orthogonality": -1.0}, "method.orthogonality must not be negative"),
        ({"rank_warmup": 0.6, "rank_settle": 0.4}, "leave no steps between them"),
        ({"rank": 8, "initial_rank": 4}, r"method.initial_rank \(4\) is below method.rank \(8\)"),
        ({"method": "freeze"}, "give either --freeze-layers N or --train-only head"),
        ({"method": "freeze", "freeze_layers": 1, "train_only": "head"}, "give either"),
        ({"method": "freeze", "freeze_layers": -1}, "method.freeze_layers must not be negative"),
        ({"method": "lora", "freeze_layers": 1}, "belong to method=freeze, not lora"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MethodConfig(**options)
    assert MethodConfig(rank=1, width=1, rank_warmup=0.0, rank_settle=0.0, orthogonality=0.0).start_rank == 2
    assert MethodConfig(method="freeze", freeze_layers=0).freeze_layers == 0  # the embeddings alone stay


def test_what_is_added_begins_as_its_source_has_it() -> None:
    """LoRA's A as in its authors' code: uniform within 1 / sqrt(inputs); the others normal of 0.02."""
    uniform, normal = 0.125 / 3**0.5, 0.02
    for method, ends, std in [
        ("lora", "lora_A", uniform),
        ("adalora", ("lora_A", "lora_B"), normal),
        ("adapter", "adapter_down", normal),
        ("prefix", "front.prefix", normal),
    ]:
        model = build(small(dim=64, mlp={"hidden_dim": 64}))
        inject(model, MethodConfig(method=method, rank=8, length=8))
        drawn = [p for name, p in model.named_parameters() if name.endswith(ends)]
        assert torch.cat([p.flatten() for p in drawn]).std().item() == pytest.approx(std, rel=0.05), method
        assert method != "lora" or max(p.abs().max() for p in drawn) <= 0.125


def test_a_new_weight_has_the_type_of_the_model() -> None:
    for method in METHODS:
        model: Transformer = shaken(method).model
        assert {p.dtype for p in model.parameters()} == {torch.float64}
