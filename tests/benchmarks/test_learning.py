"""The benchmark of learning: who has met which goal, what a rung adds, and how the peer's checkpoint is scored."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import learning, nanogpt, records, tables
from benchmarks.plots import draw_ladder, draw_widths
from minillm import presets
from minillm.commands.train import _parse
from tests.benchmarks.made import ABOUT


def goal(name, loss, wall, allowed, **other):
    return {
        "kernel": "goal", "shape": {"goal": name}, "loss": loss, "bits_per_byte": loss, "wall": wall,
        "allowed": allowed, "xz": 1.6, **ABOUT, **other,
    }  # fmt: skip


PEER = {"kernel": "nanoGPT", "shape": {}, "loss": 1.9, "wall": 120.0, **ABOUT}


def rung(number, bits, seed=1, corpus="tiny Shakespeare"):
    curve = [
        {"step": s, "tokens": 100 * s, "seconds": s, "loss": bits, "bits_per_byte": bits + 4 - s} for s in range(5)
    ]
    return {
        "kernel": "ladder", "shape": {"corpus": corpus, "rung": number, "seed": seed}, "name": f"lever {number}",
        "bits_per_byte": bits, "tokens": 400, "curve": curve, "flops_per_token": 10.0, **ABOUT,
    }  # fmt: skip


def test_a_goal_is_met_by_loss_and_time_together():
    rows = [
        PEER, goal("short", 1.89, 19.9, 20.0), goal("equal", 1.58, 120.1, 120.0), goal("long", 1.47, 290, 300),
        goal("default", 1.23, 299, 300),
    ]  # fmt: skip
    lines = learning.goals(rows)
    assert [line["met"] for line in lines] == [True, False, False, True]
    assert "≤ 1.9000 nats in 20.0 s" in lines[0]["goal"] and "≤ 1.6000 bits per byte" in lines[3]["goal"]
    assert learning.goals([PEER]) == []


def test_each_rung_keeps_the_levers_below_it_and_its_options_are_known(tmp_path):
    for corpus in learning.CORPORA:
        (tmp_path / corpus.replace(" ", "-") / "tokenizer").mkdir(parents=True)
    cases = list(learning.ladder(tmp_path / "text", tmp_path, seeds=2, quick=False))
    assert len(cases) == len(learning.CORPORA) * 2 * len(learning.RUNGS)
    for (before, shorter), (after, longer) in itertools.pairwise(cases):
        if after["shape"]["rung"]:
            assert longer[: len(shorter)] == shorter and len(longer) > len(shorter)
            assert before["shape"]["seed"] == after["shape"]["seed"]
    last = _parse(cases[-1][1])
    full = presets.settings("speedrun")
    for where in ("tied", "init", "speedrun"):  # the last rung is the preset, but for its size
        assert getattr(last.model, where) == getattr(full.model, where), where
    assert last.optim == full.optim
    assert (last.model.mlp.kind, last.model.attention) == (full.model.mlp.kind, full.model.attention)


def test_the_first_rung_has_no_lever_and_each_other_changes_what_it_names(tmp_path):
    """The default preset has some of the levers itself: a ladder that began with it would add them twice."""
    (tmp_path / "tiny-Shakespeare" / "tokenizer").mkdir(parents=True)
    cases = itertools.islice(learning.ladder(tmp_path / "text", tmp_path, seeds=1, quick=False), len(learning.RUNGS))
    rungs = [_parse(argv) for _, argv in cases]
    first = rungs[0]
    assert (first.optim.name, first.optim.schedule, first.model.mlp.kind) == ("adamw", "cosine", "gelu")
    assert first.model.tied and not first.model.attention.qk_norm and first.model.speedrun.ngrams == 0
    for (name, _), before, after in zip(learning.RUNGS[1:], rungs, rungs[1:], strict=False):
        assert (before.model, before.optim) != (after.model, after.optim), name


def test_what_is_left_out_is_one_lever_of_the_whole(tmp_path):
    for corpus in learning.CORPORA:
        (tmp_path / corpus.replace(" ", "-") / "tokenizer").mkdir(parents=True)
    whole = [argv for _, argv in learning.ladder(tmp_path / "text", tmp_path, seeds=1, quick=False)][
        len(learning.RUNGS) - 1
    ]
    cases = list(learning.without(tmp_path / "text", tmp_path, quick=False))
    assert len(cases) == len(learning.CORPORA) * (len(learning.RUNGS) - 1)
    for case, argv in cases[: len(learning.RUNGS) - 1]:
        name, added = learning.RUNGS[case["shape"]["rung"]]
        assert name == case["name"] and sorted(argv + added) == sorted(whole)
        assert (_parse(argv).model, _parse(argv).optim) != (_parse(whole).model, _parse(whole).optim)


def test_every_width_is_tried_at_every_rate_by_both_rules(tmp_path):
    (tmp_path / "tiny-Shakespeare" / "tokenizer").mkdir(parents=True)
    cases = [_parse(argv) for _, argv in learning.widths(tmp_path / "text", tmp_path, quick=False)]
    tried = {(args.model.dim, args.optim.lr, args.optim.transfer) for args in cases}
    assert len(tried) == len(cases) == len(learning.WIDTHS) * len(learning.RATES) * 2
    for args in cases:
        assert args.model.dim // args.model.heads == 32 and args.optim.name == "adamw"
        assert (args.model.tied, args.model.norm.embedding, args.optim.embedding_lr) == (False, True, 0.05)


@pytest.mark.parametrize("part", ["short", "equal", "long", "default", "plain"])
def test_the_options_of_a_goal_are_known_and_leave_time_to_start(part, tmp_path):
    case, argv = learning.goal(part, tmp_path / "text", PEER, quick=False)
    args = _parse(argv)
    assert case["allowed"] == {"short": 20.0, "equal": 120.0}.get(part, 300.0)
    start = learning.START[part]
    planned = learning.RESERVE * (case["allowed"] - start)
    assert args.minutes * 60 == pytest.approx(planned, abs=0.01) and args.steps is None
    with pytest.raises(ValueError, match="measure that first"):
        learning.goal("short", tmp_path, None, quick=False)


def test_an_unknown_part_is_named(tmp_path):
    with pytest.raises(ValueError, match="--part lader: there are peer, short"):
        learning.run(None, None, ["lader"], 1, tmp_path, tmp_path, quick=True)


def width(dim, lr, transfer, bits):
    shape = {"dim": dim, "lr": lr, "transfer": transfer}
    return {"kernel": "width", "shape": shape, "bits_per_byte": bits, **ABOUT}


def test_the_widths_are_drawn_with_a_line_each(tmp_path):
    rows = [width(d, lr, t, 3.0 + lr * d) for d in (64, 128) for lr in (0.001, 0.002) for t in (False, True)]
    assert draw_widths(rows, tmp_path / "width.png").stat().st_size > 5_000
    records.save(tmp_path / "learning.json", [row | {"tokens": 2048} for row in rows])
    table = tables.width(tmp_path)
    assert "| one rate | 64 | **3.064** | 3.128 |" in table and "| rates by width | 128 | **3.128** | 3.256 |" in table


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(learning, "train", lambda argv, run: runs.append(argv) or 1.0)
    monkeypatch.setattr(learning, "result", lambda run, wall: {"wall": wall, "dtype": "bf16"})
    path, case = tmp_path / "learning.json", {"kernel": "goal", "shape": {"goal": "long"}}
    learning.measure(path, case, ["a", str(tmp_path / "text.txt")], tmp_path, quick=False)
    learning.measure(path, case, ["b"], tmp_path, quick=False)
    learning.measure(path, case, ["c"], tmp_path, quick=True)
    assert runs == [["a", str(tmp_path / "text.txt")], ["c"]]
    kept = [(row["options"], row["quick"]) for row in records.load(path)]
    assert kept == [(["a", "text.txt"], False), (["c"], True)], "a file stands there by its name"


def test_a_run_is_read_as_the_loop_wrote_it(tmp_path):
    """A few real steps: names in config.json and metrics.jsonl that change are noticed here."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    tiny = [
        "--model.layers",
        "1",
        "--model.heads",
        "1",
        "--model.dim",
        "16",
        "--model.context",
        "8",
        "--train.batch",
        "2",
    ]
    argv = [
        "--data",
        str(tmp_path / "text.txt"),
        "--tokenizer.type",
        "char",
        "--train.sample-tokens",
        "1",
        "--steps",
        "2",
    ]
    wall = learning.train([*argv, *tiny], tmp_path / "run")
    row = learning.result(tmp_path / "run", wall)
    assert [point["step"] for point in row["curve"]] == [0, 1, 2] and row["tokens"] == 2 * 16
    one = json.loads((tmp_path / "run" / "config.json").read_text())["plan"]["seconds_per_validation"]
    assert row["wall"] == wall > row["curve"][-1]["seconds"]
    assert row["validation_share"] == pytest.approx(3 * one / row["curve"][-1]["seconds"]) and one > 0
    assert row["loss"] == row["curve"][-1]["loss"] and row["compile"] is False


