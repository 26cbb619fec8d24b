"""Small models with a method in them, moved away from where they start."""

from typing import Any

import torch
from torch import Tensor, nn

from minillm.peft.config import MethodConfig
from minillm.peft.inject import Adapted, inject
from tests.model.configs import build, small

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freeze": {"method": "freeze", "freeze_layers": 1},
    "lora": {"method": "lora", "rank": 3, "alpha": 5.0},
    "adalora": {"method": "adalora", "rank": 2, "initial_rank": 3},
    "adapter": {"method": "adapter", "width": 5},
    "prefix": {"method": "prefix", "length": 3},
    "prefix-network": {"method": "prefix", "length": 3, "prefix_hidden": 6},
    "prompt": {"method": "prompt", "length": 3},
}
SHAPES: dict[str, dict[str, Any]] = {
    "decoder": {"kv_heads": 2},
    "encoder": {"shape": "encoder", "position": {"kind": "learned"}, "norm": {"placement": "post"}},
    "encoder-decoder": {"shape": "encoder-decoder", "decoder_layers": 3, "mlp": {"kind": "gelu"}},
}


class Tagger(nn.Module):
    """A Transformer with a task's head on top."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer
        self.head = nn.Linear(16, 2).to(transformer.embedding.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.transformer.states(ids))


def inputs(shape: str, rows: int = 2, T: int = 6) -> dict[str, Tensor]:
    """Keyword arguments of a model of this shape; an encoder-decoder's source has padding."""
    ids = {"ids": torch.randint(29, (rows, T))}
    if shape == "encoder-decoder":
        return ids | {
            "source": torch.randint(29, (rows, 5)),
            "source_segments": torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, -1, -1]])[:rows],
        }
    return ids


def shaken(method: str, shape: str = "decoder", dtype: torch.dtype = torch.float64, **changes: Any) -> Adapted:
    """A model of random weights with a method whose every parameter has moved."""
    adapted = inject(build(small(**{**SHAPES[shape], **changes}), dtype), MethodConfig(**METHODS[method]))
    move(adapted.model)
    return adapted


@torch.no_grad()
def move(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.2 * torch.randn_like(parameter)


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
