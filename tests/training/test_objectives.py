"""What training minimises, against its formulas written out: place by place, with what must not count among them."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from minillm.config import TrainConfig
from minillm.data.batch import IGNORED, Batch
from minillm.model.heads import HeadConfig, TaskModel
from minillm.training import objectives
from minillm.training.objectives import evaluate
from tests.model.configs import build, shake, small

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # the losses are fp32


def batch_of(targets: Tensor) -> Batch:
    """Rows of six tokens, of which the second one ends with two places of padding."""
    segments = torch.zeros(len(targets), 6, dtype=torch.long)
    segments[1, -2:] = -1
    ids = torch.randint(29, (len(targets), 6))
    return Batch(ids=ids, targets=targets, samples=tuple(range(len(targets))), segments=segments)


def head(outputs: int, pool: str | None = "mean") -> TaskModel:
    model = TaskModel(build(small(), torch.float32), HeadConfig(outputs=outputs, pool=pool, dropout=0.0))  # type: ignore[arg-type]
    shake(model.task_head)
    return model.eval()


def outputs_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    return model(batch.ids, segments=batch.segments).detach().double()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_likelihood(softcap: float | None, z_loss: float, smoothing: float) -> None:
    model = build(small(tied=False, softcap=softcap, output_bias=True), torch.float32)
    targets = torch.randint(29, (2, 6))
    targets[0, 1] = targets[1, 4] = targets[1, 5] = IGNORED
    batch, expected = batch_of(targets), 0.0
    logits = outputs_of(model, batch)
    assert softcap is None or logits.abs().max() < softcap
    for row, places in zip(logits, targets.tolist(), strict=True):
        for scores, target in zip(row, places, strict=True):
            if target != IGNORED:
                lse = scores.logsumexp(0)
                expected += (1 - smoothing) * (lse - scores[target]) + smoothing * (lse - scores.mean())
                expected += z_loss * lse**2
    objective = objectives.training_objective(TrainConfig(label_smoothing=smoothing, z_loss=z_loss))
    torch.testing.assert_close(objective(model, batch).double(), expected, **CLOSE)
    if not smoothing and not z_loss:
        rows = objectives.row_likelihoods(model, batch)
        assert rows.shape == (2,) and -rows.sum().item() == pytest.approx(expected.item(), rel=1e-5)
        assert objectives.likelihood(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 3.0])])
@pytest.mark.parametrize("pool", ["mean", None])
def test_labels_of_rows_and_of_words(pool: str | None, weights: Tensor | None) -> None:
    model, targets = head(3, pool), torch.tensor([2, 0, 1])
    if pool is None:
        targets = torch.randint(3, (3, 6))
        targets[0, 2:] = IGNORED
    batch = batch_of(targets)
    outputs = outputs_of(model, batch).view(-1, 3)
    expected = sum(
        (1.0 if weights is None else weights[c].item()) * (scores.logsumexp(0) - scores[c])
        for scores, c in zip(outputs, targets.flatten().tolist(), strict=True)
        if c != IGNORED
    )
    torch.testing.assert_close(objectives.label_loss(model, batch, weights).double(), expected, **CLOSE)


def test_several_labels_and_numbers() -> None:
    model, truth = head(3), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    batch = batch_of(truth)
    p = outputs_of(model, batch).sigmoid()
    expected = -(truth * p.log() + (1 - truth) * (1 - p).log()).sum()
    torch.testing.assert_close(objectives.labels_loss(model, batch).double(), expected, **CLOSE)

    model, batch = head(1), batch_of(torch.tensor([0.5, -2.0]))
    expected = ((outputs_of(model, batch)[:, 0] - batch.targets) ** 2).sum()
    torch.testing.assert_close(objectives.number_loss(model, batch).double(), expected, **CLOSE)


@pytest.mark.parametrize("padded", [True, False])
def test_spans_begin_and_end_on_tokens(padded: bool) -> None:
    model, targets = head(2, None), torch.tensor([[0, 5], [1, 3], [IGNORED, 2]])
    batch = batch_of(targets)
    if not padded:
        batch = Batch(ids=batch.ids, targets=targets, samples=batch.samples)
    outputs, expected = outputs_of(model, batch), 0.0
    for i, (row, ends) in enumerate(zip(outputs, targets.tolist(), strict=True)):
        places = row[:4] if padded and i == 1 else row
        expected += sum(places[:, e].logsumexp(0) - places[at, e] for e, at in enumerate(ends) if at != IGNORED)
    torch.testing.assert_close(objectives.span_loss(model, batch).double(), expected, **CLOSE)
    scores = objectives.span_scores(model, batch)
    assert (scores == -math.inf).sum() == (4 if padded else 0)


def test_a_preference_is_by_how_much_more_than_before() -> None:
    model, start = (build(small(), torch.float32) for _ in range(2))
    targets = torch.randint(29, (4, 6))
    targets[:, 0] = targets[1, -2:] = IGNORED
    batch = batch_of(targets)

    def likelihoods(net: torch.nn.Module) -> Tensor:
        log_p = outputs_of(net, batch).log_softmax(-1)
        kept = targets.clamp(min=0).unsqueeze(-1)
        return (log_p.gather(-1, kept).squeeze(-1) * (targets != IGNORED)).sum(1)

    gain = likelihoods(model) - likelihoods(start)
    margins = torch.stack([0.3 * (gain[0] - gain[1]), 0.3 * (gain[2] - gain[3])])
    torch.testing.assert_close(objectives.reward_margins(model, start, batch, 0.3).double(), margins, **CLOSE)
    loss = objectives.preference_loss(model, start, batch, 0.3)
    torch.testing.assert_close(loss.double(), (1 + (-margins).exp()).log().sum(), **CLOSE)
    loss.backward()
    assert all(p.grad is None for p in start.parameters()) and model.embedding.weight.grad.abs().max() > 0


def test_validation_counts_every_target_once() -> None:
    """Three batches of unequal size on two processes: `total` is what makes both of them one."""
    model, polls, modes = head(3), [], []
    batches = [batch_of(torch.randint(3, (rows,))) for rows in (2, 3, 5)]

    def score(net: torch.nn.Module, batch: Batch) -> Tensor:
        modes.append((net.training, torch.is_grad_enabled()))
        return objectives.label_loss(net, batch)

    expected = sum(objectives.label_loss(model, batch).item() for batch in batches)
    found = evaluate(model.train(), batches, nullcontext, lambda: polls.append(1), score, total=lambda mine: 2 * mine)
    assert found.targets == 20 and found.loss == pytest.approx(expected / 10, rel=1e-6)
    assert model.training and len(polls) == 3 and modes == [(False, False)] * 3
    batch = batch_of(torch.tensor([1, IGNORED]))
    one = evaluate(model, [batch], nullcontext, lambda: None, score)
    assert (one.loss, one.targets) == (objectives.label_loss(model.eval(), batch).item(), 1)
    none = evaluate(model, [batch_of(torch.tensor([IGNORED, IGNORED]))], nullcontext, lambda: None, score)
    assert (none.loss, none.targets) == (0.0, 0)