def test_tables_and_figure_come_from_the_rows(tmp_path):
    rows = [PEER, goal("long", 1.46, 290, 300), *(rung(n, 3 - n / 8, seed) for n in (0, 1) for seed in (1, 2))]
    left_out = {"kernel": "without", "shape": {"corpus": "tiny Shakespeare", "rung": 1}, "bits_per_byte": 3.25}
    rows.append({**rung(1, 3.0), **left_out})
    gone = {"kernel": "deleted lever", "shape": {"corpus": "tiny Shakespeare", "lever": "old"}, "added_to": [2.5, 2.7]}
    rows.append({**rung(1, 3.0), **gone, "with": [2.75, 2.75], "whole": 2.0, "left_out": 1.9})
    (tmp_path / "learning.json").write_text(json.dumps(rows))
    assert "| 1.4600 in 290.0 s | met |" in tables.learning(tmp_path) and "nanoGPT: 1.9000" in tables.learning(tmp_path)
    table = tables.ladder(tmp_path)
    assert "| lever 0 | 3.000 ± 0.000 |  |  |" in table and "| + lever 1 | 2.875 ± 0.000 | -0.125 | +0.375 |" in table
    assert "| *old: deleted* | 2.750 ± 0.000 | +0.150 | -0.100 |" in table
    assert draw_ladder(rows, tmp_path / "ladder.png").stat().st_size > 10_000


