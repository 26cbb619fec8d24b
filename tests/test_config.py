"""Settings: what is wrong is one clear line that names the field, whatever the file held."""

import dataclasses
import json
import math
import random
import tracemalloc
from typing import Any

import pytest

from minillm.config import (
    AttentionConfig,
    DataConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    OptimConfig,
    PositionConfig,
    Settings,
    SpeedrunConfig,
    TokenizerConfig,
    TrainConfig,
    UserError,
    from_dict,
    merge,
    to_dict,
)
from minillm.presets import RUNS, settings

WRONG: list[tuple[type, dict[str, Any], str]] = [
    (AttentionConfig, {"window": 0}, "attention.window"),
    (AttentionConfig, {"window": 2**31}, "attention.window"),
    (AttentionConfig, {"softcap": 0.0}, "attention.softcap"),
    (MLPConfig, {"hidden_dim": 0}, "mlp.hidden_dim"),
    (MLPConfig, {"hidden_dim": 2**31}, "mlp.hidden_dim"),
    (MLPConfig, {"kind": "swish"}, "kind"),
    (PositionConfig, {"theta": 0.0}, "position.theta"),
    (PositionConfig, {"scaling_factor": -1.0}, "position.scaling_factor"),
    (PositionConfig, {"original_context": 0}, "position.original_context"),
    (PositionConfig, {"low_frequency_factor": 4.0}, "position.high_frequency_factor"),
    (PositionConfig, {"kind": "rotary"}, "kind"),
    (NormConfig, {"eps": 0.0}, "norm.eps"),
    (NormConfig, {"bias": True, "kind": "rms"}, "norm.bias"),
    (ModelConfig, {"layers": 0}, "model.layers"),
    (ModelConfig, {"layers": 4097}, "model.layers"),
    (ModelConfig, {"heads": 0}, "model.heads"),
    (ModelConfig, {"kv_heads": 0}, "model.kv_heads"),
    (ModelConfig, {"dim": -4}, "model.dim"),
    (ModelConfig, {"dim": 2**31}, "model.dim"),
    (ModelConfig, {"context": 0}, "model.context"),
    (ModelConfig, {"vocab_size": 0}, "model.vocab_size"),
    (ModelConfig, {"dim": 100, "heads": 6}, "model.heads"),
    (ModelConfig, {"heads": 6, "kv_heads": 4}, "model.kv_heads"),
    (ModelConfig, {"heads": 2, "head_dim": 5}, "head width"),
    (ModelConfig, {"dim": 15, "heads": 3, "position": {"kind": "sinusoidal"}}, "model.dim"),
    (ModelConfig, {"dropout": 1.0}, "model.dropout"),
    (ModelConfig, {"softcap": -1.0}, "model.softcap"),
    (ModelConfig, {"init_std": 0.0}, "model.init_std"),
    (ModelConfig, {"token_types": -1}, "model.token_types"),
    (ModelConfig, {"decoder_layers": 2}, "model.decoder_layers"),
    (ModelConfig, {"source_embedding": True}, "model.source_embedding"),
    (ModelConfig, {"shape": "decodr"}, "shape"),
    (ModelConfig, {"shape": "encoder", "speedrun": {"ngrams": 2}}, "model.speedrun"),
    (ModelConfig, {"norm": {"placement": "post"}, "speedrun": {"ngrams": 2}}, "model.speedrun"),
    (SpeedrunConfig, {"ngrams": 1}, "speedrun.ngrams"),
    (SpeedrunConfig, {"ngrams": 17}, "speedrun.ngrams"),
    (SpeedrunConfig, {"ngram_rows": 0}, "speedrun.ngram_rows"),
    (SpeedrunConfig, {"ngram_dim": 2**31}, "speedrun.ngram_dim"),
    (SpeedrunConfig, {"ngram_dropout": 1.0}, "speedrun.ngram_dropout"),
    (TokenizerConfig, {"vocab_size": 0}, "tokenizer.vocab_size"),
    (DataConfig, {"validation": 1.0}, "data.validation"),
    (DataConfig, {"mask_rate": 0.0}, "data.mask_rate"),
    (DataConfig, {"span_length": 0.5}, "data.span_length"),
    (DataConfig, {"workers": 0}, "data.workers"),
    (OptimConfig, {"lr": 0.0}, "optim.lr"),
    (OptimConfig, {"embedding_lr": 0.0}, "optim.embedding_lr"),
    (OptimConfig, {"muon_lr": -1.0}, "optim.muon_lr"),
    (OptimConfig, {"eps": 0.0}, "optim.eps"),
    (OptimConfig, {"weight_decay": -0.1}, "optim.weight_decay"),
    (OptimConfig, {"l1": -0.1}, "optim.l1"),
    (OptimConfig, {"l2": -0.1}, "optim.l2"),
    (OptimConfig, {"beta1": 1.0}, "optim.beta1"),
    (OptimConfig, {"beta2": -0.1}, "optim.beta2"),
    (OptimConfig, {"momentum": 1.0}, "optim.momentum"),
    (OptimConfig, {"warmup": 1.1}, "optim.warmup"),
    (OptimConfig, {"decay": -0.1}, "optim.decay"),
    (OptimConfig, {"final_lr": 1.5}, "optim.final_lr"),
    (OptimConfig, {"clip": 0.0}, "optim.clip"),
    (TrainConfig, {"batch": 0}, "train.batch"),
    (TrainConfig, {"micro_batch": 0}, "train.micro_batch"),
    (TrainConfig, {"eval_every": 0}, "train.eval_every"),
    (TrainConfig, {"save_every": 0}, "train.save_every"),
    (TrainConfig, {"log_every": 0}, "train.log_every"),
    (TrainConfig, {"keep": 0}, "train.keep"),
    (TrainConfig, {"patience": 0}, "train.patience"),
    (TrainConfig, {"threads": 0}, "train.threads"),
    (TrainConfig, {"shard_ranks": 0, "parallel": "fsdp"}, "train.shard_ranks must be at least 1"),
    (TrainConfig, {"stall_seconds": 0.5}, "train.stall_seconds"),
    (TrainConfig, {"shard_ranks": 2}, "train.shard_ranks needs train.parallel=fsdp"),
    (TrainConfig, {"reshard": False}, "train.reshard needs train.parallel=fsdp"),
    (TrainConfig, {"gather_dtype": "bf16"}, "train.gather_dtype needs train.parallel=fsdp"),
    (TrainConfig, {"sample_tokens": -1}, "train.sample_tokens"),
    (TrainConfig, {"label_smoothing": 1.0}, "train.label_smoothing"),
    (TrainConfig, {"z_loss": -1.0}, "train.z_loss"),
    (Settings, {"steps": 0}, "steps"),
    (Settings, {"minutes": 0.0}, "minutes"),
    (Settings, {"seed": -1}, "seed"),
    (Settings, {"seed": 2**63}, "seed must be below 2⁶³, not a number of 64 bits"),
    (Settings, {"data": {"objective": "masked"}}, "data.objective"),
    (Settings, {"model": {"shape": "encoder"}, "tokenizer": {"type": "char"}}, "tokenizer.type"),
    (Settings, {"train": {"batch": 8, "micro_batch": 3}}, "train.micro_batch"),
]


