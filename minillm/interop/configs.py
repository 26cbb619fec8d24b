"""config.json of each family as a `ModelConfig`; what would compute something else than ours is refused by name."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from minillm.config import ModelConfig, UserError, from_dict

_ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_fast": "gelu-tanh", "relu": "relu", "relu2": "relu2", "silu": "silu", "swish": "silu", "tanh": "tanh",
}  # fmt: skip
_GATES = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
BART_EPS = 1e-5  # no field of BART's: torch's default


class Fields:
    """config.json, read field by field; `notes` collects what a reader should know."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self.notes: list[str] = []

    def get(self, name: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        """A value of the type expected; `default` where the file does not say. Raises `UserError` naming the field."""
        value = self.values.get(name, default)
        value = default if value is None else value
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            shown = str(value)[:40]
            raise UserError(f"{self.where}: {name} is {shown}, which is no {_name(kind)}; restore the file")
        return value

    def integer(self, name: str, default: int) -> int:
        return self.get(name, default, int)

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default, (int, float))
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{self.where}: {name} is beyond what a float holds; restore the file") from None

    def flag(self, name: str, default: bool) -> bool:
        return self.get(name, default, bool)

    def choice(self, name: str, default: str, options: Mapping[str, str]) -> str:
        value = self.get(name, default, str)
        if value not in options:
            raise UserError(f"{self.where}: {name}={value[:40]} is not supported; there are {', '.join(options)}")
        return options[value]

    def must(self, **expected: Any) -> None:
        """Refuses an option whose value is another than the one that our model computes."""
        for name, only in expected.items():
            value = self.values.get(name, only)
            if value != only and not (value is None and only is False):
                raise UserError(f"{self.where}: {name}={str(value)[:40]} is not supported; only {name}={only} is")

    def dropout(self, *names: str, default: float) -> float:
        """The first of `names` is what we have; where another differs, a note says so."""
        rate = self.number(names[0], default)
        for name in names[1:]:
            if self.number(name, default) != rate:
                self.notes.append(f"{name} is {self.number(name, default)}; dropout is {rate} everywhere here")
        return rate

    def no_attention_dropout(self, name: str, default: float) -> None:
        if rate := self.number(name, default):
            self.notes.append(f"{name} is {rate}: attention probabilities have no dropout here")


def _name(kind: type | tuple[type, ...]) -> str:
    return {int: "whole number", bool: "truth value", str: "text"}.get(kind, "number")  # type: ignore[arg-type]


