"""Small models and tokenizers of ours, to be exported."""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizer
from minillm.config import ModelConfig, from_dict, merge, to_dict
from minillm.model.transformer import Transformer
from tests.model.configs import build

TEXT = [
    "def moving_average(values, width):\n    return [sum(values[i : i + width]) / width for i in range(len(values))]\n",
    "class Account:\n\tdef __init__(self, owner, balance=0):\n\t\tself.owner = owner  # who may withdraw\n",
    "Größe und café: a few words of prose, with numbers 1, 22, 333 and    runs    of spaces.\n\n\n",
    "if self.owner is None:\n    raise ValueError('the account of nobody')\nreturn self.balance\n",
]
_BLOCKS = {"layers": 2, "heads": 4, "dim": 16, "context": 64}
_POST = {"kind": "layer", "placement": "post", "bias": True, "embedding": True}
_WIDE = {"hidden_dim": 20, "bias": True}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "attention": {"bias": True},
        "mlp": {"kind": "gelu-tanh", **_WIDE},
        "position": {"kind": "learned"},
        "norm": {"kind": "layer", "bias": True},
    },
    "llama": {"mlp": {"hidden_dim": 20}, "kv_heads": 2},
    "qwen3": {"mlp": {"hidden_dim": 20}, "kv_heads": 2, "head_dim": 6, "attention": {"qk_norm": True}},
    "bert": {
        "shape": "encoder",
        "token_types": 2,
        "output_transform": True,
        "output_bias": True,
        "attention": {"bias": True},
        "mlp": {"kind": "gelu", **_WIDE},
        "position": {"kind": "learned"},
        "norm": _POST,
    },
    "bart": {
        "shape": "encoder-decoder",
        "decoder_layers": 1,
        "output_bias": True,
        "attention": {"bias": True},
        "mlp": {"kind": "gelu", **_WIDE},
        "position": {"kind": "learned"},
        "norm": {**_POST, "eps": 1e-5},
    },
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in SHAPES),
    *((family, {"tied": False}) for family in SHAPES),
    ("gpt2", {"attention": {"bias": False}, "mlp": {"bias": False, "kind": "relu"}, "norm": {"bias": False}}),
    ("gpt2", {"mlp": {"kind": "relu2"}, "dropout": 0.1}),
    ("llama", {"mlp": {"kind": "geglu", "bias": True}, "attention": {"bias": True}, "head_dim": 6}),
    ("llama", {"position": {"scaling": "llama3", "original_context": 16, "theta": 100.0}}),
    ("llama", {"position": {"scaling": "linear", "scaling_factor": 3.0}, "dropout": 0.1}),
    ("qwen3", {"attention": {"window": 5, "bias": True}}),
    ("bert", {"token_types": 0, "output_bias": False, "mlp": {"kind": "silu"}, "norm": {"eps": 1e-3}}),
    ("bert", {"output_transform": False, "output_bias": False}),
    ("bart", {"embedding_scale": True, "output_bias": False, "mlp": {"kind": "tanh"}}),
    ("bart", {"tied": False, "source_embedding": True}),
    ("bart", {"source_embedding": True}),
]


def name_of(variant: tuple[str, dict[str, Any]]) -> str:
    return "-".join([variant[0], *variant[1]])


def tokenizer_of(type: str, size: int = 340) -> tokenizer.Tokenizer:
    return tokenizer.train(TEXT, type=type, vocab_size=size)


def model_of(family: str, vocab_size: int, **changes: Any) -> Transformer:
    """A random model in fp32, norms and biases shaken."""
    import torch

    values = merge({**_BLOCKS, **SHAPES[family], "vocab_size": vocab_size}, changes)
    return build(from_dict(ModelConfig, values), torch.float32)


def finetuned_run(folder: Path, model: Transformer, tokenizer: tokenizer.Tokenizer, method: dict[str, Any]) -> Path:
    """A run folder of `--task chat` by this method, every weight that it moves shaken."""
    from minillm.peft.config import MethodConfig
    from minillm.peft.inject import inject
    from minillm.training import checkpoint
    from tests.peft.helpers import move

    config = MethodConfig(**method)
    adapted = inject(copy.deepcopy(model), config)
    move(adapted.model)
    tokenizer.save(folder / "tokenizer")
    task = {"name": "chat", "head": None, "info": {}}
    values = {"format": 1, "settings": {"model": to_dict(model.config)}, "task": task, "method": asdict(config)}
    checkpoint.save(
        folder, 3, weights=adapted.model.state_dict(), state={}, config=values, tokenizer=folder / "tokenizer", keep=1
    )
    return folder
