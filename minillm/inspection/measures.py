"""All that is measured of one text, as plain values: for a page, or for a program."""

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from minillm.config import UserError
from minillm.inspection.ablation import head_ablation
from minillm.inspection.attention import attention_maps
from minillm.inspection.depths import logit_lens
from minillm.inspection.gradients import blocks_alone, gradient_flow, without_additions
from minillm.inspection.reading import Reading, losses
from minillm.model.transformer import Transformer

BIT = math.log(2)


def inspect(model: Transformer, read: Reading, name: Callable[[int], str]) -> dict[str, Any]:
    """Losses are in bits a token; `name` gives a token's text. Of an encoder-decoder the text is what it says.

    Under "attention" and "ablation_bits" stands each kind of attention by its name, under "gradients" each stack.

    Raises `UserError` where the loss is not finite.
    """
    whole = losses(model, read).detach()
    if not bool(whole.isfinite().all()):
        raise UserError("the model's loss on this text is not finite: its weights are broken; take another checkpoint")
    return {
        "shape": model.config.shape,
        **_tokens(read.text, name),
        "source": None if read.source is None else _tokens(read.source, name),
        "scored": read.scored.tolist(),
        "bits": (whole / BIT).tolist(),
        "mean_bits": float(whole.mean() / BIT),
        "attention": {kind: maps.tolist() for kind, maps in attention_maps(model, read).items()},
        "lens": _lens(model, read, name),
        "ablation_bits": {kind: (nats / BIT).tolist() for kind, nats in head_ablation(model, read).items()},
        "gradients": _gradients(model, read),
    }


def _tokens(ids: Tensor, name: Callable[[int], str]) -> dict[str, Any]:
    return {"ids": ids[0].tolist(), "tokens": [name(i) for i in ids[0].tolist()]}


def _lens(model: Transformer, read: Reading, name: Callable[[int], str]) -> list[dict[str, Any]]:
    lens = []
    for logits in logit_lens(model, read):  # one depth at a time: [N, V] of them all would be gigabytes
        best, likeliest = logits.softmax(-1).max(-1)
        lens.append(
            {
                "mean_bits": float(F.cross_entropy(logits, read.targets) / BIT),
                "ids": likeliest.tolist(),
                "tokens": [name(i) for i in likeliest.tolist()],
                "probabilities": best.tolist(),
            }
        )
    return lens


def _gradients(model: Transformer, read: Reading) -> dict[str, dict[str, list[float | None]]]:
    """Without additions a value may lie beyond what fp32 holds: it is None then, since JSON has no infinity."""
    flow = gradient_flow(model, read)
    with blocks_alone(model):
        alone = gradient_flow(model, read)
    with without_additions(model):
        removed = gradient_flow(model, read)
    return {
        name: {
            "streams": _finite(flow[name].streams),
            "weights": _finite(flow[name].weights),
            "likeness": _finite(flow[name].likeness),
            "streams_blocks_alone": _finite(alone[name].streams),
            "streams_without_additions": _finite(removed[name].streams),
            "likeness_without_additions": _finite(removed[name].likeness),
        }
        for name in flow
    }


def _finite(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
