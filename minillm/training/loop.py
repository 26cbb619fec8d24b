"""The one loop: everything that trains goes through `train`.

A step is forward, backward (for each micro-batch), clip, step. Between steps come the chores: validation, a sample,
a checkpoint. What the loop knows besides weights and optimizer stands in `Progress`, and all of it is saved, so that
a run that is killed and resumed writes the same numbers as one that was not.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from minillm.config import Settings, UserError
from minillm.data.batch import Batch
from minillm.training import checkpoint, memory
from minillm.training.distributed import ALONE, Alone, Call, apply, placed, placed_state, whole
from minillm.training.monitor import Monitor
from minillm.training.objectives import Count, Evaluation, Objective, counted, evaluate, likelihood
from minillm.training.optim import add_penalties, gradient_norm, set_learning_rate
from minillm.training.plan import Plan, autocast
from minillm.training.profile import Profile
from minillm.training.run import cut_metrics, write_json
from minillm.training.signals import Signals, Stopped
from minillm.training.units import watch_units


class TrainingFailed(Exception):
    """A step met NaN or Inf; the weights are those before it."""


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    chores_done: bool = False
    """Whether validation and samples of `step` are behind us."""
    best_loss: float | None = None
    best_step: int | None = None
    best_score: float | None = None
    """What chose the best step; lower is better: the validation loss, or the negative of the watched metric."""
    worse: int = 0
    """Validations since the best one."""
    loss_sum: float = 0.0
    """Since the last line of the log, as the next three."""
    targets: int = 0
    line_tokens: int = 0
    line_seconds: float = 0.0


@dataclass
class Job:
    """What is to be trained, and with what; `pretrain` puts it together."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    settings: Settings
    plan: Plan
    objective: Objective
    batch: Callable[[int], Batch]
    """Step -> this rank's rows of it; a pure function, so that a resumed run reads on where the first one stopped."""
    validation: Callable[[], Iterable[Batch]]
    run: Path
    config: dict[str, Any]
    """What checkpoints keep as config.json."""
    train_bits: float | None
    """Bits per byte for each nat per token, of the training text and of the validation text; None: not defined."""
    val_bits: float | None
    samples_per_epoch: int
    sample: Callable[[nn.Module, int], Iterable[dict[str, Any]]] | None = None
    """(model, step) -> events to write; must leave torch's global generator alone."""
    score: Objective = likelihood
    """What validation sums up; `objective` may add weights and regularisers to it."""
    count: Count = counted
    """What the sums of both are divided by."""
    metrics: Callable[[nn.Module], dict[str, float]] | None = None
    """Model -> a task's metrics on its validation data, for the validation line."""
    watch: str | None = None
    """The metric by which a model is the best, higher is better. None: the validation loss."""
    allocator: "Allocator | None" = None
    """AdaLoRA's."""
    profile: Profile | None = None
    """What watches some of the steps."""
    team: Alone = ALONE
    """The processes that train together; each has a job of its own."""
    call: Call = apply
    """Computes an objective with the model, as `team.spread` has prepared it."""


class Allocator(Protocol):
    """What moves ranks around each optimizer step (minillm/peft/adalora.py)."""

    def before_step(self) -> None: ...

    def after_step(self, step: int) -> None: ...

    def ranks(self) -> dict[str, int]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Outcome:
    reason: str
    """finished, early stop, or signal"""
    code: int
    progress: Progress


def precision(plan: Plan) -> Callable[[], AbstractContextManager]:
    """The context in which matrix products run in plan.dtype."""
    return autocast(plan.device, plan.dtype)