def error_of(cls: type, values: Any) -> str:
    with pytest.raises(UserError) as caught:
        from_dict(cls, values)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    return message


@pytest.mark.parametrize(("cls", "values", "field"), WRONG, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(cls: type, values: dict, field: str) -> None:
    assert field in error_of(cls, values)


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (AttentionConfig, {"window": 1}),
        (ModelConfig, {"layers": 4096, "dropout": 0.0, "token_types": 0}),
        (SpeedrunConfig, {"ngrams": 2, "ngram_rows": 1, "ngram_dim": 1}),
        (SpeedrunConfig, {"ngrams": 16}),
        (DataConfig, {"span_length": 1.0, "workers": 1}),
        (OptimConfig, {"beta1": 0.0, "weight_decay": 0.0, "warmup": 1.0, "final_lr": 0.0, "decay": 0.0}),
        (TrainConfig, {"batch": 1, "keep": 1, "sample_tokens": 0, "label_smoothing": 0.0, "stall_seconds": 1.0}),
        (TrainConfig, {"parallel": "fsdp", "shard_ranks": 1, "reshard": False, "gather_dtype": "bf16"}),
        (Settings, {"seed": 2**63 - 1, "steps": 1}),
        (Settings, {"seed": 0, "train": {"batch": 6, "micro_batch": 6}}),
    ],
)
def test_a_value_at_the_edge_of_its_range_is_taken(cls: type, values: dict) -> None:
    found = to_dict(from_dict(cls, values))
    assert merge(found, values) == found


