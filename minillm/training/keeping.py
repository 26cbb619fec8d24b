"""What a finetuned model forgets, and what keeps it from it.

    forgetting     loss on the text that it was pretrained on, before and after
    replay         loss + share · (loss on rows of that text)          (Robins 1995, "rehearsal")
    l2_to_start    loss + strength / 2 · Σ (w − w₀)²                   L2-SP (Li et al. 2018, arXiv:1802.01483)

w are the trained weights of the Transformer, w₀ where they were; all three are per step, whatever the micro-batches.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from minillm.data.batch import Batch
from minillm.data.loader import Loader, validation
from minillm.model.heads import TaskModel
from minillm.training.objectives import Count, Objective, evaluate, likelihood

METER_BATCHES, ROWS = 4, 16
"""The meter reads so many batches of so many rows: enough to see what is lost, at little cost."""


@dataclass(frozen=True)
class OldText:
    """The text of the pretraining, as its run folder has it.

    Args:
        train, val: its streams of tokens.
        objective: what was predicted there, one of minillm/data/corpus.py.
    """

    train: Any
    val: Any
    objective: Any
    context: int

    def held_out(self) -> Iterable[Batch]:
        return islice(validation(self.val, self.objective, context=self.context, rows=ROWS), METER_BATCHES)

    def loss(self, model: nn.Module, poll: Callable[[], None], precision: Callable[[], Any]) -> float:
        """Mean loss on held-out text, in nats per target; of a model with a head what lies under it."""
        model = _transformer(model)
        device = next(model.parameters()).device
        training = model.training
        result = evaluate(model, (batch.to(device) for batch in self.held_out()), precision, poll)
        model.train(training)
        return result.loss


def with_replay(objective: Objective, count: Count, old: OldText, share: float, seed: int) -> Objective:
    """The objective, and `share` times the mean loss on as many old rows as the batch has.

    Which rows is a function of the batch's samples alone, so that a resumed run reads the same.
    """
    loader = Loader(old.train, old.objective, context=old.context, seed=seed)

    def total(model: nn.Module, batch: Batch) -> Tensor:
        rows = loader.batch(batch.samples[0], len(batch.samples)).to(batch.ids.device)
        replayed = likelihood(_transformer(model), rows) / max(1, rows.counted)
        return objective(model, batch) + share * count(batch) * replayed

    return total


def l2_to_start(objective: Objective, count: Count, start: nn.Module, strength: float) -> Objective:
    """The objective, and a pull of every trained weight of the Transformer towards its value in `start` now."""
    begun = {name: p.detach().clone() for name, p in _transformer(start).named_parameters() if p.requires_grad}

    def total(model: nn.Module, batch: Batch) -> Tensor:
        now = dict(_transformer(model).named_parameters())
        distance = torch.stack([(now[name] - weight).square().sum() for name, weight in begun.items()]).sum()
        return objective(model, batch) + strength / 2 * count(batch) * distance

    return total


def _transformer(model: nn.Module) -> nn.Module:
    return model.transformer if isinstance(model, TaskModel) else model
