"""Preflight: counts against published figures, memory against what a process really takes."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from minillm import preflight
from minillm.config import ModelConfig, UserError, from_dict
from minillm.model.transformer import Transformer
from minillm.presets import MODELS, settings

CPU = torch.device("cpu")


def model(name, **changes):
    return from_dict(ModelConfig, {"vocab_size": 4096, **MODELS[name], **changes})


def test_parameters_by_part_are_gpt2s():
    counts = preflight.parameters(model("gpt2"))
    assert counts == {
        "embeddings": 50257 * 768,
        "positions": 1024 * 768,
        "attention": 12 * 4 * (768 * 768 + 768),
        "mlp": 12 * (2 * 768 * 3072 + 3072 + 768),
        "norms": 25 * 2 * 768,
        "head": 0,
    }
    assert sum(counts.values()) == 124_439_808


@pytest.mark.parametrize("name", ["llama-tiny", "bert-tiny", "transformer-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_parts_add_up_to_the_model(name, tied):
    config = model(name, tied=tied)
    state = torch.get_rng_state()
    counts = preflight.parameters(config)
    assert torch.equal(state, torch.get_rng_state())  # a run must not begin differently because it was counted
    assert sum(counts.values()) == sum(p.numel() for p in Transformer(config).parameters())
    assert (counts["head"] >= config.vocab_size * config.dim) == (not tied)


def test_flops_per_token():
    # PaLM's appendix B for GPT-2: 6 · (124,439,808 − 786,432) + 12 · 12 layers · 768 · 1024
    assert preflight.flops_per_token(model("gpt2")) == 6 * 123_653_376 + 12 * 12 * 768 * 1024
    tied, untied = model("llama-tiny"), model("llama-tiny", tied=False)
    assert preflight.flops_per_token(tied) == preflight.flops_per_token(untied)  # a looked-up matrix multiplies nothing
    window = model("llama-tiny", attention={"qk_norm": True, "window": 16})
    assert preflight.flops_per_token(tied) - preflight.flops_per_token(window) == 12 * 2 * 64 * (64 - 16)
    both = model("transformer-tiny")
    counts = preflight.parameters(both)
    assert preflight.flops_per_token(both) == 6 * sum(counts.values()) + 12 * 64 * 64 * (2 + 2 + 2)  # and cross


def tiny(optimizer="adamw", **train):
    model = {"vocab_size": 4096, "layers": 2, "dim": 64, "heads": 2, "kv_heads": 2, "head_dim": 32, "context": 64}
    model["mlp"] = {"hidden_dim": 192}
    return settings(
        "default",
        {"steps": 10, "minutes": None, "model": model, "optim": {"name": optimizer}, "train": {"batch": 16, **train}},
    )


def need(settings, rows, **options):
    return preflight.memory(settings, rows, device=CPU, **options)


def test_memory_has_its_parts():
    wanted = need(tiny(), 16)
    weights = 4 * sum(preflight.parameters(tiny().model).values())
    assert wanted.weights == wanted.gradients == weights
    assert 2 * weights <= wanted.optimizer <= 2.01 * weights  # two moments, and a counter for each tensor
    logits = 4 * 16 * 64 * 4096
    assert 1.5 * logits < wanted.activations < 5 * logits
    assert wanted.total == sum(dataclasses.astuple(wanted))


def test_memory_follows_the_settings():
    whole = need(tiny(), 16)
    assert need(tiny(), 8).activations < 0.6 * whole.activations
    assert need(tiny(checkpoint_activations=True), 16).total < whole.total
    wide = settings("default", {"model": {"vocab_size": 512}})  # where activations outweigh logits and copied weights
    assert need(wide, 4, dtype="bf16").activations < 0.85 * need(wide, 4).activations
    assert need(tiny("sgd"), 16).optimizer == whole.weights
    assert whole.weights < need(tiny("muon"), 16).optimizer < whole.optimizer  # one moment for matrices in the blocks
    again = need(tiny(), 16)
    assert again == whole


@pytest.mark.parametrize("preset", ["mlm-tiny", "seq2seq-tiny", "gpt2-tiny"])
def test_every_objective_can_be_rehearsed(preset):
    chosen = settings(preset, {"model": {"vocab_size": 512}})
    weights = 4 * sum(preflight.parameters(chosen.model).values())
    wanted = need(chosen, 2)
    assert wanted.weights == weights and wanted.activations > 4 * 2 * 64 * 512


def test_the_micro_batch_is_the_largest_divisor_that_fits():
    chosen = tiny(batch=12)
    exact = {rows: need(chosen, rows).total for rows in (1, 2, 3, 4, 6, 12)}
    assert list(exact.values()) == sorted(exact.values())
    for rows, wanted in exact.items():
        free = int(wanted / preflight.SPARE) + 1
        assert preflight.micro_batch(chosen, device=CPU, dtype="fp32", free=free) == rows
    with pytest.raises(UserError, match=r"needs \d+\.\d GiB even with one sequence.*checkpoint-activations"):
        preflight.micro_batch(chosen, device=CPU, dtype="fp32", free=exact[1] // 2)
    assert preflight.micro_batch(chosen, device=CPU, dtype="fp32") == 12


def test_disk_and_device_memory():
    weights = 4 * sum(preflight.parameters(tiny().model).values())
    assert preflight.disk(tiny(keep=3)) == 5 * 3 * weights
    free, real = preflight.device_memory(CPU), 1024 * 1024
    assert free > 64 * real and free % 1 == 0


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    (tmp_path / "max").write_text(f"{3 * 2**20}\n")
    (tmp_path / "now").write_text(f"{2**20}\n")
    monkeypatch.setattr(preflight, "_CGROUPS", [(tmp_path / "max", tmp_path / "now")])
    assert preflight.device_memory(CPU) == 2 * 2**20
    (tmp_path / "max").write_text("max\n")
    assert preflight.device_memory(CPU) > 2**26


MEASURE = """
import dataclasses, json, resource, sys
from pathlib import Path
import torch
from minillm import preflight
from minillm.machine import peak_bytes
from minillm.presets import settings
from minillm.model.transformer import Transformer
from minillm.training.objectives import training_objective
from minillm.training.optim import build_optimizers
torch.set_num_threads(2)
chosen, dtype, cpu = settings(sys.argv[1], json.loads(sys.argv[2])), sys.argv[3], torch.device("cpu")
rows = chosen.train.micro_batch or chosen.train.batch