def _read_gpt2(hf: Fields, names: Collection[str], lm: bool) -> dict[str, Any]:
    hf.must(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    hf.no_attention_dropout("attn_pdrop", 0.1)
    dim = hf.integer("n_embd", 768)
    return {
        "layers": hf.integer("n_layer", 12),
        "heads": hf.integer("n_head", 12),
        "dim": dim,
        "context": hf.integer("n_positions", 1024),
        "vocab_size": hf.integer("vocab_size", 50257),
        "tied": hf.flag("tie_word_embeddings", True) or not lm,
        "dropout": hf.dropout("resid_pdrop", "embd_pdrop", default=0.1),
        "init_std": hf.number("initializer_range", 0.02),
        "attention": {"bias": True},
        "mlp": {
            "kind": hf.choice("activation_function", "gelu_new", _ACTIVATIONS),
            "hidden_dim": hf.integer("n_inner", 4 * dim),
            "bias": True,
        },
        "position": {"kind": "learned"},
        "norm": {"kind": "layer", "eps": hf.number("layer_norm_epsilon", 1e-5), "bias": True},
    }


def _read_llama(hf: Fields, names: Collection[str], lm: bool) -> dict[str, Any]:
    hf.no_attention_dropout("attention_dropout", 0.0)
    heads = hf.integer("num_attention_heads", 32)
    dim = hf.integer("hidden_size", 4096)
    return {
        "layers": hf.integer("num_hidden_layers", 32),
        "heads": heads,
        "kv_heads": hf.integer("num_key_value_heads", heads),
        "head_dim": hf.integer("head_dim", dim // max(1, heads)),
        "dim": dim,
        "context": hf.integer("max_position_embeddings", 2048),
        "vocab_size": hf.integer("vocab_size", 32000),
        "tied": hf.flag("tie_word_embeddings", False) or not lm,
        "init_std": hf.number("initializer_range", 0.02),
        "attention": {"bias": hf.flag("attention_bias", False)},
        "mlp": {
            "kind": hf.choice("hidden_act", "silu", _GATES),
            "hidden_dim": hf.integer("intermediate_size", 11008),
            "bias": hf.flag("mlp_bias", False),
        },
        "position": {"kind": "rope", **_read_rope(hf)},
        "norm": {"kind": "rms", "eps": hf.number("rms_norm_eps", 1e-6)},
    }


def _read_rope(hf: Fields) -> dict[str, Any]:
    """rope_parameters, or rope_theta and rope_scaling as files were written before."""
    values = hf.get("rope_parameters", hf.get("rope_scaling", {}, dict), dict)
    rope = Fields(values, f"{hf.where}: rope_parameters")
    rope.must(partial_rotary_factor=1.0)
    hf.must(partial_rotary_factor=1.0)
    theta = rope.number("rope_theta", hf.number("rope_theta", 10_000.0))
    kinds = {"default": "", "linear": "linear", "llama3": "llama3"}
    kind = rope.choice("rope_type", rope.get("type", "default", str), kinds)
    if not kind:
        return {"theta": theta}
    scaling = {"theta": theta, "scaling": kind, "scaling_factor": rope.number("factor", 1.0)}
    if kind == "llama3":
        context = hf.integer("max_position_embeddings", 2048)
        scaling["original_context"] = rope.integer("original_max_position_embeddings", context)
        scaling["low_frequency_factor"] = rope.number("low_freq_factor", 1.0)
        scaling["high_frequency_factor"] = rope.number("high_freq_factor", 4.0)
    return scaling


def _read_qwen3(hf: Fields, names: Collection[str], lm: bool) -> dict[str, Any]:
    layers = hf.integer("num_hidden_layers", 32)
    defaults = {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768}
    sizes = {"num_hidden_layers": layers, "vocab_size": 151936, "intermediate_size": 22016, "mlp_bias": False}
    hf.must(mlp_bias=False)
    full = Fields({**defaults, **sizes, **hf.values}, hf.where)
    values = _read_llama(full, names, lm)
    hf.notes += full.notes
    kinds = hf.get("layer_types", None, (list, type(None)))
    if kinds is None:
        sliding = hf.flag("use_sliding_window", False) and hf.values.get("sliding_window", 4096) is not None
        first = hf.integer("max_window_layers", 28)
        kinds = ["sliding_attention" if sliding and i >= first else "full_attention" for i in range(layers)]
    window = None
    if "sliding_attention" in kinds:
        window = hf.integer("sliding_window", 4096)
    if any(kind != kinds[0] or kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise UserError(f"{hf.where}: layer_types must be all full_attention or all sliding_attention here, not mixed")
    values["attention"] |= {"qk_norm": True, "window": window}
    return values


def _read_bert(hf: Fields, names: Collection[str], lm: bool) -> dict[str, Any]:
    hf.must(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    hf.no_attention_dropout("attention_probs_dropout_prob", 0.1)
    kind = hf.choice("hidden_act", "gelu", _ACTIVATIONS)
    return {
        "shape": "encoder",
        "layers": hf.integer("num_hidden_layers", 12),
        "heads": hf.integer("num_attention_heads", 12),
        "dim": hf.integer("hidden_size", 768),
        "context": hf.integer("max_position_embeddings", 512),
        "vocab_size": hf.integer("vocab_size", 30522),
        "token_types": hf.integer("type_vocab_size", 2),
        "tied": hf.flag("tie_word_embeddings", True) or not lm,
        "dropout": hf.dropout("hidden_dropout_prob", default=0.1),
        "output_transform": lm,
        "output_bias": lm,
        "init_std": hf.number("initializer_range", 0.02),
        "attention": {"bias": True},
        "mlp": {"kind": kind, "hidden_dim": hf.integer("intermediate_size", 3072), "bias": True},
        "position": {"kind": "learned"},
        "norm": {
            "kind": "layer",
            "placement": "post",
            "eps": hf.number("layer_norm_eps", 1e-12),
            "bias": True,
            "embedding": True,
        },
    }


def _read_bart(hf: Fields, names: Collection[str], lm: bool) -> dict[str, Any]:
    hf.must(is_encoder_decoder=True, is_decoder=False, normalize_before=False, add_final_layer_norm=False)
    hf.must(static_position_embeddings=False, normalize_embedding=True, add_bias_logits=False)
    hf.no_attention_dropout("attention_dropout", 0.0)
    heads, hidden = hf.integer("encoder_attention_heads", 16), hf.integer("encoder_ffn_dim", 4096)
    for name, value in (("decoder_attention_heads", heads), ("decoder_ffn_dim", hidden)):
        if hf.integer(name, value) != value:
            raise UserError(f"{hf.where}: {name} differs from the encoder's {value}, and both sides are alike here")
    for name in ("activation_dropout", "encoder_layerdrop", "decoder_layerdrop"):
        if rate := hf.number(name, 0.0):
            hf.notes.append(f"{name} is {rate}, and has no place here")
    layers = hf.integer("encoder_layers", 12)
    return {
        "shape": "encoder-decoder",
        "layers": layers,
        "decoder_layers": hf.integer("decoder_layers", 12),
        "heads": heads,
        "dim": hf.integer("d_model", 1024),
        "context": hf.integer("max_position_embeddings", 1024),
        "vocab_size": hf.integer("vocab_size", 50265),
        "source_embedding": "encoder.embed_tokens.weight" in names,
        "tied": hf.flag("tie_word_embeddings", True) or not lm,
        "dropout": hf.dropout("dropout", default=0.1),
        "embedding_scale": hf.flag("scale_embedding", False),
        "output_bias": lm,
        "init_std": hf.number("init_std", 0.02),
        "attention": {"bias": True},
        "mlp": {
            "kind": hf.choice("activation_function", "gelu", _ACTIVATIONS),
            "hidden_dim": hidden,
            "bias": True,
        },
        "position": {"kind": "learned"},
        "norm": {"kind": "layer", "placement": "post", "eps": BART_EPS, "bias": True, "embedding": True},
    }


_READERS: dict[str, Callable[[Fields, Collection[str], bool], dict[str, Any]]] = {
    "gpt2": _read_gpt2,
    "llama": _read_llama,
    "qwen3": _read_qwen3,
    "bert": _read_bert,
    "bart": _read_bart,
}


def read_config(family: str, fields: Fields, names: Collection[str], *, lm: bool) -> ModelConfig:
    """The settings of a model of `family`.

    Args:
        names: the tensors of its files, by their plain names (BART's own encoder embedding is no field of its config).
        lm: whether the architecture has a language model's head.

    Raises `UserError` that names the field for an option that our model does not compute.
    """
    try:
        return from_dict(ModelConfig, _READERS[family](fields, names, lm), "model.")
    except UserError as error:
        if fields.where in str(error):
            raise
        raise UserError(f"{fields.where}: {error}") from None
