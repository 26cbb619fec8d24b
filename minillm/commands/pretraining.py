"""A pretraining whose settings are known: its text and model, the run itself, and what is said at its end."""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minillm import preflight
from minillm.commands import corpus
from minillm.commands.announce import baselines_text, plan_text, predictions
from minillm.commands.running import conclude, say
from minillm.config import Settings, UserError
from minillm.data.shards import Shards, corpus_hash
from minillm.data.sources import Source
from minillm.model.transformer import Transformer
from minillm.training.distributed import Alone
from minillm.training.job import TrainingFailed
from minillm.training.plan import Plan, choose_dtype
from minillm.training.pretrain import Pretraining, pretrain, resolved
from minillm.training.profile import ATTENTION, PRODUCTS, STEPS, Profile
from minillm.training.report import write_report
from minillm.training.run import write_json
from minillm.training.signals import Signals


def prepare(
    settings: Settings,
    source: Source,
    run: Path,
    config: dict[str, Any],
    *,
    trackers: tuple[str, ...],
    team: Alone,
    profile: bool = False,
) -> Pretraining:
    """Tokenizer and shards, made or found in the run folder; `config` learns what they are.

    Raises `UserError` where a resumed run's text is not what it was.
    """
    known = config.get("corpus", {}).get("hash")
    if known is not None and corpus_hash(source) != known:
        raise UserError(
            f"the text of {settings.source} has changed since {run} began; restore it, or start a new run with --out"
        )
    with team.lead_first():
        tokenizer = corpus.run_tokenizer(settings, source, run)
        settings = resolved(settings, tokenizer.vocab_size)
        shards = corpus.run_shards(settings, source, run, tokenizer)
        config.update(settings=dataclasses.asdict(settings), corpus=shards.info)
        if team.lead:
            write_json(run / "config.json", config)
    if len(set(team.gather(shards.info["hash"]))) > 1:
        raise UserError(f"{settings.source} does not hold the same on all machines; put it where they share it")
    sampled = settings.train.sample_tokens
    return Pretraining(
        settings=settings,
        run=run,
        shards=shards,
        objective=corpus.run_objective(settings, tokenizer),
        config=config,
        micro_batch=partial(_micro_batch, settings, team),
        sample=corpus.run_sampler(settings, tokenizer, shards, source) if sampled else None,
        say=say,
        show_plan=partial(_show_plan, settings, shards, team),
        show_baselines=lambda values: say(baselines_text(values)),
        log=trackers,
        team=team,
        profile=partial(_profile, settings, run, team) if profile and team.lead else None,
    )


def run_prepared(work: Pretraining, signals: Signals, *, resume_from: Path | None) -> int:
    """Trains, writes the report, says what came of it; returns the exit code."""
    run, lead = work.run, work.team.lead
    try:
        outcome = pretrain(work, signals, resume_from=resume_from)
        signals.careful = True  # what is left takes a moment, and is done whole
    except TrainingFailed as failure:
        print(f"error: {failure}\nreport: {write_report(run) if lead else run}", file=sys.stderr)
        return 1
    if lead:
        report = write_report(run)
        if outcome.code == 0:
            conclude(run, work.config, report)
    return outcome.code


def _micro_batch(settings: Settings, team: Alone, model: Transformer, device: torch.device) -> int:
    rows = team.rows(settings.train.batch)[1]
    parts = (settings.train.shard_ranks or team.size) if settings.train.parallel == "fsdp" else 1
    free = preflight.device_memory(device) // (team.neighbours if device.type == "cpu" else 1)
    dtype = choose_dtype(settings, device)
    return preflight.micro_batch(settings, device=device, dtype=dtype, free=free, batch=rows, parts=parts)


def _show_plan(settings: Settings, shards: Shards, team: Alone, plan: Plan) -> dict[str, Any]:
    predicted = predictions(settings, plan)
    say(plan_text(settings, plan, predicted, shards.info, team.size))
    return predicted


def _profile(settings: Settings, run: Path, team: Alone, plan: Plan) -> Profile:
    """What watches the steps of `--profile`. Raises `UserError` for a run that ends before they are recorded."""
    if plan.steps < STEPS:
        raise UserError(f"--profile records step {STEPS - 2} to {STEPS}, and this run has {plan.steps}; lengthen it")
    products, attention = preflight.flops_by_part(settings.model, all_pairs=False)
    return Profile(
        run=run,
        device=torch.device(plan.device),
        dtype=plan.dtype,
        flops={PRODUCTS: products, ATTENTION: attention},
        whole_flops=preflight.flops_per_token(settings.model),
        tokens=settings.train.batch * settings.model.context // team.size,
        compiled=plan.compile,
        say=say,
    )
