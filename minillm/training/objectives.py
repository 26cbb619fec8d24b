"""What training minimises, summed over the targets that count.

    likelihood         −Σ log p(target): next token, masked tokens, corrupted spans, replies, translations
    label_loss         −Σ w_c log p(class) of a row, or of the first piece of each word
    labels_loss        binary cross-entropy of each label of a row
    number_loss        Σ (output − target)²
    span_loss          −Σ log p(first) + log p(last), over the places of a row
    preference_loss    −Σ log σ(β (log π(c)/π₀(c) − log π(r)/π₀(r)))   DPO: eq. 7 of arXiv:2305.18290

A batch says what should have been predicted (see minillm/data), and that is all a loss needs.
B rows, T tokens, L labels; π the model, π₀ the model before, c a chosen and r a rejected reply.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm import ops
from minillm.config import TrainConfig
from minillm.data.batch import IGNORED, Batch

Objective = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> sum of the losses over the batch's targets that count, fp32."""
Count = Callable[[Batch], int]
"""batch -> how many targets count."""


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


def label_loss(model: nn.Module, batch: Batch, weights: Tensor | None = None) -> Tensor:
    """Outputs [B, L] or [B, T, L] against classes [B] or [B, T]; `weights` [L] multiply each class's loss."""
    outputs = model(batch.ids, **batch.inputs()).float().flatten(0, -2)
    weights = None if weights is None else weights.to(outputs.device)
    return F.cross_entropy(outputs, batch.targets.flatten(), weights, ignore_index=IGNORED, reduction="sum")


def labels_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Outputs [B, L] against zeros and ones [B, L]."""
    outputs = model(batch.ids, **batch.inputs()).float()
    return F.binary_cross_entropy_with_logits(outputs, batch.targets, reduction="sum")


def number_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Outputs [B, 1] against numbers [B]."""
    return (model(batch.ids, **batch.inputs()).float().squeeze(-1) - batch.targets).square().sum()


def span_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Outputs [B, T, 2] against places [B, 2]; padding is no place."""
    return F.cross_entropy(span_scores(model, batch), batch.targets, ignore_index=IGNORED, reduction="sum")


def span_scores(model: nn.Module, batch: Batch) -> Tensor:
    """[B, T, 2] score of each place as the first and as the last token of the answer; −inf for padding."""
    outputs = model(batch.ids, **batch.inputs()).float()
    return outputs if batch.segments is None else outputs.masked_fill((batch.segments < 0).unsqueeze(-1), -torch.inf)


def row_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """[B] log p of all targets of a row together."""
    x = model.head.transform(model.states(batch.ids, **batch.inputs()))
    head = model.head
    losses = [  # a row at a time: the operator gives one sum, and never holds all logits
        ops.linear_cross_entropy(row, model.output_weight, targets, head.bias, softcap=head.softcap)
        for row, targets in zip(x, batch.targets, strict=True)
    ]
    return -torch.stack(losses)


def reward_margins(model: nn.Module, start: nn.Module, batch: Batch, beta: float) -> Tensor:
    """[B / 2] β (log π(c)/π₀(c) − log π(r)/π₀(r)); rows 2i are chosen, rows 2i + 1 rejected.

    Args:
        start: π₀, which gets no gradient.
    """
    with torch.no_grad():
        before = row_likelihoods(start, batch)
    reward = beta * (row_likelihoods(model, batch) - before)
    return reward[0::2] - reward[1::2]


def preference_loss(model: nn.Module, start: nn.Module, batch: Batch, beta: float) -> Tensor:
    """As `reward_margins`, with the loss of each pair summed up."""
    return -F.logsigmoid(reward_margins(model, start, batch, beta)).sum()


def counted(batch: Batch) -> int:
    return batch.counted


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean over the targets, in nats."""
    targets: int


@torch.no_grad()  # not inference_mode: weights that fully_shard gathers there would stay unfit for training
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    precision,
    poll: Callable[[], None],
    score: Objective = likelihood,
    count: Count = counted,
    total: Callable[[float], float] = lambda mine: mine,
) -> Evaluation:
    """Mean loss over all targets of `batches`, each counted once; `poll` runs between batches and may raise.

    Args:
        total: a number of this process -> its sum over all processes, of the same type.
    """
    model.eval()
    # Losses in fp32 add up in fp64 without rounding, so that the sum is the same in whatever order and wherever.
    loss, targets = 0.0, 0
    try:
        for batch in batches:
            with precision():
                loss += score(model, batch).double().item()
            targets += count(batch)
            poll()
    finally:
        model.train()
    loss, targets = total(loss), total(targets)
    return Evaluation(loss / max(1, targets), targets)
