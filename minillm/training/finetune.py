"""Finetuning: a model, a task's data, a method and the one loop, put together.

model -> head -> method        examples -> data -> batches        settings -> optimizers -> plan -> loop
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minillm import ops
from minillm.config import Settings, UserError
from minillm.data.batch import Batch
from minillm.data.sampling import balanced, shuffled
from minillm.data.tasks import TaskData, check_rows
from minillm.model.heads import HeadConfig, TaskModel
from minillm.model.transformer import Transformer
from minillm.peft import files
from minillm.peft.config import MethodConfig
from minillm.peft.depth import layer_scale
from minillm.peft.inject import Adapted, inject, summary
from minillm.training.job import Job, Outcome
from minillm.training.keeping import OldText, l2_to_start, with_replay
from minillm.training.loop import train
from minillm.training.memory import rows_each
from minillm.training.objectives import Objective, evaluate
from minillm.training.optim import build_optimizers
from minillm.training.plan import Plan, Rehearsal, autocast, choose_device, cores, known_plan, make_plan
from minillm.training.run import Metrics, read_metrics, write_json
from minillm.training.signals import Signals
from minillm.training.trial import choose

FEW = 16
"""Examples on which the metrics are timed before the run."""


@dataclass(frozen=True)
class Finetuning:
    """What the composition root hands over."""

    settings: Settings
    """Of the run; `settings.model` is the base model's. `steps` None and `minutes` None: `epochs` count."""
    run: Path
    base: Transformer
    task: Any
    """A minillm.tasks.task.Task that was fit."""
    means: Any
    """Its minillm.tasks.task.Means."""
    head: HeadConfig | None
    method: MethodConfig
    parts: Any
    """The examples as a minillm.tasks.division.Division: train, val and, where any are held out for the end, test."""
    config: dict[str, Any]
    """config.json as far as it is known; the plan is added."""
    epochs: float
    minutes_at_most: float | None
    """Of training and validation, whatever `epochs` says. None: as long as it takes."""
    balance: bool
    """Batches have each class equally often."""
    layer_decay: float
    """Each layer below another learns at this share of its rate."""
    micro_batch: Callable[[Transformer, torch.device], int]
    say: Callable[[str], None]
    log: tuple[str, ...] = ()
    pooler: Mapping[str, Tensor] | None = None
    """Weights of the pooler that came with the base, where it has one."""
    old: OldText | None = None
    """What the base was pretrained on, where its run folder still has it."""
    replay: float = 0.0
    """Share of the old text's loss in training."""
    l2_start: float = 0.0
    """Pull of the weights towards where they began."""


@dataclass
class Finetuned:
    """What came of it."""

    outcome: Outcome
    adapted: Adapted
    metrics: dict[str, Any] = field(default_factory=dict)
    """Of the best model on the test examples where there are any, else on the validation data; empty where stopped."""

    @property
    def model(self) -> nn.Module:
        return self.adapted.model


