"""Every task and every method, from the command to numbers that beat the trivial answer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minillm.loading import load, open_model
from minillm.training import checkpoint
from tests.finetuning import FAST, base, classify_file, lines, minillm, records
from tests.training.running import events
from tests.training.running import lines as metric_lines

SHAPES = {
    "classify": "encoder", "regress": "encoder", "tag": "encoder", "span-qa": "encoder",
    "seq2seq": "encoder-decoder", "chat": "decoder", "preference": "decoder",
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {shape: base(folder / shape, shape) for shape in ("decoder", "encoder", "encoder-decoder")}


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


@pytest.mark.parametrize("task", SHAPES)
def test_each_task_is_learnt(
    task: str, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "data.jsonl", records(task))
    steps = {"seq2seq": 200, "span-qa": 160}.get(task, 80)
    argv = ["--task", task, "--data", data, "--out", tmp_path / "run", "--steps", steps, *FAST, "--train.patience", 9]
    done = minillm(capsys, "finetune", bases[SHAPES[task]], *argv)
    assert done.code == 0, done.err
    first, last = metric_lines(tmp_path / "run", "val")[0], result(tmp_path / "run")["metrics"]
    fallen = 0.95 if task in ("preference", "span-qa") else 0.7
    assert last["loss"] < fallen * first["loss"]
    quality = {
        "classify": ("accuracy", 1.0), "regress": ("pearson", 0.95), "tag": ("entity_f1", 0.9), "span-qa": ("f1", 0.9),
        "seq2seq": ("exact_match", 0.7), "chat": ("bits_per_byte", None), "preference": ("reward_accuracy", 0.75),
    }  # fmt: skip
    name, least = quality[task]
    assert name in done.out and (last[name] < 2 if least is None else last[name] >= least)

    again = minillm(capsys, "evaluate", tmp_path / "run", "--data", data, "--json")
    assert again.code == 0, again.err
    found = json.loads(again.out)
    assert (found["task"], found["examples"]) == (task, 40) and found["loss"] < fallen * first["loss"]
    assert least is None or found[name] >= least - 0.2


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "adalora", "adapter", "prefix", "prompt"])
def test_each_method_moves_its_share_and_opens_again(
    method: str, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = classify_file(tmp_path / "data.jsonl"), tmp_path / "run"
    argv = ["--task", "classify", "--data", data, "--method", method, "--out", run, "--steps", 12, *FAST]
    argv += ["--train.patience", "None", *(["--train-only", "head"] if method == "freeze" else [])]
    done = minillm(capsys, "finetune", bases["encoder"], *argv)
    assert done.code == 0, done.err
    found = result(run)
    share = found["trained_parameters"] / found["parameters"]
    assert share == 1 if method == "full" else share < 0.5
    plain, after = load(bases["encoder"])[0].state_dict(), load(run)[0].state_dict()
    kept = [name for name in plain if name in after and torch.equal(plain[name], after[name])]
    assert ("embedding.weight" in kept) == (method != "full")
    assert (len(kept) == len(plain)) == (method in ("freeze", "adapter", "prefix", "prompt"))
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size == found["adapter_bytes"]
    if method == "adalora":
        ranks = [sum(event["ranks"].values()) for event in events(run, "layers")]
        assert ranks[-1] < ranks[0] and ranks == sorted(ranks, reverse=True)
    again = minillm(capsys, "evaluate", run, "--data", data, "--json")
    last = metric_lines(run, "val")[-1]
    both = json.loads(again.out)
    held_out = minillm(capsys, "predict", run, "--input", data)
    guesses = [json.loads(line) for line in held_out.out.splitlines()]
    truth = [record["label"] for record in records("classify")]
    assert both["accuracy"] == pytest.approx(np.mean([g["label"] == t for g, t in zip(guesses, truth, strict=True)]))
    assert 0 < last["loss"] < 2


def test_a_stopped_run_goes_on_bit_for_bit(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AdaLoRA has the most to remember: ranks, importance, dropout's stream."""
    data = classify_file(tmp_path / "data.jsonl")
    common = ["--task", "classify", "--data", data, "--method", "adalora", "--train.eval-every", 4, *FAST]
    common += ["--train.keep", 9, "--train.patience", "None", "--train.log-every", 1, "--steps", 12]
    assert minillm(capsys, "finetune", bases["encoder"], *common, "--out", tmp_path / "whole").code == 0
    assert minillm(capsys, "finetune", bases["encoder"], *common, "--out", tmp_path / "cut").code == 0
    cut = tmp_path / "cut"
    for step in (8, 12):
        for file in (cut / "checkpoints" / f"step-{step}").rglob("*"):
            if file.is_file():
                file.unlink()
        for folder in sorted((cut / "checkpoints" / f"step-{step}").rglob("*"), reverse=True):
            folder.rmdir()
        (cut / "checkpoints" / f"step-{step}").rmdir()
    events_kept = [line for line in (cut / "metrics.jsonl").read_text().splitlines() if '"end"' not in line]
    (cut / "metrics.jsonl").write_text("\n".join(events_kept) + "\n")
    assert minillm(capsys, "train", "--resume", cut).code == 0  # the one door for every run that stopped
    one, two = (checkpoint.load_weights(tmp_path / name / "checkpoints" / "step-12") for name in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].nan_to_num(-1), two[name].nan_to_num(-1)) for name in one)  # NaN: no threshold
    losses = [[line["loss"] for line in metric_lines(tmp_path / name, "train")] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_the_best_is_restored_with_its_threshold(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two classes, 1 : 5: rare ones weigh more, and the probability from which they are given is tuned."""
    made = [r for n, r in enumerate(records("classify", 120)) if r["label"] == "red" or n % 10 == 1]
    data, run = lines(tmp_path / "data.jsonl", made), tmp_path / "run"
    argv = ["--task", "classify", "--data", data, "--val", data, "--out", run, "--steps", 40, *FAST]
    done = minillm(capsys, "finetune", bases["encoder"], *argv)
    assert done.code == 0 and "blue 3.00, red 0.60" in done.err, done.err
    model: Any = open_model(run).model
    assert 0 < model.threshold[0] < 1 and model.threshold[1].isnan()
    best = max(line["macro_f1"] for line in metric_lines(run, "val"))
    evaluated = json.loads(minillm(capsys, "evaluate", run, "--data", data, "--json").out)
    assert evaluated["macro_f1"] == result(run)["metrics"]["macro_f1"] == best
    assert best > next(e for e in events(run, "baselines"))["macro_f1"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--task", "chat"], "needs a model that is decoder"),
        (["--task", "classify", "--steps", 1, "--minutes", 1], "--steps and --minutes contradict each other"),
        (["--task", "classify", "--method", "freeze"], "either --freeze-layers N or --train-only head"),
        (["--task", "classify", "--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--task", "classify", "--train.batch", 64], "36 examples are fewer than one batch of 64"),
        (["--task", "tag"], "tagging data needs 'tokens', 'tags'"),
        (["--task", "regress"], "the label 'red' is no finite number"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing_behind(
    argv: list[Any], words: str, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if "--data" in argv else ["--data", classify_file(tmp_path / "data.jsonl")]
    done = minillm(capsys, "finetune", bases["encoder"], *argv, *data, "--out", tmp_path / "run")
    assert done.code == 2 and words in done.err and "Traceback" not in done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ") and not (tmp_path / "run").exists()
