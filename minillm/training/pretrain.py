"""Pretraining: a model, its text and the one loop, put together.

shards -> loader -> batches        settings -> model, optimizers -> plan -> loop
"""

import math
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillm import ops
from minillm.config import Settings, UserError, to_dict
from minillm.data.batch import Batch
from minillm.data.loader import Loader, validation
from minillm.data.shards import Shards
from minillm.evaluation.baselines import baselines
from minillm.model.transformer import Transformer
from minillm.training import memory
from minillm.training.compiling import compile_blocks, compile_objective
from minillm.training.distributed import ALONE, Alone, micro_batch
from minillm.training.job import Job, Outcome
from minillm.training.loop import train
from minillm.training.objectives import training_objective
from minillm.training.optim import build_optimizers
from minillm.training.plan import Plan, Rehearsal, autocast, choose_device, choose_dtype, cores, known_plan, make_plan
from minillm.training.profile import Profile
from minillm.training.run import Metrics, read_metrics, write_json
from minillm.training.signals import Signals
from minillm.training.trial import Way, choose

VALIDATION_ROWS = 32


@dataclass(frozen=True)
class Pretraining:
    """What the composition root hands over."""

    settings: Settings
    """With model.vocab_size filled in."""
    run: Path
    shards: Shards
    objective: Any
    """What is to be predicted: one of minillm/data/corpus.py."""
    config: dict[str, Any]
    """config.json as far as it is known; the plan is added."""
    micro_batch: Callable[[Transformer, torch.device], int]
    """How many rows fit the device's memory at once."""
    sample: Callable[[nn.Module, int], Iterable[dict[str, Any]]] | None
    say: Callable[[str], None]
    show_plan: Callable[[Plan], dict[str, Any]]
    """Tells a person, and returns what is predicted (memory, time …), which goes into config.json beside the plan."""
    show_baselines: Callable[[dict[str, Any]], None]
    log: tuple[str, ...] = ()
    team: Alone = ALONE
    profile: Callable[[Plan], Profile] | None = None
    """Makes what watches some of the steps; None: nothing does."""


def pretrain(work: Pretraining, signals: Signals, *, resume_from: Path | None = None) -> Outcome:
    """Plans (or takes the plan that config.json holds), scores the baselines, trains."""
    settings, run, team = work.settings, work.run, work.team
    device = choose_device(settings.device)
    torch.set_num_threads(settings.train.threads or team.threads(cores(), work.config.get("plan", {}).get("threads")))
    ops.select(settings.kernels)
    torch.manual_seed(settings.seed)
    model = Transformer(settings.model).to(device)
    for stack in (model.encoder, model.decoder):
        if stack is not None:
            stack.checkpoint_activations = settings.train.checkpoint_activations

    try:
        loader = Loader(work.shards.train, work.objective, context=settings.model.context, seed=settings.seed)
    except UserError as error:
        raise UserError(f"{settings.source}: {error}") from error
    first, rows = team.rows(settings.train.batch)

    def batch(step: int) -> Batch:
        return loader.batch(step * settings.train.batch + first, rows)

    def validate() -> Iterable[Batch]:
        planned = work.config["plan"]["micro_batch"]  # as it is now: memory that runs out makes it smaller
        part = validation(
            work.shards.val,
            work.objective,
            context=settings.model.context,
            rows=VALIDATION_ROWS if planned >= rows else min(VALIDATION_ROWS, planned),
            rank=team.rank,
            ranks=team.size,
        )
        return (each.to(device) for each in part)

    objective = training_objective(settings.train)
    micro = micro_batch(_micro_batch(work, model, device, objective, batch), rows)
    poll = partial(team.poll, signals, midway=True)
    rehearsal = Rehearsal(model=model, device=device, objective=objective, batch=batch, poll=poll, team=team)
    way = _way(work, rehearsal, micro)
    by_block = device.type == "cpu" and (way.compile or settings.compile == "on")
    if by_block:  # before the plan, which then measures compiled steps
        by_block = compile_blocks(objective, model, next(batch(0).split(way.micro_batch)), way.dtype, work.say)
    plan = _plan(work, rehearsal, way)
    if device.type == "cpu":
        plan = replace(plan, compile=by_block)
    elif plan.compile:
        part = next(batch(0).split(plan.micro_batch)).to(device)
        compiled = compile_objective(objective, model, part, autocast(plan.device, plan.dtype), work.say)
        plan = replace(plan, compile=compiled is not objective)
        objective = compiled
    _keep_plan(work, plan, **work.show_plan(plan))
    profile = None if work.profile is None else work.profile(plan)
    if team.lead:
        _write_baselines(work)

    torch.manual_seed(settings.seed + 1 + 1_000_003 * team.rank)  # dropout's stream, whatever planning drew
    call = team.spread(model, settings.train)
    info, next_token = work.shards.info, settings.objective == "next-token"
    optimizers = build_optimizers(model, settings.optim, muon=team.muon)
    if profile is not None:
        profile.optimizers = optimizers
    job = Job(
        model=model,
        optimizers=optimizers,
        settings=settings,
        plan=plan,
        objective=objective,
        batch=batch if profile is None else profile.batches(batch),
        validation=validate,
        run=run,
        config=work.config,
        train_bits=info["train_tokens"] / info["train_bytes"] / math.log(2) if next_token else None,
        val_bits=info["val_targets"] / info["val_bytes"] / math.log(2) if next_token else None,
        samples_per_epoch=loader.samples_per_epoch,
        sample=work.sample,
        team=team,
        call=call,
        profile=profile,
    )
    return train(job, signals, log=work.log, resume_from=resume_from)


