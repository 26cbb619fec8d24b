"""A hundred steps on a corpus made by a rule: the loss is known, so that no change to it goes unnoticed.

golden.json holds the last losses for each (torch version, CPU capability) that they were recorded on; there they must
be exact. Elsewhere the order of sums differs, and they agree with the first record to a relative 1e-5.
Record them with: python -m tests.training.test_golden
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from minillm.cli import run as command
from tests.training.running import TINY, lines

GOLDEN = Path(__file__).with_name("golden.json")
KEY = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def hundred_steps(folder: Path) -> dict[str, float]:
    """Losses of a run over sentences that count: what comes next follows from what was before."""
    text = folder / "text.txt"
    text.write_text("".join(f"{i} plus {i % 7} is {i + i % 7}.\n" for i in range(400)), encoding="utf-8")
    argv = [
        "--data",
        text,
        "--out",
        folder / "run",
        *TINY,
        "--steps",
        "100",
        "--optim.lr",
        "0.01",
        "--model.layers",
        "2",
    ]
    assert command("train", [str(arg) for arg in argv]) == 0
    train, val = lines(folder / "run", "train"), lines(folder / "run", "val")
    return {
        "train 1": train[0]["loss"],
        "train 10": train[9]["loss"],
        "train 100": train[99]["loss"],
        "val": val[-1]["loss"],
    }


def test_the_loss_is_the_recorded_one(tmp_path: Path) -> None:
    recorded = json.loads(GOLDEN.read_text())
    found = hundred_steps(tmp_path)
    if KEY in recorded:
        assert found == recorded[KEY]
    else:
        assert found == pytest.approx(next(iter(recorded.values())), rel=1e-5)
    assert found["val"] < found["train 1"] - 2, "a loss that falls"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps({**known, KEY: hundred_steps(Path(folder))}, indent=2) + "\n")
    sys.exit(0)
