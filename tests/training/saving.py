"""A small real run to save: a model after AdamW steps, with everything that a training state holds."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.training import checkpoint


def trained(seed: int = 0, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A two-layer model and its AdamW after `steps` steps on noise."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))
    matrices, vectors = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    advance(model, optimizer, steps)
    return model, optimizer


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    return {
        "optimizer": optimizer.state_dict(),
        "random": {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss]},
        "position": {"epoch": 2, "sample": 12345, "loss": 0.1 + 0.2},
    }


def save_example(run: Path, step: int, **options: Any) -> Path:
    """A checkpoint of `trained(step)`, with a tokenizer folder of two files."""
    tokenizer = run / "tokenizer"
    if not tokenizer.exists():
        tokenizer.mkdir(parents=True)
        (tokenizer / "tokenizer.model").write_bytes(bytes(range(256)))
        (tokenizer / "manifest.json").write_text('{"type": "bpe"}')
    model, optimizer = trained(step)
    values: dict[str, Any] = {"weights": model.state_dict(), "state": state_of(optimizer), "keep": 3}
    values |= {"config": {"format": 1, "settings": {"seed": step}}, "tokenizer": tokenizer}
    return checkpoint.save(run, step, **(values | options))


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and every bit; a tuple counts as the list that it is saved as."""
    if isinstance(a, Tensor):
        raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]  # so that NaN equals NaN
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)
