"""What training minimises: the summed negative log-likelihood of the targets that count.

Next token, masked tokens and corrupted spans are the same objective on different batches: a batch says at each place
what should have been predicted (see minillm/data/corpus.py), and that is all a loss needs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minillm import ops
from minillm.config import TrainConfig
from minillm.data.batch import Batch

Objective = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> sum of the losses over the batch's targets that count, fp32."""


def likelihood(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """-Σ log p(target), in nats."""
    x = model.head.transform(model.states(batch.ids, **batch.inputs()))
    return ops.linear_cross_entropy(
        x.flatten(0, 1),
        model.output_weight,
        batch.targets.flatten(),
        model.head.bias,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=model.head.softcap,
    )


def training_objective(config: TrainConfig) -> Objective:
    """The likelihood with the run's regularisers; validation always takes the bare one."""

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        return likelihood(model, batch, label_smoothing=config.label_smoothing, z_loss=config.z_loss)

    return objective


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean over the targets, in nats."""
    targets: int


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[Batch], precision, poll: Callable[[], None]) -> Evaluation:
    """Mean loss over all targets of `batches`, each counted once; `poll` runs between batches and may raise."""
    model.eval()
    total, targets = 0.0, 0
    try:
        for batch in batches:
            with precision():
                total += likelihood(model, batch).double().item()
            targets += batch.counted
            poll()
    finally:
        model.train()
    return Evaluation(total / max(1, targets), targets)
