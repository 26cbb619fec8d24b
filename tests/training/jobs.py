"""Jobs for the loop without files or commands: a model of two blocks that learns from random ids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minillm.config import Settings, from_dict, merge
from minillm.data.batch import IGNORED, Batch
from minillm.model.transformer import Transformer
from minillm.training.job import Job, Outcome
from minillm.training.loop import train
from minillm.training.objectives import training_objective
from minillm.training.optim import build_optimizers
from minillm.training.plan import Plan
from minillm.training.signals import Signals
from tests.model.configs import BASE

V, T = BASE["vocab_size"], 8


def rows(first: int, count: int) -> Batch:
    """Row n is a function of n alone; its first n % 6 + 1 targets count, so that no two neighbours count alike."""
    generators = [torch.Generator().manual_seed(n) for n in range(first, first + count)]
    tokens = torch.stack([torch.randint(V, (T + 1,), generator=g) for g in generators])
    counts = torch.arange(first, first + count)[:, None] % 6 + 1
    targets = torch.where(torch.arange(T) < counts, tokens[:, 1:], IGNORED)
    return Batch(ids=tokens[:, :-1], targets=targets, samples=tuple(range(first, first + count)))


def job(
    run: Path, *, steps: int = 3, micro: int | None = None, dtype: torch.dtype = torch.float32, **values: Any
) -> Job:
    """A job of `steps` steps; `values` are settings, section by section."""
    values = merge({"seed": 0, "steps": steps, "model": BASE, "train": {"batch": 6}}, values)
    settings = from_dict(Settings, values)
    torch.manual_seed(settings.seed)
    model = Transformer(settings.model).to(dtype)
    torch.manual_seed(settings.seed + 1)
    for stack in (model.encoder, model.decoder):
        if stack is not None:
            stack.checkpoint_activations = settings.train.checkpoint_activations
    batch = settings.train.batch
    plan = Plan(
        device="cpu", dtype="fp32", kernels="torch", compile=False, threads=1, micro_batch=micro or batch, steps=steps,
        eval_every=settings.train.eval_every or steps, save_every=settings.train.save_every or steps, log_every=1,
        seconds_per_step=0.0,
        seconds_per_validation=0.0,
    )  # fmt: skip
    (run / "tokenizer").mkdir(parents=True, exist_ok=True)
    (run / "tokenizer" / "manifest.json").write_text("{}")
    return Job(
        model=model,
        optimizers=build_optimizers(model, settings.optim),
        settings=settings,
        plan=plan,
        objective=training_objective(settings.train),
        batch=lambda step: rows(step * batch, batch),
        validation=lambda: [rows(10_000, 4), rows(10_004, 4)],
        run=run,
        config={"settings": values},
        train_bits=None,
        val_bits=None,
        samples_per_epoch=1000,
    )


def go(work: Job, change: Callable[[Job], Job] | None = None) -> Outcome:
    return train(change(work) if change else work, Signals())


def weights(work: Job) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in work.model.named_parameters()}
