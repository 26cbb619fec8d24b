"""Small random models of Transformers' in every variant that a family has, saved as their own code saves them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

V = 41
_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 20}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
BASES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 16, "n_positions": 32, "vocab_size": V},
    "llama": {**_SMALL, "max_position_embeddings": 32, "vocab_size": V},
    "qwen3": {**_SMALL, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 32, "vocab_size": V},
    "bert": {**_SMALL, "max_position_embeddings": 32, "vocab_size": V},
    "bart": {
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "d_model": 16,
        "encoder_ffn_dim": 20,
        "decoder_ffn_dim": 20,
        "max_position_embeddings": 32,
        "vocab_size": V,
    },
}
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "GPT2LMHeadModel", {}),
    ("gpt2", "GPT2LMHeadModel", {"activation_function": "gelu", "tie_word_embeddings": False, "n_inner": 24}),
    ("gpt2", "GPT2LMHeadModel", {"activation_function": "relu", "reorder_and_upcast_attn": True}),
    ("gpt2", "GPT2LMHeadModel", {"activation_function": "silu", "layer_norm_epsilon": 1e-3}),
    ("gpt2", "GPT2LMHeadModel", {"activation_function": "tanh"}),
    ("gpt2", "GPT2LMHeadModel", {"activation_function": "gelu_fast"}),
    ("gpt2", "GPT2LMHeadModel", {"activation_function": "relu2"}),
    ("gpt2", "GPT2Model", {"activation_function": "gelu_pytorch_tanh"}),
    ("llama", "LlamaForCausalLM", {}),
    ("llama", "LlamaForCausalLM", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    ("llama", "LlamaForCausalLM", {"num_key_value_heads": 1, "attention_bias": True, "rope_parameters": LINEAR}),
    ("llama", "LlamaForCausalLM", {"mlp_bias": True, "head_dim": 6, "hidden_act": "gelu", "rms_norm_eps": 1e-3}),
    ("llama", "LlamaModel", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("qwen3", "Qwen3ForCausalLM", {}),
    ("qwen3", "Qwen3ForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "rope_parameters": LLAMA3}),
    ("qwen3", "Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
    ("qwen3", "Qwen3Model", {"rope_parameters": LINEAR}),
    ("bert", "BertForMaskedLM", {}),
    ("bert", "BertForMaskedLM", {"tie_word_embeddings": False, "hidden_act": "gelu_new", "type_vocab_size": 3}),
    ("bert", "BertForPreTraining", {"hidden_act": "relu"}),
    ("bert", "BertModel", {"hidden_act": "silu", "layer_norm_eps": 1e-5}),
    ("bart", "BartForConditionalGeneration", {}),
    ("bart", "BartForConditionalGeneration", {"tie_word_embeddings": False, "activation_function": "relu"}),
    ("bart", "BartForConditionalGeneration", {"scale_embedding": True, "activation_function": "gelu_new"}),
    ("bart", "BartModel", {"activation_function": "silu", "decoder_layers": 3}),
]


def name_of(variant: tuple[str, str, dict[str, Any]]) -> str:
    return "-".join(
        [
            variant[1],
            *(f"{key}={getattr(value, 'get', lambda _, v=value: v)('rope_type')}" for key, value in variant[2].items()),
        ]
    )


def make(family: str, architecture: str, **changes: Any) -> nn.Module:
    """A model of Transformers' in evaluation mode whose every number is random, norms and biases too."""
    import transformers

    values = {**BASES[family], **changes}
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = 1.0 if ("norm" in name.lower() and name.endswith("weight")) or ".ln_" in name else 0.0
            parameter.copy_(start + 0.3 * torch.randn_like(parameter))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))
    return model


def save(model: nn.Module, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def output(model: nn.Module, **inputs: Any) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        out = model(**inputs)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if hasattr(out, name):
            return getattr(out, name)
    raise AssertionError(f"no output known among {list(out)}")
