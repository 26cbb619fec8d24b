"""What moved, written and read back: the same logits bit for bit, nothing else in the files, nothing wrong taken."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.config import DamagedFile, UserError
from minillm.model.transformer import Transformer
from minillm.peft.config import MethodConfig
from minillm.peft.files import CONFIG, TENSORS, load, save
from minillm.peft.inject import Adapted, inject
from tests.model.configs import build, small
from tests.peft.helpers import METHODS, SHAPES, Tagger, inputs, move


def base(shape: str = "decoder", seed: int = 3) -> Transformer:
    torch.manual_seed(seed)
    return build(small(**SHAPES[shape]))


def trained(method: str, shape: str = "decoder") -> Adapted:
    adapted = inject(base(shape), MethodConfig(**METHODS[method]))
    move(adapted.model)
    if adapted.allocator is not None:
        for i, layer in enumerate(adapted.allocator.layers.values()):
            layer.kept.copy_(torch.tensor([i % 2 == 0, i % 3 != 0, True]))
            layer.lora_E.data[~layer.kept] = 0.0
    return adapted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_saved_and_loaded_is_the_same_bit_for_bit(method: str, shape: str, tmp_path: Path) -> None:
    adapted, batch = trained(method, shape), inputs(shape)
    expected = adapted.model(**batch)
    save(adapted, tmp_path)
    again = load(base(shape), tmp_path)
    assert torch.equal(again.model(**batch), expected)
    assert again.config == adapted.config
    if adapted.allocator is not None:
        assert again.allocator.ranks() == adapted.allocator.ranks()
    if method != "prefix-network":  # which is saved as what it makes
        left = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
        assert {name for name, p in again.model.named_parameters() if p.requires_grad} == left
    if method not in ("full", "freeze"):
        again.remove()
        assert torch.equal(again.model(**batch), base(shape)(**batch))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_head_of_a_task_travels_with_it(method: str, tmp_path: Path) -> None:
    model = Tagger(base())
    adapted = inject(model, MethodConfig(**METHODS[method]), extra=["head"])
    move(model)
    save(adapted, tmp_path)
    batch, expected = inputs("decoder"), None
    expected = model(**batch)
    again = Tagger(base())
    assert not torch.equal(again(**batch), expected)
    load(again, tmp_path)
    assert torch.equal(again(**batch), expected)
    assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize("method", METHODS)
def test_only_what_moved_is_written(method: str, tmp_path: Path) -> None:
    adapted = trained(method)
    save(adapted, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    moved = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    if method == "adalora":
        moved = sum(
            rank * (layer.in_features + layer.out_features + 1)
            for rank, layer in zip(adapted.allocator.ranks().values(), adapted.grown.values(), strict=True)
        )
    if method == "prefix-network":
        moved = 3 * 2 * 2 * 2 * 4
    assert sum(tensor.numel() for tensor in tensors.values()) == moved
    assert (tmp_path / CONFIG).is_file()


@pytest.mark.parametrize("method", METHODS)
def test_another_base_model_is_refused_and_left_alone(method: str, tmp_path: Path) -> None:
    save(trained(method), tmp_path)
    other = base(seed=4)
    names = set(other.state_dict())
    with pytest.raises(UserError, match="was trained on another model: its weights hash to"):
        load(other, tmp_path)
    assert set(other.state_dict()) == names and all(p.requires_grad for p in other.parameters())


def test_damage_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    save(trained("lora"), tmp_path)
    for name in (TENSORS, CONFIG):
        whole = (tmp_path / name).read_bytes()
        for place in (12, len(whole) // 2, len(whole) - 3):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(UserError, match=r"damaged|is not what was written"):
                load(base(), tmp_path)
        (tmp_path / name).write_bytes(whole[:-9])
        with pytest.raises(DamagedFile):
            load(base(), tmp_path)
        (tmp_path / name).write_bytes(whole)
    load(base(), tmp_path)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("lora", "lora_alpha", None),
        ("lora", "alpha_pattern", "x"),
        ("lora", "alpha_pattern", {"(": 2}),
        ("lora", "alpha_pattern", {"decoder.*": "y"}),
        ("adalora", "init_r", 3.5),
        ("adalora", "rank_pattern", [1]),
        ("adalora", "rank_pattern", {"decoder.blocks.0.attention.q_proj.lora_E": [True] * 9}),
    ],
)
def test_a_config_of_others_that_makes_no_sense_is_refused(method: str, name: str, value: Any, tmp_path: Path) -> None:
    save(trained(method), tmp_path)
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS)  # without what says that it is ours
    load(base(), tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, name: value}))
    model = base()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(DamagedFile, match=f"{CONFIG} is damaged: ") as caught:
        load(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds  # nothing was left in it


@pytest.mark.parametrize("method", ["lora", "adapter", "prefix"])
def test_an_adapter_that_is_not_finite_is_refused_by_name(method: str, tmp_path: Path) -> None:
    adapted = trained(method)
    name, parameter = next((n, p) for n, p in adapted.model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[3] = float("nan")
    save(adapted, tmp_path)
    model = base()
    kinds = [type(module) for module in model.modules()]
    last = "prompt_embeddings" if method == "prefix" else name.rpartition("blocks.")[2]
    with pytest.raises(UserError, match=rf"{TENSORS}: \S*{re.escape(last)}\S* holds NaN or infinity in 1 of") as caught:
        load(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds  # nothing was left in it


@pytest.mark.parametrize(
    ("adapter", "model", "way"),
    [("run/adapter", "base/step-1", "../../base/step-1"), ("run", "run/base", "./base"), ("run/a", "run", "..")],
)
def test_a_base_beside_it_is_named_by_the_way_there(
    adapter: str, model: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / model).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for named in (model, str(tmp_path / model)):
        save(trained("lora"), adapter, base_model=named)
        assert json.loads((tmp_path / adapter / CONFIG).read_text())["base_model_name_or_path"] == way
    monkeypatch.setattr("os.path.commonpath", lambda _: "/")  # as if nothing but the root were common
    save(trained("lora"), adapter, base_model=str(tmp_path / model))
    assert json.loads((tmp_path / adapter / CONFIG).read_text())["base_model_name_or_path"] == str(tmp_path / model)


def test_a_folder_without_an_adapter_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"holds no adapter: {TENSORS} is missing"):
        load(base(), tmp_path)


def test_the_config_is_one_that_peft_knows(tmp_path: Path) -> None:
    save(trained("lora"), tmp_path, base_model="runs/base")
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["peft_type"] == "LORA" and values["task_type"] == "CAUSAL_LM"
    assert (values["r"], values["lora_alpha"], values["base_model_name_or_path"]) == (3, 5, "runs/base")
    assert "decoder.blocks.1.attention.v_proj" in values["target_modules"] and len(values["target_modules"]) == 14
