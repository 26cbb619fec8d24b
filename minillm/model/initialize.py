"""How the weights begin, as one table.

    tensor                         normal                          xavier
    embeddings, output matrix      N(0, init_std)                  N(0, init_std)
    matrices                       N(0, init_std)                  U(±sqrt(6 / (rows + columns)))
    … that end a half-block        N(0, init_std / sqrt(2 · L))    the same as the others
    norm weights, biases           1, 0                            1, 0

L counts the blocks of the stack; the smaller start of what is added to the stream keeps its variance from growing
with depth (GPT-2, §2.3). Small rows of the output matrix let the logits begin near 0, and the first loss near ln V:
the N(0, dim^-1/2) of the original's own code gives logits of variance 1 and a first loss of ln V + 1/2 and more.
"""

import math

from torch import nn

from minillm.config import ModelConfig


def initialize(model: nn.Module, config: ModelConfig) -> None:
    """Draws every weight from torch's global generator, in the order of `named_modules`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layers = (config.decoder_layers if name.startswith("decoder.") else None) or config.layers
            depth = math.sqrt(2 * layers) if name.endswith(("out_proj", "down_proj")) else 1.0
            if config.init == "xavier":
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.normal_(module.weight, std=config.init_std / depth)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=config.init_std)
    output = model.get_submodule("head").weight
    if isinstance(output, nn.Parameter):  # untied
        nn.init.normal_(output, std=config.init_std)
