"""Task heads: what they read of padded rows is what they read of each row alone."""

import pytest
import torch

from minillm.config import ModelConfig, UserError
from minillm.model.heads import HeadConfig, TaskModel, pooled_head
from tests.model.configs import build, small

LENGTHS = (7, 3, 5)
SHAPES = {
    "decoder": {},
    "encoder": {"shape": "encoder", "position": {"kind": "learned"}},
    "encoder-decoder": {"shape": "encoder-decoder", "decoder_layers": 1},
}
HEADS = {
    "cls": HeadConfig(outputs=3, pool="cls"),
    "last": HeadConfig(outputs=3, pool="last", bias=False),
    "mean": HeadConfig(outputs=3, pool="mean"),
    "pooler": HeadConfig(outputs=3, pool="cls", pooler=True),
    "every": HeadConfig(outputs=2),
}


def model_of(shape: str, head: HeadConfig) -> TaskModel:
    model = TaskModel(build(small(**SHAPES[shape]), torch.float64), head).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("transformer."):
                parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(side: str, shape: str, head: str) -> None:
    model = model_of(shape, HEADS[head])
    T = max(LENGTHS)
    places, lengths = torch.arange(T).expand(len(LENGTHS), T), torch.tensor(LENGTHS).unsqueeze(1)
    real = places < lengths if side == "right" else places >= T - lengths
    ids = torch.randint(29, real.shape)
    padded = model(ids, segments=real.long() - 1)
    for row, mask in enumerate(real):
        (alone,) = model(ids[row, mask].unsqueeze(0))
        actual = padded[row] if model.pool is not None else padded[row, mask]
        torch.testing.assert_close(actual, alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("T", [1, 5])
@torch.no_grad()
def test_each_head_by_hand(T: int) -> None:
    ids = torch.randint(29, (1, T))
    for name, config in HEADS.items():
        model = model_of("encoder", config)
        states = model.transformer.states(ids)[0]  # [T, dim]
        if model.pooler is not None:
            read = torch.tanh(model.pooler.weight @ states[0] + model.pooler.bias)
        else:
            read = {"cls": states[0], "last": states[-1], "mean": states.mean(0), "every": states}[name]
        expected = read @ model.task_head.weight.T + (0 if model.task_head.bias is None else model.task_head.bias)
        torch.testing.assert_close(model(ids)[0], expected, atol=1e-10, rtol=0)
        assert (model.task_head.bias is None) == (name == "last")
        assert model.added == (("pooler", "task_head") if name == "pooler" else ("task_head",))


def test_which_head_a_shape_gets() -> None:
    def of(shape: str, pool: str | None) -> tuple[str | None, bool, bool]:
        head = pooled_head(4, ModelConfig(shape=shape, vocab_size=9), pool)  # type: ignore[arg-type]
        assert head.outputs == 4
        return head.pool, head.pooler, head.bias

    assert of("decoder", None) == of("decoder", "last") == ("last", False, False)
    assert of("encoder", None) == of("encoder-decoder", None) == ("mean", False, True)
    assert of("encoder", "pooler") == ("cls", True, True)
    assert of("decoder", "mean") == ("mean", False, True)


def test_a_new_head_begins_small() -> None:
    model = TaskModel(build(small(dim=64, init_std=0.1)), HEADS["pooler"])
    assert model.pooler is not None
    for layer in (model.pooler, model.task_head):
        assert layer.weight.std().item() == pytest.approx(0.1, rel=0.2) and not layer.bias.any()
    assert model.threshold.isnan().all()


@pytest.mark.parametrize(("name", "value"), [("outputs", 0), ("dropout", 1.0), ("dropout", -0.1)])
def test_impossible_heads_are_refused(name: str, value: float) -> None:
    assert HeadConfig(outputs=1, dropout=0.0).pool is None
    with pytest.raises(UserError, match=f"task.head.{name} must be"):
        HeadConfig(**{"outputs": 1, name: value})


def test_a_pooler_that_came_with_the_model_is_taken_over() -> None:
    body = build(small(**SHAPES["encoder"]), torch.float32)
    given = {"weight": torch.randn(body.config.dim, body.config.dim), "bias": torch.randn(body.config.dim)}
    model = TaskModel(body, HEADS["pooler"], given)
    assert model.pooler is not None
    assert torch.equal(model.pooler.weight, given["weight"]) and torch.equal(model.pooler.bias, given["bias"])
