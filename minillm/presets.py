"""Named models and runs, as dict literals over the defaults of `config.Settings`.

A run is a model with settings that were tried together; `--preset NAME` starts from it, and every option on the
command line lies on top.
"""

import difflib
from typing import Any

from minillm.config import Settings, UserError, from_dict, merge


def _gpt2(layers: int, heads: int, dim: int) -> dict[str, Any]:
    """Radford et al. 2019, table 2."""
    return {
        "layers": layers, "heads": heads, "dim": dim, "context": 1024, "vocab_size": 50257, "dropout": 0.0,
        "attention": {"bias": True}, "mlp": {"kind": "gelu-tanh", "bias": True}, "position": {"kind": "learned"},
        "norm": {"kind": "layer", "eps": 1e-5, "bias": True},
    }  # fmt: skip


def _llama(layers: int, heads: int, dim: int, **other: Any) -> dict[str, Any]:
    """The Llama family with QK-norm, as Qwen3 has it; what is not said follows (full heads, 8/3 · dim in the MLP)."""
    return merge(
        {
            "layers": layers, "heads": heads, "dim": dim, "context": 2048,
            "attention": {"qk_norm": True}, "mlp": {"kind": "swiglu"},
            "position": {"kind": "rope"}, "norm": {"kind": "rms", "eps": 1e-6},
        },
        other,
    )  # fmt: skip


def _qwen3(dim: int, hidden_dim: int) -> dict[str, Any]:
    """Qwen3 technical report, table 1: heads of 128, wider together than the stream."""
    sizes = {"kv_heads": 8, "head_dim": 128, "context": 40960, "vocab_size": 151936}
    return _llama(28, 16, dim, **sizes, mlp={"hidden_dim": hidden_dim}, position={"theta": 1e6})


_TINY = {"layers": 2, "heads": 4, "dim": 64, "context": 64}
_BERT = {
    "shape": "encoder", "token_types": 2, "dropout": 0.1, "output_transform": True, "output_bias": True,
    "attention": {"bias": True}, "mlp": {"kind": "gelu", "bias": True}, "position": {"kind": "learned"},
    "norm": {"kind": "layer", "placement": "post", "eps": 1e-12, "bias": True, "embedding": True},
}  # fmt: skip
_ORIGINAL = {
    "shape": "encoder-decoder", "dropout": 0.1, "embedding_scale": True, "init": "xavier",
    "attention": {"bias": True}, "mlp": {"kind": "relu", "bias": True}, "position": {"kind": "sinusoidal"},
    "norm": {"kind": "layer", "placement": "post", "eps": 1e-5, "bias": True},
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "gpt2-tiny": merge(_gpt2(2, 4, 64), {"context": 64, "vocab_size": 512}),
    "llama-5m": _llama(6, 4, 256, context=256),
    "llama-30m": _llama(8, 8, 512, context=512),
    "llama-125m": _llama(12, 12, 768, context=1024, kv_heads=4, vocab_size=32768),
    "llama-350m": _llama(24, 16, 1024, vocab_size=32768, mlp={"hidden_dim": 2816}),
    "qwen3-0.6b": _qwen3(1024, 3072),
    "qwen3-1.7b": _qwen3(2048, 6144),
    "llama-tiny": merge(_TINY, {"kv_heads": 2, "attention": {"qk_norm": True}}),
    "bert-base": merge(_BERT, {"layers": 12, "heads": 12, "dim": 768, "context": 512, "vocab_size": 30522}),
    "bert-tiny": merge(_BERT, {**_TINY, "dropout": 0.0}),
    "transformer-base": merge(
        _ORIGINAL,
        {"layers": 6, "heads": 8, "dim": 512, "context": 512, "vocab_size": 37000, "mlp": {"hidden_dim": 2048}},
    ),
    "transformer-tiny": merge(_ORIGINAL, {**_TINY, "dropout": 0.0}),
}

_BIG = {  # one GPU, half a million tokens a step (GPT-3's table 2.1 for the rates)
    "steps": 20_000,
    "optim": {"lr": 6e-4, "weight_decay": 0.1, "warmup": 0.035},
    "train": {"batch": 512, "save_every": 500, "eval_every": 500, "log_every": 10},
}

_LEARNER = {"layers": 4, "heads": 4, "dim": 128, "context": 128, "attention": {"qk_norm": True}}
_QUICK = {"optim": {"name": "muon", "lr": 2e-3, "schedule": "wsd"}, "train": {"batch": 32}}

_SPEEDRUN = {  # everything that pays, whether or not published formats have a place for it
    "layers": 4, "heads": 4, "dim": 256, "context": 256, "tied": False,
    "attention": {"qk_norm": True}, "mlp": {"kind": "relu2"}, "norm": {"embedding": True},
    "speedrun": {"ngrams": 4},
}  # fmt: skip

RUNS: dict[str, dict[str, Any]] = {
    "default": {
        "minutes": 4.5,
        "model": MODELS["llama-5m"],
        "optim": {"name": "muon", "lr": 2e-3, "schedule": "wsd"},
        "train": {"batch": 8},
    },
    "speedrun": {
        "minutes": 4.5,
        "compile": "on",
        "data": {"separate": False},
        "model": _SPEEDRUN,
        "optim": {
            "name": "muon",
            "lr": 6e-3,
            "embedding_lr": 0.05,
            "transfer": True,
            "schedule": "wsd",
            "decay": 0.7,
            "final_lr": 0.0,
        },
        "train": {"batch": 16, "micro_batch": 16},
    },
    "shakespeare-char": {  # nanoGPT's setting for a CPU
        "steps": 2000,
        "tokenizer": {"type": "char"},
        "data": {"validation": 0.1},
        "model": {"layers": 4, "heads": 4, "dim": 128, "context": 64},
        "optim": {"lr": 1e-3, "warmup": 0.05, "beta2": 0.99},
        "train": {"batch": 12, "eval_every": 250},
    },
    # RoPE and pre-norm where BERT and the original have learned positions and post-norm: they learn in minutes
    "mlm-tiny": {"steps": 600, "model": {"shape": "encoder", **_LEARNER}, **_QUICK},
    "seq2seq-tiny": {"steps": 600, "model": {"shape": "encoder-decoder", **_LEARNER}, **_QUICK},
    "gpt2-tiny": {"steps": 200, "model": MODELS["gpt2-tiny"], "tokenizer": {"vocab_size": 512}},
    "llama-tiny": {"steps": 200, "model": MODELS["llama-tiny"], "tokenizer": {"vocab_size": 512}},
}
RUNS["speedrun-char"] = merge(RUNS["speedrun"], {"tokenizer": {"type": "char"}, "data": {"validation": 0.1}})
for _name in MODELS:
    if _name not in RUNS:  # what is left needs a GPU; the tokenizer takes the model's vocabulary
        _vocab = {"vocab_size": MODELS[_name].get("vocab_size", 4096)}
        RUNS[_name] = merge(_BIG, {"model": MODELS[_name], "tokenizer": _vocab})


def preset(name: str) -> dict[str, Any]:
    """The values of a named run. Raises `UserError` with the nearest name for an unknown one."""
    if name not in RUNS:
        near = difflib.get_close_matches(name, RUNS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown preset {name}; {hint}There are: {', '.join(RUNS)}")
    return {"preset": name, **RUNS[name]}


def settings(name: str, *layers: dict[str, Any]) -> Settings:
    """The preset with each of `layers` on top (a config file, then the command line)."""
    values = preset(name)
    for layer in layers:
        values = merge(values, layer)
    return from_dict(Settings, values)
