"""Named runs: each one builds, and what the contract says of it holds."""

import pytest
import torch

from minillm.config import UserError, merge
from minillm.model.transformer import Transformer
from minillm.presets import MODELS, RUNS, preset, settings

CONTRACT = [
    "default", "shakespeare-char", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama-350m", "bert-base",
    "transformer-base", "mlm-tiny", "seq2seq-tiny",
]  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_every_preset_is_a_run_that_can_be_built(name: str) -> None:
    made = settings(name, {"model": {"vocab_size": 512}})
    assert made.preset == name
    assert made.steps is not None or made.minutes is not None
    with torch.device("meta"):
        model = Transformer(made.model)
    assert model.embedding.weight.shape == (512, made.model.dim)


def test_every_name_of_the_contract_and_every_model_is_a_run() -> None:
    assert set(CONTRACT) <= set(RUNS)
    assert set(MODELS) <= set(RUNS)


def test_shakespeare_char_is_nanogpts_setting_for_a_cpu() -> None:
    """nanoGPT's README, "I only have a macbook": the figures that its loss of 1.88 belongs to."""
    made = settings("shakespeare-char")
    model = made.model
    assert (model.layers, model.heads, model.dim, model.context, model.dropout) == (4, 4, 128, 64, 0.0)
    assert (made.train.batch, made.steps, made.tokenizer.type) == (12, 2000, "char")


def test_a_model_of_published_size_brings_its_vocabulary_to_the_tokenizer() -> None:
    for name in ("gpt2", "bert-base", "transformer-base", "qwen3-0.6b"):
        made = settings(name)
        assert made.tokenizer.vocab_size == made.model.vocab_size == MODELS[name]["vocab_size"]


def test_shapes_and_objectives() -> None:
    assert [settings(name).objective for name in ("default", "mlm-tiny", "seq2seq-tiny")] == [
        "next-token", "masked", "span",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("defualt", "default"), ("gpt-2", "gpt2"), ("shakespeare", "shakespeare-char"), ("bert_base", "bert-base")],
)
def test_an_unknown_preset_names_the_nearest_and_all(wrong: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown preset {wrong}; did you mean {near}\\?") as caught:
        preset(wrong)
    assert all(name in str(caught.value) for name in RUNS)


def test_layers_lie_on_the_preset_in_order() -> None:
    made = settings("gpt2-tiny", {"model": {"dim": 32}, "steps": 5}, {"model": {"layers": 3}, "steps": 7})
    assert (made.model.dim, made.model.layers, made.steps, made.model.heads) == (32, 3, 7, 4)
    assert settings("gpt2-tiny").model.dim == 64  # the preset itself is as it was


def test_a_preset_can_be_changed_without_changing_the_next_ones() -> None:
    before = settings("default")
    values = merge(preset("default"), {"model": {"norm": {"eps": 1.0}}})
    assert values["model"]["norm"]["eps"] == 1.0
    assert settings("default") == before
