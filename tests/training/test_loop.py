"""What one step does, in numbers: accumulation, clipping, the penalties, and a validation that none of them touches."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minillm.config import OptimConfig
from minillm.data.batch import IGNORED
from minillm.training import checkpoint
from minillm.training.objectives import Evaluation
from minillm.training.optim import gradient_norm
from minillm.training.schedules import learning_rate
from tests.training.jobs import go, job, rows, weights
from tests.training.running import events, lines, losses


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_add_up_to_the_one_big_batch(tmp_path: Path, micro: int) -> None:
    """In fp64, with between one and six targets a row and a last micro-batch that is smaller (6 = 4 + 2)."""
    whole, parts = (job(tmp_path / name, micro=m, dtype=torch.float64) for name, m in (("a", 6), ("b", micro)))
    assert len({rows(0, 6).targets[i].ne(IGNORED).sum().item() for i in range(6)}) == 6
    before = weights(whole)
    go(whole)
    go(parts)
    for (name, a), b in zip(weights(whole).items(), weights(parts).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
        assert not torch.equal(a, before[name])
    for (_, _, a, n), (_, _, b, m) in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert n == m and a == pytest.approx(b, rel=1e-6)


def test_the_logged_loss_is_the_mean_over_the_targets_that_count(tmp_path: Path) -> None:
    work = job(tmp_path, steps=1, micro=2)
    batch = rows(0, 6)
    logits = work.model(batch.ids).detach()
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED).item()
    go(work)
    (line,) = lines(tmp_path, "train")
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert line["targets"] == batch.counted == 21 and line["tokens"] == 48
    assert line["epoch"] == 6 / 1000


def test_the_norm_that_is_logged_is_the_one_before_clipping(tmp_path: Path) -> None:
    free, clipped = (
        job(tmp_path / "free", steps=1, optim={"clip": None}),
        job(tmp_path / "clip", steps=1, optim={"clip": 0.05}),
    )
    go(free)
    go(clipped)
    norm = gradient_norm(list(free.model.parameters())).item()
    assert norm > 0.05
    for name in ("free", "clip"):
        assert lines(tmp_path / name, "train")[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert gradient_norm(list(clipped.model.parameters())).item() == pytest.approx(0.05, rel=1e-4)
    (layers,) = events(tmp_path / "free", "layers")
    assert math.hypot(*layers["grad_norms"].values()) == pytest.approx(norm, rel=1e-5)
    assert {"embedding", "decoder.blocks.0.attention", "decoder.blocks.1.mlp"} <= set(layers["grad_norms"])


def test_the_share_of_hidden_units_that_live(tmp_path: Path) -> None:
    """Five of twenty units behind ReLU get a bias that no token overcomes; the other block keeps all of its units."""
    work = job(tmp_path, steps=1, model={"mlp": {"kind": "relu", "bias": True}})
    with torch.no_grad():
        for block, dead in zip(work.model.decoder.blocks, (5, 0), strict=True):
            block.mlp.up_proj.bias.fill_(100.0)
            block.mlp.up_proj.bias[:dead] = -100.0
    go(work)
    (layers,) = events(tmp_path, "layers")
    assert layers["active"] == {"decoder.blocks.0.mlp": 0.75, "decoder.blocks.1.mlp": 1.0}
    assert not any(module._forward_pre_hooks for module in work.model.modules())


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_the_logged_rate_is_the_schedules(tmp_path: Path, schedule: str) -> None:
    optim = {"schedule": schedule, "warmup": 0.25, "lr": 0.003}
    go(job(tmp_path, steps=8, optim=optim))
    expected = [0.003 * learning_rate(step, 8, OptimConfig(**optim)) for step in range(8)]
    assert [line["lr"] for line in lines(tmp_path, "train")] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("train", [{"label_smoothing": 0.2}, {"z_loss": 0.01}])
def test_regularisers_change_the_training_loss_and_never_the_validation(tmp_path: Path, train: dict) -> None:
    bare, other = job(tmp_path / "bare", steps=1), job(tmp_path / "other", steps=1, train=train)
    batch = rows(0, 6)
    logits = bare.model(batch.ids).detach()[batch.targets != IGNORED]
    targets = batch.targets[batch.targets != IGNORED]
    expected = F.cross_entropy(logits, targets, label_smoothing=train.get("label_smoothing", 0.0))
    expected += train.get("z_loss", 0.0) * logits.logsumexp(-1).square().mean()
    go(bare)
    go(other)
    assert lines(tmp_path / "other", "train")[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert lines(tmp_path / "other", "train")[0]["loss"] != lines(tmp_path / "bare", "train")[0]["loss"]
    assert lines(tmp_path / "other", "val")[0]["loss"] == lines(tmp_path / "bare", "val")[0]["loss"]


def test_l1_and_l2_move_the_matrices_by_their_gradient(tmp_path: Path) -> None:
    """One step of plain SGD without clipping: the difference between two runs is lr · (l1 · sign(w) + l2 · w)."""
    plain = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "clip": None, "warmup": 0.0}
    bare, other = (
        job(tmp_path / "a", steps=1, optim=plain),
        job(tmp_path / "b", steps=1, optim={**plain, "l1": 0.01, "l2": 0.5}),
    )
    start = weights(bare)
    go(bare)
    go(other)
    for (name, a), b in zip(weights(bare).items(), weights(other).values(), strict=True):
        w = start[name]
        moved = 0.1 * (0.01 * w.sign() + 0.5 * w) if w.ndim >= 2 else torch.zeros_like(w)
        torch.testing.assert_close(a - b, moved, rtol=1e-3, atol=1e-7, msg=name)


def test_dropout_acts_in_training_only(tmp_path: Path) -> None:
    go(job(tmp_path / "with", steps=1, model={"dropout": 0.3}))
    go(job(tmp_path / "without", steps=1))
    first = [losses(tmp_path / name)[:2] for name in ("with", "without")]
    assert first[0][0] == first[1][0], "the validation before the first step"
    assert first[0][1] != first[1][1], "the first training step"


def test_recomputed_activations_give_the_same_run_for_more_work(tmp_path: Path) -> None:
    calls = {}
    for name, flag in (("kept", False), ("recomputed", True)):
        work = job(tmp_path / name, train={"checkpoint_activations": flag}, model={"dropout": 0.1})
        calls[name] = 0

        def count(*_, name=name) -> None:
            calls[name] += 1

        work.model.decoder.blocks[0].register_forward_pre_hook(count)
        go(work)
    assert losses(tmp_path / "kept") == losses(tmp_path / "recomputed")
    assert calls["recomputed"] == calls["kept"] + 3, "each of the three steps runs the block once more"


def test_validation_and_samples_stand_where_they_belong(tmp_path: Path) -> None:
    """Validations at 0, every eval_every and at the end; samples at 0 %, 25 % and 100 %."""
    seen = []

    def sample(model, step):
        seen.append(step)
        return [{"prompt": "p", "text": f"t{step}", "parses": None, "tried": 1}]

    values = {"model": {"dropout": 0.2}, "train": {"eval_every": 4, "save_every": 3}}
    go(replace(job(tmp_path / "a", steps=10, **values), sample=sample))
    go(job(tmp_path / "b", steps=10, **{**values, "train": {"eval_every": 10, "save_every": 3}}))
    assert [line["step"] for line in lines(tmp_path / "a", "val")] == [0, 4, 8, 10]
    assert seen == [0, 3, 10] and [e["step"] for e in events(tmp_path / "a", "sample")] == [0, 3, 10]
    train_lines = [[line["loss"] for line in lines(tmp_path / name, "train")] for name in ("a", "b")]
    assert train_lines[0] == train_lines[1], "what happens between steps changes no step"
    assert checkpoint.steps(tmp_path / "a") == [9, 10]
    (end,) = events(tmp_path / "a", "end")
    assert (end["reason"], end["step"]) == ("finished", 10)


def test_without_a_first_validation_step_one_tells_of_untrained_weights(tmp_path: Path) -> None:
    whole, short = (job(tmp_path / name, steps=6) for name in ("whole", "short"))
    go(whole)
    go(replace(short, plan=replace(short.plan, log_every=4, eval_first=False)))
    assert [line["step"] for line in lines(tmp_path / "whole", "val")] == [0, 6]
    (last,) = lines(tmp_path / "short", "val")
    assert last["step"] == 6 and last["loss"] == lines(tmp_path / "whole", "val")[1]["loss"]
    assert [line["step"] for line in lines(tmp_path / "short", "train")] == [1, 4, 6]
    assert lines(tmp_path / "short", "train")[0]["loss"] == lines(tmp_path / "whole", "train")[0]["loss"]
    assert events(tmp_path / "short", "end")[0]["best_step"] == 6


def test_a_line_covers_all_steps_since_the_last_one(tmp_path: Path) -> None:
    each, some = (job(tmp_path / name, steps=6, train={"batch": 5}) for name in ("each", "some"))  # targets differ
    go(each)
    go(replace(some, plan=replace(some.plan, log_every=4)))
    fine, coarse = lines(tmp_path / "each", "train"), lines(tmp_path / "some", "train")
    assert [line["step"] for line in coarse] == [4, 6] and len({line["targets"] for line in fine}) > 1
    for line, part in zip(coarse, (fine[:4], fine[4:]), strict=True):
        assert line["targets"] == sum(x["targets"] for x in part)
        mean = sum(x["loss"] * x["targets"] for x in part) / line["targets"]
        assert line["loss"] == pytest.approx(mean, rel=1e-9)


def test_early_stopping_restores_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations that get worse from the third on: with a patience of two the fifth ends the run."""
    scores, kept = iter([5.0, 4.0, 3.0, 3.5, 3.1, 9.0]), {}
    work = job(tmp_path, steps=20, train={"eval_every": 2, "patience": 2, "keep": 1})

    def score(model, *_):
        kept[len(kept) * 2] = weights(work)
        return Evaluation(next(scores), 8)

    monkeypatch.setattr("minillm.training.loop.evaluate", score)
    outcome = go(work)
    assert (outcome.reason, outcome.code, outcome.progress.step) == ("early stop", 0, 8)
    (end,) = events(tmp_path, "end")
    assert (end["reason"], end["step"], end["best_step"], end["best_loss"]) == ("early stop", 8, 4, 3.0)
    newest = checkpoint.resolve(tmp_path)
    assert newest.name == "step-8" and checkpoint.resolve(tmp_path / "checkpoints" / "best").name == "step-4"
    for folder in (newest, tmp_path / "checkpoints" / "step-4"):
        saved = checkpoint.load_weights(folder)
        assert all(torch.equal(saved[name], value) for name, value in kept[4].items())
    assert all(torch.equal(value, kept[4][name]) for name, value in weights(work).items())
    assert not torch.equal(kept[4]["embedding.weight"], kept[8]["embedding.weight"])


def test_without_patience_the_last_weights_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([5.0, 3.0, 4.0, 4.0])
    monkeypatch.setattr("minillm.training.loop.evaluate", lambda *_: Evaluation(next(scores), 8))
    work = job(tmp_path, steps=6, train={"eval_every": 2, "save_every": 2})
    assert go(work).reason == "finished"
    saved = checkpoint.load_weights(checkpoint.resolve(tmp_path))
    assert all(torch.equal(saved[name], value) for name, value in weights(work).items())
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-2\n"
