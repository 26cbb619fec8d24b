"""config.json without weights: what outputs do not show, what a file leaves out, what older ones say otherwise."""

from dataclasses import replace
from typing import Any

import pytest

from minillm import presets
from minillm.config import ModelConfig, Settings, UserError, from_dict, merge
from minillm.interop.configs import Fields, read_config
from minillm.interop.families import FAMILIES
from minillm.interop.writing import architecture, family_of, write_config
from tests.interop.ours import SHAPES

SCALED = {"kind": "rope", "theta": 5e5, "scaling": "llama3", "scaling_factor": 3.0, "original_context": 16}
UNUSUAL: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"norm": {"eps": 1e-3}}),
    ("llama", {"dropout": 0.0, "position": SCALED | {"low_frequency_factor": 1.5, "high_frequency_factor": 3.0}}),
    ("qwen3", {"dropout": 0.0, "attention": {"window": 5}, "position": {"theta": 7.0}}),
    ("bert", {"norm": {"eps": 1e-3}, "token_types": 3}),
    ("bart", {"embedding_scale": True, "decoder_layers": 3}),
]
FIELDS = ("shape", "layers", "heads", "dim", "context", "vocab_size", "tied", "dropout", "embedding_scale")
PARTS = ("attention", "mlp", "position", "norm", "init_std", "token_types")


def theirs(family: str, **values: Any) -> dict[str, Any]:
    """config.json as Transformers' own class for it would write it."""
    import transformers

    return transformers.AutoConfig.for_model(family, **values).to_dict()


def read(family: str, values: dict[str, Any]) -> ModelConfig:
    return read_config(family, Fields(values, "config.json"), [], lm=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_takes(family: str) -> None:
    full = theirs(family)
    assert len(full) > 20 and read(family, full) == read(family, {})


@pytest.mark.parametrize(("family", "changes"), UNUSUAL, ids=[family for family, _ in UNUSUAL])
def test_what_is_written_is_read_again_through_transformers(family: str, changes: dict[str, Any]) -> None:
    """What only training knows too: the dropout and the spread of first weights."""
    common = {"vocab_size": 41, "dropout": 0.3, "init_std": 0.07, "context": 24}
    config = from_dict(ModelConfig, merge(merge(dict(SHAPES[family]), {**common, "layers": 2, "heads": 4}), changes))
    values = write_config(config, family, architecture(config, family), {})
    assert values["dtype"] == "float32"
    del values["architectures"], values["model_type"]
    back = read(family, theirs(family, **values))
    for name in (*FIELDS, *PARTS):
        assert getattr(back, name) == getattr(config, name), name
    if family in ("llama", "qwen3"):  # readers from before rope_parameters
        older = read(family, {name: value for name, value in values.items() if name != "rope_parameters"})
        assert older.position == config.position


@pytest.mark.parametrize(
    ("said", "window"),
    [
        ({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}, 3),
        ({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}, None),
        ({"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
    ],
)
def test_older_files_say_a_window_without_layer_types(said: dict[str, Any], window: int | None) -> None:
    values = theirs("qwen3", num_hidden_layers=2, **said)
    del values["layer_types"]
    for file in (values, {"num_hidden_layers": 2, **said}, theirs("qwen3", num_hidden_layers=2, **said)):
        assert read("qwen3", file).attention.window == window
    with pytest.raises(UserError, match="layer_types must be all full_attention or all sliding_attention"):
        read("qwen3", {"num_hidden_layers": 2, "use_sliding_window": True, "max_window_layers": 1})


def test_dropout_that_has_no_place_here_is_told() -> None:
    fields = Fields(theirs("gpt2", resid_pdrop=0.2, embd_pdrop=0.4, attn_pdrop=0.5), "config.json")
    assert read_config("gpt2", fields, [], lm=True).dropout == 0.2
    assert fields.notes == [
        "attn_pdrop is 0.5: attention probabilities have no dropout here",
        "embd_pdrop is 0.4; dropout is 0.2 everywhere here",
    ]


def test_what_no_family_has_is_refused_with_a_preset_that_one_has() -> None:
    def family(preset: str) -> str:
        return family_of(replace(from_dict(Settings, presets.preset(preset)).model, vocab_size=512))

    with pytest.raises(
        UserError, match=r"rms cannot .* BERT, .* has only layer; --preset bert-base or bert-tiny trains"
    ):
        family("mlm-tiny")
    with pytest.raises(UserError, match=r"BART, the nearest family, has only layer; a model that is trained so can be"):
        family("seq2seq-tiny")
    assert [family(preset) for preset in ("bert-base", "bert-tiny", "default", "gpt2")] == [
        "bert",
        "bert",
        "qwen3",
        "gpt2",
    ]