def build_model(base: Transformer, head: HeadConfig | None, pooler: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The base with a task's head on it, or as it is."""
    return base if head is None else TaskModel(base, head, pooler)


def put_in(model: nn.Module, method: MethodConfig) -> Adapted:
    """A method into a model that `build_model` made: its head is always trained."""
    return inject(model, method, extra=model.added if isinstance(model, TaskModel) else ())


def finetune(work: Finetuning, signals: Signals, *, resume_from: Path | None = None) -> Finetuned:
    """Plans (or takes the plan that config.json holds), scores the trivial baseline, trains, scores the best."""
    settings, task, means = work.settings, work.task, work.means
    device = choose_device(settings.device)
    torch.set_num_threads(settings.train.threads or work.config.get("plan", {}).get("threads") or cores())
    ops.select(settings.kernels)
    torch.manual_seed(settings.seed)
    base = work.base.to(device)
    remembered = None if work.old is None else work.old.loss(base, signals.poll, nullcontext)
    start = copy.deepcopy(base).eval().requires_grad_(False) if task.needs_start else None
    adapted = put_in(build_model(base, work.head, work.pooler).to(device), work.method)
    work.config["base"]["hash"] = adapted.base
    model = adapted.model
    for stack in (base.encoder, base.decoder):
        if stack is not None:
            stack.checkpoint_activations = settings.train.checkpoint_activations

    data, held_out = task.data(work.parts.train, means), task.data(work.parts.val, means)
    scored = task.data(work.parts.test, means) if work.parts.test else held_out  # what is wrong is said before training
    check_rows(settings.source, data, settings.train.batch)
    _tell(work, adapted, data, held_out, scored)
    batch = _batches(work, data)
    objective = _objective(work, model, start)
    plan = _plan(work, model, device, batch, objective, len(held_out), signals, start)

    def loss() -> float:
        rows = (part.to(device) for part in _in_order(scored))
        precision = autocast(plan.device, plan.dtype)
        return evaluate(model, rows, precision, signals.poll, task.score(start), task.count).loss

    _write_baseline(work, loss)

    def metrics(model: nn.Module) -> dict[str, float]:
        return task.tuned_metrics(model, held_out, means, start)

    torch.manual_seed(settings.seed + 1)  # dropout's stream, whatever planning drew
    scale = None if work.layer_decay == 1.0 else partial(_layer_scale, adapted, work.layer_decay)
    if adapted.allocator is not None:
        adapted.allocator.begin(plan.steps)
    job = Job(
        model=model,
        optimizers=build_optimizers(model, settings.optim, scale),
        settings=settings,
        plan=plan,
        objective=objective,
        batch=batch,
        validation=lambda: (part.to(device) for part in _in_order(held_out)),
        run=work.run,
        config=work.config,
        train_bits=None,
        val_bits=None,
        samples_per_epoch=len(data),
        score=task.score(start),
        count=task.count,
        metrics=metrics,
        watch=task.watch,
        allocator=adapted.allocator,
    )
    result = Finetuned(train(job, signals, log=work.log, resume_from=resume_from), adapted)
    if result.outcome.code == 0:
        result.metrics = {"loss": loss(), **task.final_metrics(model, scored, means, start)}
        if work.old is not None:
            forgotten = work.old.loss(model, signals.poll, nullcontext)
            result.metrics |= {"old_loss_before": remembered, "old_loss_after": forgotten}
        files.save(adapted, work.run / "adapter", base_model=str(work.config["base"]["path"]))
    return result


def _objective(work: Finetuning, model: nn.Module, start: nn.Module | None) -> Objective:
    """The task's, with what keeps the model from forgetting."""
    objective = work.task.objective(start)
    if work.replay and work.old is None:
        raise UserError("--replay needs the text of the pretraining: a MODEL whose run folder holds its data/")
    if work.replay:
        objective = with_replay(objective, work.task.count, work.old, work.replay, work.settings.seed)
    return l2_to_start(objective, work.task.count, model, work.l2_start) if work.l2_start else objective


def _layer_scale(adapted: Adapted, decay: float, name: str) -> float:
    return layer_scale(name, adapted.transformer.config, decay)


def _in_order(data: TaskData, rows: int = 32) -> Iterable[Batch]:
    for first in range(0, len(data), rows):
        indices = np.arange(first, min(first + rows, len(data)))
        yield data.batch(indices, indices)


def _batches(work: Finetuning, data: TaskData) -> Callable[[int], Batch]:
    """Step -> its rows, a pure function of the step."""
    rows, seed = work.settings.train.batch, work.settings.seed
    classes = work.task.classes(work.parts.train) if work.balance else None
    if work.balance and classes is None:
        raise UserError("--balance needs a task in which each example has one class: --task classify")

    def batch(step: int) -> Batch:
        samples = np.arange(step * rows, (step + 1) * rows)
        if classes is not None:
            return data.batch(balanced(samples, classes, seed=seed), samples)
        return data.batch(shuffled(samples, len(data), seed=seed), samples)

    return batch


def _plan(work: Finetuning, model: nn.Module, device, batch, objective, validation_rows: int, signals, start) -> Plan:
    """The plan that config.json holds, or a new one, written there before anything else happens."""
    plan, settings = known_plan(work.config, work.run), work.settings
    if plan is not None:
        plan = replace(plan, steps=settings.steps or plan.steps, device=device.type)
    else:
        per_row = rows_each(batch(0), settings.train.batch)
        if settings.steps is None and settings.minutes is None:
            epoch = work.config["corpus"]["rows"] / settings.train.batch
            settings = replace(settings, steps=max(1, round(work.epochs * epoch)))
        rehearsal = Rehearsal(model=model, device=device, objective=objective, batch=batch, poll=signals.poll)
        rows = per_row * (settings.train.micro_batch or work.micro_batch(work.base, device))
        trial = choose(settings, rehearsal, micro_batch=rows, minutes_at_most=work.minutes_at_most)
        trial.tell(work.config, work.say)
        settings = replace(settings, dtype=trial.best.dtype)
        planned = partial(
            make_plan,
            rehearsal=rehearsal,
            micro_batch=trial.best.micro_batch,
            validation_rows=per_row * validation_rows,
            scoring=_scoring(work, model, start),
        )
        plan = planned(settings)
        if work.minutes_at_most is not None and plan.seconds > 60 * work.minutes_at_most:
            work.say(f"note: {work.epochs:g} epochs would take {plan.seconds / 60:.1f} min; --epochs N asks for them")
            plan = planned(replace(settings, steps=None, minutes=work.minutes_at_most))
    trained, parameters = summary(model)
    work.config["plan"] = {**asdict(plan), "parameters": parameters, "trained_parameters": trained}
    work.config["plan"]["predicted_seconds"] = plan.seconds
    write_json(work.run / "config.json", work.config)
    work.say(
        f"plan      {plan.steps:,} steps of {settings.train.batch} examples, validation every {plan.eval_every}; "
        f"{plan.device}, {plan.dtype}, {plan.threads} thread{'s' * (plan.threads > 1)}; "
        f"about {plan.seconds / 60:.1f} min"
    )
    return plan


def _scoring(work: Finetuning, model: nn.Module, start: nn.Module | None) -> float:
    """Seconds that the task's metrics take on all validation examples, measured on a few of them."""
    few = work.parts.val[:FEW]
    data, began = work.task.data(few, work.means), time.perf_counter()
    if not len(data):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they come to on so few means nothing
        work.task.metrics(model, data, work.means, start)
    return (time.perf_counter() - began) * len(work.parts.val) / len(few)


def _tell(work: Finetuning, adapted: Adapted, data: TaskData, held_out: TaskData, scored: TaskData) -> None:
    trained, parameters = summary(adapted.model)
    work.say(
        f"method    {work.method.method}: {trained:,} of {parameters:,} parameters move ({trained / parameters:.2%})"
    )
    more = f", {len(work.parts.test):,} to test in the end" if work.parts.test else ""
    work.say(f"data      {len(work.parts.train):,} examples to train on, {len(work.parts.val):,} to validate{more}")
    for name, part in (("training", data), ("validation", held_out), ("test", scored))[: 3 if work.parts.test else 2]:
        if part.truncated or part.dropped:
            work.say(
                f"note: {part.truncated} {name} examples are cut by the context of {work.means.room} tokens, "
                f"{part.dropped} give nothing to learn"
            )
    corpus = work.config.setdefault("corpus", {})
    corpus.update(rows=len(data), val_rows=len(held_out), truncated=data.truncated, dropped=data.dropped)


def _write_baseline(work: Finetuning, loss: Callable[[], float]) -> None:
    """The first line of metrics.jsonl: what the trivial answer reaches; a resumed run has it already.

    Args:
        loss: of the model as it is, on the examples that are scored in the end.
    """
    what, scores = work.task.baseline(work.parts.train, work.parts.test or work.parts.val)
    known = any(event.get("event") == "baselines" for event in read_metrics(work.run))
    if not what and work.parts.test and not known:  # else the first validation says it
        what, scores = "the model as it was", {"loss": loss()}
    if what:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if value is not None)
        work.say(f"to beat   {what}: {shown}")
    if known:
        return
    metrics = Metrics(work.run)
    metrics.write(event="baselines", trivial=what, **scores)
    metrics.close()
