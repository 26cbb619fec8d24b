"""A finetuning knows the weights that it began with: others in their place are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minillm.training import checkpoint
from tests.finetuning import FAST, base, lines, minillm, records


def other_weights(run: Path) -> None:
    """A valid checkpoint with other weights in the place of the one that `base` wrote."""
    folder = run / "checkpoints" / "step-1"
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    weights = {name: x + 0.01 * torch.randn_like(x) for name, x in weights.items()}
    shutil.rmtree(run / "checkpoints")
    checkpoint.save(run, 1, weights=weights, state={}, config=config, tokenizer=run / "tokenizer", keep=1)


def test_rewards_are_measured_against_the_weights_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, run, data = base(tmp_path / "start"), tmp_path / "run", lines(tmp_path / "d.jsonl", records("preference"))
    argv: list[Any] = ["--task", "preference", "--data", data, "--val", data, "--out", run, "--steps", 12, *FAST]
    assert minillm(capsys, "finetune", start, *argv, "--train.eval-every", 6).code == 0
    found = json.loads(minillm(capsys, "evaluate", run, "--data", data, "--json").out)
    assert found["reward_margin"] > 0 and 0 < found["loss"] < 0.6931

    kept = shutil.copytree(start / "checkpoints", tmp_path / "kept")
    other_weights(start)
    resume = ["finetune", "--resume", run, "--steps", 14]
    for name, *more in (["evaluate", run, "--data", data, "--json"], resume):
        done = minillm(capsys, name, *more)
        assert done.code == 2 and "step-1 holds other weights than when" in done.err and done.err.count("\n") == 1
    shutil.rmtree(start / "checkpoints")
    done = minillm(capsys, "evaluate", run, "--data", data)
    assert done.code == 2 and "is gone; put it back" in done.err

    kept.rename(start / "checkpoints")
    assert json.loads(minillm(capsys, "evaluate", run, "--data", data, "--json").out) == found
