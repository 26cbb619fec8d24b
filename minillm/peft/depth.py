"""How deep a parameter stands in its stack: what freezing and layer-wise learning rates go by.

    0 embeddings    1 … L blocks from the input on    L + 1 final norm, head, and what is not part of the Transformer

Each stack of an encoder-decoder counts for itself, with its own L.
"""

import re

from minillm.config import ModelConfig

_STACK = re.compile(r"(?:^|\.)(encoder|decoder)\.")
_BLOCK = re.compile(r"\.blocks\.(\d+)\.")
_BEFORE = re.compile(r"(?:^|\.)(?:(?:type_|source_|ngram_)?embedding|embedding_norm|front)\.")


def stack_layers(config: ModelConfig, stack: str | None) -> int:
    """L of the stack called encoder or decoder; of what both share (None) the larger one."""
    decoder = (config.decoder_layers if config.shape == "encoder-decoder" else None) or config.layers
    return {"encoder": config.layers, "decoder": decoder}.get(stack, max(config.layers, decoder))


def depth(name: str, config: ModelConfig) -> tuple[int, int]:
    """(depth, L) of the parameter `name`, whatever module the Transformer stands in."""
    stack = _STACK.search(name)
    layers = stack_layers(config, stack[1] if stack else None)
    if block := _BLOCK.search(name):
        return int(block[1]) + 1, layers
    return (0 if _BEFORE.search(name) else layers + 1), layers


def layer_scale(name: str, config: ModelConfig, decay: float) -> float:
    """The factor of a parameter's learning rate: decay^(L + 1 − depth), which is 1 for the head.

    Layer-wise decay (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146, "discriminative fine-tuning"; in this form
    Clark et al. 2020, arXiv:2003.10555): what lies near the input is general, and should move less. decay=1 is off.
    """
    at, layers = depth(name, config)
    return decay ** (layers + 1 - at)