class Loop:
    def __init__(self, job: Job, monitor: Monitor, signals: Signals, progress: Progress, scaler: torch.amp.GradScaler):
        self.job, self.monitor, self.signals, self.progress, self.scaler = job, monitor, signals, progress, scaler
        # By name from here on: fully_shard puts others in their place while it has them gathered.
        self.weights = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.weights.values())
        self.precision, self.team = precision(job.plan), job.team
        # One that was saved before its validation ended is saved again after it, with what the validation found.
        self.saved: int | None = progress.step if progress.step and progress.chores_done else None
        self.random = _random_state()  # after the last finished step

    def run(self) -> Outcome:
        job, progress, plan = self.job, self.progress, self.job.plan
        job.model.train()
        try:
            while True:
                self._chores()
                patience = job.settings.train.patience
                stop_early = patience is not None and progress.worse >= patience
                if progress.step >= plan.steps or stop_early:
                    break
                if job.profile is None:
                    self._step()
                else:
                    progress.line_seconds += job.profile.watch(self._step)
                if progress.step % plan.log_every == 0 or progress.step == plan.steps:
                    self._log()
                self.monitor.advance()
        except Stopped as stopped:
            self._save_after_signal()
            self._end("signal")
            return Outcome("signal", stopped.code, progress)
        reason = "early stop" if progress.step < plan.steps else "finished"
        if job.settings.train.patience is not None and progress.best_step not in (None, progress.step):
            self._restore_best()
        self._end(reason)
        return Outcome(reason, 0, progress)

    def _step(self) -> None:
        """One optimizer step; where memory runs out before a weight has moved, again with smaller micro-batches."""
        while not self._fitting_step():
            self._shrink()

    def _fitting_step(self) -> bool:
        """Whether there was memory for a step. (What failed is released when its error is, at the end of this call.)"""
        self.moving = False
        try:
            self._one_step()
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            if self.moving:
                raise UserError(
                    f"memory ran out while the optimizer moved the weights of step {self.progress.step + 1}; "
                    f"{memory.what_helps(self.job.settings, self.job.plan.device)}"
                ) from None
            return False
        return True

    def _shrink(self) -> None:
        """Goes back to the end of the last step, with smaller micro-batches from now on."""
        job, step = self.job, self.progress.step + 1
        memory.release(torch.device(job.plan.device))
        _set_random_state(self.random)
        before, rows = job.plan.micro_batch, memory.smaller(job.plan.micro_batch, job.settings.train.batch)
        if self.team.size > 1:  # the others are in the middle of a step that needs this rank
            raise UserError(
                f"step {step}: memory ran out on one process, with {before} sequences at a time; begin a run with a "
                f"smaller --train.micro-batch, or {memory.what_helps(job.settings, job.plan.device)}"
            )
        if rows is None:
            self._save_after_signal()
            raise UserError(
                f"step {step}: memory ran out with one sequence at a time; "
                f"{memory.what_helps(job.settings, job.plan.device)}"
            )
        self.monitor.say(f"step {step}: memory ran out with {before} sequences at a time; it takes {rows} from now on")
        self.monitor.event("memory", step=step, micro_batch=rows)
        job.plan = replace(job.plan, micro_batch=rows)
        job.config["plan"] = {**job.config.get("plan", {}), "micro_batch": rows}
        write_json(job.run / "config.json", job.config)

    def _one_step(self) -> None:
        """Forward and backward for each micro-batch, clip, step."""
        job, progress = self.job, self.progress
        batch = job.batch(progress.step).to(torch.device(job.plan.device))
        counted = self.team.total(job.count(batch))
        lr = set_learning_rate(job.optimizers, progress.step, job.plan.steps, job.settings.optim)

        for optimizer in job.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=batch.ids.device)
        # Each part weighs by its tokens: the sum over micro-batches is the mean over the whole batch. A team takes the
        # mean over its ranks, where the sum is wanted.
        share = max(1, counted) / self.team.size
        micros = list(batch.split(job.plan.micro_batch))
        for micro in micros:
            with self.precision():
                loss = job.call(job.objective, job.model, micro, last=micro is micros[-1])
            self.scaler.scale(loss / share).backward()
            total += loss.detach()
            self.team.poll(self.signals, midway=True)
        self.moving = True
        for optimizer in job.optimizers:
            self.scaler.unscale_(optimizer)
        add_penalties(job.model, job.settings.optim)
        if job.allocator is not None:
            job.allocator.before_step()
        norm = gradient_norm(self.parameters)
        mean = self.team.total(total.item()) / max(1, counted)
        # A scaler meets infinite fp16 gradients as a matter of course: it skips the step and halves its scale. Where
        # that does not help any more, they are infinite by themselves.
        scaling = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if not math.isfinite(mean) or not (scaling or norm.isfinite()):
            self._fail("gradient" if math.isfinite(mean) else "loss", batch)
        if job.settings.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, job.settings.optim.clip, norm)
        for optimizer in job.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        if job.allocator is not None:
            job.allocator.after_step(progress.step + 1)

        self.lr, self.norm = lr, norm.item()
        progress.step += 1
        progress.chores_done = False
        progress.tokens += self.team.size * batch.ids.numel()
        progress.line_tokens += self.team.size * batch.ids.numel()
        progress.loss_sum += mean * counted
        progress.targets += counted
        self.random = _random_state()

    def _log(self) -> None:
        progress, seconds = self.progress, self.monitor.seconds
        loss = progress.loss_sum / max(1, progress.targets)
        self.monitor.line(
            "train",
            step=progress.step,
            tokens=progress.tokens,
            loss=loss,
            bits_per_byte=_times(loss, self.job.train_bits),
            lr=self.lr,
            grad_norm=self.norm,
            tokens_per_second=progress.line_tokens / max(1e-9, seconds - progress.line_seconds),
            targets=progress.targets,
            epoch=progress.step * self.job.settings.train.batch / self.job.samples_per_epoch,
        )
        progress.loss_sum, progress.targets, progress.line_tokens = 0.0, 0, 0
        progress.line_seconds = seconds

    def _chores(self) -> None:
        """What is due after `progress.step` steps: validation, samples, a checkpoint."""
        job, progress, plan = self.job, self.progress, self.job.plan
        last = progress.step == plan.steps
        self.team.poll(self.signals)
        if not progress.chores_done:
            before = self.monitor.seconds
            if last or progress.step % plan.eval_every == 0:
                self._validate()
            if job.sample is not None and progress.step in (0, math.ceil(plan.steps / 4), plan.steps):
                self._sample(job.sample)
            progress.line_seconds += self.monitor.seconds - before  # the log's tokens/s is that of training alone
            progress.chores_done = True
        wanted = self.signals.save or last or (progress.step > 0 and progress.step % plan.save_every == 0)
        improved = job.settings.train.patience is not None and progress.best_step == progress.step
        if improved or (wanted and progress.step > 0):  # a finished model may be the best before its first step
            self._save()
        self.team.poll(self.signals)

    def _sample(self, sample: Callable[[nn.Module, int], Iterable[dict[str, Any]]]) -> None:
        step, model = self.progress.step, self.team.whole_model(self.job.model)
        if model is None:
            return
        with self.team.busy("sampling"):
            for event in sample(model, step):
                self.monitor.event("sample", step=step, **event)
                self.monitor.say(f"\n--- sample after {step} steps ---{_shown(event)}---\n")

    def _validate(self) -> None:
        job, progress = self.job, self.progress
        with watch_units(job.model) as alive:
            result: Evaluation = evaluate(
                job.model, job.validation(), self.precision, partial(self.team.poll, self.signals),
                partial(job.call, job.score), job.count, self.team.in_turn,
            )  # fmt: skip
            metrics = {} if job.metrics is None else job.metrics(job.model)
        if progress.step > 0:
            active = {name: self.team.any(units).float().mean().item() for name, units in alive.items()}
            ranks = {} if job.allocator is None else {"ranks": job.allocator.ranks()}
            self.monitor.event("layers", step=progress.step, grad_norms=self._layer_norms(), active=active, **ranks)
        self.monitor.line(
            "val",
            [job.watch] if job.watch is not None else [*metrics],
            step=progress.step,
            tokens=progress.tokens,
            loss=result.loss,
            bits_per_byte=_times(result.loss, job.val_bits),
            targets=result.targets,
            **metrics,
        )
        score = result.loss if job.watch is None else -metrics[job.watch]
        if progress.best_score is None or score < progress.best_score:
            progress.best_score, progress.best_loss = score, result.loss
            progress.best_step, progress.worse = progress.step, 0
        else:
            progress.worse += 1

    def _layer_norms(self) -> dict[str, float]:
        """Gradient norm of each half-block in the last step, after clipping."""
        squares: dict[str, float] = {}
        for name, p in self.weights.items():
            if p.grad is not None:
                parts = name.split(".")
                layer = ".".join(parts[:4]) if "blocks" in parts else parts[0]
                squares[layer] = squares.get(layer, 0.0) + whole(p.grad.float().square().sum()).item()
        return {name: math.sqrt(square) for name, square in squares.items()}

    def _save(self) -> None:
        progress = self.progress
        self.signals.save = False
        if self.saved == progress.step:
            return
        progress.seconds = self.monitor.seconds
        state = {
            "progress": asdict(progress),
            "optimizers": [optimizer.state_dict() for optimizer in self.job.optimizers],
            "scaler": self.scaler.state_dict(),
            "random": _random_state(),
            "ranks": None if self.job.allocator is None else self.job.allocator.state(),
        }
        self.team.save(
            self.job.run,
            progress.step,
            weights=self.job.model.state_dict(),
            state=state,
            config=self.job.config,
            tokenizer=self.job.run / "tokenizer",
            keep=self.job.settings.train.keep,
            best=progress.best_step,
        )
        self.saved = progress.step

    def _save_after_signal(self) -> None:
        """Saves the last finished step: the random state goes back to where the unfinished one began."""
        if not self.progress.step:
            return
        _set_random_state(self.random)
        self._save()
        self.team.settle()
        self.monitor.say(f"saved step {self.progress.step}; go on with: python train.py --resume {self.job.run}")

    def _restore_best(self) -> None:
        """Puts the best weights back, as the last checkpoint of the run."""
        progress = self.progress
        self.team.settle()
        folder = checkpoint.resolve(self.job.run / "checkpoints" / f"step-{progress.best_step}")
        self.job.model.load_state_dict(placed(checkpoint.load_weights(folder), self.job.model))
        self.monitor.say(f"restored the best weights, those of step {progress.best_step}")
        self.saved = None
        self._save()

    def _fail(self, what: str, batch: Batch) -> None:
        with self.precision():
            layer, samples = self.team.locate(self.job.model, batch, self.job.objective)
        step = self.progress.step + 1
        self.monitor.event("nonfinite", step=step, what=what, layer=layer, samples=samples)
        shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
        raise TrainingFailed(
            f"step {step}: the {what} is not finite, first at {layer}, samples {shown}; the weights are unchanged. "
            f"Lower --optim.lr, or look closer with: minillm doctor {self.job.run}"
        )

    def _end(self, reason: str) -> None:
        progress = self.progress
        best = {"best_step": progress.best_step, "best_loss": progress.best_loss}
        self.monitor.event("end", step=progress.step, seconds=self.monitor.seconds, reason=reason, **best)