def _micro_batch(work: Pretraining, model: Transformer, device: torch.device, objective, batch) -> int:
    """Rows of one pass: as config.json has them, as the settings say, or as many as fit: predicted, on a GPU measured.

    A model of which each process holds a part is only predicted: what is measured is a step of the whole one.
    """
    known = work.config.get("plan")
    rows = known.get("micro_batch") if isinstance(known, dict) else None
    rows = rows or work.settings.train.micro_batch
    if rows is not None:
        return rows
    rows = work.micro_batch(model, device)
    if device.type != "cuda" or (work.team.size > 1 and work.settings.train.parallel == "fsdp"):
        return min(work.team.gather(rows))
    whole, dtype = batch(0).to(device), choose_dtype(work.settings, device)
    context = autocast(device.type, dtype)
    rows = memory.measured_rows(
        rows, work.settings, model=model, device=device, objective=objective, batch=whole, precision=context
    )
    return min(work.team.gather(rows))


def _way(work: Pretraining, rehearsal: Rehearsal, micro: int) -> Way:
    """As config.json has it, or the fastest of those that were tried, which it then lists."""
    plan = known_plan(work.config, work.run)
    if plan is not None:
        return Way(plan.dtype, plan.threads, micro, plan.compile)
    trial = choose(work.settings, rehearsal, micro_batch=micro, say=work.say)
    trial.tell(work.config, work.say)
    return trial.best


def _plan(work: Pretraining, rehearsal: Rehearsal, way: Way) -> Plan:
    """The plan that config.json holds, or a new one, written there before anything else happens."""
    plan = known_plan(work.config, work.run)
    if plan is not None:
        steps = work.settings.steps or plan.steps
        plan = replace(plan, steps=steps, device=rehearsal.device.type, micro_batch=way.micro_batch)
    else:
        rows = -(-len(work.shards.val) // work.settings.model.context)
        plan = make_plan(
            replace(work.settings, dtype=way.dtype),
            rehearsal,
            micro_batch=way.micro_batch,
            validation_rows=rows,
            sampling=_sampling(work, rehearsal.model),
        )
        plan = work.team.share(plan)
    _keep_plan(work, plan)
    return plan


def _sampling(work: Pretraining, model: nn.Module) -> float:
    """Seconds of one sample, as the untrained model writes it."""
    began = time.perf_counter()
    for _ in () if work.sample is None else work.sample(model, 0):
        pass
    return time.perf_counter() - began


def _keep_plan(work: Pretraining, plan: Plan, **predicted: Any) -> None:
    work.config["plan"] = {**asdict(plan), **predicted}
    if work.team.lead:
        write_json(work.run / "config.json", work.config)


def _write_baselines(work: Pretraining) -> None:
    """The first line of metrics.jsonl; a resumed run has it already."""
    if any(event.get("event") == "baselines" for event in read_metrics(work.run)):
        return
    info = work.shards.info
    values: dict[str, Any] = {"event": "baselines", "val_bytes": info["val_bytes"], "val_targets": info["val_targets"]}
    if work.settings.objective == "next-token":
        values = baselines(
            work.shards.train,
            work.shards.val,
            vocab_size=work.settings.model.vocab_size,
            val_bytes=info["val_bytes"],
            val_text=work.shards.val_text(),
        )
    metrics = Metrics(work.run)
    metrics.write(**values)
    metrics.close()
    work.show_baselines(values)


def run_config(settings: Settings) -> dict[str, Any]:
    """config.json of a new run, before its data is known."""
    names = ("minillm", "torch", "triton", "numpy", "sentencepiece", "safetensors")
    versions = {"python": platform.python_version(), **{name: _version(name) for name in names}}
    return {"format": 1, "settings": to_dict(settings), "versions": versions}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def resolved(settings: Settings, vocab_size: int) -> Settings:
    """The settings with everything that follows from the others filled in."""
    model = settings.model
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size ({model.vocab_size}) is smaller than the tokenizer's vocabulary ({vocab_size}); "
            "leave it out, or train a smaller tokenizer with --tokenizer.vocab-size"
        )
    model = replace(
        model,
        vocab_size=model.vocab_size or vocab_size,
        kv_heads=model.key_value_heads,
        head_dim=model.head_width,
        mlp=replace(model.mlp, hidden_dim=model.mlp_width),
    )
    return replace(settings, model=model, data=replace(settings.data, objective=settings.objective))