def number_fields(cls: type) -> list[tuple[type, str]]:
    return [(cls, f.name) for f in dataclasses.fields(cls) if "float" in str(f.type)]


SECTIONS = [AttentionConfig, PositionConfig, NormConfig, ModelConfig, DataConfig, OptimConfig, TrainConfig, Settings]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400], ids=["nan", "inf", "-inf", "10^400"])
@pytest.mark.parametrize(("cls", "name"), [pair for cls in SECTIONS for pair in number_fields(cls)])
def test_no_number_may_be_infinite(cls: type, name: str, value: float) -> None:
    assert name in error_of(cls, {name: value})
    with pytest.raises(UserError, match=name):
        cls(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "unknown setting modle; did you mean model?"),
        ({"model": {"layer": 2}}, "unknown setting model.layer; did you mean model.layers?"),
        ({"model": {"norm": {"placment": "pre"}}}, "unknown setting model.norm.placment; did you mean"),
        ({"optim": {"zzz": 1}}, "unknown setting optim.zzz"),
        ({"model": {"layers": "6"}}, "model.layers must be of type int, not '6'"),
        ({"model": {"layers": True}}, "model.layers must be of type int, not True"),
        ({"model": {"layers": 6.0}}, "model.layers must be of type int, not 6.0"),
        ({"model": {"layers": None}}, "model.layers must be of type int, not None"),
        ({"model": {"tied": 1}}, "model.tied must be of type bool, not 1"),
        ({"optim": {"lr": "fast"}}, "optim.lr must be of type float, not 'fast'"),
        ({"model": {"position": {"kind": "rotary"}}}, "model.position.kind must be one of none, learned, sinusoidal"),
        ({"kernels": "cuda"}, "kernels must be one of auto, triton, torch, not 'cuda'"),
        ({"model": {"window": 3}}, "unknown setting model.window"),
        ({"model": 3}, "model must be a table of settings, not 3"),
        ({"model": [1, 2]}, "model must be a table of settings, not a list"),
        (None, "Settings must be a table of settings, not None"),
        ({"steps": 10**5000}, "steps must be below 2⁶³, not a number of"),
        ({"x" * 10**6: 1}, "unknown setting 'xxxx"),
        ({"a\nb": 1}, "unknown setting 'a\\nb'"),
        ({7: 1}, "unknown setting 7"),
    ],
    ids=lambda x: x[:50] if isinstance(x, str) else "",
)
def test_the_message_says_what_where_and_what_would_do(values: Any, message: str) -> None:
    assert error_of(Settings, values).startswith(message)


def test_settings_made_in_python_are_held_to_the_same() -> None:
    with pytest.raises(UserError, match=r"model.shape must be one of decoder, encoder, encoder-decoder, not 'decodr'"):
        ModelConfig(shape="decodr")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model.layers must be of type int, not '3'"):
        ModelConfig(layers="3")  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().layers = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", RUNS)
def test_settings_survive_json(name: str) -> None:
    made = settings(name)
    assert from_dict(Settings, json.loads(json.dumps(to_dict(made)))) == made


def test_settings_away_from_their_defaults_survive_json() -> None:
    made = Settings(
        steps=3,
        dtype="bf16",
        model=ModelConfig(
            shape="encoder-decoder",
            decoder_layers=2,
            kv_heads=3,
            position=PositionConfig(scaling="llama3"),
            norm=NormConfig(kind="layer", bias=True),
            attention=AttentionConfig(window=5, softcap=1.5),
        ),
        data=DataConfig(objective="span", workers=2),
        optim=OptimConfig(clip=None, name="muon"),
        train=TrainConfig(patience=3, sample_prompt="def f(\n"),
    )
    back = from_dict(Settings, json.loads(json.dumps(to_dict(made))))
    assert back == made and back.model.position.scaling == "llama3" and back.optim.clip is None


