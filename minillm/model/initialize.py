"""How the weights begin, as one table.

    tensor                         normal                          xavier
    embeddings, output matrix      N(0, init_std)                  N(0, dim^-1/2)
    matrices inside the blocks     N(0, init_std)                  U(±sqrt(6 / (rows + columns)))
    … that end a half-block        N(0, init_std / sqrt(2 · L))    the same as the others
    norm weights, biases           1, 0                            1, 0

L counts the blocks of the stack; the smaller start of what is added to the stream keeps its variance from growing
with depth (GPT-2, §2.3). With it the logits begin near 0, and the first loss near ln V.
"""

import math

from torch import nn

from minillm.config import ModelConfig


def initialize(model: nn.Module, config: ModelConfig) -> None:
    """Draws every weight from torch's global generator, in the order of `named_modules`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            ends_half_block = name.endswith(("out_proj", "down_proj"))
            depth = math.sqrt(2 * config.layers) if ends_half_block else 1.0
            if config.init == "xavier":
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.normal_(module.weight, std=config.init_std / depth)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=_embedding_std(config))
    output = model.get_submodule("head").weight
    if isinstance(output, nn.Parameter):  # untied
        nn.init.normal_(output, std=_embedding_std(config))


def _embedding_std(config: ModelConfig) -> float:
    return config.init_std if config.init == "normal" else config.dim**-0.5