def train(model, batch, steps):
    optimizers, objective = build_optimizers(model, chosen.optim), training_objective(chosen.train)
    for _ in range(steps):
        for _ in range(chosen.train.batch // rows):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                loss = objective(model, batch)
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

small = dataclasses.replace(chosen.model, layers=1, dim=2 * chosen.model.heads, head_dim=None, vocab_size=8)
one = preflight._empty_batch(dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, context=16)), 1, cpu)
train(Transformer(small), one, 1)  # what is imported and set up once is no part of the run
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
torch.manual_seed(0)
batch = preflight._empty_batch(chosen, rows, cpu)
batch.ids.random_(0, chosen.model.vocab_size)
train(Transformer(chosen.model), batch, 3)
print(peak_bytes() - before)
"""


@pytest.mark.prove
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_without_a_heap_the_tensors_explain_what_is_measured(monkeypatch, optimizer):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    measured, predicted = grown("default", {"optim": {"name": optimizer}}, "fp32")
    exact = predicted.total - predicted.overhead + preflight.PROCESS
    assert abs(exact / measured - 1) <= 0.07, (exact / 2**20, measured / 2**20)


def grown(preset, changes, dtype):
    """(bytes that a process grew by in three steps, what was predicted)."""
    changes = {**changes, "model": {"vocab_size": 4096}}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, preset, json.dumps(changes), dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = settings(preset, changes)
    return int(done.stdout), need(chosen, chosen.train.micro_batch or chosen.train.batch, dtype=dtype)
