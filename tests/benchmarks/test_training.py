"""python -m benchmarks training: ours and Transformers' model do the same work, or nothing is written."""

import math
from contextlib import contextmanager, nullcontext

import pytest
import torch

from benchmarks import peers, records, tables, training
from benchmarks.__main__ import main
from minillm import ops


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(training, "peak_memory", lambda of, who, nanogpt: 2**20)
    monkeypatch.setattr(training, "matrix_rate", lambda device, dtype: 1e9)


def run(out, *more):
    return main(["training", "--quick", "--out", str(out), *map(str, more)])


def test_rows_say_what_was_measured_and_are_measured_once(tmp_path, capsys):
    assert run(tmp_path, "--model", "shakespeare-char") == 0
    (path,) = tmp_path.glob("*/training.json")
    rows = records.load(path)
    assert [row["provider"] for row in rows] == ["minillm", "transformers"] and len(rows[0]["losses"]) == 7
    ours = rows[0]
    assert ours["gap"] == 0 and rows[1]["gap"] < 1e-3 and ours["losses"][-1] < ours["losses"][0]
    assert ours["tokens_p20"] <= 4 * 16 / (ours["ms_p50"] / 1e3) <= ours["tokens_p80"]
    flops = 6 * (2 * 12 * 32 * 32 + 2 * 13 * 32 + 65 * 32 + 2 * 32) + 12 * 2 * 32 * 16  # GPT-2: 12 d² + 13 d a block
    assert ours["mfu"] == pytest.approx(flops * 4 * 16 / (ours["ms_p50"] / 1e3) / 1e9)
    capsys.readouterr()
    assert run(tmp_path, "--model", "shakespeare-char") == 0
    assert "measured before" in capsys.readouterr().out and records.load(path) == rows
    table = tables.training(tmp_path)
    assert "| shakespeare-char, 4 × 16, fp32 | minillm |" in table and "| 1.00× |" in table


def test_a_peer_that_does_other_work_is_no_peer(tmp_path, monkeypatch, capsys):
    honest = peers.transformers

    def other(of, first):
        with torch.no_grad():
            next(first.parameters()).mul_(1.2)
        return honest(of, first)

    monkeypatch.setattr(peers, "transformers", other)
    assert run(tmp_path, "--model", "shakespeare-char") == 1
    assert "the losses differ by" in capsys.readouterr().out and not list(tmp_path.glob("*/*"))


def test_llama_with_qk_norm_is_qwen3(monkeypatch):
    model = {"layers": 2, "heads": 4, "dim": 32, "context": 16, "vocab_size": 300, "attention": {"qk_norm": True}}
    of = peers.setting(model, 3, torch.device("cpu"), "fp32")
    found = training.measured(training.trainers(of, None), of, quick=True)
    assert found["transformers"]["gap"] < 1e-3


def test_nanogpts_matrices_stand_the_other_way_round():
    theirs = {"h.0.attn.c_attn.weight": torch.randn(4, 12), "wte.weight": torch.randn(5, 4), "surplus": torch.ones(1)}
    own = {"h.0.attn.c_attn.weight": torch.empty(12, 4), "wte.weight": torch.empty(5, 4)}
    mapped = peers._nanogpt_weights(theirs, own)
    assert torch.equal(mapped["h.0.attn.c_attn.weight"], theirs["h.0.attn.c_attn.weight"].t())
    assert torch.equal(mapped["wte.weight"], theirs["wte.weight"]) and mapped.keys() == own.keys()


def test_what_does_not_exist_is_said(tmp_path, capsys):
    assert run(tmp_path, "--model", "gpt5") == 2 and "there are default," in capsys.readouterr().err
    assert run(tmp_path, "--model", "shakespeare-char", "--nanogpt", tmp_path) == 2
    assert f"--nanogpt {tmp_path}: there is no model.py" in capsys.readouterr().err


def test_batches_are_the_same_on_every_call():
    of = training.setting("", torch.device("cpu"), quick=True)
    source = training.text()
    ids, targets = training.batch(source, of, 3)
    again = training.batch(source, of, 3)
    assert torch.equal(ids, again[0]) and torch.equal(ids[:, 1:], targets[:, :-1]) and ids.max() < 65
    assert not torch.equal(ids, training.batch(source, of, 4)[0])


def test_on_a_gpu_ours_is_measured_on_both_kernels(monkeypatch):
    model = {"layers": 1, "heads": 2, "dim": 32, "context": 16, "vocab_size": 61}
    gpu = peers.setting(model, 2, torch.device("cuda"), "bf16")
    assert list(training.makers(gpu, None)) == ["minillm", "minillm, --kernels torch", "transformers"]
    of, seen = peers.setting(model, 2, torch.device("cpu"), "fp32"), []

    @contextmanager
    def on():
        with ops.on_torch():
            yield seen.append(ops._choice)

    ops.select("triton")
    try:
        first = peers.start(of)
        providers = {"minillm": peers.minillm(of, first, on=on), "triton": peers.minillm(of, first, on=nullcontext)}
        found = training.measured(providers, of, quick=True)
    finally:
        ops.select("auto")
    assert seen == ["torch"] * 7 and 0 < found["triton"]["gap"] < 1e-4


def test_the_recipe_has_no_peer():
    model = {"layers": 1, "heads": 2, "dim": 32, "context": 16, "vocab_size": 61, "speedrun": {"ngrams": 2}}
    of = peers.setting(model, 2, torch.device("cpu"), "fp32")
    found = training.measured(training.trainers(of, None), of, quick=True)
    assert list(found) == ["minillm"] and len(set(found["minillm"]["losses"])) == 7
    assert found["minillm"]["losses"][0] == pytest.approx(math.log(61), rel=0.1)