def test_the_peer_is_scored_in_consecutive_windows_with_every_target(tmp_path):
    """A model whose loss is the mean of its targets: the score is the mean of all ids but the first."""
    (tmp_path / "out-shakespeare-char").mkdir()
    (tmp_path / "data/shakespeare_char").mkdir(parents=True)
    model = """
import torch
class GPTConfig:
    def __init__(self, **sizes): assert sizes == {"n_layer": 4}; print("number of parameters: 0.80M")
class GPT(torch.nn.Linear):
    def __init__(self, config): super().__init__(1, 1)
    def forward(self, x, y):
        assert not self.training and torch.equal(x[0, 1:], y[0, :-1]) and y.shape[1] <= 64
        return None, y.double().mean()
"""
    (tmp_path / "model.py").write_text(model)
    saved = {"model_args": {"n_layer": 4}, "model": torch.nn.Linear(1, 1).state_dict()}
    torch.save(saved, tmp_path / "out-shakespeare-char/ckpt.pt")
    ids = np.random.default_rng(1).integers(0, 65, 150).astype(np.uint16)  # two windows of 64 and one of 21
    ids.tofile(tmp_path / "data/shakespeare_char/val.bin")
    command = [sys.executable, "-c", nanogpt.SCORE, "64"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    loss, targets = said.splitlines()[-1].split()
    assert int(targets) == 149 and float(loss) == pytest.approx(ids[1:].mean())
