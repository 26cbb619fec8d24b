"""`ModelConfig` as config.json of the family that can express it; what none can is refused by the field's name."""

from collections.abc import Callable
from typing import Any

from minillm.config import ModelConfig, UserError
from minillm.interop.configs import BART_EPS

_ACTIVATIONS = {
    "gelu": "gelu", "gelu-tanh": "gelu_new", "relu": "relu", "relu2": "relu2", "silu": "silu", "tanh": "tanh",
}  # fmt: skip
_GATES = {"swiglu": "silu", "geglu": "gelu"}
TITLES = {"gpt2": "GPT-2", "llama": "Llama", "qwen3": "Qwen3", "bert": "BERT", "bart": "BART"}

_PLAIN: dict[str, tuple[Any, ...]] = {
    "softcap": (None,),
    "attention.softcap": (None,),
    "speedrun.ngrams": (0,),
}
_FULL_HEADS = {**_PLAIN, "attention.qk_norm": (False,), "attention.window": (None,), "mlp.kind": tuple(_ACTIVATIONS)}
_LAYER_NORM: dict[str, tuple[Any, ...]] = {"norm.kind": ("layer",), "position.kind": ("learned",)}
_LLAMA: dict[str, tuple[Any, ...]] = {
    **_PLAIN,
    "position.kind": ("rope",),
    "norm.kind": ("rms",),
    "norm.placement": ("pre",),
    "norm.embedding": (False,),
    "mlp.kind": tuple(_GATES),
    "embedding_scale": (False,),
    "token_types": (0,),
    "output_transform": (False,),
    "output_bias": (False,),
}
_NEEDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        **_LAYER_NORM,
        **_FULL_HEADS,
        "norm.placement": ("pre",),
        "norm.embedding": (False,),
        "embedding_scale": (False,),
        "token_types": (0,),
        "output_transform": (False,),
        "output_bias": (False,),
    },
    "llama": {**_LLAMA, "attention.window": (None,)},
    "qwen3": {**_LLAMA, "mlp.bias": (False,)},
    "bert": {
        **_LAYER_NORM,
        **_FULL_HEADS,
        "norm.placement": ("post",),
        "norm.embedding": (True,),
        "embedding_scale": (False,),
    },
    "bart": {
        **_LAYER_NORM,
        **_FULL_HEADS,
        "norm.placement": ("post",),
        "norm.embedding": (True,),
        "norm.eps": (BART_EPS,),
        "token_types": (0,),
        "output_transform": (False,),
    },
}


def family_of(config: ModelConfig) -> str:
    """The family that computes what `config` says. Raises `UserError` naming the field that it cannot express."""
    if config.shape == "decoder":
        family = "gpt2" if config.position.kind == "learned" else "qwen3" if config.attention.qk_norm else "llama"
    else:
        family = "bert" if config.shape == "encoder" else "bart"
    for path, allowed in _NEEDS[family].items():
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        if value not in allowed:
            raise _refusal(family, path, value, f"only {' or '.join(map(_show, allowed))}")
    whole = config.heads * config.head_width == config.dim
    if family in ("gpt2", "bert", "bart"):
        if config.key_value_heads != config.heads:
            raise _refusal(family, "kv_heads", config.kv_heads, "as many as there are heads")
        if not whole:
            raise _refusal(family, "head_dim", config.head_dim, f"only dim / heads = {config.dim / config.heads:g}")
    if family == "llama" and config.dim % config.heads:
        raise _refusal(family, "heads", config.heads, f"only divisors of dim ({config.dim})")
    if family == "bert" and not config.output_transform and (config.output_bias or not config.tied):
        raise _refusal(family, "output_transform", False, "a masked-LM head with it")
    return family


def has_head(config: ModelConfig) -> bool:
    """Whether the export has a language model's head. BERT's begins with a transform; without one it is the body."""
    return config.shape != "encoder" or config.output_transform


def write_config(config: ModelConfig, family: str, name: str, ids: dict[str, Any]) -> dict[str, Any]:
    """config.json.

    Args:
        name: of the architecture.
        ids: bos_token_id, eos_token_id, pad_token_id.
    """
    values = _WRITERS[family](config)
    tied = config.tied and not config.source_embedding
    shared = {"vocab_size": config.vocab_size, "tie_word_embeddings": tied, "dtype": "float32", "use_cache": True}
    return {"architectures": [name], "model_type": family, **values, **shared, **ids}


def architecture(config: ModelConfig, family: str) -> str:
    """The class of Transformers' that the export is for."""
    names = {
        "gpt2": "GPT2LMHeadModel",
        "llama": "LlamaForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "bert": "BertForMaskedLM" if has_head(config) else "BertModel",
        "bart": "BartForConditionalGeneration",
    }
    return names[family]


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_embd": config.dim,
        "n_inner": config.mlp_width,
        "n_positions": config.context,
        "activation_function": _ACTIVATIONS[config.mlp.kind],
        "layer_norm_epsilon": config.norm.eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": config.init_std,
    }


def _llama(config: ModelConfig) -> dict[str, Any]:
    position = config.position
    rope: dict[str, Any] = {"rope_type": position.scaling or "default", "rope_theta": position.theta}
    if position.scaling:
        rope["factor"] = position.scaling_factor
    if position.scaling == "llama3":
        rope |= {
            "low_freq_factor": position.low_frequency_factor,
            "high_freq_factor": position.high_frequency_factor,
            "original_max_position_embeddings": position.original_context,
        }
    return {
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context,
        "hidden_act": _GATES[config.mlp.kind],
        "rms_norm_eps": config.norm.eps,
        "attention_bias": config.attention.bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.mlp.bias,
        "initializer_range": config.init_std,
        "rope_parameters": rope,
        # what readers from before `rope_parameters` look for
        "rope_theta": position.theta,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if position.scaling else None,
    }


def _qwen3(config: ModelConfig) -> dict[str, Any]:
    values = _llama(config)
    del values["mlp_bias"]
    window = config.attention.window
    if window is not None:
        kinds = ["sliding_attention"] * config.layers
        values |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0, "layer_types": kinds}
    return values


def _bert(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context,
        "type_vocab_size": config.token_types or 1,
        "hidden_act": _ACTIVATIONS[config.mlp.kind],
        "layer_norm_eps": config.norm.eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": config.init_std,
    }


def _bart(config: ModelConfig) -> dict[str, Any]:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("attention_heads", config.heads), ("ffn_dim", config.mlp_width), ("layerdrop", 0.0))
    }
    return {
        **sides,
        "is_encoder_decoder": True,
        "encoder_layers": config.layers,
        "decoder_layers": config.decoder_layers or config.layers,
        "d_model": config.dim,
        "max_position_embeddings": config.context,
        "activation_function": _ACTIVATIONS[config.mlp.kind],
        "scale_embedding": config.embedding_scale,
        "dropout": config.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "init_std": config.init_std,
        "forced_eos_token_id": None,  # else BART's default, 2, would end every text
    }


_WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen3": _qwen3,
    "bert": _bert,
    "bart": _bart,
}


_PRESETS = {"gpt2": "gpt2", "qwen3": "default", "bert": "bert-base or bert-tiny"}
"""What trains a model of the family."""


def _refusal(family: str, path: str, value: Any, possible: str) -> UserError:
    such = f"--preset {_PRESETS[family]} trains a model that" if family in _PRESETS else "a model that is trained so"
    return UserError(
        f"model.{path}={_show(value)} cannot be written in Hugging Face's format: {TITLES[family]}, the nearest "
        f"family, has {possible}; {such} can be"
    )


def _show(value: Any) -> str:
    return "off" if value is None else str(value)