def test_merge_lays_section_upon_section() -> None:
    base = {"steps": 3, "model": {"dim": 8, "norm": {"eps": 1e-5}}, "data": None}
    over = {"model": {"norm": {"kind": "layer"}, "heads": 2}, "data": {"separate": False}}
    expected = {
        "steps": 3,
        "model": {"dim": 8, "heads": 2, "norm": {"eps": 1e-5, "kind": "layer"}},
        "data": {"separate": False},
    }
    assert merge(base, over) == expected
    assert base == {"steps": 3, "model": {"dim": 8, "norm": {"eps": 1e-5}}, "data": None}


def test_widths_that_follow_from_others() -> None:
    assert ModelConfig(dim=768, heads=12, mlp=MLPConfig(kind="gelu")).mlp_width == 3072
    assert ModelConfig(dim=768, heads=12, mlp=MLPConfig(kind="swiglu")).mlp_width == 2048
    assert ModelConfig(dim=260, heads=10).mlp_width == 704  # 693.3, rounded up to a multiple of 64
    assert ModelConfig(dim=768, heads=12, mlp=MLPConfig(hidden_dim=5)).mlp_width == 5
    assert (ModelConfig(heads=6).key_value_heads, ModelConfig(heads=6, kv_heads=2).key_value_heads) == (6, 2)
    assert (ModelConfig(dim=384, heads=6).head_width, ModelConfig(head_dim=32).head_width) == (64, 32)
    shapes = {"decoder": 3, "encoder": 3, "encoder-decoder": 6}
    assert {s: from_dict(ModelConfig, {"shape": s, "layers": 3}).blocks for s in shapes} == shapes
    assert ModelConfig(shape="encoder-decoder", layers=3, decoder_layers=1).blocks == 4


# ---- files that somebody made by hand, or that a disk damaged


def nested(depth: int) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"model": value}
    return value


@pytest.mark.parametrize(
    "values",
    [nested(10**5), {"model": nested(10**5)}, {"model": {"layers": nested(10**5)}}, {"kernels": nested(10**5)}],
    ids=["whole", "section", "field", "variant"],
)
def test_endless_nesting_is_an_error_not_a_recursion(values: Any) -> None:
    with pytest.raises(UserError):
        from_dict(Settings, values)


HOSTILE = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 10**5000, 0.0, -0.5, 1e308, 1e-320, math.nan,
    math.inf, "", "auto", "rope", "x" * 10**5, "\x00", "\ud800", [], [1], {}, {"kind": "none"}, {"": {}}, b"bytes",
    nested(5000),
]  # fmt: skip


def places(values: dict[str, Any], before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in values.items():
        found.append((*before, name))
        if isinstance(value, dict):
            found += places(value, (*before, name))
    return found


def mutated(draw: random.Random) -> dict[str, Any]:
    """A valid configuration with one to three values replaced, dropped or added."""
    values = to_dict(settings(draw.choice(list(RUNS))))
    for _ in range(draw.randint(1, 3)):
        *way, name = draw.choice(places(values))
        section: Any = values
        for step in way:
            section = section[step] if isinstance(section, dict) and step in section else {}
        if not isinstance(section, dict):
            continue
        change = draw.randrange(5)
        if change == 0:
            section.pop(name, None)
        elif change == 1:
            section[name + draw.choice("sx_ \n")] = draw.choice(HOSTILE)
        else:
            section[name] = draw.choice(HOSTILE)
    return values


def test_500_mutations_raise_nothing_but_user_errors_and_allocate_nothing() -> None:
    draw, refused = random.Random(1), 0
    cases = [mutated(draw) for _ in range(500)]
    tracemalloc.start()
    for values in cases:
        try:
            made = from_dict(Settings, values)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400
        else:
            assert from_dict(Settings, to_dict(made)) == made
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 250 < refused < 500
    assert peak < 10 * 2**20