def train(job: Job, signals: Signals, *, log: tuple[str, ...] = (), resume_from: Path | None = None) -> Outcome:
    """Trains to the end of the plan, from the start or from a checkpoint folder.

    Raises `TrainingFailed` for NaN or Inf, `UserError` where the checkpoint does not fit the job.
    """
    progress, scaler = Progress(), torch.amp.GradScaler(job.plan.device, enabled=job.plan.dtype == "fp16")
    if resume_from is not None:
        progress = _load(job, scaler, resume_from)
    if job.team.lead:
        cut_metrics(job.run, progress.step, chores_done=progress.chores_done)
    monitor = Monitor(
        job.run, job.plan.steps, log=log, seconds=progress.seconds, step=progress.step, writes=job.team.lead
    )
    signals.careful = True
    try:
        with job.team.training(job.settings.train):
            return Loop(job, monitor, signals, progress, scaler).run()
    finally:
        signals.careful = False
        monitor.close()


def _load(job: Job, scaler: torch.amp.GradScaler, folder: Path) -> Progress:
    state = checkpoint.load_state(folder)
    try:
        job.model.load_state_dict(placed(checkpoint.load_weights(folder), job.model))
        for optimizer, values in zip(job.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(placed_state(values, optimizer))
        scaler.load_state_dict(state["scaler"])
        if job.allocator is not None:
            job.allocator.load_state(state["ranks"])
        random = job.team.random_of(state)
        if random is not None:
            _set_random_state(random)
        return Progress(**state["progress"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} does not fit this run: {str(error).splitlines()[0]}") from error


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _shown(event: dict[str, Any]) -> str:
    parses = f"{event['parses']:.0%} of {event['tried']} parse\n" if event["parses"] is not None else ""
    return f"\n{event['prompt']}{event['text']}\n{parses}"


def _times(loss: float, bits: float | None) -> float | None:
    return None if bits is None else loss * bits
