"""Forgetting is measured, and replay and the pull to the start are what their formulas say."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from minillm.data.batch import Batch
from minillm.data.corpus import NextToken
from minillm.data.index import open_shards
from minillm.training.keeping import OldText, l2_to_start, with_replay
from minillm.training.objectives import counted, likelihood
from tests.finetuning import lines, minillm, records
from tests.training.jobs import job, rows
from tests.training.running import TINY


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    from minillm.cli import run as command

    folder = tmp_path_factory.mktemp("keeping") / "run"
    argv = ["--data", text, "--out", folder, *TINY, "--model.context", 48, "--steps", 80, "--optim.lr", 5e-3]
    assert command("train", [str(arg) for arg in argv]) == 0
    return folder


def test_replay_keeps_what_finetuning_forgets(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "data.jsonl", records("chat"))
    lost = {}
    for name, options in {"bare": [], "replay": ["--replay", 1.0], "pull": ["--l2-start", 1.0]}.items():
        argv = ["--task", "chat", "--data", data, "--out", tmp_path / name, "--steps", 40, "--optim.lr", 5e-3]
        argv += ["--train.threads", 1, "--train.batch", 4, "--train.patience", "None", *options]
        done = minillm(capsys, "finetune", pretrained, *argv)
        assert done.code == 0, done.err
        metrics = json.loads((tmp_path / name / "result.json").read_text())["metrics"]
        lost[name] = metrics["old_loss_after"] - metrics["old_loss_before"]
    assert lost["bare"] > 0.05 and lost["replay"] < 0.5 * lost["bare"] and lost["pull"] < lost["bare"]


def test_the_pull_is_half_the_squared_distance_for_every_target(tmp_path: Path) -> None:
    model, batch = job(tmp_path).model, rows(0, 4)
    objective = l2_to_start(likelihood, counted, model, 0.5)
    bare = likelihood(model, batch).item()
    assert objective(model, batch).item() == pytest.approx(bare, rel=1e-6)
    with torch.no_grad():
        model.embedding.weight += 0.1
        bare = likelihood(model, batch).item()
        pull = 0.5 / 2 * 0.1**2 * model.embedding.weight.numel() * batch.counted
        assert objective(model, batch).item() == pytest.approx(bare + pull, rel=1e-4)


def test_replay_adds_the_mean_loss_of_as_many_old_rows(pretrained: Path, tmp_path: Path) -> None:
    from minillm.loading import load

    model, tokenizer = load(pretrained)
    shards = open_shards(pretrained / "data", tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size)
    seen: list[Batch] = []

    def watched(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(batch)
        return likelihood(model, batch)

    plain = NextToken(document_id=tokenizer.document_id, separate=True)
    old = OldText(shards.train, shards.val, plain, 48)
    batch = next(iter(old.held_out()))
    total = partial(with_replay(watched, counted, old, 0.25, 3), model, batch)
    with torch.no_grad():
        first, second = total().item(), total().item()
        bare = likelihood(model, batch).item()
        from minillm.data.loader import Loader

        again = Loader(shards.train, plain, context=48, seed=3).batch(batch.samples[0], len(batch.samples))
        wanted = bare + 0.25 * batch.counted * likelihood(model, again).item() / again.counted
    assert first == second == pytest.approx(wanted, rel=1e-5) and len(seen) == 2


def test_replay_without_the_old_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.finetuning import base

    data = lines(tmp_path / "data.jsonl", records("chat"))
    argv = ["--task", "chat", "--data", data, "--replay", 1, "--train.batch", 4, "--out", tmp_path / "run"]
    done = minillm(capsys, "finetune", base(tmp_path / "base"), *argv)
    assert done.code == 2 and "--replay needs the text of the pretraining" in done.err
